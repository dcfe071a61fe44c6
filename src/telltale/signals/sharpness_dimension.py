"""The Sharpness Dimension from raw atoms (arXiv 2604.19740, definitions 4.1 and 4.2), in float64.

With S(t) the integral of the largest t of the sorted exponents ln sigma (concave, piecewise linear, S(0) = 0),
SD = sup{t in [0, N] : S(t) >= 0}. That one line has all three branches of the definition: 0 if the largest exponent is
negative, N if the sum of all is not, and the Kaplan-Yorke fraction between. Nothing is binned, smoothed or shifted; the
paper's own numerical forms are in ``benchmarks/sharpness_paper_forms.py``, for comparison.

Definition 4.1 takes lambda_k = E_omega[sup over w in A(omega) of ln sigma_k], over an attractor A; the paper measures one final w.
:func:`dimension_over_checkpoints` takes the supremum over given points, such as the last checkpoints of a run. That is a lower
bound of the definition's, and closer to it than a single point.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from telltale.config import check_choice, check_range
from telltale.errors import DataError, NumericalError
from telltale.signals.spectrum import Spectrum
from telltale.signals.statistics import mean_over_seeds

Exponents = Callable[[Tensor], Tensor]
"""Maps nodes (m,) to their exponents, (m,) or (m, k) where each direction has k of them (momentum has two roots)."""
AGGREGATES = ("mixture", "rank")
NULL = 1e-6
"""|ln sigma| up to which :func:`breakdown` calls a direction null; it has no part in the dimension itself."""
OVER = ("sup", "mean")
FEWEST = 4
"""Minibatches that an interval takes at least."""
Member = tuple[Tensor, Tensor]
"""Exponents (atoms,) and their masses (atoms,) of one minibatch at one point."""


def log_moduli(nodes: Tensor, *, rate: float, floor: float = 1e-12) -> Tensor:
    """ln|1 - rate * alpha| of each eigenvalue, float64: the exponents of one step of gradient descent.

    log1p below 1/2, so that a null direction has exactly 0 and a weak one keeps its digits. ``floor`` bounds the modulus
    from below (0: none, ln 0 = -inf); it does not move the dimension, unlike the paper's "+ epsilon" (eq. 89).

    Raises :class:`~telltale.errors.ConfigError` for a rate that is not above 0.
    """
    check_range("floor", floor, low=0.0, below=0.5)
    check_range("rate", rate, above=0.0, finite=True)
    moved = nodes.to(torch.float64) * rate
    far = (1.0 - moved).abs().clamp_min(floor).log()
    return torch.where(moved < 0.5, torch.log1p(-moved.clamp_max(0.5)), far)


def gradient_descent(rate: float) -> Exponents:
    """:func:`log_moduli` at ``rate``, as a map of nodes."""
    return partial(log_moduli, rate=rate)


def sharpness_dimension(
    log_moduli: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor] | None = None,
    *,
    aggregate: str = "mixture",
    size: float | None = None,
) -> float:
    """SD = sup{t : S(t) >= 0} of exponents (atoms,) with masses ``weights`` (atoms,; None: 1 each).

    Several minibatches are a sequence of such tensors. "mixture" is the dimension of the mean of their measures (the
    paper's quadrature); "rank" averages the exponents of equal rank (the paper's exact form). SD_mixture >= SD_rank.
    ``size`` scales every minibatch to that total mass N; None takes the masses as they are, which must then agree.

    Raises :class:`~telltale.errors.DataError` for no atoms or unequal masses, :class:`~telltale.errors.NumericalError`
    for NaN or +inf. -inf is a modulus of 0 and allowed.
    """
    check_choice("aggregate", aggregate, AGGREGATES)
    members = [
        _sorted(exponents, mass, size) for exponents, mass in zip(*_as_sequences(log_moduli, weights), strict=True)
    ]
    totals = torch.stack([mass.sum() for _, mass in members])
    if bool((totals - totals[0]).abs().max() > 1e-9 * totals[0]):
        raise DataError(f"the minibatches have masses {totals.tolist()}; expected equal ones (or give size).")
    if aggregate == "rank" and len(members) > 1:
        exponents, mass = by_rank(members)
    elif len(members) > 1:
        joined = torch.cat([mass for _, mass in members]) / len(members)
        exponents, mass = _sorted(torch.cat([values for values, _ in members]), joined, None)
    else:
        exponents, mass = members[0]
    return _crossing(exponents, mass).dimension


def dimension_of(spectrum: Spectrum, exponents: Exponents, *, aggregate: str = "mixture") -> float:
    """SD of a spectrum under a map such as :func:`gradient_descent`; "rank" averages over minibatches."""
    return sharpness_dimension(*_members(spectrum, exponents), aggregate=aggregate)


def dimension_over_checkpoints(
    points: Sequence[Sequence[Member]], *, over: str = "sup", aggregate: str = "mixture"
) -> float:
    """SD of K points, each with its minibatches in the same order: K sequences of (exponents, masses).

    ``over`` "sup" takes the largest exponent of each rank among the points, "mean" their average; ``aggregate`` as in
    :func:`sharpness_dimension`: "rank" does so for each minibatch and averages over minibatches,
    "mixture" pools the minibatches of a point first. "sup" is at least the SD of every single point.

    Raises :class:`~telltale.errors.DataError` for no points, or points that differ in minibatches or in total mass.
    """
    check_choice("over", over, OVER)
    check_choice("aggregate", aggregate, AGGREGATES)
    if not points or not points[0] or len({len(point) for point in points}) > 1:
        raise DataError(
            f"points with {[len(point) for point in points]} minibatches; expected at least one point, and as many minibatches "
            f"at each."
        )
    totals = torch.tensor([float(mass.sum()) for point in points for _, mass in point], dtype=torch.float64)
    if bool((totals - totals[0]).abs().max() > 1e-9 * totals[0]):
        raise DataError("the points or their minibatches differ in total mass; expected points of one model.")
    if aggregate == "mixture":
        points = [[_pooled(point)] for point in points]
    combined = [by_rank(list(minibatch), over=over) for minibatch in zip(*points, strict=True)]
    return sharpness_dimension(*by_rank(combined, over="mean"))


def interval(
    spectrum: Spectrum,
    exponents: Exponents,
    *,
    aggregate: str = "mixture",
    level: float = 0.95,
    resamples: int | None = None,
    seed: int | None = None,
) -> tuple[float, float]:
    """Interval (low, high) of the dimension of all minibatches at ``level``, within [0, N].

    The delete-one jackknife: of n minibatches each is left out in turn, with all its runs; the spread of what is left gives
    the standard error of SD (Tukey 1958), and Student's quantile of n - 1 degrees the reach. It holds the error of the
    quadrature too. N counts each root of a step with momentum.

    Nothing is drawn. ``resamples`` and ``seed`` were the bootstrap's: whoever still gives them is warned, and they will go.

    Raises :class:`~telltale.errors.DataError` for fewer than :data:`FEWEST` minibatches: the spread of three numbers or
    less says next to nothing of that of others.
    """
    check_range("level", level, low=0.5, below=1.0)
    check_choice("aggregate", aggregate, AGGREGATES)
    if resamples is not None or seed is not None:
        warnings.warn(
            "interval() draws nothing: resamples and seed have no effect and will be removed; leave them out.",
            FutureWarning,
            stacklevel=2,
        )
    values, masses = _members(spectrum, exponents)
    count = len(values)
    if count < FEWEST:
        raise DataError(f"an interval over {count} minibatch{'es' * (count > 1)}; expected at least {FEWEST}.")
    point = sharpness_dimension(values, masses, aggregate=aggregate)
    without = [
        sharpness_dimension(_without(values, index), _without(masses, index), aggregate=aggregate)
        for index in range(count)
    ]
    spread = mean_over_seeds([(count - 1) * other for other in without], level=level)
    reach, most = (spread.high - spread.low) / 2, float(masses[0].sum())
    return max(point - reach, 0.0), min(point + reach, most)


def _without(members: list[Tensor], index: int) -> list[Tensor]:
    return members[:index] + members[index + 1 :]


@dataclass(frozen=True)
class Breakdown:
    """Where the Sharpness Dimension of a spectrum comes from: masses that sum to the number of exponents.

    ``dimension`` = negative + over_edge + null + weak + the part ``cut_fraction`` of ``cut_mass``.
    """

    dimension: float
    negative: float
    """Expanding directions of negative curvature."""
    null: float
    """Directions with |ln sigma| <= 1e-6: they neither grow nor shrink, and count 1 each."""
    weak: float
    """Contracting directions that the expanding ones make up for, above the cut."""
    over_edge: float
    """Expanding directions of positive curvature: past the threshold of the step."""
    strong: float
    """Contracting directions below the cut, which do not count."""
    cut_mass: float
    """Mass of the atom in which S(t) becomes negative."""
    cut_fraction: float
    """The part of ``cut_mass`` that counts."""
    conditioning: float
    """|z_cut|: an error dS in the sum of exponents moves SD by dS / |z_cut|. 0 if there is no cut."""


def breakdown(spectrum: Spectrum, exponents: Exponents) -> Breakdown:
    """The parts of the mixture's dimension, each as a number of directions."""
    nodes, _ = spectrum.atoms()
    values, masses = _members(spectrum, exponents, grouped=False)
    flat, mass = torch.cat(values), torch.cat(masses) / len(masses)
    curvature = nodes.repeat_interleave(flat.numel() // nodes.numel())
    order = flat.argsort(descending=True, stable=True)
    flat, mass, curvature = flat[order], mass[order], curvature[order]
    cut = _crossing(flat, mass)
    null = flat.abs() <= NULL
    growing, above = (flat > 0) & ~null, torch.arange(flat.numel()) < cut.index
    inside = torch.arange(flat.numel()) == cut.index

    def total(which: Tensor) -> float:
        return float(mass[which].sum())

    cut_mass = total(inside)
    return Breakdown(
        dimension=cut.dimension,
        negative=total(growing & (curvature < 0)),
        null=total(null & ~inside),
        weak=total((flat < 0) & ~null & above),
        over_edge=total(growing & (curvature > 0)),
        strong=total((flat < 0) & ~null & ~above & ~inside),
        cut_mass=cut_mass,
        cut_fraction=cut.fraction / cut_mass if cut_mass > 0 else 0.0,
        conditioning=-cut.exponent,
    )


def by_rank(members: Sequence[tuple[Tensor, Tensor]], *, over: str = "mean") -> tuple[Tensor, Tensor]:
    """The mean ("sup": the largest) over ``members`` of the exponent at each rank t in [0, N], as atoms (exponents, masses).

    Members are (exponents, masses) of equal total mass; the atoms are at the merged breakpoints.
    """
    ends = [_without_zero_mass(*member) for member in members]
    cuts = torch.cat([mass.cumsum(0) for _, mass in ends]).unique()
    cuts = cuts[cuts > 0]
    middles = (cuts + torch.cat([cuts.new_zeros(1), cuts[:-1]])) / 2
    found = []
    for values, mass in ends:
        ranks = torch.searchsorted(mass.cumsum(0), middles).clamp_max(values.numel() - 1)
        found.append(values[ranks])
    stacked = torch.stack(found)
    return stacked.amax(0) if over == "sup" else stacked.mean(0), cuts.diff(prepend=cuts.new_zeros(1))


@dataclass(frozen=True)
class _Cut:
    dimension: float
    index: int
    fraction: float
    exponent: float


def _crossing(exponents: Tensor, mass: Tensor) -> _Cut:
    """Where the cumulative sum of sorted exponents becomes negative (Def. 4.2); the fraction is of that atom."""
    sums, masses = (exponents * mass).cumsum(0), mass.cumsum(0)
    # S falls for good once it is negative, except for rounding.
    negative = (sums < 0) & (exponents < 0)
    if not bool(negative.any()):
        return _Cut(float(masses[-1]), exponents.numel(), 0.0, 0.0)
    index = int(negative.to(torch.uint8).argmax())
    before_sum = float(sums[index - 1]) if index else 0.0
    before_mass = float(masses[index - 1]) if index else 0.0
    exponent = float(exponents[index])
    fraction = max(before_sum, 0.0) / -exponent
    return _Cut(before_mass + fraction, index, fraction, exponent)


def _without_zero_mass(values: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Equal exponents as one atom; only positive masses."""
    unique, owner = values.unique(return_inverse=True)
    joined = torch.zeros_like(unique).index_add_(0, owner, mass).flip(0)
    return unique.flip(0)[joined > 0], joined[joined > 0]


def _sorted(exponents: Tensor, mass: Tensor | None, size: float | None) -> tuple[Tensor, Tensor]:
    values = exponents.to(torch.float64).reshape(-1)
    if values.numel() == 0:
        raise DataError("there are no exponents; expected at least one.")
    if bool((torch.isnan(values) | (values == math.inf)).any()):
        raise NumericalError("the exponents hold NaN or inf; expected finite numbers, or -inf for a modulus of 0.")
    weights = torch.ones_like(values) if mass is None else mass.to(torch.float64).reshape(-1)
    if weights.shape != values.shape:
        raise DataError(f"{weights.numel()} weights for {values.numel()} exponents; expected one each.")
    total = float(weights.sum())
    if not total > 0 or not math.isfinite(total):
        raise DataError(f"the weights sum to {total}; expected a positive mass.")
    if size is not None:
        weights = weights * (size / total)
    order = values.argsort(descending=True, stable=True)
    present = weights[order] != 0  # -inf times a mass of 0 is NaN
    return values[order][present], weights[order][present]


def _as_sequences(
    log_moduli: Tensor | Sequence[Tensor], weights: Tensor | Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    values = [log_moduli] if isinstance(log_moduli, Tensor) else list(log_moduli)
    if not values:
        raise DataError("there are no exponents; expected at least one.")
    if weights is None:
        return values, [None] * len(values)
    masses: list[Tensor | None] = [weights] if isinstance(weights, Tensor) else list(weights)
    if len(masses) != len(values):
        raise DataError(f"{len(masses)} weights for {len(values)} minibatches; expected one tensor each.")
    return values, masses


def _members(spectrum: Spectrum, exponents: Exponents, *, grouped: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Exponents and masses of each minibatch, or of each run; a direction's mass counts once for each exponent of it."""
    if grouped:
        pairs = spectrum.by_minibatch()
    else:
        pairs = [(n, w * spectrum.size) for n, w in zip(spectrum.nodes, spectrum.weights, strict=True)]
    values, masses = [], []
    for nodes, mass in pairs:
        found = exponents(nodes)
        each = found.numel() // nodes.numel()
        values.append(found.reshape(-1))
        masses.append(mass.repeat_interleave(each))
    return values, masses


def _pooled(point: Sequence[Member]) -> Member:
    return torch.cat([values for values, _ in point]), torch.cat([mass for _, mass in point]) / len(point)
