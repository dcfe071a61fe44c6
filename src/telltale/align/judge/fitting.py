"""From features and preferences, or from files, to a judge: ridge, decorrelation, gate, and the baselines to beat.

The three stages of ArmoRM (arXiv 2406.12845) in order, each on data of its own: ratings for the objectives, reference responses
for the decorrelation, preferences for the gate. Everything is split by prompt, and the report measures on prompts that nothing was
fitted, stopped or chosen by. Rated rows may come from disk block by block: only their sums are kept.

Features are the expensive part. They are kept in a folder and computed only where they are missing, so that a second fit with
other options costs no pass of the backbone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from telltale.align.judge.baselines import Baselines, fit_baselines
from telltale.align.judge.data import (
    Conversation,
    check_rated,
    read_conversations,
    read_objectives,
    read_preferences,
    read_ratings,
)
from telltale.align.judge.decorrelation import DecorrelationReport, decorrelation_report, fit_transform
from telltale.align.judge.feature_store import FeatureStore
from telltale.align.judge.features import Backbone, extract, pair_conversations, pair_features
from telltale.align.judge.gate_fit import GateFit, PairFeatures, accuracy, held_out_rows, reward_differences, train_gate
from telltale.align.judge.gram import GramStatistics
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.judge import Judge
from telltale.align.judge.model import JudgeModel
from telltale.align.judge.ridge import ALPHAS, BLOCK, RidgeFit, fit_from_statistics, fit_ridge
from telltale.config import check_choice
from telltale.errors import ConfigError, DataError
from telltale.runs.files import strict_json, write_json
from telltale.runs.progress import ProgressBar
from telltale.signals.statistics import CountedEstimate, proportion

SCOPES = ("within-prompt", "pooled")
REPORT_FILE = "fit.json"
"""The fit's report, in the judge's folder."""


def fit(
    ratings: Responses | FeatureStore,
    labels: Tensor,
    objectives: Sequence[str],
    *,
    preferences: PairFeatures,
    reference: Responses | FeatureStore | None = None,
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

    ``ratings``: responses (n, d) with prompt ids ``groups`` (n,), and their ``labels`` (n, K) in [0, 1], NaN where missing; a
    store is read block by block, so that memory does not grow with n. ``reference``: responses to decorrelate on (None: those of
    ``ratings``); a fifth of their prompts is held out for the report. ``nuisances`` name objectives to take out of the others,
    ``scope`` "within-prompt" or "pooled" (the paper). ``preferences`` train the gate: ``gate.held_out`` of their prompts is
    kept to compare it with the baselines, and as large a part of the others to stop by.

    Raises :class:`~telltale.errors.DataError` for labels that do not fit or preferences of fewer than three prompts, and what its
    stages raise: :func:`~telltale.align.judge.ridge.fit_ridge`,
    :func:`~telltale.align.judge.decorrelation.fit_transform`, :func:`~telltale.align.judge.gate_fit.train_gate`.
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
    compared, held_out = _parts(pairs, config.held_out, seed=seed)
    warnings: list[str] = []
    ridge = _objectives(ratings, labels, names, alphas=alphas, folds=folds)
    size = ridge.weights.shape[1]
    warnings += [
        f"{name} has {int(rows)} ratings for {size} features: its fit depends on alpha alone."
        for name, rows, thin in zip(names, ridge.rows, ridge.under_determined, strict=True)
        if thin
    ]
    head = Head(names, size, prompt_size=pairs.prompts.shape[1], gate=config, nuisances=nuisances)
    head.set_regression(ridge.weights)
    decorrelation = None
    if nuisances:
        decorrelation = _decorrelated(head, reference or ratings, scope=scope, method=method, how=how, seed=seed)
        warnings += decorrelation.warnings
    seen = pairs.take(~compared)
    fitted = train_gate(head, seen, config, seed=seed, held_out=held_out, progress=progress)
    baselines = fit_baselines(head, seen, config, seed=seed, held_out=held_out)
    unseen = pairs.take(compared)
    accuracies = {"gate": gate_accuracy(head, unseen)} | baselines.accuracies(head, unseen)
    beats_fixed_weights = accuracies["gate"] > accuracies["fixed weights"]
    if not beats_fixed_weights:
        warnings.append(
            f"the gate ({accuracies['gate']:.3f}) does not beat fixed weights ({accuracies['fixed weights']:.3f}) on held-out "
            f"prompts; use fixed weights, or more preferences whose prompts call for different objectives."
        )
    report = FitReport(
        names,
        ridge,
        decorrelation,
        fitted,
        accuracies,
        len(unseen),
        len(unseen.groups.unique()),
        beats_fixed_weights,
        len(pairs),
        pairs.dropped,
        tuple(warnings),
    )
    return JudgeFit(head, baselines, report)


@dataclass(frozen=True)
class JudgeFit:
    """The fitted head, the baselines, and the report."""

    head: Head
    baselines: Baselines
    report: FitReport


@dataclass(frozen=True)
class FitReport:
    """How every stage went, for people and as JSON."""

    objectives: tuple[str, ...]
    ridge: RidgeFit
    decorrelation: DecorrelationReport | None
    """On reference prompts that lambda was not fitted on; None without nuisances."""
    gate: GateFit
    accuracies: dict[str, float]
    """On prompts that no model was trained or stopped on: the gate's ("gate") and the baselines'."""
    compared_pairs: int
    """How many pairs these are."""
    compared_prompts: int
    """Whose pairs they are."""
    beats_fixed_weights: bool
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
        found: dict[str, Any] = strict_json(
            {
                "objectives": self.objectives,
                "ridge": ridge,
                "decorrelation": self.decorrelation,
                "gate": self.gate,
                "accuracies": self.accuracies,
                "compared_pairs": self.compared_pairs,
                "compared_prompts": self.compared_prompts,
                "ships": self.beats_fixed_weights,
                "pairs": self.pairs,
                "dropped_pairs": self.dropped_pairs,
                "warnings": self.warnings,
            }
        )
        return found

    def interval(self, model: str) -> CountedEstimate:
        """One of the ``accuracies`` with Wilson's 95% interval; pairs of one prompt count once, since they are not independent."""
        return proportion([self.accuracies[model]] * self.compared_prompts)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, self.to_dict())


