"""What the LayerSkip recipe cannot be put on: each model, adapter and option by name, with the reason.

The recipe leaves rows out of layers and reads the layers' states through the one head. That is right as long as a layer
is told everything about its rows in its arguments, and as long as the head's output is what the model's loss reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models.families import Parts

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""What configurations call a change of the logits behind the head."""
_WRAPPED = ("module", "_fsdp_wrapped_module")


def check_trainable(model: nn.Module, parts: Parts, *, drops_rows: bool, reads_exits: bool) -> None:
    """Refuse ``model`` if dropping rows or reading early exits would train something else than the recipe says.

    Raises :class:`~telltale.errors.UnsupportedModelError` for the model and its adapters, and
    :class:`~telltale.errors.ConfigError` for an option that can be changed.
    """
    for wrapper in _wrappers(model):
        if hasattr(wrapper, "_orig_mod"):
            raise ConfigError(
                "the model is compiled (torch.compile), and a compiled graph does not see layers being left out; "
                "expected the model itself."
            )
        if isinstance(wrapper, nn.DataParallel):
            raise ConfigError(
                "the model is in DataParallel, whose replicas the recipe cannot follow; expected one process for each "
                "device (torchrun), with DistributedDataParallel."
            )
        if type(wrapper).__name__ == "FullyShardedDataParallel":
            raise ConfigError(
                "FullyShardedDataParallel (FSDP 1) flattens the weights that the early exits read; expected "
                "torch.distributed.fsdp.fully_shard (FSDP 2)."
            )
        if hasattr(wrapper, "peft_config"):
            _check_adapters(wrapper, drops_rows=drops_rows)
    config = getattr(parts.base, "config", None)
    if drops_rows and getattr(config, "_attn_implementation", None) == "flex_attention":
        raise ConfigError(
            "attn_implementation='flex_attention' keeps its mask where rows cannot be left out of it; expected 'sdpa', "
            "'eager' or 'flash_attention_2', or p_max=0."
        )
    if reads_exits:
        _check_logits(config, parts.head)


def check_reduced(model: nn.Module) -> None:
    """Refuse a direct run of ``model`` in a job of several processes where nothing would average its gradients.

    Raises :class:`~telltale.errors.ConfigError`.
    """
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if alone or not torch.is_grad_enabled():
        return
    inside = nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None
    if inside or any(isinstance(part, nn.parallel.DistributedDataParallel) for part in _wrappers(model)):
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    raise ConfigError(
        f"this job has {dist.get_world_size()} processes and the recipe runs the model outside of any wrapper, so nothing "
        f"averages the gradients; expected model=the DistributedDataParallel model, or model=the model itself if you "
        f"average them yourself."
    )


def innermost(layer: nn.Module) -> nn.Module:
    """The layer's own module inside PyTorch's wrapper for activation checkpointing."""
    while "_checkpoint_wrapped_module" in layer._modules:
        layer = cast(nn.Module, layer._modules["_checkpoint_wrapped_module"])
    return layer


def _wrappers(model: nn.Module) -> Iterator[Any]:
    """``model`` and what it wraps, outermost first, down to the Hugging Face model."""
    found: Any = model
    while found is not None:
        yield found
        if hasattr(found, "_orig_mod"):
            found = found._orig_mod
        elif hasattr(found, "peft_config") and hasattr(found, "get_base_model"):
            found = None
        else:
            found = next((found._modules[name] for name in _WRAPPED if name in found._modules), None)


def _check_adapters(model: Any, *, drops_rows: bool) -> None:
    """Refuse adapters of PEFT whose layers need what they are not told; :func:`~telltale.models.families.unwrap` has refused
    those that do not live in the base model at all."""
    for name in _active(model):
        config = model.peft_config[name]
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        if getattr(config, "alora_invocation_tokens", None) and drops_rows:
            raise UnsupportedModelError(
                f"the adapter {name!r} is an activated LoRA, whose place in each row the layers are not told; expected "
                f"p_max=0 or an ordinary LoRA."
            )
        forward = getattr(type(model.base_model), "forward", nn.Module.forward)
        if forward.__module__.startswith("peft.") and forward.__module__ != "peft.tuners.tuners_utils":
            raise UnsupportedModelError(
                f"the adapter {name!r} ({kind}) runs the base model in its own way, with a loss, passes or arguments "
                f"that the layers are not told; expected an adapter in the base model's modules, such as LoRA."
            )


def _active(model: Any) -> list[str]:
    names = model.active_adapters
    names = names() if callable(names) else names
    return [names] if isinstance(names, str) else list(names)


def _check_logits(config: Any, head: Any) -> None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            "output_router_logits=True adds the router's own loss to the model's, which has no weight among the exits; "
            "expected output_router_logits=False (SFTTrainer: router_aux_loss_coef=0.0), or e_scale=0."
        )
    changed = [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
    if changed and type(head) is nn.Linear:
        raise UnsupportedModelError(
            f"the model changes its logits behind the head ({changed[0]}={getattr(config, changed[0])}), which its early "
            f"exits do not; expected a family without that, or e_scale=0."
        )


def check_rows(batch: int, values: dict[str, Any]) -> None:
    """Refuse what describes the rows of a batch in a form that rows cannot be left out of.

    Raises :class:`~telltale.errors.ConfigError` naming it.
    """
    if batch == 1:
        return
    for name, value in values.items():
        flat = isinstance(value, Tensor) and value.ndim == 1 and value.numel() > 1
        if (flat and name.startswith("cu_seq_lens")) or type(value).__name__ == "BlockMask":
            raise ConfigError(
                f"{name} tells the layers about {batch} rows in one piece, which no row can be left out of; expected "
                f"packed rows as a batch of one, or p_max=0."
            )
