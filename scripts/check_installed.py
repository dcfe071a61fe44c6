"""Use an installed telltale with nothing but its core dependencies: import every module, then decode with a tiny model."""

from __future__ import annotations

import importlib
import pkgutil
import tempfile

import torch

import telltale
from telltale.errors import MissingExtraError

EXTRAS = {
    "accelerate", "cv2", "datasets", "fastapi", "gymnasium", "httpx", "lightning", "mapie", "networkx", "openai", "pandas",
    "PIL", "plotly", "prometheus_client", "psutil", "pydantic", "sklearn", "starlette", "tensorboard", "trl", "uvicorn",
    "websockets",
}  # fmt: skip
"""Packages that extras bring; a module may need one of them when it is imported, and no other that is absent."""


def import_everything() -> tuple[int, dict[str, str]]:
    """How many modules were imported, and for the others the extra package they need."""
    imported, needs = 0, {}
    for module in pkgutil.walk_packages(telltale.__path__, "telltale.", onerror=lambda name: None):
        if module.name == "telltale.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except (ModuleNotFoundError, MissingExtraError) as error:
            absent = error.__cause__ if isinstance(error, MissingExtraError) else error
            name = getattr(absent, "name", None) or ""
            if name.split(".")[0] not in EXTRAS:
                raise
            needs[module.name] = name
        else:
            imported += 1
    return imported, needs


def decode() -> None:
    """A two-layer model decodes greedily: alone, as its own draft, and from its saved folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from telltale.decode import Autoregressive, SelfSpeculative

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()
    prompt = torch.tensor([[1, 5, 9]])
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 3:]
    found = Autoregressive(model).generate(prompt, max_new_tokens=12).tokens
    drafted = SelfSpeculative(model, exit_layer=1, draft_length=2).generate(prompt, max_new_tokens=12).tokens
    assert torch.equal(found, wanted), (found, wanted)
    assert torch.equal(drafted, wanted), (drafted, wanted)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert type(telltale.models.load_model(folder)) is LlamaForCausalLM


if __name__ == "__main__":
    count, needs = import_everything()
    print(f"{count} modules imported; {len(needs)} need an extra: {', '.join(sorted(set(needs.values()))) or 'none'}")
    decode()
    print("decoded")
