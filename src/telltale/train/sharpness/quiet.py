"""Running a live model's forward pass for a second derivative, and leaving everything about it as it was.

What is switched for the length of the block: fused attention to the math kernel (the fused ones have no second
derivative), compiled modules to eager, activation checkpointing of Transformers off, sparse embedding gradients to
dense, half precision to float32 leaves, autocast off. Random state is the probe's own; buffers are copies.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from telltale.errors import ConfigError
from telltale.signals.activations import kept_curvature

MODES = ("as is", "eval", "train")
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def quiet(model: nn.Module, *, mode: str, seed: int) -> Iterator[dict[str, Tensor]]:
    """Inside: ``model`` runs twice differentiably. Yields name -> parameter as the forward pass will see it.

    ``mode`` is the train/eval flag inside: "as is", "eval" or "train". Half-precision parameters are float32 copies
    there; all others are the live tensors.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is unknown; expected one of {', '.join(map(repr, MODES))}.")
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(own_random_state(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(kept_curvature())
        for device in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        if any(_is_compiled(module) for module in modules):
            stack.enter_context(_eager_stance())
        stack.enter_context(_attributes(_switches(model, modules, mode)))
        stack.enter_context(_own_buffers(modules))
        yield stack.enter_context(_full_precision(model, modules))


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Torch's, NumPy's and Python's random state start at ``seed`` inside, and are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.random.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def original(model: nn.Module) -> nn.Module:
    """The module under torch.compile, DistributedDataParallel and DataParallel wrappers, in whatever order they nest."""
    found = model
    while True:
        if isinstance(getattr(found, "_orig_mod", None), nn.Module):
            found = found._orig_mod  # type: ignore[assignment]
        elif isinstance(found, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            found = found.module
        else:
            return found


def in_full_precision(batch: Any) -> Any:
    """``batch`` with its half-precision tensors as float32, through mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.float() if batch.dtype in _HALF else batch
    if isinstance(batch, Mapping):
        return {key: in_full_precision(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and type(batch) in (list, tuple):
        return type(batch)(in_full_precision(value) for value in batch)
    return batch


def _switches(model: nn.Module, modules: Iterable[nn.Module], mode: str) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value inside the block)."""
    found: list[tuple[Any, str, Any]] = []
    for module in modules:
        if mode != "as is":
            found.append((module, "training", mode == "train"))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            found.append((module, "sparse", False))
        if getattr(module, "gradient_checkpointing", False) is True:
            found.append((module, "gradient_checkpointing", False))
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            found.append((config, "_attn_implementation", "sdpa"))
    return found


@contextmanager
def _attributes(switches: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    before = []
    try:
        for owner, name, value in switches:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


@contextmanager
def _own_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Copies in place of the buffers: batch norm updates them in place, and the kept graph may hold them."""
    copies: dict[int, Tensor] = {}
    before = []
    try:
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    before.append((module._buffers, name, buffer))
                    copy = copies.setdefault(id(buffer), buffer.detach().clone())
                    module._buffers[name] = copy.float() if copy.dtype in _HALF else copy
        yield
    finally:
        for owner, name, buffer in before:
            owner[name] = buffer


@contextmanager
def _full_precision(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Half-precision parameters as float32 leaves; the rounding of bf16 products would drown the null directions."""
    if not any(parameter.dtype in _HALF for parameter in model.parameters()):
        yield dict(model.named_parameters())
        return
    copies: dict[int, nn.Parameter] = {}
    before = []
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in _HALF:
                    before.append((module._parameters, name, parameter))
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                    module._parameters[name] = copies[id(parameter)]
        yield dict(model.named_parameters())
    finally:
        for owner, name, parameter in before:
            owner[name] = parameter


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _eager_stance() -> Iterator[None]:
    # PyTorch's compiled graphs have no second derivative.
    with torch.compiler.set_stance("force_eager"):
        yield
