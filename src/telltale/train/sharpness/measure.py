"""Measuring one point of a training run: the Sharpness Dimension with its interval, its origin and its controls.

What is measured is the one-step Jacobian of a minibatch update at the model's present parameters, in place of the supremum
over the attractor (arXiv 2604.19740, section 5). Every result names its Jacobian, its aggregate and its controls; a
dimension alone predicts nothing about generalisation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telltale.configuration import check_choice, check_integer
from telltale.errors import ConfigError
from telltale.signals.exponents import (
    AGGREGATES,
    breakdown,
    dimension_of,
    interval,
)
from telltale.signals.hessian import HessianOperator, Operator
from telltale.signals.spectrum import Spectrum, dense, joined, slq
from telltale.train.sharpness.controls import point_controls
from telltale.train.sharpness.minibatch import rows
from telltale.train.sharpness.persistence import pairwise, persistence_dimension
from telltale.train.sharpness.probe import LossFunction, Probe
from telltale.train.sharpness.result import Sharpness
from telltale.train.sharpness.view import View, paper_view

JACOBIANS = ("gd", "optimizer")
DENSE_LIMIT = 4096
"""N up to which the exact path is considered: 128 MiB and about 10 CPU seconds of eigenvalues in float64 per minibatch."""


def measure(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    rate: float | None = None,
    runs: int = 30,
    steps: int = 25,
    jacobian: str = "gd",
    aggregate: str = "mixture",
    exact: bool | None = None,
    deflation: int = 0,
    mode: str = "as is",
    trajectory: Tensor | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Sharpness:
    """The Sharpness Dimension of ``model`` at its present parameters, over ``batches`` of the training batch size.

    ``loss_fn(model, batch)`` is the mean loss; None is the next-token loss of a Hugging Face causal LM. ``rate`` None is
    the optimizer's own. ``jacobian`` "gd" is the paper's I - rate H whatever the optimizer; "optimizer" takes rate, momentum,
    weight decay, parameter groups and the preconditioner from its live state. The spectrum takes ``runs`` * ``steps``
    products; ``exact`` None uses the dense path where its N products for each minibatch are no more. ``runs`` below the
    number of minibatches is raised to it. ``deflation``: see :func:`telltale.signals.spectrum.slq`; ``mode``: see
    :class:`~telltale.train.sharpness.probe.Probe`. ``trajectory`` (iterates, N), the weights at many steps, adds the
    control ``persistence_dimension`` (:mod:`telltale.train.sharpness.persistence`).

    The batch size matters: the Hessian of b samples has a null space that shrinks with b, and every null direction
    counts 1. Compare points at one batch size, or read the controls.

    Raises :class:`~telltale.errors.ConfigError` for a rate that is missing or not above 0, or given beside
    jacobian="optimizer", and what :class:`~telltale.train.sharpness.probe.Probe` and ``persistence`` raise. An optimizer
    whose Jacobian is not known is measured as "gd", with a warning.
    """
    check_choice("jacobian", jacobian, JACOBIANS)
    check_choice("aggregate", aggregate, AGGREGATES)
    check_integer("runs", runs, low=1)
    check_integer("steps", steps, low=1)
    step_rate = _rate(optimizer, rate, jacobian)
    probe = Probe(model, loss_fn, batches, mode=mode, seed=seed)
    view = _view(jacobian, optimizer, probe, step_rate)
    hessians = _Recorded(probe.operators)
    count = len(hessians)
    found = _spectrum(
        hessians if view.wrap is None else _Viewed(hessians, view.wrap), runs, steps, seed, exact, deflation
    )
    plain = found
    if view.wrap is not None:
        plain = _spectrum(hessians, count, steps, seed, exact, 0)
    if aggregate == "rank" and not found.exact and found.runs < 3 * count:
        warnings.warn(f"{found.runs} probes over {count} minibatches are few for quantiles of each one.", stacklevel=2)
    point = dimension_of(found, view.exponents, aggregate=aggregate)
    origin = breakdown(found, view.exponents)
    controls = point_controls(
        plain,
        rate=step_rate,
        parameters=probe.parameters,
        train_loss=sum(hessians.losses.values()) / count,
        batch_size=rows(probe.batches[0]),
    )
    if trajectory is not None:
        controls["persistence_dimension"] = persistence_dimension(pairwise(trajectory), seed=seed).dimension
    return Sharpness(
        sd=point,
        interval=interval(found, view.exponents, aggregate=aggregate, level=level, seed=seed),
        level=level,
        codimension=view.roots * found.size - point,
        breakdown=origin,
        conditioning=origin.conditioning,
        spectrum=found,
        jacobian=view.name,
        aggregate=aggregate,
        rate=step_rate,
        threshold=view.threshold,
        exponents=torch.cat([view.exponents(nodes).reshape(-1) for nodes in found.nodes]),
        controls=controls,
        no_curvature=not any(hessians.curved.values()) or all(not bool(nodes.any()) for nodes in plain.nodes),
        excluded=dict(probe.excluded),
    )


def spectrum(
    loss: Tensor | Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
    parameters: Iterable[Tensor],
    *,
    runs: int = 30,
    steps: int = 25,
    exact: bool | None = None,
    deflation: int = 0,
    seed: int = 0,
) -> Spectrum:
    """The Hessian spectrum of a scalar loss, or of several (one function for each minibatch), over ``parameters``.

    For a loss that is no ``loss_fn(model, batch)``; nothing about a module is switched here (fused attention, say, has to
    be off). ``exact`` None uses the dense path where its N products for each loss are no more than ``runs * steps``.
    """
    listed = list(parameters)
    losses = [loss] if isinstance(loss, Tensor) or callable(loss) else list(loss)
    if not losses:
        raise ConfigError("there is no loss; expected a scalar tensor, or one function or more that compute one.")
    return _spectrum(_Built([_builder(item, listed) for item in losses]), runs, steps, seed, exact, deflation)


def _spectrum(
    operators: Sequence[Any], runs: int, steps: int, seed: int, exact: bool | None, deflation: int
) -> Spectrum:
    count = len(operators)
    runs = max(runs, count)
    first = operators[0]
    if exact is None:
        exact = first.size <= DENSE_LIMIT and first.size * count <= runs * steps
    if exact:
        if first.size > DENSE_LIMIT:
            raise ConfigError(f"exact=True with N={first.size}; expected at most {DENSE_LIMIT} parameters.")
        return joined([dense(first if index == 0 else operators[index]) for index in range(count)])
    del first
    return slq(operators, runs=runs, steps=steps, seed=seed, deflation=deflation)


def _rate(optimizer: torch.optim.Optimizer | None, rate: float | None, jacobian: str) -> float:
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise ConfigError(f"optimizer is {type(optimizer).__name__}; expected one of torch.optim.")
    if rate is None:
        if optimizer is None:
            raise ConfigError("there is neither a rate nor an optimizer; expected one of them.")
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        # Groups have rates of their own under jacobian="optimizer"; one number is needed for "gd" and the controls.
        rate = max(rates)
        if len(rates) > 1:
            warnings.warn(f"the groups' rates differ ({sorted(rates)}); the controls use the largest.", stacklevel=3)
    elif jacobian == "optimizer" and optimizer is not None:
        raise ConfigError(
            f"rate={rate!r} was given beside jacobian='optimizer', which takes the optimizer's own; leave it out."
        )
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"rate={rate!r} is not allowed; expected a learning rate > 0.")
    return float(rate)


def _view(jacobian: str, optimizer: torch.optim.Optimizer | None, probe: Probe, rate: float) -> View:
    if jacobian == "optimizer" and optimizer is None:
        raise ConfigError("jacobian='optimizer' needs the optimizer; expected optimizer=... or jacobian='gd'.")
    if jacobian == "gd" or optimizer is None:
        return paper_view(rate)
    from telltale.train.sharpness.preconditioner import view_of

    view = view_of(optimizer, probe.parameters)
    if view is None:
        warnings.warn(
            f"the Jacobian of {type(optimizer).__name__} is not known; it is measured as I - rate H ('gd').",
            stacklevel=3,
        )
        return paper_view(rate)
    return view


def _builder(loss: Tensor | Callable[[], Tensor], parameters: Sequence[Tensor]) -> Callable[[], HessianOperator]:
    return lambda: HessianOperator(loss, parameters)


class _Built(Sequence[Any]):
    """Operators that are built when they are taken out, so that one graph is held at a time."""

    def __init__(self, builders: Sequence[Callable[[], Any]]) -> None:
        self._builders = builders

    def __len__(self) -> int:
        return len(self._builders)

    def __getitem__(self, index: Any) -> Any:
        return self._builders[index]()


class _Recorded(_Built):
    """The probe's Hessians, with the loss of each and whether it has any curvature."""

    def __init__(self, operators: Sequence[HessianOperator]) -> None:
        self._operators = operators
        self.losses: dict[int, float] = {}
        self.curved: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._operators)

    def __getitem__(self, index: Any) -> Any:
        operator = self._operators[index]
        self.losses[index], self.curved[index] = operator.loss, operator.has_curvature
        return operator


class _Viewed(_Built):
    def __init__(self, operators: Sequence[Any], wrap: Callable[[Operator], Operator]) -> None:
        self._operators, self._wrap = operators, wrap

    def __len__(self) -> int:
        return len(self._operators)

    def __getitem__(self, index: Any) -> Any:
        return self._wrap(self._operators[index])
