"""Solutions of (G + alpha) W = C for many alphas from one orthogonal reduction of G to a band.

G = Q S Q^T with S of bandwidth b, by blocks of Householder reflections (Bischof, Lang & Sun 2000, first stage): 2 d^3 operations,
nearly all of them in matrix products. Then (G + alpha)^-1 C = Q (S + alpha)^-1 Q^T C, and a band is factored in d b^2.
A Cholesky factorisation costs d^3 / 3 for every alpha, at a lower speed; a full eigendecomposition costs more than nine of them.

Rounding is relative to the largest eigenvalue, whatever the scales of the columns are, where Cholesky's is relative to each
column's own scale. So the band is for comparing alphas; a solution that is kept is refined once against G itself, and solved
for by Cholesky where the correction was more than rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

WIDTH = 64
"""Of the band. Wider panels are faster to apply, and slower to factor."""
DIRECT = 384
"""Below this d, factoring anew for each of nine alphas is no slower."""
ROUNDING = 1e-11
"""The largest correction, relative to a column's largest weight, that passes for rounding."""


def solved(gram: Tensor, alpha: Tensor, cross: Tensor) -> Tensor:
    """(gram + alpha)^-1 cross, (d, m), for positive semidefinite ``gram`` (d, d); float64."""
    ridged = np.array(gram.numpy(), order="F")
    np.fill_diagonal(ridged, ridged.diagonal() + float(alpha))
    factor, failed = lapack.dpotrf(ridged, lower=1, clean=0, overwrite_a=1)
    if not failed:
        return torch.from_numpy(lapack.dpotrs(factor, cross.numpy(), lower=1)[0])
    # Rounding has made the matrix indefinite: alpha is far below the Gram matrix's own rounding.
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ ((vectors.T @ cross) / (values.clamp_min(0) + alpha)[:, None])


class ManyAlphas:
    """(gram + alpha)^-1 cross for positive semidefinite ``gram`` (d, d), float64, and several alphas above 0.

    ``width`` of the band; None: 64, or no band for a small ``gram``, where it does not pay.
    """

    def __init__(self, gram: Tensor, *, width: int | None = None) -> None:
        self._gram = gram
        self._band: np.ndarray | None = None
        if width is not None or len(gram) >= DIRECT:
            # Rows a power of two apart would fall into the same few sets of the cache.
            space = gram.new_empty(len(gram), len(gram) + 8)[:, : len(gram)]
            reduced, self._reflections = _reduced(space.copy_(gram), width or WIDTH)
            self._band = _diagonals(reduced, width or WIDTH)

    def compared(self, alphas: Tensor, cross: Tensor) -> Tensor:
        """For all alphas (A,), near enough to choose one by: (A, d, m)."""
        factors = [factor for alpha in alphas.tolist() if (factor := self._factor(alpha)) is not None]
        if len(factors) < len(alphas):
            return torch.stack([solved(self._gram, alpha, cross) for alpha in alphas])
        return self._through(factors, cross).view(len(cross), len(alphas), -1).transpose(0, 1)

    def kept(self, alpha: Tensor, cross: Tensor, near: Tensor) -> Tensor:
        """For one alpha, from what :meth:`compared` found for it, as exact as :func:`solved`: (d, m)."""
        factor = self._factor(float(alpha))
        if factor is not None:
            correction = self._through([factor], cross - self._gram @ near - alpha * near)
            if bool((correction.abs().amax(0) <= ROUNDING * near.abs().amax(0)).all()):
                return near + correction
        return solved(self._gram, alpha, cross)

    def _factor(self, alpha: float) -> np.ndarray | None:
        """Of S + alpha; None without a band, or if rounding has made it indefinite."""
        if self._band is None:
            return None
        ridged = self._band.copy(order="F")
        ridged[0] += alpha
        factor, failed = lapack.dpbtrf(ridged, lower=1, overwrite_ab=1)
        return None if failed else factor

    def _through(self, factors: list[np.ndarray], cross: Tensor) -> Tensor:
        """Q (S + alpha)^-1 Q^T cross of several factors side by side, (d, A m)."""
        turned = _apply(self._reflections, cross.clone(), transposed=True).numpy()
        solutions = [lapack.dpbtrs(factor, turned, lower=1)[0] for factor in factors]
        return _apply(self._reflections, torch.from_numpy(np.concatenate(solutions, axis=1)))


Reflections = list[tuple[int, Tensor, Tensor]]
"""First row, V and T of each Q_j = I - V T V^T: Q is their product, first to last."""


def _reduced(matrix: Tensor, width: int) -> tuple[Tensor, Reflections]:
    """Q^T matrix Q, of which the lower band is right, in place of ``matrix``, and Q."""
    reflections = []
    for column in range(0, len(matrix) - width - 1, width):
        row = column + width
        panel = np.array(matrix[row:, column:row].numpy(), order="F")
        count = min(panel.shape)
        factored, triangle, _ = lapack.dgeqrt(count, panel, overwrite_a=1)
        matrix[row : row + count, column:row] = torch.from_numpy(np.triu(factored[:count]))
        v = torch.from_numpy(np.tril(factored[:, :count], -1))
        v.diagonal().fill_(1.0)
        t = torch.from_numpy(np.triu(triangle[:count, :count]))
        rest = matrix[row:, row:]
        # Q^T A Q = A - V W^T - W V^T with Y = A V T and W = Y - V T^T V^T Y / 2.
        y = rest @ (v @ t)
        w = torch.addmm(y, v, t.T @ (v.T @ y), alpha=-0.5)
        rest.addmm_(torch.cat([v, w], dim=1), torch.cat([w, v], dim=1).T, alpha=-1)
        reflections.append((row, v, t))
    return matrix, reflections


def _diagonals(matrix: Tensor, width: int) -> np.ndarray:
    """The main diagonal and the ``width`` below it, in LAPACK's rows (width + 1, d)."""
    values = matrix.numpy()
    band = np.zeros((min(width, len(values) - 1) + 1, len(values)), order="F")
    for below in range(len(band)):
        band[below, : len(values) - below] = values.diagonal(-below)
    return band


def _apply(reflections: Reflections, columns: Tensor, *, transposed: bool = False) -> Tensor:
    """Q columns, or Q^T columns, in place of ``columns`` (d, m)."""
    for row, v, t in reflections if transposed else reversed(reflections):
        rows = columns[row:]
        rows.addmm_(v, (t.T if transposed else t) @ (v.T @ rows), alpha=-1)
    return columns
