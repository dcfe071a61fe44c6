"""How well objectives are predicted on held-out prompts, and how well they could be at best.

R2 = 1 - sum (y - prediction)^2 / sum (y - mean)^2 with the mean of the labels that were fitted on: below 0 a constant would have
done better. Where a response was rated several times, the spread of its ratings is noise that nothing can predict, so R2 has the
ceiling 1 - (variance within responses) / (variance of labels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from telltale.signals.statistics import CountedEstimate

SAME = 1e-5
"""Rows of one prompt whose keys differ by less, relative to their size, are the same response: batches round differently."""


@dataclass(frozen=True)
class ObjectiveQuality:
    """One objective on held-out prompts."""

    r2: CountedEstimate
    """With its 95% interval over prompts; ``count`` prompts have ratings of it."""
    ceiling: float | None
    """The largest R2 that label noise allows; None where no response was rated twice."""
    repeats: int
    """Responses with several ratings, among all rows."""
    rows: int

    def warnings(self, name: str) -> list[str]:
        """What is wrong with the objective ``name``."""
        if not self.rows:
            return [f"{name} has no rating on held-out prompts, so nothing is known of its fit."]
        if math.isnan(self.r2.value):
            return [f"all ratings of {name} are the same, which says nothing; leave it out."]
        if self.r2.value < 0.0:
            return [
                f"{name} is predicted worse than by its mean: R2 {self.r2.value:.3f} [{self.r2.low:.3f}, {self.r2.high:.3f}] "
                f"on {self.r2.count} held-out prompts. Fit an intercept, rate more responses, or leave it out."
            ]
        if self.ceiling is not None and self.ceiling <= 0.0:
            return [
                f"ratings of {name} differ as much on one response as between responses: there is nothing to predict."
            ]
        return []


def objective_quality(
    names: Sequence[str],
    predicted: Tensor,
    labels: Tensor,
    groups: Tensor,
    held_out: Tensor,
    *,
    keys: Tensor | None = None,
) -> dict[str, ObjectiveQuality]:
    """Of ``predicted`` (n, K) against ``labels`` (n, K; NaN: missing) of prompts ``groups`` (n,) on the rows ``held_out`` (n,).

    ``keys`` are :func:`response_keys`, by which repeated ratings are found; None: not looked for.
    """
    same = None if keys is None else _same_response(keys, groups)
    found = {}
    for column, name in enumerate(names):
        y, rated = labels[:, column], ~labels[:, column].isnan()
        there = rated & held_out
        mean = float(y[rated & ~held_out].mean()) if bool((rated & ~held_out).any()) else math.nan
        wrong = (y[there] - predicted[there, column].to(y.dtype)).square().numpy()
        spread = (y[there] - mean).square().numpy()
        ceiling, repeats = (None, 0) if same is None else _ceiling(y[rated].numpy(), same[rated.numpy()])
        found[name] = ObjectiveQuality(
            _explained(wrong, spread, groups[there].numpy()), ceiling, repeats, int(there.sum())
        )
    return found


def response_keys(responses: Tensor) -> Tensor:
    """Two numbers for each response (n, d), (n, 2) float64, that tell responses to one prompt apart."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(responses.shape[1], 2, generator=generator).to(responses.dtype)
    return (responses @ directions).double()


def _same_response(keys: Tensor, groups: Tensor) -> np.ndarray:
    """A number for each row (n,), equal for rows of one prompt with the same response."""
    values, prompts = keys.numpy(), groups.numpy()
    order = np.lexsort((values[:, 1], values[:, 0], prompts))
    ordered, owners = values[order], prompts[order]
    scale = np.abs(values).mean(0) + 1e-300
    near = (np.abs(np.diff(ordered, axis=0)) <= SAME * scale).all(1) & (owners[1:] == owners[:-1])
    found = np.zeros(len(values), dtype=np.int64)
    found[order] = np.concatenate([[0], np.cumsum(~near)])
    return found


def _ceiling(labels: np.ndarray, response: np.ndarray) -> tuple[float | None, int]:
    """1 - variance within responses / variance of labels, and how many responses have several ratings."""
    _, place, counts = np.unique(response, return_inverse=True, return_counts=True)
    several = counts > 1
    if not several.any():
        return None, 0
    means = np.bincount(place, weights=labels) / counts
    residual = (labels - means[place])[several[place]]
    within = float(residual @ residual) / float((counts[several] - 1).sum())
    variance = float(labels.var(ddof=1))
    return (1.0 - within / variance if variance > 0 else 0.0), int(several.sum())


def _explained(wrong: np.ndarray, spread: np.ndarray, prompts: np.ndarray) -> CountedEstimate:
    """1 - sum of ``wrong`` / sum of ``spread``, with Student's interval over prompts for the ratio."""
    names, place = np.unique(prompts, return_inverse=True)
    total, count = float(spread.sum()), len(names)
    if not count or not total > 0:
        return CountedEstimate(math.nan, math.nan, math.nan, count)
    ratio = float(wrong.sum()) / total
    if count < 2:
        return CountedEstimate(1 - ratio, math.nan, math.nan, count)
    residuals = np.bincount(place, weights=wrong - ratio * spread)
    error = math.sqrt(float(residuals @ residuals) * count / (count - 1)) / total
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return CountedEstimate(1 - ratio, 1 - ratio - reach, 1 - ratio + reach, count)
