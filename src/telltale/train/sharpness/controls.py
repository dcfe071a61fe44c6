"""The quantities that have to stand beside a Sharpness Dimension before anybody reads something into it.

A Hessian of b samples has a null space that shrinks with b, every null direction counts as one in the dimension, and train
loss or weight norm order networks much as the dimension does (arXiv 2604.19740 compares with lambda_max, the trace and
lambda_1; arXiv 2406.02234 is why batch size, rate and weight norm are here). Pure functions of one point; no I/O.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from telltale.errors import ConfigError, DataError

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
    if not rate > 0:
        raise ConfigError(f"rate={rate!r} is not allowed; expected a positive learning rate.")
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
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r} is not allowed; expected an integer >= 1.")
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
