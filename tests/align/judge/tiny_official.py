"""A tiny checkpoint in the official layout: hidden 32, five objectives, an asymmetric transform, code that must not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

HIDDEN, OBJECTIVES = 32, 5
PATTERN = [3, 5]
"""``</s> <assistant>`` of the tiny tokenizer."""


def official_tensors(*, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)) -> dict[str, Tensor]:
    """Backbone tensors in the first dtype (norms in float32), head in the second."""
    torch.manual_seed(0)
    backbone = LlamaModel(llama_config())
    tensors = {
        f"model.{name}": value.to(torch.float32 if "norm" in name else dtypes[0])
        for name, value in backbone.state_dict().items()
    }
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / 4).to(dtypes[1])

    transform = torch.eye(OBJECTIVES)
    transform[2] -= torch.tensor([0.3, 0.5, 1.0, -0.2, 0.0])
    sizes = [HIDDEN, 16, 16, 16, OBJECTIVES]
    tensors |= {
        "regression_layer.weight": normal(OBJECTIVES, HIDDEN),
        "reward_transform_matrix": transform.to(dtypes[1]),
    }
    for index in range(4):
        tensors[f"gating.layers.{index}.weight"] = normal(sizes[index + 1], sizes[index])
        tensors[f"gating.layers.{index}.bias"] = normal(sizes[index + 1])
    tensors["gating.logit_scale"] = torch.tensor([1.7]).to(dtypes[1])
    return tensors


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def write_official(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, **changes: Any) -> Path:
    """The folder, with a ``modeling_custom.py`` that tells when it is run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config().to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "model_type": "llama",
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "num_objectives": OBJECTIVES,
        "gating_temperature": 10,
        "gating_hidden_dim": 16,
        "gating_n_hidden": 3,
        "gating_pattern": PATTERN,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    (folder / "modeling_custom.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nraise RuntimeError('ran')\n"
    )
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