class Responses(Protocol):
    """What is read of features: :class:`~telltale.align.judge.feature_store.Features` or anything like it."""

    @property
    def responses(self) -> Tensor: ...
    @property
    def groups(self) -> Tensor: ...


def gate_accuracy(head: Head, pairs: PairFeatures) -> float:
    """Share of ``pairs`` that the gated score has in the right order, ties counted one half."""
    with torch.no_grad():
        return accuracy((head.weights(pairs.prompts) * reward_differences(head, pairs)).sum(-1))


@dataclass(frozen=True)
class JudgeFiles:
    """What a judge is fitted on. ``objectives`` None takes every rating from 0 to 1, ``reference`` None the rated responses."""

    ratings: Path
    preferences: Path
    objectives: Path | None = None
    reference: Path | None = None


def fit_files(
    backbone: Backbone, files: JudgeFiles, features: Path, *, batch_size: int = 16, **options: Any
) -> tuple[Judge, JudgeFit]:
    """Fit a judge on ``files``, with features in the folder ``features``; ``options`` are those of ``fit``.

    ``nuisances`` default to "verbosity" if there is such an objective. Raises :class:`~telltale.errors.ConfigError` for a
    nuisance that is no objective, and what reading, extraction and the fit raise.
    """
    scales = None if files.objectives is None else read_objectives(files.objectives)
    ratings = read_ratings(files.ratings, scales)
    nuisances = tuple(options.pop("nuisances", None) or [n for n in ("verbosity",) if n in ratings.objectives])
    for name in nuisances:
        if name not in ratings.objectives:
            raise ConfigError(f"nuisance {name!r} is no objective; expected one of {', '.join(ratings.objectives)}.")
    stores = compute_features(backbone, files, features, batch_size=batch_size)
    same = read_preferences(files.preferences)[1]
    pairs = dataclasses.replace(pair_features(stores["preferences"].load()), dropped=same)
    gate = options.get("gate")
    with ProgressBar("gate", gate.steps if gate is not None else 2000) as progress:
        result = fit(
            stores["ratings"],
            ratings.labels,  # features are in the order of the conversations
            ratings.objectives,
            preferences=pairs,
            reference=stores.get("reference"),
            nuisances=nuisances,
            progress=progress,
            **options,
        )
    return assembled(backbone, result, ratings.scales, batch_size=batch_size), result


def compute_features(
    backbone: Backbone, files: JudgeFiles, out: Path, *, batch_size: int = 16
) -> dict[str, FeatureStore]:
    """Features of all ``files`` in folders of ``out``; what is there already is kept. Under torchrun every rank does its share.

    Raises what reading and :func:`~telltale.align.judge.features.extract` raise.
    """
    scales = None if files.objectives is None else read_objectives(files.objectives)
    parts: dict[str, Sequence[Conversation]] = {
        "ratings": read_ratings(files.ratings, scales).conversations,
        "preferences": pair_conversations(read_preferences(files.preferences)[0]),
    }
    if files.reference is not None:
        parts["reference"] = read_conversations(files.reference)
    found = {}
    for name, conversations in parts.items():
        with ProgressBar(f"features of {name}", len(conversations), unit="row") as progress:
            found[name] = extract(
                backbone.model,
                backbone.tokenizer,
                conversations,
                out / name,
                backbone,
                batch_size=batch_size,
                progress=progress,
            )
    return found


