"""Every policy's delayed update in one process: the oracle of the distributed trainer, and a way to ask what stashing would
do to a training run without a cluster.

Minibatches are processed one after the other. For minibatch t each stage reads the weights that a pipeline
would have read under the policy (PipeDream, section 3.3): with v = version(s, t),

    w_s[u+1] = step(w_s[u], mean over the round of grad_s f(w_1[v_1(t)], ..., w_n[v_n(t)]))

Optimizer state is never versioned: it advances with the delayed gradients. Buffers (running statistics) advance in forward
order. Under "none", the ablation, a backward meets weights that are newer than its forward's.

A stage of the reference holds whole copies of every weight version, and gradient sums per replica.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import NumericalError, PlanError
from telltale.train.pipeline.layers import LayeredModel, Values, sequential, share_of_terms
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.collectives import tied_groups
from telltale.train.pipeline.runtime.norm_statistics import NormStatistics
from telltale.train.pipeline.runtime.optimizer import (
    OptimizerFactory,
    RateDiscount,
    Schedule,
    StageOptimizer,
    clip,
    gradient_norms,
)
from telltale.train.pipeline.runtime.stage import Stage
from telltale.train.pipeline.runtime.worker import Batches
from telltale.train.pipeline.schedule import Policy, policy_of


@dataclass
class ReferenceResult:
    """What a run leaves: losses of [start, stop), and per minibatch the (forward, backward) version at every stage."""

    losses: list[float] = field(default_factory=list)
    trace: list[list[tuple[int, int]]] = field(default_factory=list)


def train(
    model: LayeredModel | nn.Sequential,
    plan: Plan,
    batches: Callable[[int], Any] | Sequence[Any],
    *,
    optimizer: OptimizerFactory,
    stop: int,
    loss: Callable[[Any, Any], Tensor] | None = None,
    schedule: Schedule | None = None,
    discount: RateDiscount | None = None,
    replica_rates: bool = True,
    grad_clip: float | None = None,
    seed: int = 0,
    on_update: Callable[[int, int, nn.Module], None] | None = None,
) -> ReferenceResult:
    """Train ``model`` on the minibatches [0, stop) as the pipeline of ``plan`` would; its parameters are replaced in place.

    ``batches`` is a sequence or a function of the minibatch number; ``loss`` is needed for an ``nn.Sequential``, whose
    minibatches are (inputs, targets). ``on_update(stage, version, root)`` is called after each update of each stage, with
    the newest weights in ``root``. Raises what :class:`Reference` raises.
    """
    layered = sequential(model, loss) if isinstance(model, nn.Sequential) and loss is not None else model
    run = Reference(
        layered,  # type: ignore[arg-type]
        plan,
        optimizer=optimizer,
        schedule=schedule,
        discount=discount,
        replica_rates=replica_rates,
        grad_clip=grad_clip,
        seed=seed,
        on_update=on_update,
    )
    return run.run(batches, stop=stop)


class Reference:
    """The delayed updates of one model under one plan; :meth:`run` may be called again to go on.

    Raises :class:`~telltale.errors.PlanError` if plan and model do not fit or a weight is shared across stages that update
    at different times, and :class:`~telltale.errors.NumericalError` when a loss is not finite.
    """

    def __init__(
        self,
        model: LayeredModel,
        plan: Plan,
        *,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        discount: RateDiscount | None = None,
        replica_rates: bool = True,
        grad_clip: float | None = None,
        seed: int = 0,
        on_update: Callable[[int, int, nn.Module], None] | None = None,
    ) -> None:
        if not isinstance(model, LayeredModel):
            raise PlanError(
                f"the model is {type(model).__name__}; expected a LayeredModel (see split) or nn.Sequential + loss."
            )
        if plan.n_layers != len(model.layers):
            raise PlanError(f"the plan has {plan.n_layers} layers and the model {len(model.layers)}; expected as many.")
        self.model, self.plan = model, plan
        self.policy: Policy = policy_of(plan)
        self.minibatch = 0
        self._settings: dict[str, Any] = {
            "optimizer": optimizer,
            "schedule": schedule,
            "discount": discount,
            "replica_rates": replica_rates,
            "grad_clip": grad_clip,
            "seed": seed,
            "on_update": on_update,
        }
        self._grad_clip, self._on_update = grad_clip, on_update
        self.ties = tied_groups(model, plan, self.policy)
        # Recomputing changes no bit, except under "none", whose backward then repeats the forward with the newest weights.
        self.stages = [
            ReferenceStage(
                stage := Stage(model, s.layers[0], s.layers[-1] + 1, seed=seed, recompute=plan.recompute),
                NormStatistics.where_needed(stage, s.replicas),
            )
            for s in plan.stages
        ]
        self._weights: dict[int, float] = {}
        self.optimizers = [
            StageOptimizer(
                optimizer,
                stage.live.items(),
                policy=self.policy,
                stage=number,
                schedule=schedule,
                discount=discount,
                replica_rates=replica_rates,
            )
            for number, stage in enumerate(self.stages)
        ]

    def run(self, batches: Callable[[int], Any] | Sequence[Any], *, stop: int) -> ReferenceResult:
        """Go on to minibatch ``stop`` (not included). A last round that is too short averages over what it has."""
        if self.minibatch % self.policy.alignment:
            raise PlanError(
                f"minibatch {self.minibatch} is inside a round; expected to go on at a multiple of {self.policy.alignment}."
            )
        source, result = Batches(batches, self.model.weight), ReferenceResult()
        self._start = self.minibatch
        for stage in self.stages:
            stage.module.train()
        for minibatch in range(self.minibatch, stop):
            self._weigh(minibatch, source, stop)
            result.losses.append(self._minibatch(minibatch, source(minibatch), source.terms(minibatch)))
            result.trace.append(
                [
                    (self.policy.version(s, minibatch, start=self._start), self.policy.backward_version(s, minibatch))
                    for s in range(len(self.stages))
                ]
            )
            source.release(minibatch)
            self._updates(minibatch, stop)
        self.minibatch = max(stop, self.minibatch)
        self._write_back()
        return result

    def switch(self, plan: Plan) -> Reference:
        """This training under another plan from here on, as a pipeline resumed from a checkpoint goes on.

        Where versions are numbered by the same batches the older ones are carried over; otherwise every stage starts the new
        delay pattern with its newest weights. Optimizer state is carried over by parameter name.
        """
        other = Reference(self.model, plan, **self._settings)
        other.minibatch = self.minibatch
        ours, theirs = self.policy, other.policy
        kept = ours.name == theirs.name and ours.synchronous and ours.microbatches == theirs.microbatches
        states = {
            name: optimizer.optimizer.state[parameter]
            for stage, optimizer in zip(self.stages, self.optimizers, strict=True)
            for name, parameter in stage.live.items()
            if optimizer.optimizer is not None and parameter in optimizer.optimizer.state
        }
        past: dict[int, Weights] = {}
        for version, weights in [entry for stage in self.stages for entry in stage.history.items()] if kept else ():
            past.setdefault(version, {}).update(weights)
        for number, (stage, optimizer) in enumerate(zip(other.stages, other.optimizers, strict=True)):
            stage.restart(-(-self.minibatch // theirs.round_size(number)), past)
            for name in states.keys() & stage.live.keys():
                optimizer.optimizer.state[stage.live[name]] = copy.deepcopy(states[name])  # type: ignore[union-attr]
        return other

    def _minibatch(self, minibatch: int, batch: Any, terms: float) -> float:
        """Forward and backward through all stages, each under its own version; gradients go to their replica's sum."""
        values: Values = self.model.inputs(batch)
        policy, kept = self.policy, []
        for number, stage in enumerate(self.stages):
            weights = stage.leaves(policy.version(number, minibatch, start=self._start))
            # A copy: a layer in place must not write into what the stage before has kept for its backward.
            inputs = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in values)
            with stage.statistics.noting(minibatch) if stage.statistics else nullcontext():
                values = stage.module.run_forward(weights, inputs, batch, minibatch, terms)
            if stage.statistics:
                stage.statistics.apply(stage.statistics.note_of(minibatch))
            kept.append((weights, inputs, values))
        loss = float(values[0].detach())
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss of minibatch {minibatch} is {loss} (weight version "
                f"{policy.version(len(self.stages) - 1, minibatch)}, policy {policy.name}); expected a finite number. Lower "
                f"the learning rate or use a policy with a smaller delay."
            )
        gradients: list[Tensor | None] = [torch.full_like(values[0], self._loss_scale(minibatch))]
        for number in reversed(range(len(self.stages))):
            weights, inputs, outputs = kept[number]
            stage = self.stages[number]
            stage.overwrite(weights, policy.backward_version(number, minibatch))
            stage.module.run_backward(weights, outputs, gradients)
            if stage.module.is_last:
                stage.module.check_reached(weights, inputs, minibatch)
            gradients = [
                (torch.zeros_like(x) if x.grad is None else x.grad) if x.requires_grad else None for x in inputs
            ]
            stage.collect(weights, minibatch % policy.replicas[number])
        return loss

    def _loss_scale(self, minibatch: int) -> float:
        """1, or where several minibatches make one update the share of its terms that this one has."""
        return self._weights[minibatch] if self.policy.synchronous else 1.0

    def _weigh(self, minibatch: int, source: Batches, stop: int) -> None:
        """Count the terms in the loss of ``minibatch``; where several make one update, its share of all their terms."""
        if not self.policy.synchronous:
            self._weights[minibatch] = source.terms(minibatch)
            return
        size = self.policy.microbatches
        if minibatch % size:
            return
        batch = range(minibatch, min(minibatch + size, stop))
        total = sum(source.terms(t) for t in batch)
        self._weights = {t: share_of_terms(source.terms(t), total, batch[0], batch[-1]) for t in batch}

    def _updates(self, minibatch: int, stop: int) -> None:
        """The updates that come after ``minibatch``: of the stages whose round it completes."""
        due = []
        for number, stage in enumerate(self.stages):
            size = self.policy.round_size(number)
            if (minibatch + 1) % size == 0 or minibatch + 1 == stop:
                replicas = self.policy.replicas[number]
                shares: dict[int, float] | None = None
                if replicas > 1 and not self.policy.synchronous:
                    first = minibatch // size * size
                    terms = {t % replicas: self._weights[t] for t in range(first, minibatch + 1)}
                    total = sum(terms.values())
                    shares = {r: share_of_terms(one, total, first, minibatch) for r, one in terms.items()}
                stage.reduce(replicas, shares)
                due.append(number)
        if not due:
            return
        self._sum_ties()
        if self._grad_clip:
            self._clip(due)
        for number in due:
            version = self.policy.update_after(number, minibatch)
            self.optimizers[number].step(minibatch, version)
            self.stages[number].publish(version, max(self.policy.warmup(number), self.policy.delay))
            if self._on_update is not None:
                self._write_back()
                self._on_update(number, version, self.model.root)

    def _sum_ties(self) -> None:
        for name, owners in self.ties.items():
            parts = [self.stages[owner].live[name].grad for owner in owners]
            present = [part for part in parts if part is not None]
            if present:
                total = present[0].clone()
                for part in present[1:]:
                    total += part
                for owner in owners:
                    self.stages[owner].live[name].grad = total.clone()

    def _clip(self, due: list[int]) -> None:
        """By the whole model's norm where all stages step together, by each stage's own otherwise."""
        assert self._grad_clip is not None
        gradients = {s: [p.grad for p in self.optimizers[s].parameters] for s in due}
        if not self.policy.synchronous:
            for number in due:
                clip(gradients[number], gradient_norms(gradients[number]), self._grad_clip)
            return
        first = {name: owners[0] for name, owners in self.ties.items()}
        norms: dict[str, Tensor] = {}
        for number in due:
            named = [(name, p) for name, p in self.stages[number].live.items() if p.requires_grad]
            for (name, _), norm in zip(named, gradient_norms([p.grad for _, p in named]), strict=False):
                if first.get(name, number) == number:
                    norms[name] = norm
        order = [name for name, p in self.model.root.named_parameters() if p.requires_grad]
        whole = torch.stack([norms[name] for name in order])
        for number in due:
            clip(gradients[number], whole, self._grad_clip)

    @torch.no_grad()
    def _write_back(self) -> None:
        parameters = dict(self.model.root.named_parameters())
        for stage in reversed(self.stages):
            for name, value in stage.live.items():
                parameters[name].copy_(value)


