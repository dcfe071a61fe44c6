"""Many runs side by side: how the Sharpness Dimension and every control order their generalisation gaps.

A coefficient of the dimension alone shows little, since batch size, train loss or weight norm often order runs as well or
better; so a comparison always has a row for every measure that all runs share. It makes no claim: it gives signs, sizes and
intervals of Kendall's tau, and of the granulated coefficients of Jiang et al. (arXiv 1912.02178), which arXiv 2604.19740 reports
as psi_LR and psi_BS: tau among runs that differ in one setting only.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.runs.files import strict_json, write_json
from telltale.signals.statistics import (
    CountedEstimate,
    Floats,
    Statistic,
    bootstrap,
    kendall_statistic,
    kendall_tau,
    mean_over_seeds,
    partial_tau,
)

POINT_FILE = "sharpness_point.json"
"""What ``telltale sharpness measure`` leaves in a run directory for a comparison."""
FEWEST_SEEDS = 3
"""From so many seeds on, intervals are over seeds; below, over resampled runs."""


@dataclass(frozen=True)
class Point:
    """One trained network: its measures and gaps by name, the settings it was trained with, and its seed.

    A gap is test minus train for a loss, train minus test for an accuracy: larger is worse.
    """

    name: str
    measures: Mapping[str, float]
    gaps: Mapping[str, float]
    settings: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None

    def save(self, folder: str | Path) -> Path:
        """Write the point into ``folder`` as JSON. Raises :class:`~telltale.errors.CheckpointError` if it cannot."""
        path = Path(folder) / POINT_FILE
        write_json(path, self)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Point:
        """Read the point of a run directory.

        Raises :class:`~telltale.errors.CheckpointError` if there is none, :class:`~telltale.errors.DataError` if it is damaged.
        """
        path = Path(folder) / POINT_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {POINT_FILE}; run telltale sharpness measure on its checkpoint with --held-out first."
            )
        try:
            point = cls(**json.loads(path.read_text()))
            for values in (point.measures, point.gaps, point.settings):
                for name, value in values.items():
                    if isinstance(value, bool) or not isinstance(value, (int, float)):
                        raise TypeError(f"{name} is {value!r}, no number")
            return point
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a measured point: {error}. Measure it again.") from error


@dataclass(frozen=True)
class Row:
    """One measure against one gap. ``psi`` by setting; ``given``: tau with that other measure held fixed."""

    measure: str
    gap: str
    runs: int
    tau: CountedEstimate
    psi: dict[str, CountedEstimate]
    given: dict[str, CountedEstimate]


@dataclass(frozen=True)
class Comparison:
    """All rows, strongest tau first within a gap. ``intervals`` names what the intervals range over."""

    rows: list[Row]
    runs: int
    seeds: int
    level: float
    intervals: str

    def of(self, measure: str, gap: str) -> Row:
        """The row of one measure and gap. Raises :class:`~telltale.errors.ConfigError` if there is none."""
        for row in self.rows:
            if (row.measure, row.gap) == (measure, gap):
                return row
        raise ConfigError(f"no row for measure {measure!r} and gap {gap!r}; expected one of those compared.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not defined is None."""
        found: dict[str, Any] = strict_json(self)
        return found


