"""Measuring one point of a training run: the Sharpness Dimension with its interval, its origin and its controls.

What is measured is the one-step Jacobian of a minibatch update at the model's present parameters, in place of the supremum
over the attractor (arXiv 2604.19740, section 5). Every result names its Jacobian, its aggregate and its controls; a
dimension alone predicts nothing about generalisation.

A Sharpness Dimension has to be read beside its controls: a Hessian of b samples has a null space that shrinks with b, every
null direction counts as one in the dimension, and train loss or weight norm order networks much as the dimension does (arXiv
2604.19740 compares with lambda_max, the trace and lambda_1; arXiv 2406.02234 is why batch size, rate and weight norm are
here). Pure functions of one point; no I/O.

:func:`over_checkpoints` takes several points of one run together, nearer to the definition's supremum than a single one.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError
from telltale.signals.hessian import HessianOperator, Operator
from telltale.signals.quiet import own_precision
from telltale.signals.sharpness_dimension import (
    AGGREGATES,
    FEWEST,
    breakdown,
    dimension_of,
    dimension_over_checkpoints,
    interval,
)
from telltale.signals.spectrum import Spectrum, dense, joined, slq
from telltale.train.sharpness.edges import JACOBIANS, StepJacobian, gradient_descent_jacobian
from telltale.train.sharpness.isolation import rows
from telltale.train.sharpness.persistence import pairwise, persistence_dimension
from telltale.train.sharpness.probe import LossFunction, Probe
from telltale.train.sharpness.result import Sharpness

DENSE_LIMIT = 4096
"""N up to which the exact path is considered: 128 MiB and about 10 CPU seconds of eigenvalues in float64 per minibatch."""


@own_precision()
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
    parameters: Iterable[str] | None = None,
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
    number of minibatches is raised to it. ``parameters`` (names, modules or patterns; None: all) and ``mode``: see
    :class:`~telltale.train.sharpness.probe.Probe`. With fewer than 4 minibatches there is no interval.
    ``trajectory`` (iterates, N), the weights at many steps, adds the
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
    probe = Probe(model, loss_fn, batches, parameters=parameters, mode=mode, seed=seed)
    view = _view(jacobian, optimizer, probe, step_rate)
    hessians = _Recorded(probe)
    count = len(hessians)
    found = _spectrum(hessians if view.wrap is None else _Viewed(hessians, view.wrap), runs, steps, seed, exact)
    plain = found
    if view.wrap is not None:
        plain = _spectrum(hessians, count, steps, seed, exact)
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
        interval=None if count < FEWEST else interval(found, view.exponents, aggregate=aggregate, level=level),
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
        receipts=[probe.receipts[index] for index in range(count)],
    )


def spectrum(
    loss: Tensor | Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
    parameters: Iterable[Tensor],
    *,
    runs: int = 30,
    steps: int = 25,
    exact: bool | None = None,
    seed: int = 0,
) -> Spectrum:
    """The Hessian spectrum of a scalar loss, or of several (one function for each minibatch), over ``parameters``.

    For a loss that is no ``loss_fn(model, batch)``; no module is switched or copied here. A function is checked as
    :class:`~telltale.signals.hessian.HessianOperator` does, a tensor for symmetry alone. ``exact`` None uses the dense
    path where its N products for each loss are no more than ``runs * steps``.
    """
    listed = list(parameters)
    losses = [loss] if isinstance(loss, Tensor) or callable(loss) else list(loss)
    if not losses:
        raise ConfigError("there is no loss; expected a scalar tensor, or one function or more that compute one.")
    return _spectrum(_Built([_builder(item, listed) for item in losses]), runs, steps, seed, exact)


def _spectrum(operators: Sequence[Any], runs: int, steps: int, seed: int, exact: bool | None) -> Spectrum:
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
    return slq(operators, runs=runs, steps=steps, seed=seed)


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
    return check_range("rate", rate, above=0.0, finite=True)


def _view(jacobian: str, optimizer: torch.optim.Optimizer | None, probe: Probe, rate: float) -> StepJacobian:
    if jacobian == "optimizer" and optimizer is None:
        raise ConfigError("jacobian='optimizer' needs the optimizer; expected optimizer=... or jacobian='gd'.")
    if jacobian == "gd" or optimizer is None:
        return gradient_descent_jacobian(rate)
    from telltale.train.sharpness.edges import step_jacobian_of

    view = step_jacobian_of(optimizer, probe.parameters)
    if view is None:
        warnings.warn(
            f"the Jacobian of {type(optimizer).__name__} is not known; it is measured as I - rate H ('gd').",
            stacklevel=3,
        )
        return gradient_descent_jacobian(rate)
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
    """The probe's Hessians, with the loss of each and whether it has any curvature; each is checked when first opened."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.losses: dict[int, float] = {}
        self.curved: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._probe.batches)

    def __getitem__(self, index: Any) -> Any:
        operator = self._probe.operator(index, check=index not in self.losses)
        self.losses[index], self.curved[index] = operator.loss, operator.has_curvature
        return operator


class _Viewed(_Built):
    def __init__(self, operators: Sequence[Any], wrap: Callable[[Operator], Operator]) -> None:
        self._operators, self._wrap = operators, wrap

    def __len__(self) -> int:
        return len(self._operators)

    def __getitem__(self, index: Any) -> Any:
        return self._wrap(self._operators[index])


RELATIVE_NULL = 1e-6
"""An eigenvalue below this part of the largest modulus counts as null: the rounding of single-precision products."""


