"""From features and preferences to the head of a judge: ridge, decorrelation, gate, and the baselines to beat.

The three stages of ArmoRM (arXiv 2406.12845) in order, each on data of its own: ratings for the objectives, reference responses
for the decorrelation, preferences for the gate. All of it happens twice. First every stage takes the training part of one split of
the prompts, and the report measures on prompts that no stage has seen. Then every stage takes everything, with the alphas,
numbers of steps and penalties that the first fit has found: that is the judge which is kept.

Rated rows may come from disk block by block: only their sums are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from telltale.align.judge.baselines import Baselines, fit_baselines
from telltale.align.judge.calibration import calibrate
from telltale.align.judge.data import check_rated
from telltale.align.judge.decorrelation import DecorrelationReport, decorrelation_report, fit_transform
from telltale.align.judge.feature_range import ROWS, FeatureRange
from telltale.align.judge.feature_store import FeatureStore
from telltale.align.judge.fit_report import FitReport, compared_models
from telltale.align.judge.gate_fit import PairFeatures, accuracy, reward_differences, train_gate
from telltale.align.judge.gram import GramStatistics, fold_of
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.objective_quality import ObjectiveQuality, objective_quality, response_keys
from telltale.align.judge.prompt_split import COMPARE, PARTS, STOP, TRAIN, PromptSplit, split_prompts
from telltale.align.judge.ridge import ALPHAS, BLOCK, RidgeFit, fit_from_statistics, refitted
from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError
from telltale.runs.progress import ProgressBar

SCOPES = ("within-prompt", "pooled")


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
    intercept: bool = False,
    gate: GateConfig | None = None,
    folds: int = 5,
    seed: int = 0,
    progress: ProgressBar | None = None,
) -> JudgeFit:
    """Fit the head of a judge, report on prompts that no stage has seen, and fit it again on everything.

    ``ratings``: responses (n, d) with prompt ids ``groups`` (n,), and their ``labels`` (n, K) in [0, 1], NaN where missing; a
    store is read block by block, so that memory does not grow with n. ``reference``: responses to decorrelate on (None: those of
    ``ratings``). ``nuisances`` name objectives to take out of the others, ``scope`` "within-prompt" or "pooled" (the paper).
    ``preferences`` train the gate. Prompt ids of all three are one space: what has the same id is split together, and
    ``gate.held_out`` is the part of the prompts to compare on, and of the others to stop by. ``intercept`` gives every
    objective one.

    Raises :class:`~telltale.errors.DataError` for labels that do not fit or preferences of fewer than three prompts, and what its
    stages raise: :func:`~telltale.align.judge.ridge.fit_ridge`,
    :func:`~telltale.align.judge.decorrelation.fit_transform`, :func:`~telltale.align.judge.gate_fit.train_gate`.
    """
    stages = Stages(
        ratings,
        labels,
        tuple(objectives),
        preferences,
        reference=reference,
        nuisances=tuple(nuisances),
        scope=scope,
        method=method,
        how=how,
        alphas=tuple(alphas),
        intercept=intercept,
        gate=gate or GateConfig(),
        folds=folds,
        seed=seed,
        progress=progress,
    )
    compared = stages.on_the_split()
    return JudgeFit(*stages.on_everything(compared), compared.report, compared)


@dataclass(frozen=True)
class JudgeFit:
    """The head and the baselines that were fitted on everything, and the report on the split."""

    head: Head
    baselines: Baselines
    report: FitReport
    compared: SplitFit
    """What the report speaks of: the same stages on the training part alone."""


@dataclass(frozen=True)
class SplitFit:
    """A fit on the training part of the prompts, and its report on those to compare on."""

    head: Head
    baselines: Baselines
    report: FitReport
    split: PromptSplit


class Responses(Protocol):
    """What is read of features: :class:`~telltale.align.judge.feature_store.Features` or anything like it."""

    @property
    def responses(self) -> Tensor: ...
    @property
    def groups(self) -> Tensor: ...


def gate_accuracy(head: Head, pairs: PairFeatures) -> float:
    """Share of ``pairs`` that the gated score has in the right order, ties counted one half."""
    return accuracy(gate_margins(head, pairs), pairs.decided)


@torch.no_grad()
def gate_margins(head: Head, pairs: PairFeatures) -> Tensor:
    """Gated score of the chosen less that of the rejected response, (n,)."""
    return (head.weights(pairs.prompts) * reward_differences(head, pairs)).sum(-1)


@dataclass(frozen=True)
class Stages:
    """The stages of :func:`fit` and what they take; arguments are those of ``fit``."""

    ratings: Responses | FeatureStore
    labels: Tensor
    names: tuple[str, ...]
    preferences: PairFeatures
    reference: Responses | FeatureStore | None
    nuisances: tuple[str, ...]
    scope: str
    method: str
    how: str
    alphas: tuple[float, ...]
    intercept: bool
    gate: GateConfig
    folds: int
    seed: int
    progress: ProgressBar | None = None

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_integer("folds", self.folds, low=2)
        count = len(self.names)
        if self.labels.ndim != 2 or self.labels.shape[1] != count:
            raise DataError(
                f"labels have shape {tuple(self.labels.shape)} for {count} objectives; expected (n, {count})."
            )
        if not bool(self.preferences.decided.any()):
            raise DataError("all preferences are ties; expected some with a winner.")
        if len(self.nuisances) >= count:
            raise ConfigError(f"all {count} objectives are nuisances; expected at least one to judge by.")
        check_rated(self.labels, self.names)
        if len(self.labels) != len(self.groups):
            raise DataError(
                f"{len(self.labels)} rows of labels for {len(self.groups)} rows of features; expected as many."
            )

    def on_the_split(self) -> SplitFit:
        """Every stage on the training part; the report on what none of them has seen."""
        self._check_parts()
        ridge = fit_from_statistics(
            self.statistics, alphas=self.alphas, folds=range(self.folds), intercept=self.intercept
        )
        head = self._head(ridge)
        quality, decorrelation = self._objectives_held_out(head, ridge)
        part = self.split.part_of(self.pairs.groups)
        seen, unseen = self.pairs.take(part != COMPARE), self.pairs.take(part == COMPARE)
        stop = part[part != COMPARE] == STOP
        fitted = train_gate(head, seen, self.gate, seed=self.seed, held_out=stop, progress=self.progress)
        baselines = fit_baselines(head, seen, self.gate, seed=self.seed, held_out=stop)
        margins = {"gate": gate_margins(head, unseen)} | baselines.margins(head, unseen)
        held_back = seen.take(stop)
        head.feature_range = self._feature_range()
        report = FitReport(
            self.names,
            ridge,
            quality,
            decorrelation,
            fitted,
            compared_models(margins, unseen),
            calibrate(gate_margins(head, held_back), held_back, margins["gate"], unseen, seed=self.seed),
            prompts={name: len(self.pairs.groups[part == index].unique()) for index, name in enumerate(PARTS)},
            pairs=len(self.pairs),
            dropped_pairs=self.pairs.dropped,
            features=ridge.weights.shape[1],
        )
        return SplitFit(head, baselines, report, self.split)

    def _check_parts(self) -> None:
        """Raise :class:`~telltale.errors.DataError` for a part without a winner, and for ratings of too few prompts."""
        part = self.split.part_of(self.pairs.groups)
        for index in (TRAIN, COMPARE):
            if not bool(self.pairs.decided[part == index].any()):
                raise DataError(
                    f"all preferences of the prompts to {PARTS[index]} on are ties; expected more preferences with a winner."
                )
        inside = self.split.part_of(self.groups) == TRAIN
        for column, name in enumerate(self.names):
            prompts = self.groups[inside & ~self.labels[:, column].isnan()].unique()
            if len(fold_of(prompts, self.folds).unique()) < 2:
                raise DataError(
                    f"the ratings of {name!r} that are to train on belong to {len(prompts)} prompt"
                    f"{'s' * (len(prompts) != 1)}; expected more prompts, to choose alpha by those left out."
                )

    def on_everything(self, compared: SplitFit) -> tuple[Head, Baselines]:
        """Every stage on all its rows, with what ``compared`` has found: alphas, numbers of steps, the penalty."""
        head = self._head(refitted(self.statistics, compared.report.ridge, intercept=self.intercept))
        if self.nuisances:
            rewards, groups = self._reference_rewards(head)
            head.set_transform(self._transform(head, rewards, groups))
        head.feature_range = compared.head.feature_range
        steps = compared.report.gate.training.best_step
        train_gate(head, self.pairs, self.gate, seed=self.seed, steps=steps, progress=self.progress)
        return head, fit_baselines(head, self.pairs, self.gate, seed=self.seed, like=compared.baselines)

    @cached_property
    def pairs(self) -> PairFeatures:
        """The preferences without pairs of the same text."""
        return self.preferences.distinct()

    @cached_property
    def groups(self) -> Tensor:
        """Prompt ids of the rated rows, (n,)."""
        return _groups(self.ratings)

    @cached_property
    def split(self) -> PromptSplit:
        """The one split of all prompts."""
        others = [self.groups] if self.reference is None else [self.groups, _groups(self.reference)]
        return split_prompts(self.pairs.groups, others, self.gate.held_out, seed=self.seed)

    @cached_property
    def statistics(self) -> GramStatistics:
        """Sums over the rated rows: the training part in its folds, then the part to stop by, then that to compare on."""
        statistics: GramStatistics | None = None
        place = 0
        for responses, groups, rows in _blocks(self.ratings):
            statistics = statistics or GramStatistics(responses.shape[1], len(self.names), self.folds + COMPARE)
            part = self.split.part_of(groups)
            fold = torch.where(part == TRAIN, fold_of(groups, self.folds), self.folds + part - STOP)
            labels = self.labels[place : place + len(groups)]
            statistics.add(responses, labels, groups=groups, rows=rows, first_row=place, fold=fold)
            place += len(groups)
        assert statistics is not None
        return statistics

    def _head(self, ridge: RidgeFit) -> Head:
        head = Head(
            self.names,
            ridge.weights.shape[1],
            prompt_size=self.pairs.prompts.shape[1],
            gate=self.gate,
            nuisances=self.nuisances,
            intercept=self.intercept,
        )
        head.set_regression(ridge.weights, ridge.intercept)
        return head

    def _objectives_held_out(
        self, head: Head, ridge: RidgeFit
    ) -> tuple[dict[str, ObjectiveQuality], DecorrelationReport | None]:
        """Set the head's transform from the training part, and measure both stages on the rest."""
        rewards, keys = _rewards(head, self.ratings)
        held_out = self.split.part_of(self.groups) != TRAIN
        quality = objective_quality(self.names, rewards, self.labels, self.groups, held_out, keys=keys)
        if not self.nuisances:
            return quality, None
        groups = self.groups
        if self.reference is not None:
            (rewards, _), groups = _rewards(head, self.reference), _groups(self.reference)
        outside = self.split.part_of(groups) != TRAIN
        if not bool(outside.any()) or bool(outside.all()):
            raise DataError(
                "all responses to decorrelate on belong to one part of the prompts; expected at least three prompts."
            )
        transform = self._transform(head, rewards[~outside], groups[~outside])
        head.set_transform(transform)
        return quality, decorrelation_report(
            rewards[outside],
            transform,
            head.nuisance_columns,
            self.names,
            groups=groups[outside],
            method=self.method,
            seed=self.seed,
        )

    def _feature_range(self) -> FeatureRange:
        """Of the rated and the compared responses; the training part, and the limit from the others."""
        every = max(1, len(self.groups) // ROWS)
        pairs = self.pairs.take(torch.arange(0, len(self.pairs), max(1, 2 * len(self.pairs) // ROWS)))
        features, owners, place = [pairs.chosen, pairs.rejected], [pairs.groups, pairs.groups], 0
        for responses, groups, _ in _blocks(self.ratings):
            rows = torch.arange(-place % every, len(groups), every)
            features.append(responses[rows])
            owners.append(groups[rows])
            place += len(groups)
        inside = self.split.part_of(torch.cat(owners)) == TRAIN
        whole = torch.cat(features)
        return FeatureRange.fitted(whole[inside], whole[~inside], seed=self.seed)

    def _reference_rewards(self, head: Head) -> tuple[Tensor, Tensor]:
        source = self.reference or self.ratings
        return _rewards(head, source)[0], _groups(source)

    def _transform(self, head: Head, rewards: Tensor, groups: Tensor) -> Tensor:
        inside = groups if self.scope == "within-prompt" else None
        return fit_transform(rewards, head.nuisance_columns, method=self.method, groups=inside, how=self.how)


def _groups(source: Responses | FeatureStore) -> Tensor:
    return source.groups if not isinstance(source, FeatureStore) else source.prompt_ids()


@torch.no_grad()
def _rewards(head: Head, source: Responses | FeatureStore) -> tuple[Tensor, Tensor]:
    """Rewards (n, K) float64, and keys (n, 2) of the responses, of rows that pass by once."""
    parts = [(head.rewards(responses).double(), response_keys(responses)) for responses, _, _ in _blocks(source)]
    rewards, keys = (torch.cat(side) for side in zip(*parts, strict=True))
    return rewards, keys


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
