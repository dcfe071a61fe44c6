"""Selections written as their formulas are, step by step and without any shortcut: what the fast ones must equal."""

from __future__ import annotations

import numpy as np


def cosine_matrix(embeddings):
    rows = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(lengths > 0, lengths, 1)
    return units @ units.T


def first(candidates, score, importance):
    """The candidate with the largest score; ties by larger importance, then lower index."""
    return max(candidates, key=lambda i: (round(score(i), 9), importance[i], -i))


def sage(a, z, budget, k=2.0):
    pool = sorted(range(len(a)), key=lambda i: (-a[i], i))[: min(len(a), int(np.ceil(k * budget)))]
    similar = cosine_matrix(z)
    chosen = [pool[0]]
    while len(chosen) < budget:
        left = [i for i in pool if i not in chosen]
        chosen.append(first(left, lambda i: -max(similar[i, j] for j in chosen), a))
    return chosen


def mmr(a, z, budget, weight=0.5):
    similar = cosine_matrix(z)
    chosen = [int(np.argmax(a))]
    while len(chosen) < budget:
        left = [i for i in range(len(a)) if i not in chosen]
        chosen.append(
            first(left, lambda i: weight * a[i] / max(a) - (1 - weight) * max(similar[i, j] for j in chosen), a)
        )
    return chosen


def facility(a, z, budget):
    similar = np.maximum(cosine_matrix(z), 0)
    chosen = []

    def value(members):
        return float((np.asarray(a) * similar[:, members].max(axis=1)).sum())

    while len(chosen) < budget:
        left = [i for i in range(len(a)) if i not in chosen]
        chosen.append(max(left, key=lambda i: value([*chosen, i])))
    return chosen


def dpp(a, z, budget):
    kernel = np.asarray(a)[:, None] * cosine_matrix(z) * np.asarray(a)
    chosen = []
    while len(chosen) < budget:
        left = [i for i in range(len(a)) if i not in chosen]
        chosen.append(max(left, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]))
    return chosen
