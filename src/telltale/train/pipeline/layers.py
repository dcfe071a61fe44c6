"""A model as a chain of layers that can be cut between any two of them.

The trainer, the one-process reference and the profiler see every model this way; ``telltale.train.pipeline.split`` makes
one from a Hugging Face causal LM or any exported module. Whatever a rank can compute from the minibatch itself (labels,
masks, positions) is read there and never sent: only :data:`Values` cross a cut.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves

from telltale.errors import DataError, PlanError, UnsupportedModelError

Values = tuple[Tensor, ...]
"""What one layer hands to the next; floating-point values that require grad get a gradient back."""


def _always_the_same(minibatch: int) -> Hashable:
    return 0


IGNORED = -100
"""The label that torch's cross-entropy leaves out by default."""


def terms_of(batch: Any) -> float:
    """Terms in the mean loss of a minibatch ``(inputs, targets)``: the class indices that are not :data:`IGNORED`, or for targets
    of floating-point numbers (and anything that is no tensor) the samples."""
    inputs, targets = pair(batch)
    if isinstance(targets, Tensor) and targets.ndim and not (targets.is_floating_point() or targets.is_complex()):
        return float((targets != IGNORED).sum()) if targets.dtype != torch.bool else float(targets.numel())
    first = next((leaf for leaf in tree_leaves((targets, inputs)) if isinstance(leaf, Tensor) and leaf.ndim), None)
    return 1.0 if first is None else float(first.shape[0])


def terms_for(loss: Any) -> Callable[[Any], float]:
    """:func:`terms_of` as ``loss`` counts: torch's cross-entropy or NLL, as a module or a ``functools.partial``, has an
    ``ignore_index`` of its own, and with class weights its mean is over their sum."""
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        ignored, weights = loss.ignore_index, loss.weight
    elif isinstance(loss, partial) and loss.func in (nn.functional.cross_entropy, nn.functional.nll_loss):
        ignored, weights = loss.keywords.get("ignore_index", IGNORED), loss.keywords.get("weight")
    else:
        return terms_of
    if ignored == IGNORED and weights is None:
        return terms_of

    def terms(batch: Any) -> float:
        targets = pair(batch)[1]
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return terms_of(batch)
        judged = targets[targets != ignored]
        return float(judged.numel() if weights is None else weights.to(judged.device)[judged].sum())

    return terms


def share_of_terms(terms: float, total: float, first: int, last: int) -> float:
    """A minibatch's share of all ``total`` terms in the losses of one update, which is over the minibatches ``first`` to ``last``.
    Raises :class:`~telltale.errors.DataError` if there is none."""
    if not total:
        raise DataError(
            f"no minibatch from {first} to {last} has a term in its loss (every label is {IGNORED}); expected at least one in "
            f"the minibatches of an update."
        )
    return terms / total


def weighted_mean(losses: Sequence[float], weights: Sequence[float]) -> float:
    """Mean over all terms of minibatches whose mean losses and numbers of terms are given."""
    if not sum(weights):
        raise DataError(
            "no minibatch of the evaluation has a term in its loss (every label is ignored); expected at least one."
        )
    shares = [weight * len(weights) / sum(weights) for weight in weights]
    return sum(loss * share for loss, share in zip(losses, shares, strict=True)) / len(losses)


@dataclass(frozen=True)
class Layer:
    """One step of the chain. ``call(values, batch, minibatch)`` reads its parameters through ``module`` when it is called."""

    name: str
    module: nn.Module
    call: Callable[[Values, Any, int], Values]


