"""Synchronous plans on the schedules of ``torch.distributed.pipelining``: GPipe, 1F1B, interleaved 1F1B and zero bubble.

The stages, losses, random numbers and optimizers are ours, the order of operations and the messages are torch's; what comes
out is the ``flush`` reference to the last bit. Interleaved plans run here alone: with c chunks per worker, stage k is on
worker k mod W (Megatron-LM, arXiv 2104.04473, section 2.2). torch lets weights that stages share drift apart; here their
gradients are summed before the step. Out of scope, since torch's schedules have no place for them: replicated stages,
batches of another size at the end, shapes that change, and every policy that keeps old versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from telltale.errors import NumericalError, PlanError
from telltale.train.pipeline.layers import LayeredModel, as_layered, share_of_terms, weighted_mean
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.collectives import World, tied_groups
from telltale.train.pipeline.runtime.failures import FlightRecord, default_device, rendezvous
from telltale.train.pipeline.runtime.links import different_minibatches
from telltale.train.pipeline.runtime.optimizer import OptimizerFactory, Schedule, StageOptimizer, clip, gradient_norms
from telltale.train.pipeline.runtime.stage import Stage, WeightVersions
from telltale.train.pipeline.runtime.worker import Batches
from telltale.train.pipeline.schedule import Policy
from telltale.train.pipeline.stage_checkpoint import StagePart, on_all_ranks
from telltale.train.pipeline.stage_weights import read_stage

_SINGLE: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "flush": Schedule1F1B}


def torch_schedule(
    stages: Sequence[PipelineStage], plan: Plan, loss: Callable[[Any, Any], Tensor], *, zero_bubble: bool = False
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """torch's schedule for ``plan`` and this worker's ``stages``; ``loss`` must be scaled already (``scale_grads`` is off).

    gpipe: ``ScheduleGPipe``; flush: ``Schedule1F1B``; interleaved: ``ScheduleInterleaved1F1B``, or with ``zero_bubble``
    ``ScheduleInterleavedZeroBubble``. Raises what :func:`check_plan` raises.
    """
    check_plan(plan, zero_bubble=zero_bubble)
    if plan.policy in _SINGLE:
        return _SINGLE[plan.policy](stages[0], plan.microbatches, loss_fn=loss, scale_grads=False)
    kind = ScheduleInterleavedZeroBubble if zero_bubble else ScheduleInterleaved1F1B
    return kind(list(stages), plan.microbatches, loss_fn=loss, scale_grads=False)


def check_plan(plan: Plan, *, zero_bubble: bool = False) -> int:
    """Workers that ``plan`` needs here. Raises :class:`~telltale.errors.PlanError` if torch's schedules cannot run it."""
    stages, m = len(plan.stages), plan.microbatches
    if plan.policy not in (*_SINGLE, "interleaved"):
        raise PlanError(f"policy {plan.policy!r} is none of torch's schedules; expected gpipe, flush or interleaved.")
    if max(plan.replicas) > 1:
        raise PlanError(
            f"the plan {plan.describe()} has replicated stages; expected one replica each for torch's schedules."
        )
    if zero_bubble and plan.policy != "interleaved":
        raise PlanError(f"zero_bubble needs policy 'interleaved', not {plan.policy!r}.")
    if stages % plan.chunks:
        raise PlanError(
            f"{stages} stages in {plan.chunks} chunks per worker; expected a multiple of {plan.chunks} stages."
        )
    workers = stages // plan.chunks
    if plan.policy == "flush" and m < workers:
        raise PlanError(
            f"microbatches={m} is too few for torch's 1F1B on {workers} stages; expected at least {workers}."
        )
    rounds = max(1, m // workers)
    if plan.policy == "interleaved" and m % rounds:
        raise PlanError(
            f"microbatches={m} does not divide into {rounds} rounds on {workers} workers; expected {rounds}k."
        )
    return workers


class TorchPipelineTrainer:
    """This rank's part of a synchronous ``plan`` on torch's schedules; arguments as for
    :class:`~telltale.train.pipeline.trainer.PipelineTrainer`.

    Raises :class:`~telltale.errors.PlanError` on every rank if plan, model and number of processes do not fit, or torch's
    schedules cannot run the plan.
    """

    def __init__(
        self,
        model: LayeredModel | nn.Sequential,
        plan: Plan,
        *,
        optimizer: OptimizerFactory,
        loss: Callable[[Any, Any], Tensor] | None = None,
        schedule: Schedule | None = None,
        grad_clip: float | None = None,
        zero_bubble: bool = False,
        recompute: bool | None = None,
        seed: int = 0,
        timeout: float = 300.0,
        device: torch.device | str | None = None,
        weights: str | Path | None = None,
    ) -> None:
        self.model, self.plan = as_layered(model, loss), plan
        workers = check_plan(plan, zero_bubble=zero_bubble)
        if workers < 2:
            raise PlanError(
                f"the plan {plan.describe()} has one worker; expected at least two for a pipeline of torch's."
            )
        self.rank, world = rendezvous(timeout)
        self.device = torch.device(device) if device is not None else default_device()
        self.record = FlightRecord(self.rank, timeout, world=world)
        self.groups = World(self.model, plan, workers, self.record, timeout)
        self.minibatch = 0
        """The next minibatch."""
        self._grad_clip = grad_clip
        self.policy = policy = Policy("flush", plan.replicas, plan.microbatches)
        self._ties = tied_groups(self.model, plan, policy)
        own = range(self.rank, len(plan.stages), workers)
        if weights is not None:
            on_all_ranks(self, lambda: self._read(own, weights))
        self.stages = [
            _Chunk(
                Stage(
                    self.model,
                    plan.stages[number].layers[0],
                    plan.stages[number].layers[-1] + 1,
                    seed=seed,
                    recompute=plan.recompute if recompute is None else recompute,
                ).to(self.device)
            )
            for number in own
        ]
        self._named = {
            number: self.model.parameter_names(chunk.stage.first, chunk.stage.stop)
            for number, chunk in zip(own, self.stages, strict=True)
        }
        self.optimizers = [
            StageOptimizer(optimizer, named.items(), policy=policy, stage=number, schedule=schedule)
            for number, named in self._own_parameters().items()
        ]
        self._versions = [WeightVersions(chunk.stage, policy, n) for n, chunk in zip(own, self.stages, strict=True)]
        pipelined = [
            PipelineStage(chunk, number, len(plan.stages), self.device, group=self.groups.world)
            for number, chunk in zip(own, self.stages, strict=True)
        ]
        self._shares: dict[int, float] = {}
        self.schedule = torch_schedule(
            pipelined, plan, lambda output, t: output * self._shares[int(t)], zero_bubble=zero_bubble
        )
        self._equalise_ties()

    def train(self, batches: Callable[[int], Any] | Sequence[Any], *, stop: int) -> list[float]:
        """Train on the minibatches from :attr:`minibatch` to ``stop - 1``; returns their losses, on every rank.

        Raises :class:`~telltale.errors.PlanError` unless ``stop`` ends a batch, :class:`~telltale.errors.NumericalError` for
        a loss that is not finite, :class:`~telltale.train.pipeline.runtime.failures.RankFailure` if another rank fails.
        """
        m = self.plan.microbatches
        if stop % m:
            raise PlanError(f"stop={stop} is inside a batch; expected a multiple of {m} minibatches.")
        source, losses = Batches(batches, self.model.weight, self.device), []
        while self.minibatch < stop:
            with self.record.published():
                losses += self._batch(source, list(range(self.minibatch, self.minibatch + m)))
            self.minibatch += m
        return losses

    @property
    def parts(self) -> list[StagePart]:
        """What this rank contributes to a checkpoint."""
        columns = zip(self._named, self.stages, self._versions, self.optimizers, strict=True)
        return [StagePart(number, 0, chunk.stage, versions, own) for number, chunk, versions, own in columns]

    def evaluate(self, batches: Callable[[int], Any] | Sequence[Any], count: int) -> float:
        """As :meth:`~telltale.train.pipeline.trainer.PipelineTrainer.evaluate`; one minibatch after the other."""
        source = Batches(batches, self.model.weight, self.device)
        losses, terms = [0.0] * count, [0.0] * count
        for chunk in self.stages:
            chunk.eval()
        with torch.no_grad(), self.record.published():
            for t in range(count):
                for number, chunk in zip(self._named, self.stages, strict=True):
                    outputs = self._forward(number, chunk.stage, source, t)
                    if chunk.stage.is_last:
                        losses[t], terms[t] = float(outputs[0]), source.terms(t)
                source.release(t)
            return weighted_mean(self._on_every_rank(losses), self._on_every_rank(terms))

    def _forward(self, number: int, stage: Stage, source: Batches, minibatch: int) -> tuple[Tensor, ...]:
        """One stage of an evaluation: values from the stage before, handed on to the next."""
        workers, batch = self.plan.processes, source(minibatch)
        box: list[Any] = [None]
        if stage.is_first:
            values = self.model.inputs(batch)
        else:
            with self.record.waiting(f"the values of minibatch {minibatch}", (number - 1) % workers):
                dist.recv_object_list(box, (number - 1) % workers, group=self.groups.world, device=self.device)
            values = box[0]
        outputs = stage(values, batch, minibatch, source.terms(minibatch) if stage.is_last else None)
        if not stage.is_last:
            with self.record.waiting(f"minibatch {minibatch} to be taken", (number + 1) % workers):
                dist.send_object_list([outputs], (number + 1) % workers, group=self.groups.world, device=self.device)
        return outputs

    def _read(self, own: Iterable[int], weights: str | Path) -> None:
        for number in own:
            layers = self.plan.stages[number].layers
            read_stage(self.model, layers[0], layers[-1] + 1, weights)

    def _batch(self, batches: Batches, minibatches: list[int]) -> list[float]:
        """One batch of m minibatches and its update."""
        for chunk in self.stages:
            chunk.train()
            chunk.batches, chunk.losses = batches, {}
        self.record.note(f"minibatches {minibatches[0]} to {minibatches[-1]}")
        self._check_minibatches(batches, minibatches)
        if self.stages[-1].stage.is_last:
            total = sum(batches.terms(t) for t in minibatches)
            ends = minibatches[0], minibatches[-1]
            self._shares = {t: share_of_terms(batches.terms(t), total, *ends) for t in minibatches}
        numbers = torch.tensor(minibatches)
        entering = (numbers,) if self.stages[0].stage.is_first else ()
        leaving: dict[str, Any] = {"target": numbers} if self.stages[-1].stage.is_last else {}
        try:
            self.schedule.step(*entering, minibatch=numbers, return_outputs=False, **leaving)
        except RuntimeError as error:
            if error.__cause__ is not None:
                raise error.__cause__ from None
            if _is_of_the_network(error):
                raise self.record.failure("the neighbouring stages", None, error) from error
            raise
        own = {t: loss for chunk in self.stages for t, loss in chunk.losses.items()}
        losses = self._on_every_rank([own.get(t, 0.0) for t in minibatches])
        for t, loss in zip(minibatches, losses, strict=True):
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the loss of minibatch {t} is {loss} (policy {self.plan.policy}); expected a finite number."
                )
            batches.release(t)
        self._update(minibatches[-1])
        return losses

    def _update(self, last: int) -> None:
        self._sum_ties()
        version = last // self.plan.microbatches + 1
        if self._grad_clip:
            norms = self._norms()
            for optimizer in self.optimizers:
                clip([parameter.grad for parameter in optimizer.parameters], norms, self._grad_clip)
        for optimizer, versions in zip(self.optimizers, self._versions, strict=True):
            versions.advance(partial(optimizer.step, last, version))

    def _equalise_ties(self) -> None:
        """Start every copy of a weight that workers share from the values of the first of them."""
        workers = len(self.plan.stages) // self.plan.chunks
        whole = dict(self.model.root.named_parameters())
        for name, stages in sorted(self._ties.items()):
            value = torch.empty_like(whole[name], device=self.device)
            if not whole[name].is_meta:
                value.copy_(whole[name].data)
            with self.record.waiting(f"the shared weight {name}", stages[0] % workers):
                dist.broadcast(value, stages[0] % workers, group=self.groups.world)
            if not whole[name].is_meta:
                whole[name].data.copy_(value)

    def _check_minibatches(self, batches: Batches, minibatches: list[int]) -> None:
        digests = torch.tensor([batches.digest(t) for t in minibatches], device=self.device)
        parts = [torch.empty_like(digests) for _ in range(self.record.world)]
        with self.record.waiting("the digests of the minibatches", None):
            dist.all_gather(parts, digests, group=self.groups.world)
        for rank, part in enumerate(parts):
            for place, t in enumerate(minibatches):
                if part[place] != parts[0][place]:
                    raise different_minibatches(0, rank, t)

    def _own_parameters(self) -> dict[int, dict[str, nn.Parameter]]:
        """Per stage of this worker; a parameter that two of them share is stepped with the first."""
        seen: set[str] = set()
        own = {}
        for number, named in self._named.items():
            own[number] = {name: parameter for name, parameter in named.items() if name not in seen}
            seen |= named.keys()
        return own

    def _sum_ties(self) -> None:
        """Sum the gradients of weights that stages on different workers share."""
        workers = len(self.plan.stages) // self.plan.chunks
        parameters = {name: parameter for named in self._named.values() for name, parameter in named.items()}
        whole = dict(self.model.root.named_parameters())
        for name, stages in self._ties.items():
            if len({stage % workers for stage in stages}) == 1:
                continue
            parameter = parameters.get(name)
            mine = None if parameter is None else parameter.grad
            total = torch.zeros_like(whole[name], device=self.device) if mine is None else mine.clone()
            with self.record.waiting(f"the shared gradient of {name}", None):
                dist.all_reduce(total, group=self.groups.world)
            if parameter is not None:
                parameter.grad = total

    def _norms(self) -> Tensor:
        """Gradient norm of every trainable parameter of the whole model, each once, in the unsplit model's order."""
        order = [name for name, parameter in self.model.root.named_parameters() if parameter.requires_grad]
        slots = {name: slot for slot, name in enumerate(order)}
        norms = torch.zeros(len(order))
        for number, named in self._own_parameters().items():
            counted = [(n, p) for n, p in named.items() if n in slots and self._ties.get(n, (number,))[0] == number]
            for (name, _), norm in zip(counted, gradient_norms([p.grad for _, p in counted]), strict=False):
                norms[slots[name]] = norm
        norms = norms.to(self.device)
        with self.record.waiting("the gradient norms of the other stages", None):
            dist.all_reduce(norms, group=self.groups.world)
        return norms

    def _on_every_rank(self, losses: list[float]) -> list[float]:
        """Only the last stage has losses; the others add zeros."""
        values = torch.tensor(losses, dtype=torch.float64, device=self.device)
        with self.record.waiting("the losses of the last stage", None):
            dist.all_reduce(values, group=self.groups.world)
        return values.tolist()


