"""Where a model keeps its embedding, layers, final norm, head and rotary module.

Families of the table are known through and through: they can be trained.
Any other decoder-only causal LM of Transformers is searched by structure: its output embedding is the head, the module list of
as many layers as the configuration says are the layers, and what stands beside them is read off. What is found is only worth
something because a decoder is compared with the model's own forward before it is trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from telltale.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Dotted paths from the causal LM to its parts. ``llama_like``: layers that the fused and native backends can read."""

    name: str
    base: str = "model"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    rotary: str | None = "model.rotary_emb"
    head: str = "lm_head"
    position_embedding: str | None = None
    llama_like: bool = True
    listed: bool = True
    """Whether it stands in the table; other families are found by their structure, and decoded only."""


_ROWS = (
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3"),
    Family("gemma"),
    Family("phi3"),
    Family(
        "gpt2",
        base="transformer",
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        rotary=None,
        position_embedding="transformer.wpe",
        llama_like=False,
    ),
    Family(
        "gpt_neox",
        base="gpt_neox",
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        llama_like=False,
    ),
)

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
"""Families of the table by the ``model_type`` of their Hugging Face configuration."""


@dataclass(frozen=True)
class Parts:
    """The modules of one loaded model, found by :data:`FAMILIES`; rotary and position embedding may be None."""

    family: Family
    base: Any
    embedding: Any
    layers: nn.ModuleList
    norm: Any
    rotary: Any
    head: Any
    position_embedding: Any

    @property
    def modules(self) -> list[nn.Module]:
        """All modules that a decoder runs."""
        found = [self.embedding, self.position_embedding, *self.layers, self.norm, self.rotary, self.head]
        return [module for module in found if module is not None]


def family_of(config: Any, *, listed: bool = True) -> Family:
    """The family of a Hugging Face configuration.

    Raises :class:`~telltale.errors.UnsupportedModelError` naming the family if it is an encoder-decoder, or not in the table
    (``listed`` False takes others as well, and says nothing about whether they can be decoded).
    """
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind!r} is an encoder-decoder model; expected a decoder-only one: {_names()}.")
    if kind not in FAMILIES and not listed:
        return Family(str(kind), llama_like=False, listed=False)
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"model family {kind!r} is not supported; expected one of {_names()}.")
    return FAMILIES[kind]


def parts_of(model: nn.Module, *, listed: bool = True) -> Parts:
    """The parts of a causal LM; wrappers of PEFT and DistributedDataParallel are looked through.

    ``listed`` False takes families outside the table as well, and finds their parts by structure. Raises
    :class:`~telltale.errors.UnsupportedModelError` for an unknown family or a model without an LM head.
    """
    model = unwrap(model)
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config; expected a Hugging Face causal LM of {_names()}."
        )
    family = family_of(model.config, listed=listed)
    if not family.listed:
        return _found_parts(model, family)
    try:
        return Parts(
            family=family,
            base=_follow(model, family.base),
            embedding=_follow(model, family.embedding),
            layers=_follow(model, family.layers),
            norm=_follow(model, family.norm),
            rotary=_follow(model, family.rotary) if family.rotary else None,
            head=_follow(model, family.head),
            position_embedding=_follow(model, family.position_embedding) if family.position_embedding else None,
        )
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is of family {family.name!r} but not a causal LM: {error}."
        ) from error


def _found_parts(model: Any, family: Family) -> Parts:
    """The parts of a causal LM that is not in the table, by structure."""
    count = getattr(model.config, "num_hidden_layers", None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embedding is None or head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no LM head and embedding; expected a causal LM.")
    for base in model.modules():
        lists = [own for own in base.children() if isinstance(own, nn.ModuleList) and len(own) == count]
        if not lists:
            continue
        names = [name for name, _ in base.named_children()]
        behind = names[names.index(next(name for name, own in base.named_children() if own is lists[0])) + 1 :]
        norms = [name for name in behind if "norm" in name or "ln_" in name]
        norms = norms or [name for name in names if "final" in name and "norm" in name]
        rotary = [own for name, own in base.named_children() if "rotary" in name]
        if norms:
            norm = getattr(base, norms[0])
            return Parts(family, base, embedding, lists[0], norm, rotary[0] if len(rotary) == 1 else None, head, None)
    raise UnsupportedModelError(
        f"no stack of {count} layers with a final norm behind it was found in {type(model).__name__}; expected a decoder-only "
        f"causal LM of Transformers."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model under DistributedDataParallel, torch.compile and PEFT wrappers.

    Raises :class:`~telltale.errors.UnsupportedModelError` for a PEFT method that does not live in the model below.
    """
    found: Any = model
    while True:
        if isinstance(found, nn.parallel.DistributedDataParallel):
            found = found.module
        elif hasattr(found, "_orig_mod"):
            found = found._orig_mod
        elif hasattr(found, "get_base_model"):
            _refuse_outer_adapter(found)
            found = found.get_base_model()
        else:
            return found


_OUTER_ADAPTERS = ("XLORA", "CPT")
"""PEFT methods beside prompt learning that compute something in the wrapper's own forward."""


def _refuse_outer_adapter(wrapper: Any) -> None:
    """What PEFT puts before the prompt, or decides per call, is in its wrapper: the model below would be another one."""
    config = getattr(wrapper, "active_peft_config", None)
    if config is None:
        configs = getattr(wrapper, "peft_config", None) or {}
        config = next(iter(configs.values()), None) if isinstance(configs, dict) else configs
    kind = getattr(config, "peft_type", None)
    name = str(getattr(kind, "value", kind))
    if getattr(config, "is_prompt_learning", False) or name in _OUTER_ADAPTERS:
        raise UnsupportedModelError(
            f"the model is wrapped by PEFT's {name}, which acts outside the layers (virtual tokens before the prompt, or "
            f"scalings per call); expected an adapter that lives in the layers, such as LoRA, or the base model itself."
        )


def _follow(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _names() -> str:
    return ", ".join(FAMILIES)
