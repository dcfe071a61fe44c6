"""Seconds and bytes of every layer of a model, measured in place, inside the model (PipeDream, SOSP'19, section 3.1).

Every round runs one training step layer by layer, cut between all of them: the first layer has no input gradient to compute,
the last one has the loss, each backward gets the gradient that the next layer sent. The whole uncut step is measured in the same
rounds, so that the residual between the sum of the layers and the whole is honest. Times are medians over the rounds. The
optimizer, versioning and communication of a pipeline are not part of forward and backward.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from telltale.config import check_integer
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.train.pipeline.layers import LayeredModel, Values, buffers_kept
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.runtime.stage import writable
from telltale.train.pipeline.split import split

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Clock = Callable[[], float]


def profile(
    model: nn.Module | LayeredModel,
    example: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    repeats: int = 10,
    warm_up: int = 3,
    optimizer: OptimizerFactory | None = None,
    threads: int | None = None,
    device: str | torch.device | None = None,
) -> Profile:
    """Measure ``model`` (see :func:`telltale.train.pipeline.layers.split`, which also takes ``loss``) on one minibatch.

    ``warm_up`` rounds go first, ``repeats`` are counted; round t runs as minibatch t, so that a model whose work depends on the
    minibatch (LayerSkip's rotation) is averaged over its pattern. ``threads`` must be what each worker will run with; None keeps
    the present number. ``device`` None is where the model is; the minibatch is moved there. With ``optimizer``, a factory as the
    trainer takes it, the step of every layer's parameters is measured on copies. A model in eval mode is measured in train mode.
    Parameters, gradients, buffers, train flags and random state are afterwards what they were.

    Of every layer: ``activation_bytes``, all tensors that cross the cut behind it; ``parameter_bytes``; ``saved_bytes``, the
    storages that autograd keeps and that are neither parameters nor buffers, each counted once in the whole model, at the last
    layer that keeps it (the most over the patterns of the rounds).

    Raises :class:`~telltale.errors.DataError` for an empty minibatch or a loss that is no scalar,
    :class:`~telltale.errors.NumericalError` for a loss or a time that is not finite, and
    :class:`~telltale.errors.ConfigError` for numbers out of range or a model on another device.
    """
    check_integer("repeats", repeats, low=1)
    check_integer("warm_up", warm_up, low=0)
    if threads is not None:
        check_integer("threads", threads, low=1)
    layered = split(model, loss=loss, example=example)
    place = _device(layered, device)
    batch = tree_map(lambda leaf: leaf.to(place) if isinstance(leaf, torch.Tensor) else leaf, example)
    clock = _clock(place)
    with _thread_count(threads), _left_as_found(layered):
        size = _batch_size(layered.inputs(batch))
        rounds = [_round(layered, batch, t, clock) for t in (*[0] * warm_up, *range(repeats))][warm_up:]
        saved = _saved_bytes(layered, batch, repeats)
        updates, state_bytes = _updates(layered, optimizer, warm_up, repeats, clock)
        copies = _copies(layered, warm_up, repeats, clock)
        used_threads = torch.get_num_threads()
    held = [_parameter_bytes(layer.module.parameters()) for layer in layered.layers]
    layers = tuple(
        LayerProfile(
            name=layer.name,
            forward=_median([found.forward[i] for found in rounds]),
            backward=_median([found.backward[i] for found in rounds]),
            activation_bytes=statistics.fmean(found.activations[i] for found in rounds),
            parameter_bytes=float(held[i]),
            saved_bytes=float(saved[i]),
            update=updates[i],
            version=copies[i],
        )
        for i, layer in enumerate(layered.layers)
    )
    trained = sum(_parameter_bytes(_trainable(layer.module)) for layer in layered.layers)
    measured = Profile(
        layers,
        step_seconds=_median([found.whole for found in rounds]),
        batch_size=size,
        threads=used_threads,
        device=str(place),
        fingerprint=layered.fingerprint,
    )
    if optimizer is None or not trained:
        return measured
    return dataclasses.replace(measured, optimizer_bytes_per_parameter_byte=state_bytes / trained)


class _Round:
    """What one round measured: seconds per layer, bytes that cross behind each, seconds of the whole step."""

    def __init__(self, layers: int) -> None:
        self.forward = [0.0] * layers
        self.backward = [0.0] * layers
        self.activations = [0] * layers
        self.whole = 0.0


def _round(model: LayeredModel, batch: Any, minibatch: int, clock: Clock) -> _Round:
    """Both measurements, taking turns in who goes first, on fresh graphs and with no gradients to add to."""
    found = _Round(len(model.layers))
    for part in (_cut_step, _whole_step) if minibatch % 2 == 0 else (_whole_step, _cut_step):
        for parameter in model.root.parameters():
            parameter.grad = None
        part(model, batch, minibatch, clock, found)
    return found


def _cut_step(model: LayeredModel, batch: Any, minibatch: int, clock: Clock, found: _Round) -> None:
    values, kept = model.inputs(batch), []
    last = len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        # A copy: a layer in place must not write into what the layer before has kept for its backward.
        inputs = _received(tuple(value.clone() for value in values)) if index else values
        entering = writable(inputs)
        began = clock()
        values = layer.call(entering, batch, minibatch)
        outputs = (model.loss(values, batch, minibatch),) if index == last else values
        found.forward[index] = clock() - began
        found.activations[index] = sum(value.nbytes for value in values)
        kept.append((inputs, outputs))
    _check_loss(outputs[0])
    gradients: list[Tensor | None] = [torch.ones_like(outputs[0])]
    for index in reversed(range(last + 1)):
        inputs, outputs = kept.pop()
        wanted = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad and g is not None]
        began = clock()
        if wanted:
            torch.autograd.backward([y for y, _ in wanted], [g for _, g in wanted])
        found.backward[index] = clock() - began
        gradients = [value.grad for value in inputs]


def _whole_step(model: LayeredModel, batch: Any, minibatch: int, clock: Clock, found: _Round) -> None:
    values = writable(model.inputs(batch))
    began = clock()
    for layer in model.layers:
        values = layer.call(values, batch, minibatch)
    loss = model.loss(values, batch, minibatch)
    if loss.requires_grad:
        loss.backward()
    found.whole = clock() - began


def _received(values: Values) -> Values:
    """The values as the next stage would get them: the same numbers, another graph."""
    return tuple(value.detach().requires_grad_(value.requires_grad) for value in values)


def _saved_bytes(model: LayeredModel, batch: Any, repeats: int) -> list[int]:
    """Per layer, the most over the patterns that the rounds saw."""
    patterns = {model.pattern(t): t for t in reversed(range(repeats))}
    found = [_saved_at(model, batch, minibatch) for minibatch in patterns.values()]
    return [max(sizes) for sizes in zip(*found, strict=True)]


def _saved_at(model: LayeredModel, batch: Any, minibatch: int) -> list[int]:
    lasting = {
        tensor.untyped_storage().data_ptr()
        for module in _modules(model)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    owner: dict[int, tuple[int, int]] = {}
    values, kept = model.inputs(batch), []
    alive: list[Values] = []
    for index, layer in enumerate(model.layers):

        def pack(tensor: Tensor, index: int = index) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in lasting:
                owner[storage.data_ptr()] = (index, storage.nbytes())
            return tensor.detach()

        inputs = _received(values) if index else values
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            entering = writable(inputs)
            values = layer.call(entering, batch, minibatch)
            # Kept, so that no storage is freed and its address given to another.
            alive.append(entering)
            kept.append(model.loss(values, batch, minibatch) if layer is model.layers[-1] else values)
    sizes = [0] * len(model.layers)
    for index, size in owner.values():
        sizes[index] += size
    return sizes


def _updates(
    model: LayeredModel, factory: OptimizerFactory | None, warm_up: int, repeats: int, clock: Clock
) -> tuple[list[float], int]:
    """Seconds of the optimizer step per layer, on copies with gradients, and the bytes of all optimizer states."""
    if factory is None:
        return [0.0] * len(model.layers), 0
    names = {id(parameter): name for name, parameter in model.root.named_parameters()}
    seconds, state_bytes = [], 0
    for layer in model.layers:
        copies = [(names[id(p)], nn.Parameter(p.detach().clone())) for p in _trainable(layer.module)]
        if not copies:
            seconds.append(0.0)
            continue
        optimizer = factory(copies)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"optimizer made a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
        times = []
        for _ in range(max(warm_up, 1) + repeats):
            for _, copy in copies:
                copy.grad = torch.full_like(copy, 1e-3)
            began = clock()
            optimizer.step()
            times.append(clock() - began)
        seconds.append(_median(times[-repeats:]))
        states = [value for state in optimizer.state.values() for value in state.values()]
        state_bytes += sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return seconds, state_bytes


@torch.no_grad()
def _copies(model: LayeredModel, warm_up: int, repeats: int, clock: Clock) -> list[float]:
    """Seconds per layer to copy its trainable parameters into storage that was used before, as a new weight version."""
    seconds = []
    for layer in model.layers:
        own = [parameter.data for parameter in _trainable(layer.module)]
        spare = [torch.zeros_like(value) for value in own]
        times = [0.0]
        for _ in range(max(warm_up, 1) + repeats if own else 0):
            began = clock()
            torch._foreach_copy_(spare, own)
            times.append(clock() - began)
        seconds.append(_median(times[-repeats:]))
    return seconds


@contextmanager
def _left_as_found(model: LayeredModel) -> Iterator[None]:
    """Train mode inside the block; gradients, buffers, flags and random state afterwards as they were."""
    modules = _modules(model)
    gradients = [(parameter, parameter.grad) for parameter in model.root.parameters()]
    flags = [(module, module.training) for module in modules]
    cards = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cards), torch.enable_grad(), buffers_kept(modules):
            if not model.root.training:
                for module in modules:
                    module.training = True
            yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _modules(model: LayeredModel) -> list[nn.Module]:
    """The unsplit model's modules, and those that only the layers have."""
    own = [*model.root.modules(), *(module for layer in model.layers for module in layer.module.modules())]
    return list(dict.fromkeys(own))


def _device(model: LayeredModel, asked: str | torch.device | None) -> torch.device:
    own = next((parameter.device for parameter in model.root.parameters()), None)
    if asked is None:
        return own or torch.device("cpu")
    place = torch.device(asked)
    if own is not None and (own.type != place.type or place.index not in (None, own.index)):
        raise ConfigError(f"device={str(place)!r}, but the model is on {own}; move the model there first.")
    return own or place


def _clock(device: torch.device) -> Clock:
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _batch_size(values: Values) -> int:
    if not values or values[0].ndim == 0 or any(value.numel() == 0 for value in values):
        shapes = [tuple(value.shape) for value in values]
        raise DataError(f"the example minibatch has inputs of shapes {shapes}; expected at least one sample.")
    return int(values[0].shape[0])


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, torch.Tensor):
        raise DataError(f"the loss is a {type(loss).__name__}; expected a scalar tensor, the mean over the minibatch.")
    if loss.ndim != 0:
        raise DataError(f"the loss has shape {tuple(loss.shape)}; expected a scalar, the mean over the minibatch.")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(f"the loss of the example minibatch is {value}; expected a finite number.")


def _median(times: Sequence[float]) -> float:
    result = statistics.median(times)
    if not all(math.isfinite(value) for value in times) or result < 0:
        raise NumericalError(
            f"a measured time is not a number of seconds: {list(times)[:4]}; expected a working clock."
        )
    return result


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _parameter_bytes(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
