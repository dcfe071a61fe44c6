"""One look at the edge of stability: what it holds, the state it amounts to, and the files that looks leave behind.

The writers for CSV and TensorBoard are given to a monitor's ``on_reading``.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from telltale.errors import CheckpointError, MissingExtraError
from telltale.runs.files import JsonLines, write_json
from telltale.signals.receipt import Receipt
from telltale.train.sharpness.result import Sharpness
from telltale.train.sharpness.tracking import Extreme

STATES = STABLE, AT_EDGE, PAST_EDGE, DIVERGING = "stable", "at the edge", "past the edge", "diverging"
EDGE = (0.9, 1.1)
"""Ratios that count as at the edge."""
RISING = 3
"""Readings in a row past the edge with a rising probe loss that count as diverging."""
SLOPE_READINGS = 8
SHOWN_MODULES = 5
READINGS_FILE, CONFIG_FILE = "sharpness.jsonl", "sharpness_config.json"
_NOT_FINITE_IS_NULL = ("threshold", "ratio", "ratio_error", "loss")
_NUMBERS = ("step", "rate", *_NOT_FINITE_IS_NULL, "cost_seconds", "cost_share", "interval")
_MAYBE_NUMBERS = ("lambda_max", "lambda_min", "error", "slope", "sd", "sd_minibatches", "probe_loss", "forward_ratio")


@dataclass(frozen=True)
class EdgeReading:
    """One look. ``ratio`` = ``lambda_max`` * ``rate`` / ``threshold``: 1 is the edge; an eigenvalue lies within the errors."""

    step: int
    lambda_max: float | None
    """Largest eigenvalue of the Hessian, of P^-1/2 H P^-1/2 for Adam and RMSprop, with coupled weight decay; None where
    nothing could be computed."""
    lambda_min: float | None
    error: float | None
    rate: float
    threshold: float
    ratio: float
    ratio_error: float
    state: str
    loss: float
    """The training loss if it was given, else the probe's."""
    slope: float | None
    """Rise of the ratio per 1,000 steps over the last readings (progressive sharpening); None while there are fewer than 3."""
    sd: float | None
    sd_interval: tuple[float, float] | None
    no_curvature: bool
    cost_seconds: float
    """CPU seconds of all looks of this process so far, this one included."""
    cost_share: float
    """The same as a part of all CPU time."""
    interval: int
    """Steps until the next look at the present costs."""
    probe_loss: float | None = None
    """Loss of the minibatch that the edge was read on; None where it is not finite."""
    leading: dict[str, float] | None = None
    """Share of the steepest direction's square that lies in each module, the largest :data:`SHOWN_MODULES` of them: where the
    edge is. None where nothing could be computed."""
    sd_minibatches: int | None = None
    """Minibatches behind ``sd``."""
    receipt: Receipt | None = None
    """Residuals of the products, from the last time that they were checked."""
    forward_ratio: float | None = None
    """The same from forward passes alone; None where that was not asked for, or nothing was kept ahead of the look."""


def reading_of(
    found: Extreme | None,
    *,
    step: int,
    rate: float,
    loss: float,
    before: Sequence[EdgeReading],
    factor: float = 1.0,
    threshold: float = math.nan,
    probe_loss: float | None = None,
    no_curvature: bool = False,
    leading: Mapping[str, float] | None = None,
    receipt: Receipt | None = None,
    forward_ratio: float | None = None,
) -> EdgeReading:
    """``found`` (None: nothing could be computed) as a reading; ``factor`` brings its values into units of rate * curvature.

    Of the cost only zeros: it is known when the look is over.
    """
    values: list[float | None] = [None, None, None]
    ratio = error = math.nan
    if found is not None:
        ratio, error = found.largest * factor / threshold, found.error * factor / threshold
        if rate > 0:
            values = [value * factor / rate for value in (found.largest, found.smallest, found.error)]
    reading = EdgeReading(
        step=step,
        lambda_max=values[0],
        lambda_min=values[1],
        error=values[2],
        rate=rate,
        threshold=threshold,
        ratio=ratio,
        ratio_error=error,
        state=STABLE,
        loss=loss,
        slope=None,
        sd=None,
        sd_interval=None,
        no_curvature=no_curvature,
        cost_seconds=0.0,
        cost_share=0.0,
        interval=1,
        probe_loss=probe_loss,
        leading=None if leading is None else largest(leading),
        receipt=receipt,
        forward_ratio=forward_ratio,
    )
    return dataclasses.replace(reading, state=state_of(reading, before), slope=slope_of(reading, before))


