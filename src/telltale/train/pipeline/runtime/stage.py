"""One stage of a pipeline: its layers, run forward and backward under a given weight version.

The backward runs with the same version in place as the forward, because activation checkpointing (the user's or ours) reads
the weights again there. Random numbers are drawn from (seed, layer, minibatch), so dropout depends neither on where the model
was cut nor on the order in which a worker happens to run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from telltale.errors import DataError
from telltale.train.pipeline.layered import LayeredModel, Values


class Stage(nn.Module):
    """Layers ``first`` to ``stop - 1`` of ``model``. Registered modules are the user's own; nothing is copied."""

    def __init__(self, model: LayeredModel, first: int, stop: int, *, seed: int = 0, recompute: bool = False) -> None:
        super().__init__()
        self.model = _Unregistered(model)
        self.first, self.stop = first, stop
        self.seed, self.recompute = seed, recompute
        self.layers = nn.ModuleList(layer.module for layer in model.layers[first:stop])
        self.slots = _slots(self)
        self._own = [parameters[key] for parameters, key, _ in self.slots]
        by_identity = {id(parameter): name for name, parameter in model.root.named_parameters()}
        self.names = {local: by_identity[id(parameter)] for local, parameter in self.named_parameters()}
        """Stage-local parameter name -> the unsplit model's."""

    @property
    def is_first(self) -> bool:
        """Whether minibatches enter here."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stop == len(self.model.value.layers)

    def forward(self, values: Values, batch: Any, minibatch: int) -> Values:
        """The layers one after the other; on the last stage the result is the loss alone."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, values, batch, minibatch, use_reentrant=False, preserve_rng_state=False)
        return self._run(values, batch, minibatch)

    def _run(self, values: Values, batch: Any, minibatch: int) -> Values:
        model = self.model.value
        with _random_state_kept(self.training):
            for index in range(self.first, self.stop):
                if self.training:
                    _seed_generators(_seed(self.seed, index, minibatch))
                values = model.layers[index].call(values, batch, minibatch)
            if self.is_last:
                loss = model.loss(values, batch, minibatch)
                if loss.ndim != 0:
                    raise DataError(
                        f"the loss has shape {tuple(loss.shape)}; expected a scalar, the mean over the minibatch."
                    )
                return (loss,)
        return values

    def run_forward(self, weights: Mapping[str, Tensor], values: Values, batch: Any, minibatch: int) -> Values:
        """:meth:`forward` with ``weights`` (stage-local name -> tensor) in place of the parameters."""
        with self.holding(weights):
            return self(values, batch, minibatch)

    def run_backward(
        self, weights: Mapping[str, Tensor], outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        """Accumulate gradients into ``weights`` and the stage's inputs, with ``weights`` in place all the while."""
        wanted = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        if not wanted:
            return
        tensors, grads = zip(*wanted, strict=True)
        with self.holding(weights):
            torch.autograd.backward(tensors, grads)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """``weights`` in place of the parameters inside the block.

        This is what ``torch.func.functional_call`` does, with the places looked up once: twice per minibatch, on a stage of a
        hundred parameters, that is a tenth of its time.
        """
        try:
            for parameters, key, name in self.slots:
                parameters[key] = weights[name]
            yield
        finally:
            for (parameters, key, _), own in zip(self.slots, self._own, strict=True):
                parameters[key] = own


class _Unregistered:
    """Keeps the unsplit model out of the stage's own parameters."""

    def __init__(self, value: LayeredModel) -> None:
        self.value = value


@contextmanager
def _random_state_kept(training: bool) -> Iterator[None]:
    if not training:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """(parameter dictionary of a submodule, key, name) of every place that holds a parameter; a tied one has several
    places under the first of its names."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        (child._parameters, key, names[id(parameter)])
        for child in module.modules()
        for key, parameter in child._parameters.items()
        if parameter is not None
    ]


def _seed_generators(seed: int) -> None:
    """``torch.manual_seed`` without its bookkeeping for devices that are not in use, which formats a stack trace."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _seed(seed: int, layer: int, minibatch: int) -> int:
    """32 bits, as many as the CPU generator takes, that differ for every (seed, layer, minibatch)."""
    digest = hashlib.blake2b(f"{seed}/{layer}/{minibatch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