class Atoms(Protocol):
    """What is read of a :class:`telltale.signals.spectrum.Spectrum`: per run nodes, weights that sum to 1, and minibatch."""

    @property
    def size(self) -> int: ...
    @property
    def nodes(self) -> Sequence[Tensor]: ...
    @property
    def weights(self) -> Sequence[Tensor]: ...
    @property
    def batch(self) -> Sequence[int]: ...


def point_controls(
    spectrum: Atoms,
    *,
    rate: float,
    parameters: Iterable[Tensor],
    train_loss: float,
    batch_size: int | None = None,
    null_tolerance: float | None = None,
) -> dict[str, float]:
    """Every control of one point, by name: ``lambda_max``, ``trace``, ``lambda_1``, ``null_space``, ``train_loss``,
    ``weight_norm``, ``learning_rate``, and where ``batch_size`` is known ``batch_size`` and ``rate_over_batch``.

    ``spectrum`` holds eigenvalues of minibatch Hessians, ``rate`` is the learning rate of the Jacobian I - rate H.
    Raises :class:`~telltale.errors.ConfigError` for a rate that is not positive or a batch size below one, and
    :class:`~telltale.errors.DataError` for an empty spectrum.
    """
    check_range("rate", rate, above=0.0, finite=True)
    values = {
        "lambda_max": largest_eigenvalue(spectrum),
        "trace": trace(spectrum),
        "lambda_1": leading_exponent(spectrum, rate=rate),
        "null_space": null_space(spectrum, tolerance=null_tolerance),
        "train_loss": float(train_loss),
        "weight_norm": weight_norm(parameters),
        "learning_rate": float(rate),
    }
    if batch_size is not None:
        check_integer("batch_size", batch_size, low=1)
        values |= {"batch_size": float(batch_size), "rate_over_batch": rate / batch_size}
    return values


def largest_eigenvalue(spectrum: Atoms) -> float:
    """lambda_max: the largest eigenvalue of each minibatch Hessian, averaged over the minibatches."""
    return _mean_over_batches(spectrum, lambda nodes: float(nodes.max()))


def trace(spectrum: Atoms) -> float:
    """tr(H): N times the mean over runs of sum_l w_l alpha_l, minibatches weighted alike."""
    sums: dict[int, list[float]] = defaultdict(list)
    for nodes, weights, batch in _runs(spectrum):
        sums[batch].append(spectrum.size * float(nodes.double() @ weights.double()))
    return _mean([_mean(values) for values in sums.values()])


def leading_exponent(spectrum: Atoms, *, rate: float) -> float:
    """lambda_1 = E_B ln ||I - rate H_B|| (Definition 4.1 for k = 1, one point): positive means an expanding direction.

    Nats per step. A lower bound where nodes are Ritz values, since they lie inside the spectrum.
    """
    return _mean_over_batches(spectrum, lambda nodes: float((1.0 - rate * nodes.double()).abs().max().log()))


def null_space(spectrum: Atoms, *, tolerance: float | None = None) -> float:
    """Number of directions with \\|alpha\\| <= ``tolerance``, averaged over minibatches: their exponent is exactly zero.

    ``tolerance`` is absolute; None takes 1e-6 of the largest modulus of the same run. Exact for dense spectra; of Ritz values
    it counts only those that have settled at zero, so too few steps read as too small a null space.
    """
    masses: dict[int, list[float]] = defaultdict(list)
    for nodes, weights, batch in _runs(spectrum):
        modulus = nodes.double().abs()
        bound = float(modulus.max()) * RELATIVE_NULL if tolerance is None else tolerance
        masses[batch].append(spectrum.size * float(weights.double()[modulus <= bound].sum()))
    return _mean([_mean(values) for values in masses.values()])


def weight_norm(parameters: Iterable[Tensor]) -> float:
    """The Euclidean norm of all ``parameters`` together. Raises :class:`~telltale.errors.DataError` if there are none."""
    squares = [float(parameter.detach().double().square().sum()) for parameter in parameters]
    if not squares:
        raise DataError("no parameters were given; expected at least one tensor to take the norm of.")
    return sum(squares) ** 0.5


def _runs(spectrum: Atoms) -> list[tuple[Tensor, Tensor, int]]:
    runs = list(zip(spectrum.nodes, spectrum.weights, spectrum.batch, strict=True))
    if not runs or any(nodes.numel() == 0 for nodes, _, _ in runs):
        raise DataError("the spectrum has a run without nodes, or no runs; expected at least one eigenvalue per run.")
    return runs


def _mean_over_batches(spectrum: Atoms, extreme: Callable[[Tensor], float]) -> float:
    """``extreme`` of all nodes of a minibatch, averaged over minibatches: several probes see one and the same Hessian."""
    nodes_of: dict[int, list[Tensor]] = defaultdict(list)
    for nodes, _, batch in _runs(spectrum):
        nodes_of[batch].append(nodes)
    return _mean([extreme(torch.cat(nodes)) for nodes in nodes_of.values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def over_checkpoints(points: Sequence[Sharpness], *, over: str = "sup") -> float:
    """SD of the points together: of each rank the largest exponent among them ("sup") or the average ("mean").

    Take points between which training has settled, on the same minibatches, such as the last of a monitor's ``dimensions``.
    "sup" is at least the SD of each. Aggregate and Jacobian are those of the points.

    Raises :class:`~telltale.errors.DataError` for no points, and for points that differ in model, minibatches, Jacobian or
    aggregate.
    """
    kinds = {(point.size, point.jacobian, point.aggregate) for point in points}
    if len(kinds) != 1:
        raise DataError(
            f"the points are of {len(kinds)} kinds (size, Jacobian, aggregate); expected points of one kind."
        )
    return dimension_over_checkpoints([point.members() for point in points], over=over, aggregate=points[0].aggregate)
