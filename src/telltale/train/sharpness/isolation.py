"""Running a live model's forward pass for a second derivative, and leaving everything about it as it was.

What is switched for the length of the block: fused attention to the math kernel (the fused ones have no second
derivative), compiled code to eager, activation checkpointing of Transformers off, sparse embedding gradients to dense,
half precision to float32 leaves, autocast off, synchronised batch norm to that of one process. Parameters with hooks are
leaves without them. Random state is the probe's own; buffers are copies.

Tensors of a minibatch of any form can be found and moved to another device or precision.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from telltale.config import check_choice
from telltale.signals.second_derivatives import closed_form_second_derivatives

MODES = ("as is", "no dropout", "eval", "train")


@contextmanager
def isolated(model: nn.Module, *, mode: str, seed: int, keep: bool = True) -> Iterator[dict[str, Tensor]]:
    """Inside: ``model`` runs twice differentiably. Yields name -> parameter as the forward pass will see it.

    ``mode`` is the train/eval flag inside: "as is", "eval", "train", or "no dropout": eval for all but batch and instance
    norm, which keep their own. Half-precision parameters are float32 copies there, those with hooks are leaves on the same
    memory; all others are the live tensors. ``keep`` uses activations whose second derivatives are kept; not for a graph that
    is computed anew during a backward pass, in which PyTorch does not see them.
    """
    check_choice("mode", mode, MODES)
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(own_random_state(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if keep:
            stack.enter_context(closed_form_second_derivatives())
        for device in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_without_autocast())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_eager_stance())
        stack.enter_context(_attributes(_switches(modules, mode)))
        stack.enter_context(_own_buffers(modules))
        yield stack.enter_context(_own_leaves(model, modules))


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Torch's, NumPy's and Python's random state start at ``seed`` inside, and are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            # torch.manual_seed also queues a call for an uninitialised CUDA, which costs milliseconds.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
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


def _switches(modules: Iterable[nn.Module], mode: str) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value inside the block)."""
    found: list[tuple[Any, str, Any]] = []
    for module in modules:
        normalises = isinstance(module, (_BatchNorm, _InstanceNorm))
        if mode in ("eval", "train") or (mode == "no dropout" and not normalises):
            found.append((module, "training", mode == "train"))
        if isinstance(module, nn.SyncBatchNorm):
            found.append((module, "__class__", _LocalBatchNorm))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            found.append((module, "sparse", False))
        if getattr(module, "gradient_checkpointing", False) is True:
            found.append((module, "gradient_checkpointing", False))
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            found.append((config, "_attn_implementation", "sdpa"))
    return found


class _LocalBatchNorm(_BatchNorm):
    """What a synchronised one is on one process: the others do not take part in a probe, so waiting for them never ends."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


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
                    module._buffers[name] = copy.float() if copy.dtype in HALF else copy
        yield
    finally:
        for owner, name, buffer in before:
            owner[name] = buffer


@contextmanager
def _own_leaves(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Other leaves for half-precision parameters, whose rounding would drown the null directions, and for those with hooks,
    which would see the probe's gradients and change them."""
    if not any(_needs_a_leaf(parameter) for parameter in model.parameters()):
        yield dict(model.named_parameters())
        return
    copies: dict[int, nn.Parameter] = {}
    before = []
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and _needs_a_leaf(parameter):
                    before.append((module._parameters, name, parameter))
                    if id(parameter) not in copies:
                        value = parameter.detach()
                        copies[id(parameter)] = nn.Parameter(
                            value.float() if value.dtype in HALF else value, parameter.requires_grad
                        )
                    module._parameters[name] = copies[id(parameter)]
        yield dict(model.named_parameters())
    finally:
        for owner, name, parameter in before:
            owner[name] = parameter


def _needs_a_leaf(parameter: Tensor) -> bool:
    return parameter.dtype in HALF or bool(parameter._backward_hooks)


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Off also where the model or the loss switches it on itself, as what Accelerate prepares for mixed precision does."""
    enter, thread = torch.autocast.__enter__, threading.get_ident()

    def enter_disabled(self: torch.autocast) -> Any:
        if threading.get_ident() != thread:
            return enter(self)
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = wanted

    torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def _eager_stance() -> Iterator[None]:
    # PyTorch's compiled graphs have no second derivative.
    with torch.compiler.set_stance("force_eager"):
        yield


HALF = (torch.float16, torch.bfloat16)


def in_full_precision(batch: Any) -> Any:
    """``batch`` with its half-precision tensors as float32, through mappings, lists and tuples; itself if it has none."""
    return _mapped(batch, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)


def on_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``; itself if they are there."""
    return _mapped(batch, lambda tensor: tensor.to(device))


def rows(batch: Any) -> int | None:
    """Length of the first tensor in the minibatch; None if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((size for size in map(rows, batch) if size is not None), None)
    return None


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The container is only made anew where a tensor changed: one of the user's own kind may have more than items."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        fields = {key: _mapped(value, function) for key, value in batch.items()}
        if all(fields[key] is value for key, value in batch.items()):
            return batch
        return _of_kind(batch, fields)
    if isinstance(batch, (list, tuple)):
        values = [_mapped(value, function) for value in batch]
        if all(one is other for one, other in zip(values, batch, strict=True)):
            return batch
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _of_kind(batch: Mapping[Any, Any], fields: dict[Any, Any]) -> Any:
    """``fields`` as a mapping like ``batch``, such as Transformers' BatchEncoding with its attributes; a dict if it cannot be."""
    try:
        return type(batch)(fields)  # type: ignore[call-arg]
    except TypeError:
        return fields