def compare(
    points: Sequence[Point],
    *,
    measures: Sequence[str] | None = None,
    gaps: Sequence[str] | None = None,
    given: Sequence[str] = (),
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Kendall's tau and the granulated psi of every measure with every gap, with intervals.

    With three seeds or more (each of at least two runs) a coefficient is computed within each seed and averaged, with Student's
    interval; else once over all runs, with a bootstrap over runs. None for ``measures`` or ``gaps`` takes those that
    all points have; naming one that a point lacks raises :class:`~telltale.errors.DataError`. ``given`` names measures to
    hold fixed in partial taus. Settings are those that all points have and that vary.
    """
    if len(points) < 2:
        raise DataError(f"{len(points)} run was given; expected at least two to compare.")
    shared_measures = _shared([point.measures for point in points], measures, "measure")
    shared_gaps = _shared([point.gaps for point in points], gaps, "gap")
    if given:
        _shared([point.measures for point in points], given, "measure")
    settings = _varying(points)
    groups = _by_seed(points)
    by_seeds = len(groups) >= FEWEST_SEEDS
    parts = groups if by_seeds else [list(points)]
    rows = []
    for gap in shared_gaps:
        for measure in shared_measures:
            if by_seeds:
                psi = _over_seeds(groups, measure, gap, settings, level)
            else:
                psi = _over_runs(points, measure, gap, settings, level=level, resamples=resamples, seed=seed)
            held = {
                name: mean_over_seeds([_partial(part, measure, gap, name) for part in parts], level=level)
                for name in given
                if name != measure
            }
            rows.append(Row(measure, gap, len(points), psi.pop("tau"), psi, held))
    rows.sort(key=lambda row: (shared_gaps.index(row.gap), math.isnan(row.tau.value), -abs(row.tau.value)))
    kind = f"Student over {len(groups)} seeds" if by_seeds else f"bootstrap over {len(points)} runs"
    return Comparison(rows, len(points), len(groups), level, kind)


def granulated(
    measure: Sequence[float],
    gap: Sequence[float],
    settings: Mapping[str, Sequence[Any]],
    *,
    blocks: Sequence[Any] | None = None,
) -> dict[str, float]:
    """psi of every setting (arXiv 1912.02178), and their mean under the name ``mean``.

    ``settings`` maps a name (learning rate, batch size, ...) to its value for each run. psi of a name is the mean of tau
    over the groups of runs that agree in all *other* settings, and in ``blocks`` (such as the seed of each run). Groups in
    which tau is not defined are left out; psi is NaN if none is left.
    """
    one = np.ones((1, len(measure)))
    return {name: float(psi(one)[0]) for name, psi in _granulated(measure, gap, settings, blocks).items()}


def _granulated(
    measure: Sequence[float],
    gap: Sequence[float],
    settings: Mapping[str, Sequence[Any]],
    blocks: Sequence[Any] | None,
) -> dict[str, Statistic]:
    """psi of every setting and their mean, for :func:`~telltale.signals.statistics.bootstrap`."""
    columns = {name: list(values) for name, values in settings.items()}
    fixed = list(blocks) if blocks is not None else [None] * len(measure)
    for name, values in (columns | {"blocks": fixed}).items():
        if len(values) != len(measure):
            raise DataError(f"{name!r} has {len(values)} values for {len(measure)} runs; expected one per run.")
    psis: dict[str, Statistic] = {}
    for name, values in columns.items():
        others = [fixed, *(column for other, column in columns.items() if other != name)]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for run in range(len(measure)):
            groups[tuple(column[run] for column in others)].append(run)
        psis[name] = _mean_of_defined(
            [
                _on(runs, kendall_statistic([measure[run] for run in runs], [gap[run] for run in runs]))
                for runs in groups.values()
                if len({values[run] for run in runs}) > 1
            ]
        )
    return psis | {"mean": _mean_of_defined(list(psis.values()))} if psis else psis


def _on(rows: Sequence[int], statistic: Statistic) -> Statistic:
    return lambda weights: statistic(weights[:, list(rows)])


def _mean_of_defined(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of those that are defined; NaN where none is."""

    def statistic(weights: Floats) -> Floats:
        found = np.array([one(weights) for one in statistics]).reshape(len(statistics), len(weights))
        known = ~np.isnan(found)
        with np.errstate(invalid="ignore"):
            mean: Floats = np.where(known, found, 0.0).sum(0) / known.sum(0)
        return mean

    return statistic


def _over_seeds(
    groups: Sequence[Sequence[Point]], measure: str, gap: str, settings: Sequence[str], level: float
) -> dict[str, CountedEstimate]:
    """tau and psi within each seed, averaged over seeds."""
    columns = []
    for group in groups:
        x, y = _column(group, measure), [point.gaps[gap] for point in group]
        columns.append(granulated(x, y, _settings(group, settings)) | {"tau": kendall_tau(x, y)})
    return {name: mean_over_seeds([column[name] for column in columns], level=level) for name in columns[0]}


def _over_runs(
    points: Sequence[Point],
    measure: str,
    gap: str,
    settings: Sequence[str],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> dict[str, CountedEstimate]:
    """tau over all runs, psi within a seed, with intervals from resampled runs."""
    x, y = _column(points, measure), [point.gaps[gap] for point in points]
    blocks = [point.seed for point in points]
    columns = _settings(points, settings)
    statistics = {"tau": kendall_statistic(x, y)} | _granulated(x, y, columns, blocks)
    found = bootstrap(list(statistics.values()), range(len(points)), resamples=resamples, level=level, seed=seed)
    return {
        name: CountedEstimate(one.value, one.low, one.high, len(points))
        for name, one in zip(statistics, found, strict=True)
    }


def _settings(points: Sequence[Point], names: Sequence[str]) -> dict[str, list[float]]:
    return {name: [point.settings[name] for point in points] for name in names}


def _partial(points: Sequence[Point], measure: str, gap: str, given: str) -> float:
    return partial_tau(_column(points, measure), [point.gaps[gap] for point in points], _column(points, given))


def _column(points: Sequence[Point], measure: str) -> list[float]:
    return [point.measures[measure] for point in points]


def _by_seed(points: Sequence[Point]) -> list[list[Point]]:
    groups: dict[int | None, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.seed].append(point)
    return [group for group in groups.values() if len(group) > 1]


def _shared(columns: Sequence[Mapping[str, float]], wanted: Sequence[str] | None, kind: str) -> list[str]:
    everywhere = [name for name in columns[0] if all(name in column for column in columns)]
    for name in wanted or ():
        if name not in everywhere:
            raise DataError(f"not every run has the {kind} {name!r}; all have {', '.join(everywhere) or 'none'}.")
    chosen = list(wanted) if wanted is not None else everywhere
    if not chosen:
        raise DataError(f"the runs share no {kind}; expected at least one that all of them were measured with.")
    return chosen


def _varying(points: Sequence[Point]) -> list[str]:
    names = [name for name in points[0].settings if all(name in point.settings for point in points)]
    return [name for name in names if len({point.settings[name] for point in points}) > 1]
