"""How every stage of a fit went, on prompts that none of them has seen; for people and as JSON.

A gate ships only if it beats fixed weights beyond doubt: the lower end of the paired interval of their difference is above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from telltale.align.judge.baselines import BLACK_BOXES, FIXED
from telltale.align.judge.calibration import Calibration
from telltale.align.judge.decorrelation import DecorrelationReport
from telltale.align.judge.gate_fit import GateFit, PairFeatures, credits
from telltale.align.judge.objective_quality import ObjectiveQuality
from telltale.align.judge.ridge import RidgeFit
from telltale.runs.files import strict_json, write_json
from telltale.signals.statistics import CountedEstimate, clustered_mean, clustered_proportion

FEWEST = 6
"""Prompts that differ from which a 95% interval can lie on one side of 0: 2^-6 is below 2.5%."""


@dataclass(frozen=True)
class Comparison:
    """Models on the same pairs, whose prompts nothing was fitted on. Intervals are of 95%, over prompts."""

    accuracies: dict[str, CountedEstimate]
    """The gate's ("gate") and the baselines'; ``count`` is the number of prompts."""
    differences: dict[str, CountedEstimate]
    """The gate's accuracy less that of each baseline, paired."""
    pairs: int
    """How many there are with a majority of the votes."""
    prompts: int
    """Whose pairs they are."""


def compared_models(margins: Mapping[str, Tensor], pairs: PairFeatures) -> Comparison:
    """``margins`` (n,) of "gate" and of the baselines on ``pairs``."""
    decided = pairs.decided
    prompts = pairs.groups[decided != 0].numpy()
    found = {name: credits(values, decided).numpy() for name, values in margins.items()}
    return Comparison(
        {name: clustered_proportion(values, prompts) for name, values in found.items()},
        {name: paired_difference(found["gate"] - values, prompts) for name, values in found.items() if name != "gate"},
        len(prompts),
        len(set(prompts.tolist())),
    )


def paired_difference(values: NDArray[np.float64], prompts: NDArray[Any]) -> CountedEstimate:
    """The mean of differences in [-1, 1] (n,), with Student's 95% interval over ``prompts`` (n,).

    Fewer than ``FEWEST`` prompts that differ say nothing of the spread; two that agree have none at all. There the interval is at
    least as wide as Clopper and Pearson's bounds on the gains and on the losses, each at 97.5%, allow.
    """
    found = clustered_mean(values, prompts)
    if len(set(prompts[values != 0.0].tolist())) >= FEWEST:
        return found
    gains, losses = (clustered_proportion(np.maximum(side, 0.0), prompts, level=0.975) for side in (values, -values))
    low, high = gains.low - losses.high, gains.high - losses.low
    return CountedEstimate(found.value, float(np.fmin(found.low, low)), float(np.fmax(found.high, high)), found.count)


@dataclass(frozen=True)
class FitReport:
    """What a fit on the training part of the prompts is worth on the others."""

    objectives: tuple[str, ...]
    ridge: RidgeFit
    """Of the training part; errors are those of its folds."""
    quality: dict[str, ObjectiveQuality]
    """R2 of every objective on held-out prompts, beside the ceiling that the labels' own noise allows."""
    decorrelation: DecorrelationReport | None
    """On prompts that lambda was not fitted on; None without nuisances."""
    gate: GateFit
    comparison: Comparison
    """On prompts that no model was trained or stopped on."""
    calibration: Calibration
    """The slope from the prompts to stop by, everything else on those to compare on."""
    prompts: dict[str, int]
    """Of the preferences, in each part of the split."""
    pairs: int
    dropped_pairs: int
    features: int
    """d."""
    notes: tuple[str, ...] = ()
    """What the files say against themselves, and what was too long for the backbone."""

    @property
    def accuracies(self) -> dict[str, float]:
        """The gate's ("gate") and the baselines'."""
        return {name: found.value for name, found in self.comparison.accuracies.items()}

    @property
    def compared_pairs(self) -> int:
        """Pairs that the accuracies are of."""
        return self.comparison.pairs

    @property
    def compared_prompts(self) -> int:
        """Whose pairs they are."""
        return self.comparison.prompts

    @property
    def differences(self) -> dict[str, CountedEstimate]:
        """The gate's accuracy less that of each baseline, with paired intervals over prompts."""
        return self.comparison.differences

    @property
    def ships(self) -> bool:
        """Whether the gate beats fixed weights beyond doubt: the lower end of the difference's 95% interval is above 0."""
        return self.differences[FIXED].low > 0.0

    def interval(self, model: str) -> CountedEstimate:
        """One of the ``accuracies`` with its 95% interval over prompts."""
        return self.comparison.accuracies[model]

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What a reader has to know before using the judge."""
        found = [*self.notes]
        found += [
            f"{name} has {int(rows)} ratings for {self.features} features: its fit depends on alpha alone."
            for name, rows, thin in zip(self.objectives, self.ridge.rows, self.ridge.under_determined, strict=True)
            if thin
        ]
        for name, quality in self.quality.items():
            found += quality.warnings(name)
        if self.decorrelation is not None:
            found += self.decorrelation.warnings
        if not self.ships:
            gap = self.differences[FIXED]
            found.append(
                f"the gate does not beat fixed weights beyond doubt: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] in "
                f"accuracy on {gap.count} held-out prompts; use fixed weights, or more preferences whose prompts call for "
                f"different objectives."
            )
        for name in BLACK_BOXES:
            gap = self.differences[name]
            if gap.high < 0.0:
                found.append(
                    f"the gate is behind the black box {name}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]; that is "
                    f"the price of the explanation here."
                )
        return (*found, *self.calibration.warnings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        objectives = {
            name: {
                "alpha": float(self.ridge.alpha[index]),
                "validation_mse": float(self.ridge.validation_mse[:, index].min()),
                "rows": int(self.ridge.rows[index]),
                "under_determined": bool(self.ridge.under_determined[index]),
                "held_out": self.quality[name],
            }
            for index, name in enumerate(self.objectives)
        }
        found: dict[str, Any] = strict_json(
            {
                "objectives": self.objectives,
                "ridge": objectives,
                "decorrelation": self.decorrelation,
                "gate": self.gate,
                "accuracies": self.accuracies,
                "intervals": self.comparison.accuracies,
                "gate_minus": self.differences,
                "compared_pairs": self.compared_pairs,
                "compared_prompts": self.compared_prompts,
                "prompts": self.prompts,
                "ships": self.ships,
                "calibration": self.calibration,
                "pairs": self.pairs,
                "dropped_pairs": self.dropped_pairs,
                "warnings": self.warnings,
            }
        )
        return found

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, self.to_dict())