def assembled(backbone: Backbone, result: JudgeFit, scales: Any, *, batch_size: int = 16) -> Judge:
    """The judge of a fitted head on its backbone."""
    model = JudgeModel.assembled(
        backbone.model,
        result.head,
        scales=scales,
        pooling=backbone.pooling,
        gating=backbone.gating,
        gating_pattern=backbone.gating_pattern,
        context_length=backbone.context_length,
    )
    return Judge(model, backbone.tokenizer, batch_size=batch_size)


def save_fit(judge: Judge, result: JudgeFit, out: Path, *, layout: str = "telltale") -> None:
    """Write the judge, and the report of its fit into its folder."""
    judge.save(out, layout=layout)
    result.report.save(out / REPORT_FILE)


def _parts(pairs: PairFeatures, share_of_prompts: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Masks of the pairs (n,) to compare on, and, among the others, of those to stop by."""
    prompts = len(pairs.groups.unique())
    if prompts < 3:
        raise DataError(
            f"the preferences belong to {prompts} prompt{'s' * (prompts > 1)}; expected at least three, to train on, to stop by "
            f"and to compare on."
        )
    compared = held_out_rows(pairs.groups, share_of_prompts, seed=seed)
    if len(pairs.groups[~compared].unique()) < 2:
        compared = held_out_rows(pairs.groups, 1 / prompts, seed=seed)
    return compared, held_out_rows(pairs.groups[~compared], share_of_prompts, seed=seed + 1)


def _blocks(source: Responses | FeatureStore) -> Iterator[tuple[Tensor, Tensor, list[str] | None]]:
    """Responses (m, d), groups (m,) and row ids of about ``BLOCK`` rows at a time, in order."""
    if not isinstance(source, FeatureStore):
        for first in range(0, len(source.groups), BLOCK):
            part = slice(first, first + BLOCK)
            yield source.responses[part], source.groups[part], None
        return
    waiting: list[Any] = []
    for index, block in enumerate(source.blocks(), 1):
        waiting.append(block)
        # A shard is too small for a matrix product that is worth its sum.
        if sum(map(len, waiting)) >= BLOCK or index == source.shards:
            yield (
                torch.cat([part.responses for part in waiting]),
                torch.cat([part.groups for part in waiting]),
                [row for part in waiting for row in part.rows],
            )
            waiting = []


def _objectives(
    source: Responses | FeatureStore,
    labels: Tensor,
    names: Sequence[str],
    *,
    alphas: Sequence[float],
    folds: int,
) -> RidgeFit:
    """The ridge regressions, of rows in memory or of a store whose rows pass by once."""
    check_rated(labels, names)
    if not isinstance(source, FeatureStore):
        return fit_ridge(source.responses, labels, alphas=alphas, groups=source.groups, folds=folds)
    if source.count != len(labels):
        raise DataError(f"{len(labels)} rows of labels for {source.count} rows of features; expected as many.")
    statistics: GramStatistics | None = None
    place = 0
    for responses, groups, rows in _blocks(source):
        statistics = statistics or GramStatistics(responses.shape[1], len(names), folds)
        part = labels[place : place + len(groups)]
        statistics.add(responses, part, groups=groups, rows=rows, first_row=place)
        place += len(groups)
    assert statistics is not None
    return fit_from_statistics(statistics, alphas=alphas)


def _decorrelated(
    head: Head, reference: Responses | FeatureStore, *, scope: str, method: str, how: str, seed: int
) -> DecorrelationReport:
    """Set the head's transform from four fifths of the reference prompts, and report on the others."""
    with torch.no_grad():
        parts = [(head.rewards(responses).double(), groups) for responses, groups, _ in _blocks(reference)]
    rewards, groups = (torch.cat(side) for side in zip(*parts, strict=True))
    outside = held_out_rows(groups, 0.2, seed=seed)
    inside = groups[~outside] if scope == "within-prompt" else None
    columns = head.nuisance_columns
    transform = fit_transform(rewards[~outside], columns, method=method, groups=inside, how=how)
    head.set_transform(transform)
    return decorrelation_report(
        rewards[outside], transform, columns, head.objectives, groups=groups[outside], method=method, seed=seed
    )
