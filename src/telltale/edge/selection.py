"""Which patches to send: the selectors, one contract for all of them, and the registry that users extend.

SAGE is Algorithm 1 of arXiv 2604.19623; the others are what it is measured against and what an audit may prefer. This module
needs NumPy only, so that it runs on a device without PyTorch; torch tensors are taken and returned where they are given.

Three rules make every selection reproducible to the last index, whatever the batch, the thread count or the BLAS library:
each image is selected alone; patches are put in order of importance first (ties: lower index), and every later tie goes to
the first in that order; cosines are sums of integers that a float64 holds exactly, so that no order of addition matters.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np

from telltale.config import check_range
from telltale.errors import BudgetError, ConfigError

Array = np.ndarray
Selector = Callable[..., Sequence[int] | Array]
"""``(importance (N,), embeddings (N, D) or None, budget, **options) -> at most budget distinct indices, in selection order``.

A selector that draws takes ``generator`` (a NumPy generator) among its options.
"""


@dataclass(frozen=True)
class _Entry:
    function: Selector
    compares: bool
    draws: bool
    options: tuple[str, ...]


_REGISTRY: dict[str, _Entry] = {}
_GRAIN = 2.0**26
"""Unit vectors are rounded to multiples of 1 / _GRAIN: products are multiples of 2^-52 and their sums stay below 2."""


def register_selector(name: str, *, compares: bool = False) -> Callable[[Selector], Selector]:
    """Decorator: make a function known to :func:`select` as ``name``; ``compares``: it cannot do without embeddings.

    Raises ConfigError if the name is taken.
    """

    def add(function: Selector) -> Selector:
        if name in _REGISTRY:
            raise ConfigError(f"selector {name!r} is registered already; choose another name.")
        options = list(inspect.signature(function).parameters)[3:]
        named = tuple(option for option in options if option != "generator")
        _REGISTRY[name] = _Entry(function, compares, "generator" in options, named)
        return function

    return add


def selectors() -> list[str]:
    """Names that :func:`select` knows."""
    return list(_REGISTRY)


def selector_description(name: str) -> str:
    """The first line of the selector's docstring."""
    return (inspect.getdoc(_entry(name).function) or "").split("\n")[0]