@dataclass(frozen=True)
class LayeredModel:
    """Layers in order, the unsplit model they belong to, and how a minibatch enters and is judged."""

    root: nn.Module
    """The unsplit model; checkpoints and optimizers use its parameter names."""
    layers: tuple[Layer, ...]
    inputs: Callable[[Any], Values]
    """Minibatch -> values of the first layer."""
    loss: Callable[[Values, Any, int], Tensor]
    """(values of the last layer, minibatch, its number) -> scalar mean loss. Runs on the last stage."""
    weight: Callable[[Any], float] = terms_of
    """Minibatch -> how many terms its mean loss is over. Where several minibatches make one update, the update is the gradient
    of the mean over all their terms, not of the mean of their means. 0: the minibatch has nothing to judge, and counts for
    nothing."""
    pattern: Callable[[int], Hashable] = _always_the_same
    """Minibatches of one pattern and the same batch shapes send tensors of the same shapes across every cut."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UnsupportedModelError("the model has no layers; expected at least one to put on a stage.")
        lazy = [
            name for name, parameter in self.root.named_parameters() if isinstance(parameter, UninitializedParameter)
        ]
        if lazy:
            raise UnsupportedModelError(
                f"{lazy[0]} has no shape yet, as in a lazy module before its first forward; expected a forward of the model first."
            )
        known = {id(parameter) for parameter in self.root.parameters()}
        held = {id(parameter) for layer in self.layers for parameter in layer.module.parameters()}
        if held != known:
            names = [name for name, parameter in self.root.named_parameters() if id(parameter) not in held]
            missing = (
                f"parameters {names[:3]} of the model are in no layer" if names else "layers hold foreign parameters"
            )
            raise UnsupportedModelError(f"{missing}; expected every parameter of the model in one layer.")

    @property
    def fingerprint(self) -> str:
        """Hash of the unsplit model's parameter names and shapes, and of the layers' names."""
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self.root.named_parameters()]
        names = [layer.name for layer in self.layers]
        return hashlib.sha256(repr((shapes, names)).encode()).hexdigest()[:16]

    def parameter_names(self, first: int, stop: int) -> dict[str, nn.Parameter]:
        """Unsplit name -> parameter for the layers ``first`` to ``stop - 1``, in the unsplit model's order.

        A tied parameter appears once, under the first of its names.
        """
        held = {id(parameter) for layer in self.layers[first:stop] for parameter in layer.module.parameters()}
        return {name: parameter for name, parameter in self.root.named_parameters() if id(parameter) in held}

    def shared_parameters(self) -> dict[str, tuple[int, ...]]:
        """Unsplit name -> layers, for every parameter that more than one layer uses (tied embeddings)."""
        users: dict[int, list[int]] = defaultdict(list)
        for index, layer in enumerate(self.layers):
            for parameter in layer.module.parameters():
                users[id(parameter)].append(index)
        return {
            name: tuple(users[id(parameter)])
            for name, parameter in self.root.named_parameters()
            if len(users[id(parameter)]) > 1
        }


def sequential(model: nn.Sequential, loss: Callable[[Any, Any], Tensor]) -> LayeredModel:
    """An ``nn.Sequential`` as a chain, one layer per child. A minibatch is ``(inputs, targets)``; ``loss(outputs, targets)``
    is a scalar. A child may take and return a tensor or a tuple of tensors.

    Raises :class:`~telltale.errors.UnsupportedModelError` for anything but a non-empty ``nn.Sequential``.
    """
    if not isinstance(model, nn.Sequential) or len(model) == 0:
        raise UnsupportedModelError(f"{type(model).__name__} is not a non-empty nn.Sequential; see splitters.split.")
    # Not named_children, which gives a child that stands in several places once.
    layers = tuple(
        Layer(name, module, _caller(module)) for name, module in model._modules.items() if module is not None
    )

    def judged(values: Values, batch: Any, minibatch: int) -> Tensor:
        return loss(values[0] if len(values) == 1 else values, pair(batch)[1])

    return LayeredModel(
        model, layers, inputs=lambda batch: as_values(pair(batch)[0]), loss=judged, weight=terms_for(loss)
    )


def as_layered(model: LayeredModel | nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> LayeredModel:
    """``model`` if it has layers already, or an ``nn.Sequential`` with its ``loss``; :class:`~telltale.errors.PlanError` else."""
    if isinstance(model, LayeredModel):
        return model
    if isinstance(model, nn.Sequential) and loss is not None:
        return sequential(model, loss)
    raise PlanError(
        f"the model is {type(model).__name__}; expected a LayeredModel (see split), or an nn.Sequential and a loss."
    )


def pair(batch: Any) -> tuple[Any, Any]:
    """``batch`` as (inputs, targets). Raises :class:`~telltale.errors.DataError` if it is anything else."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(f"a minibatch is {type(batch).__name__}; expected a pair (inputs, targets).")


def as_values(output: Any) -> Values:
    """A tensor or tuple of tensors as :data:`Values`; raises :class:`~telltale.errors.DataError` for anything else."""
    values = output if isinstance(output, tuple) else (output,)
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise DataError(f"a layer handed on a {type(value).__name__}; expected a tensor or a tuple of tensors.")
    return values


def _caller(module: nn.Module) -> Callable[[Values, Any, int], Values]:
    def call(values: Values, batch: Any, minibatch: int) -> Values:
        return as_values(module(*values))

    return call


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The buffers of ``modules`` (running statistics) are afterwards what they were."""
    found = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in found:
            module._buffers[name] = buffer
            # Batch norm writes its statistics without moving the buffer's version counter.
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)
