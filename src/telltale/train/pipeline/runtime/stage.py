"""One stage of a pipeline: its layers, run forward and backward under a given weight version.

The backward runs with the same version in place as the forward, because activation checkpointing (the user's or ours) reads
the weights again there. Random numbers are drawn from (seed, layer, minibatch), so dropout depends neither on where the model
was cut nor on the order in which a worker happens to run.

A stage keeps its weight versions as separate tensors that it puts in place of its parameters. Swapping weights inside the
parameters between a forward and its backward gives wrong gradients without an error (layer norm, convolution, ``x @ W``), so
every version has storage of its own. An update moves the parameters to fresh storage first and leaves the old one to the
minibatches that still need it: one copy per update, and never more storages than the policy's count of versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from telltale.errors import CheckpointError, DataError, UnsupportedModelError
from telltale.train.pipeline.layers import LayeredModel, Values
from telltale.train.pipeline.schedule import Policy


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
        self._whole = dict(model.root.named_parameters())
        for local, parameter in self.named_parameters():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise UnsupportedModelError(
                    f"{self.names[local]} has a hook on its gradient, which weight versions do not have; expected the hook on an "
                    f"activation, or its effect in the optimizer."
                )

    @property
    def is_first(self) -> bool:
        """Whether minibatches enter here."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stop == len(self.model.value.layers)

    def forward(self, values: Values, batch: Any, minibatch: int, terms: float | None = None) -> Values:
        """The layers one after the other; on the last stage, the loss alone, of ``terms`` terms (None: to be counted)."""
        if self.recompute and torch.is_grad_enabled():
            run = _Twice(self)
            outputs = checkpoint(run, values, batch, minibatch, terms, use_reentrant=False, preserve_rng_state=False)
            run.first_is_over()
            return outputs
        return self._run(writable(values), batch, minibatch, terms)

    def _run(self, values: Values, batch: Any, minibatch: int, terms: float | None) -> Values:
        model = self.model.value
        # Under an autocast that the caller entered around a whole run: it keeps what it cast by tensor, and an update changes the
        # numbers in a tensor.
        torch.clear_autocast_cache()
        with _random_state_kept(self.training):
            for index in range(self.first, self.stop):
                if self.training:
                    _seed_generators(_seed(self.seed, index, minibatch))
                values = model.layers[index].call(values, batch, minibatch)
            if self.is_last:
                return (self._judged(values, batch, minibatch, terms),)
        return values

    def _judged(self, values: Values, batch: Any, minibatch: int, terms: float | None) -> Tensor:
        """The minibatch's loss. One without a term, whose mean would be 0/0, has loss 0 and gradients 0."""
        model = self.model.value
        if not (model.weight(batch) if terms is None else terms):
            return sum(value.sum() for value in values if value.is_floating_point()) * 0.0  # type: ignore[return-value]
        loss = model.loss(values, batch, minibatch)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            what = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            raise DataError(f"the loss {what}; expected a scalar tensor, the mean over the minibatch.")
        if self.training and torch.is_grad_enabled() and not loss.requires_grad:
            raise DataError(
                f"the loss of minibatch {minibatch} has no graph: it depends on no weight that is trained, so training would "
                f"change nothing; expected a loss of the model's outputs (is there a detach() or no_grad() in it?)."
            )
        return loss

    def run_forward(
        self, weights: Mapping[str, Tensor], values: Values, batch: Any, minibatch: int, terms: float | None = None
    ) -> Values:
        """:meth:`forward` with ``weights`` (stage-local name -> tensor) in place of the parameters."""
        with self.holding(weights):
            return self(values, batch, minibatch, terms)

    def run_backward(
        self, weights: Mapping[str, Tensor], outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        """Accumulate gradients into ``weights`` and the stage's inputs, with ``weights`` in place all the while."""
        wanted = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        if not wanted:
            return
        tensors, grads = zip(*wanted, strict=True)
        ours = {id(tensor) for tensor in weights.values()}
        others = [(name, parameter) for name, parameter in self._whole.items() if id(parameter) not in ours]
        for _, parameter in others:
            parameter.grad = None
        with self.holding(weights):
            torch.autograd.backward(tensors, grads)
        for name, parameter in others:
            if parameter.grad is not None:
                raise UnsupportedModelError(
                    f"a layer on the stage of layers {self.first} to {self.stop - 1} reads {name} past its module (from a list, a "
                    f"closure or another layer), where no weight version can be put; expected it as a parameter of that layer."
                )

    def check_reached(self, weights: Mapping[str, Tensor], inputs: Values, minibatch: int) -> None:
        """On the last stage, after a backward: :class:`~telltale.errors.DataError` if the loss did not come from the model."""
        if all(tensor.grad is None for tensor in (*weights.values(), *inputs)):
            raise DataError(
                f"the loss of minibatch {minibatch} has a graph that leads to no weight of the model, so training would change "
                f"nothing; expected a loss of the model's outputs (is there a detach() in it?)."
            )

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


class _Writable(torch.autograd.Function):
    """The identity, whose result shares the argument's memory and is neither a leaf nor a view of one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def writable(values: Values) -> Values:
    """``values`` as a layer may overwrite them. What a stage receives is a leaf, so that its gradient can be sent back, and
    autograd forbids writing to leaves; what the first stage reads is the user's own minibatch."""
    return tuple(_Writable.apply(value) if value.requires_grad else value.clone() for value in values)


class _Twice:
    """A forward that is run again in the backward, and moves the buffers (running statistics) once.

    The second run reads the buffers as the first one found them, and what it does to them is forgotten. The first run works on a
    copy of its inputs: a layer in place must not overwrite what the second one starts from.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._again = False
        self._found = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in stage.modules()
            for name, buffer in module._buffers.items()
        ]

    def __call__(self, values: Values, batch: Any, minibatch: int, terms: float | None) -> Values:
        if not self._again:
            return self._stage._run(tuple(value.clone() for value in values), batch, minibatch, terms)
        now = [module._buffers[name] for module, name, _, _ in self._found]
        try:
            for module, name, _, before in self._found:
                module._buffers[name] = None if before is None else before.clone()
            return self._stage._run(writable(values), batch, minibatch, terms)
        finally:
            for (module, name, _, _), buffer in zip(self._found, now, strict=True):
                module._buffers[name] = buffer

    def first_is_over(self) -> None:
        """Keep only the buffers that have moved: other numbers in them, or another tensor in their place."""
        self._again = True
        self._found = [
            (module, name, buffer, before)
            for module, name, buffer, before in self._found
            if module._buffers[name] is not buffer
            or (buffer is not None and before is not None and not torch.equal(buffer, before))
        ]


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


Weights = dict[str, Tensor]
"""Stage-local parameter name -> leaf tensor of one version."""


class WeightVersions:
    """Live and past weights of ``module``, the stage ``stage`` of a pipeline under ``policy``."""

    def __init__(self, module: nn.Module, policy: Policy, stage: int) -> None:
        self._parameters = dict(module.named_parameters())
        self._trainable = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._kept = policy.versions_held(stage)
        self._copies = self._kept > 1
        self._ring: dict[int, Weights] = {}
        self._spare: list[Weights] = []
        self.current = 0
        self.restart(0)

    def restart(self, version: int, past: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Number the live weights ``version``; ``past`` holds older versions' values by number and stage-local name.

        A version before ``version`` that is not in ``past`` reads as the oldest one known: training that goes on under
        another plan starts with these weights everywhere.
        """
        self.current = version
        self._ring = {version: self._alias()}
        self._spare = []
        for number, values in (past or {}).items():
            if version - self._kept < number < version:
                self._ring[number] = self._alias() | {
                    name: values[name].detach().clone().requires_grad_() for name in self._trainable
                }

    @property
    def alive(self) -> list[int]:
        """Numbers of the versions in memory, oldest first."""
        return sorted(self._ring)

    def at(self, version: int) -> Weights:
        """The leaf tensors of ``version``; an older one than any known reads as the oldest."""
        found = self._ring.get(version)
        if found is None:
            oldest = min(self._ring)
            if version > oldest:
                raise CheckpointError(f"weight version {version} is not alive; expected one of {self.alive}.")
            found = self._ring[oldest]
        return found

    def past(self) -> dict[int, Weights]:
        """Values of the versions before the live one, for a checkpoint."""
        return {
            number: {name: weights[name].detach() for name in self._trainable}
            for number, weights in self._ring.items()
            if number != self.current
        }

    def take_gradients(self, version: int) -> None:
        """Move the gradients that backwards under ``version`` left to the live parameters, where the optimizer looks."""
        weights = self.at(version)
        for name, parameter in self._trainable.items():
            leaf = weights[name]
            parameter.grad, leaf.grad = leaf.grad, None

    def advance(self, step: Callable[[], object]) -> None:
        """Keep the live version for those that need it, run ``step`` on the parameters, and number the result."""
        if self._copies:
            self._move_to_fresh_storage()
        step()
        for parameter in self._trainable.values():
            parameter.grad = None
        self.current += 1
        if self._copies:
            self._ring[self.current] = self._alias()
            for number in [number for number in self._ring if number <= self.current - self._kept]:
                self._spare.append(self._ring.pop(number))
        else:
            self._ring = {self.current: next(iter(self._ring.values()))}

    def _alias(self) -> Weights:
        """Leaves that share the parameters' storage but not their version counters: the optimizer's in-place step is
        unseen by autograd, which is what the ablation "none" is, and what :meth:`advance` makes harmless otherwise."""
        return {
            name: parameter.data.requires_grad_(parameter.requires_grad) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def _move_to_fresh_storage(self) -> None:
        names = list(self._trainable)
        old = [self._trainable[name].data for name in names]
        spare = self._spare.pop() if self._spare else {}
        new = [spare[name].detach() if name in spare else torch.empty_like(old[i]) for i, name in enumerate(names)]
        if new:
            torch._foreach_copy_(new, old)
        for name, tensor in zip(names, new, strict=True):
            self._trainable[name].data = tensor
