"""The loss beside a live model's weights, from forward passes alone: on copies, or in place where weights are sharded.

No graph is kept and no derivative taken, so fused attention runs as it is. Both forms have the weights as one flat vector
(N,), on a sharded model this process's part of it, and are asked for losses at other values of that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from telltale.errors import DataError, UnsupportedModelError
from telltale.signals.hessian import computing
from telltale.signals.quiet import Quiet, own_precision
from telltale.train.sharpness.isolation import (
    attributes_of,
    in_full_precision,
    is_sharded,
    local,
    on_device,
    original,
    own_random_state,
    seed_all,
)
from telltale.train.sharpness.probe import LossFunction, Probe, chosen_names, language_model_loss

Offsets = Sequence[tuple[float, Tensor]]
"""(factor, vector (N,)): what is added to the present weights."""
LossAt = Callable[[Offsets], float]
"""The probe's loss there. Every pass sees the same buffers and the same random numbers."""
T = TypeVar("T")


def passes_of(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str] | None,
    mode: str,
    seed: int,
) -> Copies | InPlace:
    """In place for a model with sharded weights, else on copies."""
    if isinstance(model, nn.Module) and any(map(is_sharded, model.parameters())):
        return InPlace(model, loss_fn, batches, parameters=parameters, mode=mode, seed=seed)
    return Copies(Probe(model, loss_fn, batches, parameters=parameters, mode=mode, seed=seed))


class Copies:
    """Passes on copies of everything that they may change: see :class:`~telltale.train.sharpness.probe.Probe`.

    In float64 where the model can, since the losses at both ends of a small step differ by less than float32 can tell.
    """

    precisions = (torch.float64, torch.float32)

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.names, self.parameters = probe.names, probe.parameters
        self._sizes = [parameter.numel() for parameter in self.parameters]

    def weights(self) -> Tensor:
        """A copy of them, in float32 where they are in half precision."""
        with own_precision():
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
            return flat.float() if flat.dtype.itemsize < 4 else flat

    def run(self, search: Callable[[LossAt], T], dtype: torch.dtype) -> T:
        """``search(loss_at)``, in ``dtype``. Raises :class:`~telltale.errors.UnsupportedModelError` where a pass fails."""
        isolated, batch = self._probe.isolated, in_full_precision(self._probe.batches[0], dtype)
        values, buffers = isolated.values(dtype), isolated.buffers(dtype)
        leaves = [values[name].detach() for name in self.names]
        kept = [(buffer, buffer.clone()) for buffer in buffers.values()]

        def loss_at(offsets: Offsets) -> float:
            moves = [(factor, vector.split(self._sizes)) for factor, vector in offsets]
            for place, (leaf, parameter) in enumerate(zip(leaves, self.parameters, strict=True)):
                leaf.copy_(parameter)
                for factor, parts in moves:
                    leaf.add_(parts[place].view_as(leaf), alpha=factor)
            for buffer, value in kept:
                buffer.copy_(value)
            seed_all(self._probe.seed)
            # Only around the model's own functions: what is above costs more inside.
            with Quiet(dtype, keep=False, composed=False):
                return float(_scalar(self._probe.loss_fn(self._probe.model, batch)))

        def quietly() -> T:
            with torch.no_grad():
                return search(loss_at)

        with computing("the loss"):
            return isolated.run(quietly, values, buffers, nullcontext())

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Of two vectors (N,)."""
        return float(torch.dot(a, b))


class InPlace:
    """Passes of a model that FSDP2 has sharded, in its own precision: its weights are moved, and put back to the last bit.

    Every process takes part in every call, each with its own minibatch; the loss is the mean over processes. Buffers,
    train/eval flags and random state are as before afterwards.

    Raises :class:`~telltale.errors.UnsupportedModelError` for weights that are placed in another way than sharded over a
    single mesh dimension.
    """

    precisions: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        batches: Iterable[Any],
        *,
        parameters: Iterable[str] | None,
        mode: str,
        seed: int,
    ) -> None:
        self._model, self._loss_fn, self._mode, self._seed = model, loss_fn or language_model_loss, mode, seed
        bare = original(model)
        wanted = None if parameters is None else chosen_names(parameters, bare)
        named = [
            (name, parameter)
            for name, parameter in bare.named_parameters()
            if parameter.requires_grad and (wanted is None or name in wanted)
        ]
        if not named:
            raise DataError("the model has no trainable parameters among those chosen; expected at least one.")
        self._group = _group_of(named)
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._sizes = [local(parameter).numel() for parameter in self.parameters]
        given = list(batches)
        if not given:
            raise DataError("the probe has no minibatches; expected at least one.")
        self._batch = on_device(given[0], local(self.parameters[0]).device)
        if all(local(parameter).dtype == torch.float64 for parameter in self.parameters):
            self.precisions = (torch.float64,)

    def weights(self) -> Tensor:
        """A copy of this process's part, in float32 at least."""
        flat = torch.cat([local(parameter).reshape(-1) for parameter in self.parameters])
        return flat.float() if flat.dtype.itemsize < 4 else flat.clone()

    def run(self, search: Callable[[LossAt], T], dtype: torch.dtype) -> T:
        """``search(loss_at)``; every process sees the same losses, and so searches alike."""
        before = [local(parameter).clone() for parameter in self.parameters]
        buffers = list(self._model.buffers())
        kept = [buffer.clone() for buffer in buffers]

        def loss_at(offsets: Offsets) -> float:
            self._place(before)
            for factor, vector in offsets:
                for parameter, part in zip(self.parameters, vector.split(self._sizes), strict=True):
                    here = local(parameter)
                    here.add_(part.view_as(here), alpha=factor)
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
            seed_all(self._seed)
            loss = _scalar(self._loss_fn(self._model, self._batch))
            if is_sharded(loss):
                loss = loss.full_tensor()  # type: ignore[attr-defined]
            whole = loss.detach().double().clone()
            dist.all_reduce(whole, group=self._group)
            self._reshard()
            return float(whole) / dist.get_world_size(self._group)

        with torch.no_grad(), computing("the loss"), own_random_state(self._seed):
            try:
                with attributes_of(self._model, self._mode):
                    return search(loss_at)
            finally:
                self._place(before)
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
                self._reshard()

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Of two vectors (N,) that lie over all processes."""
        found = torch.dot(a, b).double()
        dist.all_reduce(found, group=self._group)
        return float(found)

    def _place(self, parts: Iterable[Tensor]) -> None:
        self._reshard()
        for parameter, part in zip(self.parameters, parts, strict=True):
            here = local(parameter)
            here.copy_(part.view_as(here))

    def _reshard(self) -> None:
        """Whole weights that FSDP has gathered are let go: a later pass would read them in place of the moved ones."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f"the loss is {found}; expected a scalar tensor.")
    return loss


def _group_of(named: list[tuple[str, nn.Parameter]]) -> Any:
    """The one group of processes that all of the parameters are sharded over."""
    from torch.distributed.tensor import DTensor, Shard

    groups = {}
    for name, parameter in named:
        placed = parameter.placements if isinstance(parameter, DTensor) else ()
        if not isinstance(parameter, DTensor) or len(placed) != 1 or not isinstance(placed[0], Shard):
            raise UnsupportedModelError(
                f"parameter {name} is placed as {placed or 'whole'}; expected every trained parameter sharded over one mesh "
                f"dimension, as fully_shard does on the whole model."
            )
        group = parameter.device_mesh.get_group()
        groups[group.group_name] = group
    if len(groups) > 1:
        raise UnsupportedModelError(f"the parameters are sharded over {len(groups)} groups; expected one for all.")
    return next(iter(groups.values()))
