"""The paper's own numerical forms of the Sharpness Dimension (arXiv 2604.19740, section 5 and appendix C), to compare with.

They bin or smooth the measure before they read it, and so move the null directions off 0, which can take the result to 0
or to N. telltale itself uses :func:`telltale.signals.sharpness_dimension.sharpness_dimension` on raw atoms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError
from telltale.signals.sharpness_dimension import sharpness_dimension
from telltale.signals.spectrum import Spectrum

FORMS = ("histogram", "kde", "ps")


def smoothed_dimension(
    spectrum: Spectrum,
    *,
    rate: float,
    form: str,
    bins: int = 1000,
    bandwidth: float = 0.01,
    quantiles: int = 1000,
    epsilon: float = 1e-12,
) -> float:
    """SD of I - rate H in one of the paper's forms; ``epsilon`` is added inside the logarithm as in eq. 89.

    "histogram" (SD-SLQ): ``bins`` equal bins of ln sigma, trapezoid rule. "kde" (SD-KDE): ln sigma smoothed by a
    Gaussian of ``bandwidth`` (nats), integrated exactly. "ps" (SD-PS): ``quantiles`` equal-mass quantiles of the
    spectrum smoothed by a Gaussian of ``bandwidth`` (units of the eigenvalues).
    """
    check_choice("form", form, FORMS)
    check_integer("bins", bins, low=2)
    check_integer("quantiles", quantiles, low=1)
    check_range("bandwidth", bandwidth, low=1e-12)
    check_range("epsilon", epsilon, low=0.0)
    if not rate > 0:
        raise ConfigError(f"rate={rate!r} is not allowed; expected a learning rate > 0.")
    nodes, mass = spectrum.atoms()
    if form == "ps":
        nodes = _smooth_quantiles(nodes, mass / spectrum.size, quantiles, bandwidth)
        return sharpness_dimension(_shifted_log(nodes, rate, epsilon), size=spectrum.size)
    exponents = _shifted_log(nodes, rate, epsilon)
    if form == "kde":
        return _kernel_dimension(exponents, mass, bandwidth)
    return _histogram_dimension(exponents, mass, bins)


def _shifted_log(nodes: Tensor, rate: float, epsilon: float) -> Tensor:
    return ((1.0 - rate * nodes).abs() + epsilon).log()


def _histogram_dimension(exponents: Tensor, mass: Tensor, bins: int) -> float:
    low, high = float(exponents.min()), float(exponents.max())
    if not high > low:
        return sharpness_dimension(exponents, mass)
    width = (high - low) / bins
    owner = ((exponents - low) / width).long().clamp_max(bins - 1)
    density = torch.zeros(bins, dtype=torch.float64).index_add_(0, owner, mass).flip(0) / width
    centres = (low + (torch.arange(bins, dtype=torch.float64) + 0.5) * width).flip(0)
    counted = torch.cumulative_trapezoid(density, dx=width)
    sums = torch.cumulative_trapezoid(density * centres, dx=width)
    below = (sums < 0).nonzero()
    if not len(below):
        return float(mass.sum())
    first = int(below[0, 0])
    if first == 0:
        return 0.0
    step = float((0.0 - sums[first - 1]) / (sums[first] - sums[first - 1]))
    return float(counted[first - 1] + step * (counted[first] - counted[first - 1]))


def _kernel_dimension(exponents: Tensor, mass: Tensor, bandwidth: float) -> float:
    """With Gaussian kernels, mass and sum above a level c have closed forms; c is found by bisection."""
    finite = exponents.clamp_min(-1e6)

    def above(level: float) -> tuple[float, float]:
        distance = (finite - level) / bandwidth
        tail = 0.5 * torch.erfc(-distance / math.sqrt(2))
        bell = torch.exp(-0.5 * distance**2) / math.sqrt(2 * math.pi)
        return float(mass @ tail), float(mass @ (finite * tail + bandwidth * bell))

    if float(mass @ finite) >= 0:
        return float(mass.sum())
    low, high = float(finite.min()) - 40 * bandwidth, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        # S(c) rises as c falls to 0 and falls from there on: below 0 it changes its sign once.
        low, high = (middle, high) if above(middle)[1] < 0 else (low, middle)
    return above(high)[0]


def _smooth_quantiles(nodes: Tensor, weights: Tensor, count: int, bandwidth: float) -> Tensor:
    """The ``count`` mid-quantiles of the Gaussian-smoothed measure, by vectorised bisection."""
    targets = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    low = torch.full_like(targets, float(nodes.min()) - 10 * bandwidth)
    high = torch.full_like(targets, float(nodes.max()) + 10 * bandwidth)
    for _ in range(50):
        middle = (low + high) / 2
        reached = torch.cat(
            [
                (0.5 * torch.erfc((nodes - block[:, None]) / (bandwidth * math.sqrt(2)))) @ weights
                for block in middle.split(256)
            ]
        )
        low, high = torch.where(reached < targets, middle, low), torch.where(reached < targets, high, middle)
    return (low + high) / 2