def largest(shares: Mapping[str, float]) -> dict[str, float]:
    """The :data:`SHOWN_MODULES` modules with the largest share, from the largest down."""
    order = sorted(shares, key=lambda name: -shares[name])
    return {name: shares[name] for name in order[:SHOWN_MODULES]}


def shares_by_module(vector: Tensor, names: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    """The part of the square of ``vector`` (N,) in each module; ``names`` and ``sizes`` are its parameters', in order."""
    found: dict[str, float] = {}
    whole = float(torch.linalg.vector_norm(vector)) ** 2 or 1.0
    for name, part in zip(names, vector.split(list(sizes)), strict=True):
        module = name.rpartition(".")[0] or name
        found[module] = found.get(module, 0.0) + float(torch.linalg.vector_norm(part)) ** 2 / whole
    return found


def state_of(reading: EdgeReading, before: Sequence[EdgeReading]) -> str:
    """What ``reading`` amounts to after the readings ``before`` it.

    Divergence is a loss or ratio that is not finite, or :data:`RISING` readings in a row past the edge over which the
    probe's loss rose: it is that of one fixed minibatch, so a rise is no noise.
    """
    if not (math.isfinite(reading.loss) and math.isfinite(reading.ratio)):
        return DIVERGING
    last = [*before[-RISING:], reading]
    losses = [seen.probe_loss for seen in last if seen.probe_loss is not None]
    rising = len(losses) > RISING and all(after > ahead for ahead, after in itertools.pairwise(losses))
    if rising and all(seen.ratio > EDGE[1] for seen in last[1:]):
        return DIVERGING
    if reading.ratio > EDGE[1]:
        return PAST_EDGE
    return AT_EDGE if reading.ratio + reading.ratio_error >= EDGE[0] else STABLE


def slope_of(reading: EdgeReading, before: Sequence[EdgeReading]) -> float | None:
    """Least-squares rise of the ratio per 1,000 steps over the last :data:`SLOPE_READINGS`; None for fewer than 3."""
    last = [*before[-SLOPE_READINGS + 1 :], reading]
    if len(last) < 3 or not all(math.isfinite(seen.ratio) for seen in last):
        return None
    steps = torch.tensor([seen.step for seen in last], dtype=torch.float64)
    steps = steps - steps.mean()
    spread = float(steps @ steps)
    values = torch.tensor([seen.ratio for seen in last], dtype=torch.float64)
    return 1000.0 * float(steps @ values) / spread if spread > 0 else None


class ReadingFiles:
    """The monitor's part of a run directory: settings, a line for each reading, a file for each dimension.

    A resumed run goes on after ``start``: what lies behind it is removed, all of it for ``start`` 0.
    Raises :class:`~telltale.errors.CheckpointError` for a folder that cannot be written and for files that are no readings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, start: int) -> None:
        self.folder = Path(folder)
        write_json(self.folder / CONFIG_FILE, settings)
        self.kept = [reading for reading in read_readings(self.folder) if reading.step <= start]
        self._lines = JsonLines(self.folder / READINGS_FILE)
        self._lines.replace(map(dataclasses.asdict, self.kept))
        for step, file in dimension_files(self.folder):
            if step > start:
                file.unlink()

    def append(self, reading: EdgeReading) -> None:
        """One line, in one write. Numbers that are not finite are null there."""
        self._lines.append(dataclasses.asdict(reading))

    def save(self, found: Sharpness, step: int) -> None:
        """The dimension of one step."""
        found.save(self.folder / f"sharpness-step-{step:06d}.json")


def dimension_files(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of the dimensions that a monitor has left in ``folder``, by step."""
    found = [(file.stem.rpartition("-")[2], file) for file in Path(folder).glob("sharpness-step-*.json")]
    return sorted((int(step), file) for step, file in found if step.isdecimal())


def read_readings(folder: str | Path) -> list[EdgeReading]:
    """The readings that a monitor has left in ``folder``; a last line that a kill cut short is left out.

    Raises :class:`~telltale.errors.CheckpointError` for a line that is no reading.
    """
    path = Path(folder) / READINGS_FILE
    readings = []
    for number, values in enumerate(JsonLines(path), start=1):
        try:
            readings.append(_reading(values))
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"line {number} of {path} is no reading: {error}") from error
    return readings


