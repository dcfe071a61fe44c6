"""From averaged gradients to a step: learning rates by minibatch, clipping, and what makes up for stale gradients.

The trainer and the one-process reference share this file, so they differ only in how gradients come together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_integer
from telltale.errors import PlanError
from telltale.train.pipeline.schedule import BY_ROUND, Policy

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes a stage's optimizer from its (unsplit name, parameter) pairs; any class of ``torch.optim`` takes them as they are."""

Schedule = Callable[[int], float]
"""Minibatch number -> factor on the learning rate. By minibatch, not by update: stages update at different times."""


@dataclass(frozen=True)
class RateDiscount:
    """Smaller first steps where gradients are older (PipeMare, arXiv 1910.05124, technique T1):
    lr_s(k) = lr / tau_s^(1 - min(k / annealing_updates, 1)) at update k, for a stage whose gradients are tau_s updates old."""

    annealing_updates: int

    def __post_init__(self) -> None:
        check_integer("annealing_updates", self.annealing_updates, low=1)

    def factor(self, delay: int, update: int) -> float:
        """Factor at update ``update`` (from 0) for a delay in updates."""
        return max(1, delay) ** -(1.0 - min(update / self.annealing_updates, 1.0))


def delay_aware_nadam(
    learning_rate: float, *, beta1: float = 0.99, weight_decay: float = 0.0, **options: Any
) -> OptimizerFactory:
    """NAdam with a long momentum, which looks ahead by about as much as the gradients are late (arXiv 2505.01099)."""

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"decoupled_weight_decay": True, "weight_decay": weight_decay} | options
        return torch.optim.NAdam(named, lr=learning_rate, betas=(beta1, 0.999), **settings)

    return make


class StageOptimizer:
    """The user's optimizer on one stage; sets the learning rates of every update before it steps."""

    def __init__(
        self,
        factory: OptimizerFactory,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        policy: Policy,
        stage: int,
        schedule: Schedule | None = None,
        discount: RateDiscount | None = None,
        replica_rates: bool = True,
    ) -> None:
        trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in trainable]
        self.optimizer = factory(trainable) if trainable else None
        if trainable and not isinstance(self.optimizer, torch.optim.Optimizer):
            raise PlanError(
                f"the optimizer factory returned {type(self.optimizer).__name__}; expected a torch.optim.Optimizer."
            )
        if self.optimizer is not None:
            _refuse_closures(self.optimizer)
        self._policy, self._stage = policy, stage
        self._schedule, self._discount, self._replica_rates = schedule, discount, replica_rates
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def factor(self, minibatch: int, version: int) -> float:
        """Factor on the learning rate of the update that makes ``version``, whose last minibatch is ``minibatch``.

        A stage with r_s replicas steps once per r_s minibatches, so its rate is scaled by r_s / r_0 (official code, not in
        the paper; ``replica_rates=False`` turns it off).
        """
        policy, stage = self._policy, self._stage
        factor = 1.0
        if self._replica_rates and policy.name in BY_ROUND:
            factor *= policy.replicas[stage] / policy.replicas[0]
        if self._schedule is not None:
            factor *= self._schedule(minibatch)
        if self._discount is not None:
            factor *= self._discount.factor(version - 1 - policy.version(stage, minibatch), version - 1)
        return factor

    def step(self, minibatch: int, version: int) -> None:
        """Step with the gradients that are on the parameters, and clear them."""
        if self.optimizer is None:
            return
        factor = self.factor(minibatch, version)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        try:
            self.optimizer.step()
        except Exception as error:
            if "closure" in str(error).lower():
                raise _needs_closure(self.optimizer) from error
            raise
        self.optimizer.zero_grad(set_to_none=True)


def _refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    """A pipeline has one forward and backward per minibatch; an optimizer that asks for more (L-BFGS) cannot run in it."""
    asked = inspect.signature(optimizer.step).parameters.values()
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(one.default is inspect.Parameter.empty and one.kind not in free for one in asked):
        raise _needs_closure(optimizer)


def _needs_closure(optimizer: torch.optim.Optimizer) -> PlanError:
    return PlanError(
        f"{type(optimizer).__name__}.step needs a closure that computes the loss again; expected an optimizer that steps with "
        f"the gradients it is given."
    )


def gradient_norms(gradients: Sequence[Tensor | None]) -> Tensor:
    """2-norm of each gradient, 0 where there is none. Shape (number of gradients,)."""
    present = [gradient for gradient in gradients if gradient is not None]
    norms = iter(torch._foreach_norm(present) if present else ())
    return torch.stack(
        [torch.zeros(()) if g is None else next(norms).float().cpu() for g in gradients] or [torch.zeros(())]
    )


def clip(gradients: Sequence[Tensor | None], norms: Tensor, limit: float) -> None:
    """Scale ``gradients`` in place by min(1, limit / (norm + 1e-6)) for the norm of all ``norms``, as
    ``torch.nn.utils.clip_grad_norm_`` does."""
    coefficient = torch.clamp(limit / (torch.linalg.vector_norm(norms) + 1e-6), max=1.0)
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(coefficient.to(gradient.device))
