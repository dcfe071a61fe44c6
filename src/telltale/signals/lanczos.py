"""The Lanczos process with full reorthogonalisation, and its Ritz values with residuals.

Each step costs one product, a three-term recurrence and one classical Gram-Schmidt pass against the whole basis, for which the
basis is read twice; a second pass runs only when the first removed most of the vector ("twice is enough", Parlett 1998
section 6.9). Where it is safe, two vectors go through one pass: the first has been multiplied before it was orthogonalised,
which leaves the tridiagonal matrix exact to rounding as long as its overlaps are below the root of the rounding error (semi-
orthogonality: Simon, Math. Comp. 42, 1984). Without reorthogonalisation nothing but two vectors is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from telltale.config import check_integer
from telltale.errors import DataError, NumericalError
from telltale.signals.hessian import Operator
from telltale.signals.quiet import own_precision

BREAKDOWN = 100.0
"""A next vector shorter than this many rounding errors of the operator is rounding: the Krylov space is exhausted."""
PIECE = 65536
"""Numbers that a sum of squares adds up in float32 before it continues in float64."""
MARGIN = 0.1
"""Of the root of the rounding error: overlaps that are expected to stay below it may wait for the next vector."""


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
    """|H y - node y| of each Ritz pair, (m,): an eigenvalue is that near."""
    coordinates: Tensor
    """T's eigenvectors in columns, (m, m)."""
    basis: Tensor | None
    """Q^T, (m, N), in the operator's dtype; None without reorthogonalisation."""
    matvecs: int

    def vectors(self, which: Tensor) -> Tensor:
        """Ritz vectors of the given indices in rows, (count, N); raises DataError if the basis was not kept."""
        if self.basis is None:
            raise DataError("this Lanczos run kept no basis; expected reorthogonalise=True.")
        with own_precision():
            return self.coordinates[:, which].T.to(self.basis) @ self.basis


@own_precision()
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
    return _ritz(*_recurrence(operator, start / length, steps, reorthogonalise))


def _recurrence(
    operator: Operator, unit: Tensor, steps: int, reorthogonalise: bool
) -> tuple[list[float], list[float], Tensor | None, int]:
    """Alphas, betas, the basis in rows and the number of products; the hot loop: few passes over N-vectors apart from the basis."""
    rows = unit.new_empty(steps + 1 if reorthogonalise else 2, operator.size)
    rounding = torch.finfo(unit.dtype).eps
    limit = math.sqrt(rounding)
    alphas: list[float] = []
    betas: list[float] = []
    rows[0], scale, extra, waiting, may_wait = unit, 0.0, 0, False, reorthogonalise
    for step in range(steps):
        here = step if reorthogonalise else step % 2
        previous, current, following = rows[here - 1], rows[here], rows[(here + 1) % len(rows)]
        alpha = _three_terms(operator, previous, current, following, betas)
        beta, before = _length(following), betas[-1] if betas else 0.0
        scale = max(scale, abs(alpha) + beta + before)
        if waiting:
            waiting = False
            if _orthogonalise_both(rows, step) > limit:
                # The operator is less exact than its dtype: the product has to be the orthogonal vector's.
                length = _length(current)
                betas[-1] *= length
                alpha = _three_terms(operator, previous, current.div_(length), following, betas)
                _orthogonalise(following, rows[: step + 1])
                extra, may_wait = extra + 1, False
            beta = _length(following)
        elif may_wait and step + 1 < steps and rounding * scale <= MARGIN * limit * beta:
            waiting = True
        elif reorthogonalise:
            _orthogonalise(following, rows[: step + 1])
            beta = _length(following)
        if not math.isfinite(alpha + beta):
            raise NumericalError("the operator returned NaN or infinite values; expected a finite operator.")
        alphas.append(alpha)
        if beta <= BREAKDOWN * rounding * scale:
            betas.append(0.0)
            break
        betas.append(beta)
        following.div_(beta)
    return alphas, betas, rows[: len(alphas)] if reorthogonalise else None, len(alphas) + extra


def _three_terms(operator: Operator, previous: Tensor, current: Tensor, following: Tensor, betas: list[float]) -> float:
    """Put H q_j - beta q_(j-1) - alpha q_j into ``following``; alpha."""
    product = operator.matvec(current)
    if betas:
        torch.sub(product, previous, alpha=betas[-1], out=following)
    else:
        following.copy_(product)
    alpha = float(torch.dot(current, following))
    following.sub_(current, alpha=alpha)
    return alpha


def _orthogonalise(vector: Tensor, basis: Tensor) -> None:
    """One Gram-Schmidt pass in place, and a second if the first took more than half of the vector's square."""
    for _ in range(2):
        overlaps = torch.mv(basis, vector)
        torch.addmv(vector, basis.T, overlaps, alpha=-1, out=vector)
        if _length(overlaps) <= _length(vector):
            return


def _orthogonalise_both(rows: Tensor, step: int) -> float:
    """Rows ``step`` and the next against all before, read as often as for one, then the next against ``step``.

    Returns how much of row ``step``, a unit vector, lay in the rows before it.
    """
    basis, pair = rows[:step], rows[step : step + 2]
    overlaps = pair @ basis.T
    pair.addmm_(overlaps, basis, alpha=-1)
    current, following = pair
    following.sub_(current, alpha=float(torch.dot(current, following)))
    if _length(overlaps[1]) > _length(following):
        _orthogonalise(following, rows[: step + 1])
    return _length(overlaps[0])


def _length(vector: Tensor) -> float:
    """By dot products of pieces: one of a million equal float32 numbers, or ``norm()``, is wrong in the fifth digit."""
    return math.sqrt(sum(float(torch.dot(piece, piece)) for piece in vector.split(PIECE)))


def _ritz(alphas: list[float], betas: list[float], basis: Tensor | None, matvecs: int) -> Lanczos:
    diagonal = torch.tensor(alphas, dtype=torch.float64)
    off_diagonal = torch.tensor(betas, dtype=torch.float64)
    tridiagonal = torch.diag(diagonal) + torch.diag(off_diagonal[:-1], 1) + torch.diag(off_diagonal[:-1], -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return Lanczos(
        alphas=diagonal,
        betas=off_diagonal,
        nodes=nodes,
        weights=vectors[0] ** 2,
        residuals=(float(off_diagonal[-1]) * vectors[-1]).abs(),
        coordinates=vectors,
        basis=basis,
        matvecs=matvecs,
    )