class _Chunk(nn.Module):
    """A stage as torch calls it: activations come as arguments, the minibatch's number beside them."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.batches: Batches | None = None
        self.losses: dict[int, float] = {}
        self._measured = False

    def forward(self, *values: Tensor, minibatch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The activations of the next stage, or the loss."""
        if not self._measured:
            # torch's first call finds out shapes, on memory that nobody has written: it must leave no trace.
            self._measured = True
            kept = [buffer.clone() for buffer in self.stage.buffers()]
            outputs = self._run(values, int(minibatch))
            for buffer, old in zip(self.stage.buffers(), kept, strict=True):
                buffer.data.copy_(old)
        else:
            outputs = self._run(values, int(minibatch))
            if self.stage.is_last:
                self.losses[int(minibatch)] = float(outputs[0].detach())
        return outputs[0] if len(outputs) == 1 else outputs

    def _run(self, values: tuple[Tensor, ...], minibatch: int) -> tuple[Tensor, ...]:
        assert self.batches is not None
        batch = self.batches(minibatch)
        entering = self.stage.model.value.inputs(batch) if self.stage.is_first else values
        terms = self.batches.terms(minibatch) if self.stage.is_last else None
        return self.stage(entering, batch, minibatch, terms)


def _is_of_the_network(error: RuntimeError) -> bool:
    words = str(error).lower()
    return any(word in words for word in ("connection", "timed out", "timeout", "gloo", "nccl", "socket"))
