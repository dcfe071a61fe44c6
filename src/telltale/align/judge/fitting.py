"""From features and preferences to a judge: ridge, decorrelation, gate, and what the gate had to beat.

The three stages of ArmoRM (arXiv 2406.12845) in order, each on data of its own: ratings for the objectives, reference responses
for the decorrelation, preferences for the gate. Everything is split by prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from telltale.align.judge.baselines import Baselines, fit_baselines
from telltale.align.judge.decorrelation import DecorrelationReport, decorrelation_report, fit_transform
from telltale.align.judge.gate_training import GateFit, reward_differences, train_gate
from telltale.align.judge.gating import GateConfig
from telltale.align.judge.head import Head
from telltale.align.judge.pair_training import accuracy
from telltale.align.judge.preferences import PairFeatures, held_out_rows
from telltale.align.judge.ridge import ALPHAS, RidgeFit, fit_ridge
from telltale.configuration import check_choice
from telltale.errors import ConfigError, DataError
from telltale.runs.atomic import write_atomically
from telltale.runs.progress import ProgressBar

SCOPES = ("within-prompt", "pooled")


class Responses(Protocol):
    """What is read of features: :class:`~telltale.align.judge.features.store.Features` or anything like it."""

    @property
    def responses(self) -> Tensor: ...
    @property
    def groups(self) -> Tensor: ...


@dataclass(frozen=True)
class FitReport:
    """How every stage went, for people and as JSON."""

    objectives: tuple[str, ...]
    ridge: RidgeFit
    decorrelation: DecorrelationReport | None
    """On reference prompts that lambda was not fitted on; None without nuisances."""
    gate: GateFit
    accuracies: dict[str, float]
    """On held-out prompts: the gate's ("gate") and the baselines'."""
    ships: bool
    """Whether the gate beats fixed weights there."""
    pairs: int
    dropped_pairs: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        ridge = {
            name: {
                "alpha": float(self.ridge.alpha[index]),
                "validation_mse": float(self.ridge.validation_mse[:, index].min()),
                "rows": int(self.ridge.rows[index]),
                "under_determined": bool(self.ridge.under_determined[index]),
            }
            for index, name in enumerate(self.objectives)
        }
        return {
            "objectives": list(self.objectives),
            "ridge": ridge,
            "decorrelation": None if self.decorrelation is None else dataclasses.asdict(self.decorrelation),
            "gate": dataclasses.asdict(self.gate),
            "accuracies": self.accuracies,
            "ships": self.ships,
            "pairs": self.pairs,
            "dropped_pairs": self.dropped_pairs,
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")


@dataclass(frozen=True)
class JudgeFit:
    """The fitted head, the baselines beside it, and the report."""

    head: Head
    baselines: Baselines
    report: FitReport


def fit(
    ratings: Responses,
    labels: Tensor,
    objectives: Sequence[str],
    *,
    preferences: PairFeatures,
    reference: Responses | None = None,
    nuisances: Sequence[str] = ("verbosity",),
    scope: str = "within-prompt",
    method: str = "spearman",
    how: str = "sequential",
    alphas: Sequence[float] = ALPHAS,
    gate: GateConfig | None = None,
    folds: int = 5,
    seed: int = 0,
    progress: ProgressBar | None = None,
) -> JudgeFit:
    """Fit the head of a judge.

    ``ratings``: responses (n, d) with prompt ids ``groups`` (n,), and their ``labels`` (n, K) in [0, 1], NaN where missing.
    ``reference``: responses to decorrelate on (None: those of ``ratings``); a fifth of their prompts is held out for the report.
    ``nuisances`` name objectives to take out of the others, ``scope`` "within-prompt" or "pooled" (the paper). ``preferences``
    train the gate, which is stopped by held-out prompts and compared with the baselines there.

    Raises what its stages raise: :func:`~telltale.align.judge.ridge.fit_ridge`,
    :func:`~telltale.align.judge.decorrelation.fit_transform`, :func:`~telltale.align.judge.gate_training.train_gate`.
    """
    check_choice("scope", scope, SCOPES)
    config = gate or GateConfig()
    names = tuple(objectives)
    if labels.ndim != 2 or labels.shape[1] != len(names):
        raise DataError(
            f"labels have shape {tuple(labels.shape)} for {len(names)} objectives; expected (n, {len(names)})."
        )
    if len(nuisances) >= len(names):
        raise ConfigError(f"all {len(names)} objectives are nuisances; expected at least one to judge by.")
    pairs = preferences.distinct()
    warnings: list[str] = []
    ridge = fit_ridge(ratings.responses, labels, alphas=alphas, groups=ratings.groups, folds=folds)
    warnings += [
        f"{name} has {int(rows)} ratings for {ratings.responses.shape[1]} features: its fit leans on alpha alone."
        for name, rows, thin in zip(names, ridge.rows, ridge.under_determined, strict=True)
        if thin
    ]
    head = Head(names, ratings.responses.shape[1], prompt_size=pairs.prompts.shape[1], gate=config, nuisances=nuisances)
    head.set_regression(ridge.weights)
    told = None
    if nuisances:
        told = _decorrelated(head, reference or ratings, scope=scope, method=method, how=how, seed=seed)
        warnings += told.warnings
    held_out = held_out_rows(pairs.groups, config.held_out, seed=seed)
    fitted = train_gate(head, pairs, config, seed=seed, held_out=held_out, progress=progress)
    baselines = fit_baselines(head, pairs, config, seed=seed, held_out=held_out)
    outside = pairs.take(held_out)
    accuracies = {"gate": gate_accuracy(head, outside)} | baselines.accuracies(head, outside)
    ships = accuracies["gate"] > accuracies["fixed weights"]
    if not ships:
        warnings.append(
            f"the gate ({accuracies['gate']:.3f}) does not beat fixed weights ({accuracies['fixed weights']:.3f}) on held-out "
            f"prompts; use fixed weights, or more preferences whose prompts call for different objectives."
        )
    report = FitReport(names, ridge, told, fitted, accuracies, ships, len(pairs), pairs.dropped, tuple(warnings))
    return JudgeFit(head, baselines, report)


def gate_accuracy(head: Head, pairs: PairFeatures) -> float:
    """Share of ``pairs`` that the gated score has in the right order, ties counted one half."""
    with torch.no_grad():
        return accuracy((head.weights(pairs.prompts) * reward_differences(head, pairs)).sum(-1))


def _decorrelated(
    head: Head, reference: Responses, *, scope: str, method: str, how: str, seed: int
) -> DecorrelationReport:
    """Set the head's transform from four fifths of the reference prompts, and report on the others."""
    with torch.no_grad():
        rewards = head.rewards(reference.responses).double()
    groups = reference.groups
    outside = held_out_rows(groups, 0.2, seed=seed)
    inside = groups[~outside] if scope == "within-prompt" else None
    columns = head.nuisance_columns
    transform = fit_transform(rewards[~outside], columns, method=method, groups=inside, how=how)
    head.set_transform(transform)
    return decorrelation_report(
        rewards[outside], transform, columns, head.objectives, groups=groups[outside], method=method, seed=seed
    )