def select(
    name: str,
    importance: Any,
    embeddings: Any,
    budget: int,
    *,
    generator: Any = None,
    clamp: bool = False,
    **options: Any,
) -> Any:
    """Choose ``budget`` of N patches for each image of a batch: (B, budget) int64 in selection order.

    name: one of :func:`selectors`. importance: (B, N), or (N,) for one image, whose result is then (budget,).
    embeddings: (B, N, D) or (N, D); None for selectors that do not look at them. NumPy arrays or torch tensors; the result is
    of the importance's kind and on its device. generator: a NumPy or torch generator or an integer seed for selectors that
    draw; None is seed 0. clamp: take a budget above N as N instead of refusing it. options: the selector's own.

    Selectors that may choose fewer pad with -1. Raises :class:`~telltale.errors.ConfigError` for an unknown selector or option
    and for values that are not finite, :class:`~telltale.errors.BudgetError` for a budget outside 1..N; both are ValueErrors.
    """
    entry = _entry(name)
    rows, vectors = _checked(importance, embeddings)
    count = _checked_budget(budget, rows.shape[1], clamp=clamp)
    for option in options:
        if option not in entry.options:
            listed = ", ".join(entry.options) or "none"
            raise ConfigError(f"selector {name!r} has no option {option!r}; its options: {listed}.")
    if vectors is None and entry.compares:
        raise ConfigError(f"selector {name!r} compares embeddings and none were given; give embeddings (B, N, D).")
    key = _key(generator) if entry.draws else 0
    chosen = np.full((len(rows), count), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        extra = {"generator": np.random.default_rng([key, crc32(row.tobytes())])} if entry.draws else {}
        picked = entry.function(row, None if vectors is None else vectors[number], count, **options, **extra)
        chosen[number, : len(picked)] = _checked_choice(name, picked, count, len(row))
    return _like(chosen if np.ndim(importance) == 2 else chosen[0], importance)


@register_selector("topk")
def topk(importance: Array, embeddings: Array | None, budget: int) -> Array:
    """The ``budget`` largest importances: S = top_B(a)."""
    return ranking(importance)[:budget]


@register_selector("random")
def random(importance: Array, embeddings: Array | None, budget: int, *, generator: np.random.Generator) -> Array:
    """``budget`` patches drawn uniformly without replacement; an image is drawn alike alone and in any batch."""
    return generator.permutation(len(importance))[:budget]


@register_selector("uniform")
def uniform(
    importance: Array, embeddings: Array | None, budget: int, *, grid: tuple[int, int] | None = None
) -> list[int]:
    """A grid spread evenly, without content: s_t = argmax_i min_{j in S} |p_i - p_j|^2 from the patch nearest to the centre.

    p are row and column on ``grid`` (rows, columns), by default the square of N. Ties: the lower index.
    """
    return list(_even_order(*_grid(len(importance), grid))[:budget])


@register_selector("sage", compares=True)
def sage(importance: Array, embeddings: Array, budget: int, *, k: float = 2.0) -> Array:
    """SAGE, Algorithm 1: farthest-first by cosine inside the k * budget most important patches.

    C = top_{min(N, ceil(k B))}(a); s_1 = argmax a; s_t = argmin_{i in C \\ S} max_{j in S} cos(z_i, z_j). k = 1 is top-k as a
    set; with k * budget >= N the importance filters nothing and this is ``fps``.
    """
    check_range("k", k, low=1.0)
    pool = ranking(importance)[: math.ceil(min(len(importance), k * budget))]
    return pool[_farthest_first(_cosines(embeddings[pool]), budget)]


@register_selector("fps", compares=True)
def fps(importance: Array, embeddings: Array, budget: int) -> Array:
    """Farthest-point sampling by cosine over all patches from the most important one: SAGE without its pool.

    s_1 = argmax a; s_t = argmin_{i not in S} max_{j in S} cos(z_i, z_j).
    """
    order = ranking(importance)
    return order[_farthest_first(_cosines(embeddings[order]), budget)]


@register_selector("sage_nested", compares=True)
def sage_nested(
    importance: Array, embeddings: Array, budget: int, *, k: float = 2.0, largest: int | None = None
) -> Array:
    """SAGE with one pool for all budgets, so that a prefix of a selection is the selection of a smaller budget.

    C = top_{min(N, ceil(k * largest))}(a), ``largest`` by default N // 4. Beyond the pool's size it goes on among the rest.
    """
    check_range("k", k, low=1.0)
    count = len(importance)
    largest = max(1, count // 4) if largest is None else _checked_budget(largest, count, clamp=False)
    order = ranking(importance)
    size = math.ceil(min(count, k * largest))
    similar = _cosines(embeddings[order[: size if budget <= size else count]])
    return order[_farthest_first(similar, budget, pool=size)]


@register_selector("mmr", compares=True)
def mmr(importance: Array, embeddings: Array, budget: int, *, weight: float = 0.5) -> Array:
    """Maximal marginal relevance: argmax_i weight * a_i / max(a) - (1 - weight) * max_{j in S} cos(z_i, z_j)."""
    check_range("weight", weight, low=0.0, high=1.0)
    order = ranking(importance)
    top = importance[order[0]]
    relevance = weight * importance[order] / (top if top > 0 else 1.0)
    similar = (1.0 - weight) * _cosines(embeddings[order])
    chosen, nearest = [0], similar[0].copy()
    free = np.zeros(len(order))
    free[0] = -np.inf
    for _ in range(budget - 1):
        pick = int((relevance - nearest + free).argmax())
        chosen.append(pick)
        free[pick] = -np.inf
        np.maximum(nearest, similar[pick], out=nearest)
    return order[chosen]


@register_selector("dpp", compares=True)
def dpp(importance: Array, embeddings: Array, budget: int) -> Array:
    """Greedy MAP of the determinantal process with kernel L_ij = a_i a_j cos(z_i, z_j) (Chen et al. 2018, Algorithm 1).

    s_t = argmax_i log det L_{S + i} = argmax of the residuals d_i^2; importances are divided by their largest. Once every residual
    is below 1e-10 the kernel's rank is used up, and the rest comes in order of importance.
    """
    order = ranking(importance)
    ranked = importance[order]
    quality = ranked / (np.abs(ranked).max() or 1.0)
    kernel = quality[:, None] * _cosines(embeddings[order]) * quality
    residual = kernel.diagonal().copy()
    factors = np.zeros((budget, len(order)))
    taken = np.zeros(len(order), dtype=bool)
    chosen: list[int] = []
    while len(chosen) < budget:
        comparable = np.where(taken, -1.0, np.rint(residual * 1e12))
        pick = int(comparable.argmax())
        if comparable[pick] < 100:
            chosen += np.flatnonzero(~taken)[: budget - len(chosen)].tolist()
            break
        row = len(chosen)
        # einsum adds in one order on every thread count; the BLAS product does not.
        projection = np.einsum("t,tn->n", factors[:row, pick].copy(), factors[:row])
        factors[row] = (kernel[pick] - projection) / math.sqrt(residual[pick])
        residual -= factors[row] ** 2
        taken[pick] = True
        chosen.append(pick)
    return order[chosen]


@register_selector("facility", compares=True)
def facility(importance: Array, embeddings: Array, budget: int) -> Array:
    """Importance-weighted facility location, greedy: argmax_S sum_i a_i max_{j in S} max(0, cos(z_i, z_j)).

    Every gain is kept up to date: a pick changes it only through the patches whose nearest chosen patch has changed.
    """
    order = ranking(importance)
    ranked = importance[order]
    # Integers again: cosines up to 2^22 and weights that add up to 2^22 make gains whose updates float64 holds exactly.
    similar = _cosines(embeddings[order])
    np.maximum(similar, 0.0, out=similar)
    similar *= 2.0**22
    np.rint(similar, out=similar)
    ranked = ranked / (np.abs(ranked).max() or 1.0)
    weights = np.rint(ranked * (2.0**22 / (np.abs(ranked).sum() or 1.0)))
    covered = np.zeros(len(order))
    gains = weights @ similar
    chosen: list[int] = []
    for _ in range(budget):
        pick = int(gains.argmax())
        chosen.append(pick)
        row = similar[pick]
        nearer = (row > covered).nonzero()[0]
        before, weight = covered.take(nearer), weights.take(nearer)
        # A patch i that moves from before_i to row_i takes w_i (min(max(s_ij, before_i), row_i) - before_i) from gain j.
        lost = similar.take(nearer, axis=0)
        np.minimum(lost, row.take(nearer)[:, None], out=lost)
        np.maximum(lost, before[:, None], out=lost)
        gains -= weight.dot(lost)
        gains += weight.dot(before)
        np.maximum(covered, row, out=covered)
        gains[pick] = -np.inf
    return order[chosen]


@register_selector("attention_sum")
def attention_sum(importance: Array, embeddings: Array | None, budget: int, *, share: float = 0.97) -> Array:
    """The fewest most important patches whose importances reach ``share`` of the sum, at most ``budget`` (Im et al. 2024).

    At least one patch is kept, also where the first alone exceeds the share.
    """
    check_range("share", share, low=0.0, high=1.0)
    if importance.min() < 0:
        raise ConfigError("selector 'attention_sum' adds up importances and one is negative; give importances >= 0.")
    order = ranking(importance)
    reached = np.cumsum(importance[order])
    count = int(np.searchsorted(reached, share * reached[-1])) + 1
    return order[: min(count, budget)]


@register_selector("threshold")
def threshold(importance: Array, embeddings: Array | None, budget: int, *, level: float | None = None) -> Array:
    """Patches with a_i >= ``level`` (by default the mean importance), at most ``budget`` and at least one."""
    order = ranking(importance)
    level = float(importance.mean()) if level is None else check_range("level", level)
    return order[: min(budget, max(1, int((importance >= level).sum())))]


def ranking(importance: Array) -> Array:
    """Indices (N,) by falling importance; ties by rising index."""
    return np.argsort(-importance, kind="stable")


def cosines(embeddings: Array) -> Array:
    """Cosine similarities (N, N), float64, of the rows of ``embeddings`` (N, D); a zero row has similarity 0 to all.

    Rows are scaled to length 1 and rounded to multiples of 2^-26 (errors of a cosine stay below 1e-7). All sums of products are
    then multiples of 2^-52 below 2: float64 adds them without rounding, and equal rows have equal similarities.
    """
    return _cosines(embeddings).copy()


class _Workspace(threading.local):
    """Memory for one product per thread: getting it anew from the system for each image costs more than the product."""

    def __init__(self) -> None:
        self.rows = self.product = np.empty((0, 0))

    def fit(self, count: int, width: int) -> tuple[Array, Array]:
        if self.rows.shape != (count, width):
            self.rows, self.product = np.empty((count, width)), np.empty((count, count))
        return self.rows, self.product


_WORKSPACE = _Workspace()


def _cosines(embeddings: Array) -> Array:
    """:func:`cosines` in memory that the next call in this thread overwrites."""
    rows, product = _WORKSPACE.fit(*embeddings.shape)
    rows[:] = embeddings
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows *= (_GRAIN / np.where(lengths > 0, lengths, 1.0))[:, None]
    np.rint(rows, out=rows)
    np.matmul(rows, rows.T, out=product)
    product *= 1.0 / _GRAIN**2
    return product


def _farthest_first(similar: Array, budget: int, *, first: int = 0, pool: int | None = None) -> list[int]:
    """Greedy argmin of the largest similarity to the chosen, from ``first``; only rows below ``pool`` until those are used up."""
    np.fill_diagonal(similar, np.inf)
    nearest = similar[first].copy()
    chosen = [first]
    size = len(similar) if pool is None else min(pool, len(similar))
    inside = nearest[:size]
    for _ in range(min(budget, size) - 1):
        pick = int(inside.argmin())
        chosen.append(pick)
        np.maximum(nearest, similar[pick], out=nearest)
    for _ in range(budget - size):
        pick = int(nearest.argmin())
        chosen.append(pick)
        np.maximum(nearest, similar[pick], out=nearest)
    return chosen


@lru_cache(maxsize=16)
def _even_order(rows: int, columns: int) -> tuple[int, ...]:
    """All patches of a grid, farthest-first from the centre; every budget takes a prefix."""
    places = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    apart = ((places[:, None] - places[None]) ** 2).sum(axis=-1).astype(np.float64)
    centre = int(((2 * places - [rows - 1, columns - 1]) ** 2).sum(axis=-1).argmin())
    return tuple(_farthest_first(-apart, rows * columns, first=centre))


def _grid(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = math.isqrt(count)
    if grid is None:
        if side * side != count:
            raise ConfigError(f"{count} patches make no square; give grid=(rows, columns).")
        return side, side
    try:
        rows, columns = (operator.index(side) for side in grid)
    except (TypeError, ValueError):
        raise ConfigError(f"grid={grid!r} is not understood; expected (rows, columns).") from None
    if rows < 1 or columns < 1 or rows * columns != count:
        raise ConfigError(f"grid={grid!r} does not hold {count} patches; expected rows * columns = {count}.")
    return rows, columns


def _entry(name: str) -> _Entry:
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(str(name), _REGISTRY, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"selector {name!r} is unknown; expected one of {', '.join(_REGISTRY)}.{hint}")


def _checked(importance: Any, embeddings: Any) -> tuple[Array, Array | None]:
    """Importances (B, N) float64 and embeddings (B, N, D), finite and of one shape."""
    rows = _array(importance)
    single = rows.ndim == 1
    rows = rows[None] if single else rows
    if rows.ndim != 2 or 0 in rows.shape:
        raise ConfigError(f"importance has shape {rows.shape}; expected (batch, patches) or (patches,), not empty.")
    if not np.isfinite(rows).all():
        raise ConfigError(
            "importance holds NaN or infinite values; expected finite numbers. Check the edge model's output."
        )
    rows = rows.astype(np.float64)
    if embeddings is None:
        return rows, None
    vectors = _array(embeddings)
    vectors = vectors[None] if single else vectors
    if vectors.ndim != 3 or vectors.shape[:2] != rows.shape:
        raise ConfigError(
            f"embeddings have shape {vectors.shape} and importance {rows.shape}; expected (batch, patches, width) with the same "
            "batch and patches."
        )
    if not np.isfinite(vectors).all():
        raise ConfigError("embeddings hold NaN or infinite values; expected finite numbers.")
    return rows, vectors


def _checked_budget(budget: Any, count: int, *, clamp: bool) -> int:
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
        raise BudgetError(f"budget={budget!r} is not allowed; expected an integer from 1 to {count} patches.")
    if clamp and budget > count:
        return count
    if not 1 <= budget <= count:
        raise BudgetError(f"budget={budget} is not allowed; expected 1 to {count} patches, or clamp=True for more.")
    return int(budget)


def _checked_choice(name: str, picked: Any, budget: int, count: int) -> Array:
    chosen = np.asarray(picked)
    whole = chosen.ndim == 1 and (chosen.dtype.kind in "iu" or not len(chosen))
    distinct = whole and len(set(chosen.tolist())) == len(chosen)
    if not distinct or len(chosen) > budget or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < count):
        raise ConfigError(
            f"selector {name!r} returned {chosen.tolist()}; expected at most {budget} distinct indices from 0 to {count - 1}."
        )
    return chosen


def _key(generator: Any) -> int:
    """One number drawn from ``generator``, which moves on by it."""
    if generator is None:
        return 0
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool) and generator >= 0:
        return int(generator)
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**62))
    if type(generator).__module__.partition(".")[0] == "torch":
        import torch

        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    raise ConfigError(f"generator={generator!r} is not understood; expected a NumPy or torch generator or a seed >= 0.")


def _array(values: Any) -> Array:
    """A NumPy view or copy of an array, a list or a torch tensor (half precision widened)."""
    if hasattr(values, "detach"):
        detached = values.detach().cpu()
        return np.asarray(detached.float().numpy() if detached.dtype.itemsize < 4 else detached.numpy())
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigError("importance or embeddings have rows of different lengths; expected an array.") from error
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"importance or embeddings hold {array.dtype} values; expected real numbers.")
    return array


def _like(chosen: Array, importance: Any) -> Any:
    if hasattr(importance, "detach"):
        import torch

        return torch.from_numpy(chosen).to(importance.device)
    return chosen
