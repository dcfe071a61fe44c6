"""The Lanczos process with full reorthogonalisation, its Ritz values with residuals, and deflation by converged pairs.

Each step costs one product, a three-term recurrence, and one classical Gram-Schmidt pass by two matrix-vector products
with the basis; a second pass runs only when the first removed most of the vector ("twice is enough", Parlett 1998
section 6.9). Without reorthogonalisation nothing but two vectors is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.configuration import check_integer
from telltale.errors import DataError, NumericalError
from telltale.signals.hessian import Operator

BREAKDOWN = 100.0
"""A next vector shorter than this many rounding errors of the operator is rounding: the Krylov space is exhausted."""


@dataclass(frozen=True)
class Lanczos:
    """T = Q^T H Q after m steps from q_1 = start / |start|, and its eigenpairs; all but ``basis`` float64."""

    alphas: Tensor
    """Diagonal of T, (m,)."""
    betas: Tensor
    """Off-diagonal of T and the length of the next vector, (m,); the last is 0 after a breakdown."""
    nodes: Tensor
    """Ritz values, ascending, (m,)."""
    weights: Tensor
    """Squared first components of T's eigenvectors, (m,): they sum to 1, and sum w f(node) ~ q_1^T f(H) q_1."""
    residuals: Tensor
    """|H y - node y| of each Ritz pair, (m,): an eigenvalue lies that near."""
    coordinates: Tensor
    """T's eigenvectors in columns, (m, m)."""
    basis: Tensor | None
    """Q^T, (m, N), in the operator's dtype; None without reorthogonalisation."""
    matvecs: int

    def vectors(self, which: Tensor) -> Tensor:
        """Ritz vectors of the given indices in rows, (count, N); raises DataError if the basis was not kept."""
        if self.basis is None:
            raise DataError("this Lanczos run kept no basis; expected reorthogonalise=True.")
        return self.coordinates[:, which].T.to(self.basis) @ self.basis


@dataclass(frozen=True)
class RitzPairs:
    """Eigenpairs that a Lanczos run has found: ``values`` (k,) float64, ``vectors`` (k, N) orthonormal rows."""

    values: Tensor
    residuals: Tensor
    vectors: Tensor


def lanczos(operator: Operator, start: Tensor, steps: int, *, reorthogonalise: bool = True) -> Lanczos:
    """m = min(steps, N) steps of the Lanczos process; fewer where the Krylov space of ``start`` (N,) is exhausted.

    Raises :class:`~telltale.errors.ConfigError` for steps < 1, :class:`~telltale.errors.DataError` for a start vector
    of another size or zero length, and :class:`~telltale.errors.NumericalError` for a product that is not finite.
    """
    check_integer("steps", steps, low=1)
    if start.shape != (operator.size,):
        raise DataError(f"the start vector has shape {tuple(start.shape)}; expected ({operator.size},).")
    length = _length(start)
    if not (length > 0 and math.isfinite(length)):
        raise DataError(f"the start vector has length {length}; expected a finite one above 0.")
    steps = min(steps, operator.size)
    alphas, betas, basis = _recurrence(operator, start / length, steps, reorthogonalise)
    return _ritz(alphas, betas, basis, len(alphas))


def converged_pairs(run: Lanczos, *, tolerance: float = 1e-3) -> RitzPairs:
    """The Ritz pairs whose residual is at most ``tolerance`` times the largest |node|; nearly null ones are left out.

    Null directions are known without a probe: their exponent is 0. Taking them out would gain nothing.
    """
    scale = float(run.nodes.abs().max())
    which = ((run.residuals <= tolerance * scale) & (run.nodes.abs() > 10 * tolerance * scale)).nonzero()[:, 0]
    return RitzPairs(run.nodes[which], run.residuals[which], run.vectors(which))


class DeflatedOperator:
    """P H P with P = I - U^T U: the operator on the complement of the orthonormal rows ``vectors`` (k, N)."""

    def __init__(self, operator: Operator, vectors: Tensor) -> None:
        self._operator, self._vectors = operator, vectors
        self.size, self.dtype, self.device = operator.size, vectors.dtype, vectors.device

    def project(self, v: Tensor) -> Tensor:
        """P v, twice for rounding. (N,) -> (N,)."""
        for _ in range(2):
            v = v - self._vectors.T @ (self._vectors @ v)
        return v

    def matvec(self, v: Tensor) -> Tensor:
        """P H v for v in the complement. (N,) -> (N,)."""
        product = self._operator.matvec(v)
        return product - self._vectors.T @ (self._vectors @ product)


def _recurrence(
    operator: Operator, unit: Tensor, steps: int, reorthogonalise: bool
) -> tuple[list[float], list[float], Tensor | None]:
    """Alphas, betas and the basis in rows; the hot loop: no more than four passes over N-vectors beside the basis."""
    basis = unit.new_empty(steps, operator.size) if reorthogonalise else None
    rounding = BREAKDOWN * torch.finfo(unit.dtype).eps
    alphas: list[float] = []
    betas: list[float] = []
    previous, current, scale = unit, unit, 0.0
    for step in range(steps):
        if basis is not None:
            basis[step] = current
            current = basis[step]
        product = operator.matvec(current)
        following = product.sub(previous, alpha=betas[-1]) if betas else product.clone()
        alpha = float(torch.dot(current, following))
        following.sub_(current, alpha=alpha)
        if basis is not None:
            _orthogonalise(following, basis[: step + 1])
        beta = _length(following)
        if not math.isfinite(alpha + beta):
            raise NumericalError("the operator returned NaN or infinite values; expected a finite operator.")
        alphas.append(alpha)
        scale = max(scale, abs(alpha) + beta + (betas[-1] if betas else 0.0))
        if beta <= rounding * scale:
            betas.append(0.0)
            break
        betas.append(beta)
        previous, current = current, following.div_(beta)
    return alphas, betas, None if basis is None else basis[: len(alphas)]


def _orthogonalise(vector: Tensor, basis: Tensor) -> None:
    """One Gram-Schmidt pass in place, and a second if the first took more than half of the vector's square."""
    for _ in range(2):
        overlaps = torch.mv(basis, vector)
        torch.addmv(vector, basis.T, overlaps, alpha=-1, out=vector)
        if _length(overlaps) <= _length(vector):
            return


def _length(vector: Tensor) -> float:
    """By dot product: ``norm()`` of a million float32 numbers is wrong in the fifth digit, and slower."""
    return math.sqrt(float(torch.dot(vector, vector)))


def _ritz(alphas: list[float], betas: list[float], basis: Tensor | None, matvecs: int) -> Lanczos:
    diagonal = torch.tensor(alphas, dtype=torch.float64)
    beside = torch.tensor(betas, dtype=torch.float64)
    tridiagonal = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return Lanczos(
        alphas=diagonal,
        betas=beside,
        nodes=nodes,
        weights=vectors[0] ** 2,
        residuals=(float(beside[-1]) * vectors[-1]).abs(),
        coordinates=vectors,
        basis=basis,
        matvecs=matvecs,
    )