Weights = dict[str, Tensor]
"""Parameter name -> value."""


class ReferenceStage:
    """Weights of one stage: the live ones, whole copies of the past ones, and gradient sums per replica."""

    def __init__(self, module: Stage, statistics: NormStatistics | None) -> None:
        self.module = module
        self.locals = dict(module.names)
        self.statistics = statistics
        own = module.model.value.parameter_names(module.first, module.stop)
        self.live = {name: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for name, p in own.items()}
        self.history: dict[int, Weights] = {}
        self._sums: dict[int, dict[str, Tensor]] = {}
        self.publish(0, 0)

    def leaves(self, version: int) -> Weights:
        """Fresh leaf copies of ``version``, by stage-local name."""
        values = self.history[max(version, min(self.history))]
        return {
            local: values[name].clone().requires_grad_(self.live[name].requires_grad)
            for local, name in self.locals.items()
        }

    def overwrite(self, weights: Weights, version: int) -> None:
        """Put the values of ``version`` under leaves that a graph already holds, unseen by autograd."""
        for local, name in self.locals.items():
            weights[local].data.copy_(self.history[max(version, min(self.history))][name])

    def collect(self, weights: Weights, replica: int) -> None:
        """Add the leaves' gradients to the sums of ``replica``, in the order of the minibatches."""
        sums = self._sums.setdefault(replica, {})
        for local, name in self.locals.items():
            gradient = weights[local].grad
            if gradient is not None:
                sums[name] = gradient if name not in sums else sums[name] + gradient

    def reduce(self, replicas: int, shares: dict[int, float] | None) -> None:
        """Sum over replicas in their order onto the live parameters; with ``shares``, those of the round's minibatches by replica,
        the mean over their terms."""
        for name, parameter in self.live.items():
            if not parameter.requires_grad:
                continue
            parts = [self._sums.get(replica, {}).get(name) for replica in range(replicas)]
            if replicas == 1:
                parameter.grad = parts[0]
                continue
            filled = [torch.zeros_like(parameter) if part is None else part for part in parts]
            if shares is not None:  # a replica without a minibatch in a last round has none
                filled = [part * shares.get(replica, 0.0) for replica, part in enumerate(filled)]
            total = filled[0].clone()
            for part in filled[1:]:
                total += part
            parameter.grad = total
        self._sums = {}

    def restart(self, version: int, past: dict[int, Weights]) -> None:
        """Number the live weights ``version``, with ``past`` before them."""
        self.history = {number: weights for number, weights in past.items() if number < version}
        self.publish(version, version)

    def publish(self, version: int, delay: int) -> None:
        """Number the live weights ``version`` and forget those that are more than ``delay`` updates older."""
        self.history[version] = {name: parameter.detach().clone() for name, parameter in self.live.items()}
        for old in [number for number in self.history if number < version - delay]:
            del self.history[old]
