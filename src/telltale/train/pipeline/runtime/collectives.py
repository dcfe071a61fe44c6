"""The process groups of a plan: which ranks talk to each other, and a check that all have the same plan.

Each direction between stages has a group of its own, replicas of a stage share one to average their gradients in, and so do
the stages that share a weight. Every rank creates all of them in the same order, each with the trainer's time-out.

How gradients come together before an update: over the replicas of a stage, over stages that share a weight, and over
the whole model for its norm.

Replicas are averaged with one flat all-reduce, or, with ``reduction="ordered"``, summed in the order of the replicas so
that the result does not depend on the backend's ring. The sums across stages run in the background: a stage that is ahead
waits for the others only when it needs the new version.

Weights that several stages use, such as a tied embedding and head: each stage has its own copy, so the copies stay equal only
if every one of them takes the same step: the sum of all owners' gradients, at the same update. Policies that update every
stage once per batch can do that; under stashing the stages step at different times with gradients of different minibatches,
and sharing is refused instead of silently undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from telltale.errors import NumericalError, PlanError
from telltale.train.pipeline.layers import LayeredModel, share_of_terms
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.failures import FlightRecord, default_device
from telltale.train.pipeline.runtime.links import Link, RankPlacement
from telltale.train.pipeline.runtime.optimizer import gradient_norms
from telltale.train.pipeline.runtime.stage import Stage
from telltale.train.pipeline.schedule import Policy, policy_of


class World:
    """All ranks of a job, which were given the same model and plan.

    ``processes`` is how many the plan needs. Raises :class:`~telltale.errors.PlanError` on every rank if model, plan and number
    of processes do not fit or ranks differ in them, and
    :class:`~telltale.train.pipeline.runtime.failures.RankFailure` if a rank does not come within ``timeout`` seconds.
    """

    def __init__(self, model: LayeredModel, plan: Plan, processes: int, record: FlightRecord, timeout: float) -> None:
        self.model, self.plan, self.record = model, plan, record
        self._wait = timedelta(seconds=timeout)
        self.world: dist.ProcessGroup | None = self.new_group(None) if record.world > 1 else None
        problem = _misfit(model, plan, processes, record.world)
        cuts = tuple((stage.layers, stage.replicas) for stage in plan.stages)
        views = self.all_gather_object((problem, model.fingerprint, cuts, plan.policy, plan.microbatches))
        problems = [view[0] for view in views if view[0]]
        if not problems and any(view[1:] != views[0][1:] for view in views):
            problems = ["ranks were given different models or plans; expected the same on every rank."]
        if problems:
            raise PlanError(problems[0])

    def new_group(self, ranks: list[int] | None) -> dist.ProcessGroup:
        """A group of ``ranks`` (None: all) with this job's time-out; every rank makes it."""
        with self.record.waiting("the other ranks to start", None):
            group = dist.new_group(ranks, timeout=self._wait)
        self.record.ends(group)
        return group

    def broadcast_object(self, value: Any) -> Any:
        """The ``value`` that rank 0 gave, on every rank."""
        if self.world is None:
            return value
        sent = [value]
        with self.record.waiting("word from the first rank", None):
            dist.broadcast_object_list(sent, src=0, group=self.world)
        return sent[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What every rank gave as ``value``, in the order of the ranks, on every rank."""
        if self.world is None:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size(self.world)
        with self.record.waiting("word from all ranks", None):
            dist.all_gather_object(gathered, value, group=self.world)
        return gathered

    def agree(self, **settings: Any) -> None:
        """Raise :class:`~telltale.errors.PlanError` on every rank, naming the first setting that they do not share."""
        views = self.all_gather_object(settings)
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
        self.terms: dist.ProcessGroup | None = None
        if self.world is None:
            return
        self.values, self.gradients = self.new_group(None), self.new_group(None)
        for number, count in enumerate(plan.replicas):
            if count > 1:
                self.replicas[number] = self.new_group(self._ranks(number))
        if plan.replicas[-1] > 1:
            # Not the group that averages gradients: the replicas may count the terms of a batch and average an earlier one in
            # another order.
            self.terms = self.new_group(self._ranks(len(plan.stages) - 1))
        for owners in sorted(set(self.ties.values())):
            self.owners[owners] = self.new_group([rank for owner in owners for rank in self._ranks(owner)])

    def equalise(self, stage: Stage, number: int) -> None:
        """Give every replica the weights and buffers of the stage's first one, and every copy of a shared weight the values of
        the first stage that has it."""
        group = self.replicas[number]
        if group is not None:
            for tensor in (*stage.parameters(), *stage.buffers()):
                with self.record.waiting("the weights of the stage's first replica", self.plan.rank(number, 0)):
                    dist.broadcast(tensor.data, self.plan.rank(number, 0), group=group)
        own = {name: parameter for parameter, name in zip(stage.parameters(), stage.names.values(), strict=True)}
        for name, owners in sorted(self.ties.items()):
            if number in owners:
                source = self.plan.rank(owners[0], 0)
                with self.record.waiting(f"the shared weight {name}", source):
                    dist.broadcast(own[name].data, source, group=self.owners[owners])

    def check_equal(self, stage: Stage, number: int) -> None:
        """Compare digests of what must be the same to the last bit: weights and buffers of a stage's replicas, and the copies of
        shared weights. Raises :class:`~telltale.errors.NumericalError` on every rank of the group, naming the tensor."""
        group = self.replicas[number]
        if group is not None:
            named = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
            self._compare(named, group, f"the replicas of stage {number}")
        own = {stage.names[local]: parameter for local, parameter in stage.named_parameters()}
        for owners in sorted(set(self.ties.values())):
            if number in owners:
                shared = {name: own[name] for name, stages in sorted(self.ties.items()) if stages == owners}
                self._compare(shared, self.owners[owners], f"the copies on stages {', '.join(map(str, owners))}")

    def _compare(self, named: Mapping[str, Tensor], group: dist.ProcessGroup, who: str) -> None:
        digests = torch.stack([_digest(tensor) for tensor in named.values()]) if named else torch.zeros(0)
        if not digests.numel():
            return
        parts = [torch.empty_like(digests) for _ in range(dist.get_world_size(group))]
        with self.record.waiting(f"the digests of {who}", None):
            dist.all_gather(parts, digests, group=group)
        unequal = [
            name for place, name in enumerate(named) if any(bool(part[place] != parts[0][place]) for part in parts)
        ]
        if unequal:
            raise NumericalError(
                f"{who} differ in {unequal[0]}; expected the same bits on all of them. A buffer that a forward moves (other than "
                f"the running statistics of a batch norm) or code that acts on one rank alone does this."
            )

    def place(self, number: int, replica: int, device: torch.device) -> RankPlacement:
        """The links of one rank."""

        def links(stage: int, group: dist.ProcessGroup | None, what: str) -> tuple[Link, ...]:
            if not 0 <= stage < len(self.plan.stages):
                return ()
            assert group is not None
            return tuple(Link(peer, group, self.record, device, what=what) for peer in self._ranks(stage))

        return RankPlacement(
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
            terms_group=self.terms if number == len(self.plan.replicas) - 1 else None,
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


def _digest(tensor: Tensor) -> Tensor:
    """Sum of the tensor's words as integers, int64 of shape (): equal bits have equal digests."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous()
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    return flat.view(words[flat.element_size()]).sum(dtype=torch.int64)


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
    synchronised = [name for name, part in model.root.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    if synchronised:
        return (
            f"{synchronised[0]} is a SyncBatchNorm, which would wait for the ranks of other stages; expected a plain batch norm, "
            f"whose running statistics move alike on all replicas of a stage."
        )
    return _norm_on_two_stages(model, plan)


def _norm_on_two_stages(model: LayeredModel, plan: Plan) -> str | None:
    """A norm that layers of several stages share would have running statistics of its own on each of them."""
    found: dict[int, int] = {}
    names = {id(part): name for name, part in model.root.named_modules()}
    for number, stage in enumerate(plan.stages):
        for part in {part for index in stage.layers for part in model.layers[index].module.modules()}:
            moves = isinstance(part, _NormBase) and part.track_running_stats and part.running_mean is not None
            if moves and found.setdefault(id(part), number) != number:
                return (
                    f"{names.get(id(part), type(part).__name__)} runs on the stages {found[id(part)]} and {number}, and its "
                    f"running statistics cannot be on both; expected a plan that keeps its uses on one stage, or one norm per use."
                )
    return None


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
        terms_group: dist.ProcessGroup | None,
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
        self._replica_order, self._terms_group = replica_order, terms_group
        self._world_group, self._tie_groups = world_group, tie_groups
        self._norm_slots, self._n_norms = norm_slots, n_norms
        self._ordered = ordered
        self._device = device
        self.bytes = 0

    def gathered(self, own: Tensor) -> list[Tensor]:
        """What every replica of the stage gave, tensors of one shape in the order of the replicas."""
        if self._replica_group is None:
            return [own]
        moved = own.to(self._device)
        parts = [torch.empty_like(moved) for _ in range(self._replicas)]
        self.bytes += (self._replicas - 1) * moved.nbytes
        self._safely(
            lambda: dist.all_gather(parts, moved, group=self._replica_group), "a number of each of the other replicas"
        )
        return [parts[place].cpu() for place in self._replica_order]

    def count(self, terms: float) -> Callable[[], float]:
        """Begin to sum ``terms`` over the replicas; calling the result waits for the sum."""
        if self._terms_group is None:
            return lambda: terms
        total = torch.tensor(terms, dtype=torch.float64, device=self._device)
        work = dist.all_reduce(total, group=self._terms_group, async_op=True)
        self.bytes += 2 * (self._replicas - 1) * total.nbytes // self._replicas

        def wait() -> float:
            self._safely(work.wait, "the number of labels that the other replicas have")
            return float(total)

        return wait

    def average(self, terms: float | None = None, minibatches: tuple[int, int] = (0, 0)) -> None:
        """Sum the parameters' gradients over the replicas of the stage.

        With ``terms``, those of this replica's loss in the round ``minibatches`` (first, last), 0 if it had no minibatch in it, the
        result is the mean over the terms of all replicas. Raises :class:`~telltale.errors.DataError` on every replica if there is
        no term.
        """
        if self._replicas == 1 or not self.parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if terms is not None:
            total = sum(float(given) for given in self.gathered(torch.tensor(terms, dtype=torch.float64)))
            flat *= share_of_terms(terms, total, *minibatches)
        self.bytes += 2 * (self._replicas - 1) * flat.numel() * flat.element_size() // self._replicas
        flat = self._safely(lambda: self._summed(flat), "the gradients of the other replicas")
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
            # The norm is that of the summed gradients. A stage that put it off until it needs the new version might then be
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


def tied_groups(model: LayeredModel, plan: Plan, policy: Policy) -> dict[str, tuple[int, ...]]:
    """Unsplit name -> stages, for every trainable parameter on more than one stage.

    Raises :class:`~telltale.errors.PlanError` if there is one and the policy lets stages update at different times.
    """
    stage_of = {layer: number for number, stage in enumerate(plan.stages) for layer in stage.layers}
    trainable = {name for name, parameter in model.root.named_parameters() if parameter.requires_grad}
    groups = {}
    for name, layers in model.shared_parameters().items():
        stages = tuple(sorted({stage_of[layer] for layer in layers}))
        if len(stages) > 1 and name in trainable:
            groups[name] = stages
    if groups and not policy.synchronous:
        name, stages = next(iter(groups.items()))
        raise PlanError(
            f"{name} is shared by stages {', '.join(map(str, stages))}, which policy {policy.name!r} updates at different "
            f"times; expected vertical, 2bw, flush or gpipe, a plan that keeps them on one stage, or untie(model) first."
        )
    return groups


def untie(model: nn.Module) -> list[str]:
    """Give every later use of a shared parameter a copy of its own; returns the names that were untied.

    The configuration of a Hugging Face model records it, so that saving it keeps both.
    """
    untied = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
                untied.append(f"{prefix}.{name}" if prefix else name)
            seen.add(id(parameter))
    config = getattr(model, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return untied
