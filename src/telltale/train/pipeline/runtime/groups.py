"""The process groups of a plan: who talks to whom, and that all ranks were given the same plan.

Each direction between stages has a group of its own, replicas of a stage share one to average their gradients in, and so do
the stages that share a weight. Every rank creates all of them in the same order, each with the trainer's time-out.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from telltale.errors import PlanError
from telltale.train.pipeline.layered import LayeredModel
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.policies import policy_of
from telltale.train.pipeline.runtime.faults import FlightRecord
from telltale.train.pipeline.runtime.gradients import GradientExchange
from telltale.train.pipeline.runtime.joining import default_device
from telltale.train.pipeline.runtime.links import Link
from telltale.train.pipeline.runtime.stage import Stage
from telltale.train.pipeline.runtime.ties import tied_groups
from telltale.train.pipeline.runtime.worker import Place


class World:
    """All ranks of a job, which were given the same model and plan.

    ``processes`` is how many the plan needs. Raises :class:`~telltale.errors.PlanError` on every rank if model, plan and number
    of processes do not fit or ranks differ in them, and
    :class:`~telltale.train.pipeline.runtime.faults.RankFailure` if a rank does not come within ``timeout`` seconds.
    """

    def __init__(self, model: LayeredModel, plan: Plan, processes: int, record: FlightRecord, timeout: float) -> None:
        self.model, self.plan, self.record = model, plan, record
        self._wait = timedelta(seconds=timeout)
        self.world: dist.ProcessGroup | None = self.new_group(None) if record.world > 1 else None
        problem = _misfit(model, plan, processes, record.world)
        cuts = tuple((stage.layers, stage.replicas) for stage in plan.stages)
        views = self.told_by_all((problem, model.fingerprint, cuts, plan.policy, plan.microbatches))
        told = [view[0] for view in views if view[0]]
        if not told and any(view[1:] != views[0][1:] for view in views):
            told = ["ranks were given different models or plans; expected the same on every rank."]
        if told:
            raise PlanError(told[0])

    def new_group(self, ranks: list[int] | None) -> dist.ProcessGroup:
        """A group of ``ranks`` (None: all) with this job's time-out; every rank makes it."""
        with self.record.waiting("the other ranks to start", None):
            return dist.new_group(ranks, timeout=self._wait)

    def told_by_first(self, value: Any) -> Any:
        """The ``value`` that rank 0 gave, on every rank."""
        if self.world is None:
            return value
        told = [value]
        with self.record.waiting("word from the first rank", None):
            dist.broadcast_object_list(told, src=0, group=self.world)
        return told[0]

    def told_by_all(self, value: Any) -> list[Any]:
        """What every rank gave as ``value``, in the order of the ranks, on every rank."""
        if self.world is None:
            return [value]
        told: list[Any] = [None] * dist.get_world_size(self.world)
        with self.record.waiting("word from all ranks", None):
            dist.all_gather_object(told, value, group=self.world)
        return told

    def agree(self, **settings: Any) -> None:
        """Raise :class:`~telltale.errors.PlanError` on every rank, naming the first setting that they do not share."""
        views = self.told_by_all(settings)
        for name in settings:
            given = [view[name] for view in views]
            if any(value != given[0] for value in given):
                raise PlanError(f"ranks were given different {name}: {given}; expected the same on every rank.")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world is not None:
            with self.record.waiting("all ranks to come", None):
                dist.barrier(self.world)


