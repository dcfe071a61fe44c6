"""Unbiased estimates from n samples of what k samples would give: at least one correct, and how many different correct ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from telltale.config import check_integer


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: ``1 - C(n - c, k) / C(n, k)``.

    The estimator of Chen et al. (2021); the share of prompts solved by any of k samples is biased where more were drawn.
    """
    check_integer("k", k, low=1, high=n)
    return 1.0 - comb(n - correct, k) / comb(n, k)


def distinct_correct_at_k(n: int, counts: Sequence[int], k: int) -> float:
    """Expected number of different correct solutions among k of n samples; ``counts`` has one number per different solution."""
    return sum(pass_at_k(n, count, k) for count in counts)
