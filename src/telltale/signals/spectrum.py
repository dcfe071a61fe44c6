"""Spectra of operators that are known by their products: stochastic Lanczos quadrature, and the dense path for small N.

A :class:`Spectrum` keeps raw atoms, node and weight by run, so that a Sharpness Dimension, a trace or a density is computed
without binning or smoothing. Ubaru, Chen & Saad 2017; Ghorbani et al. 2019; arXiv 2604.19740 section 5.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.errors import CheckpointError, ConfigError, DataError, NumericalError
from telltale.runs.files import write_atomically
from telltale.signals.hessian import Operator, as_operator, materialise, vector_like
from telltale.signals.lanczos import lanczos
from telltale.signals.quiet import own_precision

MEMORY_LIMIT = 4 * 2**30
"""Bytes that a Lanczos basis may take before the no-basis mode steps in."""


@dataclass(frozen=True)
class Spectrum:
    """A spectral measure of total mass N, as atoms of one or more runs.

    ``nodes`` and ``weights`` hold a float64 tensor for each run; a run's weights sum to 1. ``batch`` is the minibatch
    index of each run. ``residuals`` are the runs' Ritz residuals: an eigenvalue is that near to each node.
    """

    size: int
    nodes: list[Tensor]
    weights: list[Tensor]
    batch: list[int]
    matvecs: int
    exact: bool
    residuals: list[Tensor]
    reorthogonalised: bool = True

    def __post_init__(self) -> None:
        if not self.nodes or not len(self.nodes) == len(self.weights) == len(self.batch) == len(self.residuals):
            raise DataError("a spectrum needs one entry of nodes, weights, batch and residuals for each run.")
        if any(not bool(torch.isfinite(part).all()) for part in (*self.nodes, *self.weights)):
            raise NumericalError("the spectrum holds values that are not finite; expected a finite operator.")

    @property
    def runs(self) -> int:
        """R."""
        return len(self.nodes)

    def atoms(self) -> tuple[Tensor, Tensor]:
        """All nodes and their masses, both (atoms,), float64; the mean of the runs' measures, with total mass N."""
        scale = self.size / self.runs
        return torch.cat(self.nodes), torch.cat(self.weights) * scale

    def by_minibatch(self) -> list[tuple[Tensor, Tensor]]:
        """Nodes and masses (total N) of each minibatch: the mean over the runs that share it."""
        found = []
        for index in dict.fromkeys(self.batch):
            runs = [run for run, owner in enumerate(self.batch) if owner == index]
            weights = torch.cat([self.weights[run] for run in runs]) * (self.size / len(runs))
            found.append((torch.cat([self.nodes[run] for run in runs]), weights))
        return found

    def trace(self) -> tuple[float, float]:
        """tr H and its standard error over minibatches (over runs if there is one minibatch; 0 for one exact run)."""
        single = len(set(self.batch)) == 1
        if single:
            values = [self.size * float(n @ w) for n, w in zip(self.nodes, self.weights, strict=True)]
        else:
            values = [float(nodes @ masses) for nodes, masses in self.by_minibatch()]
        estimate = torch.tensor(values, dtype=torch.float64)
        if len(values) == 1:
            return float(estimate), 0.0 if self.exact else math.inf
        return float(estimate.mean()), float(estimate.std() / math.sqrt(len(values)))

    def extremes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """((smallest, residual), (largest, residual)) over all runs; an eigenvalue is within each residual."""
        nodes, residuals = torch.cat(self.nodes), torch.cat(self.residuals)
        low, high = int(nodes.argmin()), int(nodes.argmax())
        return (float(nodes[low]), float(residuals[low])), (float(nodes[high]), float(residuals[high]))

    def density(self, grid: Tensor, width: float) -> Tensor:
        """Gaussian-smoothed spectral density at ``grid`` (points,), integrating to 1. For pictures, not for figures."""
        check_range("width", width, low=1e-300)
        nodes, mass = self.atoms()
        points = grid.to(torch.float64)
        parts = [torch.exp(-0.5 * ((block[:, None] - nodes) / width) ** 2) @ mass for block in points.split(256)]
        return torch.cat(parts) / (self.size * width * math.sqrt(2 * math.pi))

    def save(self, path: str | Path) -> None:
        """Write the spectrum to ``path``, whole or not at all."""
        buffer = io.BytesIO()
        torch.save({"telltale_spectrum": 1, **vars(self)}, buffer)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Read what :meth:`save` wrote; raises :class:`~telltale.errors.CheckpointError` for anything else."""
        try:
            values = torch.load(path, weights_only=True)
            if values.pop("telltale_spectrum") != 1:
                raise KeyError("telltale_spectrum")
            return cls(**values)
        except Exception as error:
            raise CheckpointError(f"{path} is no saved spectrum: {error}") from error


@own_precision()
def slq(
    operators: Sequence[Any],
    *,
    runs: int,
    steps: int,
    seed: int | torch.Generator = 0,
    memory_limit: int = MEMORY_LIMIT,
) -> Spectrum:
    """Stochastic Lanczos quadrature: ``runs`` Rademacher probes, shared out over ``operators``, ``steps`` products each.

    Run i belongs to operator i mod B; each operator is taken out of the sequence once, so it may be built on demand. An
    axis-aligned null space (dead units) has its exact mass under Rademacher probes. ``steps`` above N are capped.

    Above ``memory_limit`` bytes the basis is not kept: no reorthogonalisation, and the copies ("ghosts") of converged
    eigenvalues share their weight, which leaves the quadrature valid.

    Raises :class:`~telltale.errors.ConfigError` for runs or steps below 1 or fewer runs than operators, and
    :class:`~telltale.errors.NumericalError` for an operator that is not finite.
    """
    check_integer("runs", runs, low=1)
    check_integer("steps", steps, low=1)
    count = len(operators)
    if not 1 <= count <= runs:
        raise ConfigError(f"runs={runs} for {count} operators; expected at least one operator and one run for each.")
    seeds = _run_seeds(seed, runs)
    found: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
    matvecs, size, kept = 0, None, True
    for index in range(count):
        operator = as_operator(operators[index])
        if size not in (None, operator.size):
            raise DataError(f"operators of sizes {size} and {operator.size}; expected one size.")
        size, like = operator.size, vector_like(operator)
        kept = min(steps, size) * size * like.element_size() <= memory_limit
        for run in range(index, runs, count):
            nodes, weights, residuals, used = _one_run(operator, _rademacher(like, seeds[run]), steps, kept)
            found.append((run, index, nodes, weights, residuals))
            matvecs += used
    found.sort(key=lambda entry: entry[0])
    assert size is not None
    return Spectrum(
        size=size,
        nodes=[entry[2] for entry in found],
        weights=[entry[3] for entry in found],
        batch=[entry[1] for entry in found],
        matvecs=matvecs,
        exact=False,
        residuals=[entry[4] for entry in found],
        reorthogonalised=kept,
    )


@own_precision()
def dense(operator: Any, *, batch: int = 0) -> Spectrum:
    """Every eigenvalue of one operator, from its N products and ``eigvalsh`` in float64: N^2 numbers, time N^3."""
    one = as_operator(operator)
    matrix = materialise(one)
    rounding = float(torch.finfo(matrix.dtype).eps) * math.sqrt(one.size)
    matrix = matrix.to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError("the operator returned NaN or infinite values; expected a finite operator.")
    nodes = _null_to_zero(torch.linalg.eigvalsh(matrix).cpu(), rounding)
    weights = torch.full_like(nodes, 1 / one.size)
    return Spectrum(
        size=one.size,
        nodes=[nodes],
        weights=[weights],
        batch=[batch],
        matvecs=one.size,
        exact=True,
        residuals=[torch.zeros_like(nodes)],
    )


def joined(spectra: Sequence[Spectrum]) -> Spectrum:
    """The runs of several spectra of one size as one spectrum; each part is a minibatch of its own, renumbered."""
    if not spectra or len({part.size for part in spectra}) != 1:
        raise DataError("the spectra have different sizes or there are none; expected spectra of one operator size.")
    batch: list[int] = []
    for part in spectra:
        offset = max(batch, default=-1) + 1
        batch += [offset + owner for owner in part.batch]
    return Spectrum(
        size=spectra[0].size,
        nodes=[nodes for part in spectra for nodes in part.nodes],
        weights=[weights for part in spectra for weights in part.weights],
        batch=batch,
        matvecs=sum(part.matvecs for part in spectra),
        exact=all(part.exact for part in spectra),
        residuals=[residuals for part in spectra for residuals in part.residuals],
        reorthogonalised=all(part.reorthogonalised for part in spectra),
    )


def _one_run(operator: Operator, probe: Tensor, steps: int, kept: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """Nodes, weights, residuals and products of one probe."""
    run = lanczos(operator, probe, steps, reorthogonalise=kept)
    nodes = _null_to_zero(run.nodes, 4 * float(torch.finfo(probe.dtype).eps))
    return nodes, run.weights, run.residuals, run.matvecs


def _null_to_zero(nodes: Tensor, rounding: float) -> Tensor:
    """Eigenvalues that are rounding of the largest one, as exact zeros: their sign is noise, their exponent is 0."""
    return nodes.masked_fill(nodes.abs() <= rounding * nodes.abs().max(), 0.0)


def _rademacher(like: Tensor, seed: int) -> Tensor:
    """+1 or -1 with equal chances, (N,); drawn on the CPU, so that every device sees the same probes."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.empty(like.shape, dtype=torch.float32).bernoulli_(0.5, generator=generator)
    return signs.mul_(2).sub_(1).to(like)


def _run_seeds(seed: int | torch.Generator, count: int) -> list[int]:
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(2**31, (count,), generator=generator).tolist()
    return drawn
