"""How gradients come together before an update: over the replicas of a stage, over stages that share a weight, and over
the whole model for its norm.

Replicas are averaged with one flat all-reduce, or, with ``reduction="ordered"``, summed in the order of the replicas so
that the result does not depend on the backend's ring. The sums across stages run in the background: a stage that is ahead
waits for the others only when it needs the new version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from telltale.train.pipeline.runtime.faults import FlightRecord
from telltale.train.pipeline.runtime.updates import gradient_norms


@dataclass
class Pending:
    """Gradients of one update that wait for other stages."""

    version: int
    minibatch: int
    gradients: list[Tensor | None]
    ties: list[tuple[int, dist.Work, list[Tensor]]] = field(default_factory=list)
    """(parameter's index, work, terms of the sum in the order of the stages; the sum alone if the backend adds)."""
    norms: Tensor | None = None
    norms_work: dist.Work | None = None


class GradientExchange:
    """The collectives of one rank. ``named``: (unsplit name, trainable parameter) pairs of its stage.

    ``replica_order`` and the second of ``tie_groups`` are where a group, which counts by rank, has each replica or owner.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        *,
        record: FlightRecord,
        replicas: int,
        replica: int,
        replica_group: dist.ProcessGroup | None,
        world_group: dist.ProcessGroup | None,
        replica_order: Sequence[int],
        tie_groups: Mapping[str, tuple[dist.ProcessGroup, Sequence[int]]],
        norm_slots: dict[str, int],
        n_norms: int,
        ordered: bool,
        device: torch.device,
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._record = record
        self._replicas, self._replica, self._replica_group = replicas, replica, replica_group
        self._replica_order = replica_order
        self._world_group, self._tie_groups = world_group, tie_groups
        self._norm_slots, self._n_norms = norm_slots, n_norms
        self._ordered = ordered
        self._device = device
        self.bytes = 0

    def average(self, present: int | None) -> None:
        """Sum the parameters' gradients over the replicas of the stage, divided by ``present`` if given."""
        if self._replicas == 1 or not self.parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.bytes += 2 * (self._replicas - 1) * flat.numel() * flat.element_size() // self._replicas
        flat = self._safely(lambda: self._summed(flat), "the gradients of the other replicas")
        if present is not None:
            flat.div_(present)
        offset = 0
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = flat[offset : offset + gradient.numel()].view_as(gradient)
            offset += gradient.numel()

    def start(self, version: int, minibatch: int, *, clip: bool) -> Pending:
        """Take the gradients off the parameters and begin what the other stages must contribute to."""
        pending = Pending(version, minibatch, [parameter.grad for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        for index, name in enumerate(self.names):
            if name in self._tie_groups:
                group, order = self._tie_groups[name]
                shared = pending.gradients[index]
                total = torch.zeros_like(self.parameters[index]) if shared is None or self._replica else shared.clone()
                if self._ordered:
                    terms = [torch.empty_like(total) for _ in range(dist.get_world_size(group))]
                    work = dist.all_gather(terms, total, group=group, async_op=True)
                    terms = [terms[place] for place in order]
                else:
                    terms = [total]
                    work = dist.all_reduce(total, group=group, async_op=True)
                pending.ties.append((index, work, terms))
        if clip:
            # The norm is that of the summed gradients. Whoever put it off until it needs the new version might then be
            # waiting for a minibatch from a stage that waits for this norm.
            self._finish_ties(pending)
            self._start_norms(pending)
        return pending

    def finish(self, pending: Pending) -> Tensor | None:
        """Wait for the other stages, put the gradients back; returns the norms of the whole model if they were started."""
        self._finish_ties(pending)
        if pending.norms_work is not None:
            self._safely(pending.norms_work.wait, "the gradient norms of the other stages")
        for parameter, gradient in zip(self.parameters, pending.gradients, strict=True):
            parameter.grad = gradient
        return pending.norms

    def _finish_ties(self, pending: Pending) -> None:
        for index, work, terms in pending.ties:
            self._safely(lambda work=work: work.wait(), f"the shared gradient of {self.names[index]}")  # type: ignore[misc]
            total = terms[0]
            for term in terms[1:]:
                total += term
            pending.gradients[index] = total
        pending.ties = []

    def _start_norms(self, pending: Pending) -> None:
        norms = torch.zeros(self._n_norms)
        if self._replica == 0 and self.parameters:
            for name, norm in zip(self.names, gradient_norms(pending.gradients), strict=False):
                if name in self._norm_slots:
                    norms[self._norm_slots[name]] = norm
        pending.norms = norms.to(self._device)
        if self._world_group is not None:
            pending.norms_work = dist.all_reduce(pending.norms, group=self._world_group, async_op=True)

    def _summed(self, flat: Tensor) -> Tensor:
        if not self._ordered:
            dist.all_reduce(flat, group=self._replica_group)
            return flat
        parts = [torch.empty_like(flat) for _ in range(self._replicas)]
        dist.all_gather(parts, flat, group=self._replica_group)
        first, *others = [parts[place] for place in self._replica_order]
        for part in others:
            first += part
        return first

    def _safely(self, call: Callable[[], object], what: str) -> Tensor:
        with self._record.waiting(what, None):
            return call()  # type: ignore[return-value]