def _reading(values: Any) -> EdgeReading:
    """The reading that a line holds. Raises TypeError or ValueError for anything else."""
    interval = values.get("sd_interval")
    values |= {"sd_interval": None if interval is None else tuple(map(float, interval))}
    values["receipt"] = None if values.get("receipt") is None else Receipt(**values["receipt"])
    values |= {name: math.nan for name in _NOT_FINITE_IS_NULL if values.get(name) is None}
    reading = EdgeReading(**values)
    for name in _NUMBERS + _MAYBE_NUMBERS:
        value = getattr(reading, name)
        if not (value is None and name in _MAYBE_NUMBERS) and (
            isinstance(value, bool) or not isinstance(value, (int, float))
        ):
            raise TypeError(f"{name} is {value!r}, no number")
    if not isinstance(reading.step, int) or reading.state not in STATES or len(interval or (0, 0)) != 2:
        raise ValueError(
            f"step {reading.step!r}, state {reading.state!r} and interval {interval!r} are not of a reading"
        )
    return reading


_NESTED = ("sd_interval", "leading", "receipt")
COLUMNS = [field.name for field in dataclasses.fields(EdgeReading) if field.name not in _NESTED] + [
    "sd_low",
    "sd_high",
    "leading_module",
    "leading_share",
    "residual",
]
SCALARS = (
    "ratio",
    "ratio_error",
    "forward_ratio",
    "lambda_max",
    "lambda_min",
    "rate",
    "loss",
    "slope",
    "sd",
    "cost_share",
)


class CsvRecords:
    """A row per reading in the file ``path``, appended; a new file begins with the names of the columns.

    Raises :class:`~telltale.errors.CheckpointError` if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, reading: EdgeReading) -> None:
        """Append ``reading``."""
        low, high = reading.sd_interval or (None, None)
        module, share = next(iter((reading.leading or {}).items()), (None, None))
        row = dataclasses.asdict(reading) | {
            "sd_low": low,
            "sd_high": high,
            "leading_module": module,
            "leading_share": share,
            "residual": None if reading.receipt is None else reading.receipt.worst,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists() or self.path.stat().st_size == 0
            with self.path.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise CheckpointError(f"could not append to {self.path}: {error}") from error


class TensorBoardRecords:
    """Scalars ``sharpness/...`` by step in the event folder ``log_dir``; close it, or use it in a with block.

    Raises :class:`~telltale.errors.MissingExtraError` without TensorBoard.
    """

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("event files need TensorBoard: pip install 'telltale[monitor]'") from error
        self._writer = SummaryWriter(str(log_dir))

    def __call__(self, reading: EdgeReading) -> None:
        """Write every value that ``reading`` has."""
        for name in SCALARS:
            value = getattr(reading, name)
            if value is not None:
                self._writer.add_scalar(f"sharpness/{name}", value, reading.step)
        self._writer.add_text("sharpness/state", reading.state, reading.step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardRecords:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