class Groups(World):
    """Process groups of ``plan``, one rank per replica of a stage, seen from one rank. Raises what :class:`World` does."""

    def __init__(self, model: LayeredModel, plan: Plan, record: FlightRecord, timeout: float) -> None:
        super().__init__(model, plan, plan.workers, record, timeout)
        self.ties = tied_groups(model, plan, policy_of(plan))
        self.values: dist.ProcessGroup | None = None
        self.gradients: dist.ProcessGroup | None = None
        self.replicas: list[dist.ProcessGroup | None] = [None] * len(plan.stages)
        self.owners: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if self.world is None:
            return
        self.values, self.gradients = self.new_group(None), self.new_group(None)
        for number, count in enumerate(plan.replicas):
            if count > 1:
                self.replicas[number] = self.new_group(self._ranks(number))
        for owners in sorted(set(self.ties.values())):
            self.owners[owners] = self.new_group([rank for owner in owners for rank in self._ranks(owner)])

    def equalise(self, stage: Stage, number: int) -> None:
        """Give every replica the weights and buffers of the stage's first one."""
        group = self.replicas[number]
        if group is not None:
            for tensor in (*stage.parameters(), *stage.buffers()):
                with self.record.waiting("the weights of the stage's first replica", self.plan.rank(number, 0)):
                    dist.broadcast(tensor.data, self.plan.rank(number, 0), group=group)

    def place(self, number: int, replica: int, device: torch.device) -> Place:
        """The links of one rank."""

        def links(stage: int, group: dist.ProcessGroup | None, what: str) -> tuple[Link, ...]:
            if not 0 <= stage < len(self.plan.stages):
                return ()
            assert group is not None
            return tuple(Link(peer, group, self.record, device, what=what) for peer in self._ranks(stage))

        return Place(
            number,
            replica,
            values_in=links(number - 1, self.values, "activations"),
            values_out=links(number + 1, self.values, "activations"),
            gradients_in=links(number + 1, self.gradients, "gradients"),
            gradients_out=links(number - 1, self.gradients, "gradients"),
        )

    def exchange(
        self, named: dict[str, nn.Parameter], number: int, replica: int, *, ordered: bool, device: torch.device
    ) -> GradientExchange:
        """The gradient collectives of one rank."""
        order = [name for name, parameter in self.model.root.named_parameters() if parameter.requires_grad]
        first = {name: owners[0] for name, owners in self.ties.items()}
        slots = {name: slot for slot, name in enumerate(order) if first.get(name, number) == number}
        tie_groups = {
            name: (self.owners[owners], _order([rank for owner in owners for rank in self._ranks(owner)]))
            for name, owners in self.ties.items()
            if number in owners
        }
        return GradientExchange(
            [(name, parameter) for name, parameter in named.items() if parameter.requires_grad],
            record=self.record,
            replicas=self.plan.replicas[number],
            replica=replica,
            replica_group=self.replicas[number],
            world_group=self.world,
            replica_order=_order(self._ranks(number)),
            tie_groups=tie_groups,
            norm_slots={name: slot for name, slot in slots.items() if name in named},
            n_norms=len(order),
            ordered=ordered,
            device=device,
        )

    def losses(self, own: dict[int, float], start: int, stop: int) -> list[float]:
        """The losses of [start, stop), which the last stage has, on every rank."""
        values = torch.zeros(max(0, stop - start), dtype=torch.float64)
        for minibatch, loss in own.items():
            values[minibatch - start] = loss
        if self.world is not None and values.numel():
            moved = values.to(default_device()) if dist.get_backend(self.world) == "nccl" else values
            with self.record.waiting("the losses of the last stage", None):
                dist.all_reduce(moved, group=self.world)
            values = moved.cpu()
        return values.tolist()

    def _ranks(self, stage: int) -> list[int]:
        return [self.plan.rank(stage, replica) for replica in range(self.plan.replicas[stage])]


def _order(ranks: list[int]) -> list[int]:
    """Where a process group of ``ranks``, which torch sorts, has each of them."""
    return [sorted(ranks).index(rank) for rank in ranks]


def _misfit(model: LayeredModel, plan: Plan, processes: int, world: int) -> str | None:
    if world != processes:
        return f"the plan {plan.describe()} needs {processes} processes and {world} were started; expected {processes}."
    if plan.n_layers != len(model.layers):
        return f"the plan has {plan.n_layers} layers and the model {len(model.layers)}; expected as many."
    if plan.fingerprint is not None and plan.fingerprint != model.fingerprint:
        return (
            f"the plan was made for another model (fingerprint {plan.fingerprint}, this one {model.fingerprint}); "
            f"profile and plan this model."
        )
    return None
