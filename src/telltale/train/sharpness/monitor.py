"""How close a live training run is to its edge of stability, within a CPU budget and without touching the run.

A look takes the largest eigenvalue of the Hessian as the optimizer's step sees it (its own preconditioner, rates, momentum and
decay) and divides it by the threshold at which a step overshoots (arXiv 2604.19740; Cohen et al. 2021, 2022). Now and then
the Sharpness Dimension is measured with its controls. What is read is never fed back into training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from telltale.configuration import check_choice, check_integer
from telltale.errors import CheckpointError, ConfigError, NumericalError
from telltale.runs.atomic import write_atomically
from telltale.signals.hessian import Operator
from telltale.train.sharpness.edges import edge_of, underlying
from telltale.train.sharpness.measure import JACOBIANS, measure
from telltale.train.sharpness.pacing import Pace
from telltale.train.sharpness.preconditioner import Scaled, view_of
from telltale.train.sharpness.probe import LossFunction, Probe
from telltale.train.sharpness.result import Sharpness
from telltale.train.sharpness.tracking import Extreme, ExtremeTracker
from telltale.train.sharpness.view import View, paper_view

STABLE, AT_EDGE, PAST_EDGE, DIVERGING = "stable", "at the edge", "past the edge", "diverging"
EDGE = (0.9, 1.1)
"""Ratios that count as at the edge."""
RISING = 3
"""Readings in a row past the edge with a rising loss that count as diverging."""
SLOPE_READINGS = 8
FORWARDS_PER_PRODUCT = 7.0
"""A gradient is three forward passes, a product 1.7 to 2.3 gradients as measured on MLPs and transformers."""
READINGS_FILE, CONFIG_FILE = "sharpness.jsonl", "sharpness_config.json"


@dataclass(frozen=True)
class Reading:
    """One look. ``ratio`` = ``lambda_max`` * ``rate`` / ``threshold``: 1 is the edge; an eigenvalue lies within the errors."""

    step: int
    lambda_max: float | None
    """Largest eigenvalue of the Hessian, of P^-1/2 H P^-1/2 for Adam and RMSprop; None where nothing could be computed."""
    lambda_min: float | None
    error: float | None
    rate: float
    threshold: float
    ratio: float
    ratio_error: float
    state: str
    loss: float
    slope: float | None
    """Rise of the ratio per 1,000 steps over the last readings (progressive sharpening); None while there are fewer than 3."""
    sd: float | None
    sd_interval: tuple[float, float] | None
    no_curvature: bool
    cost_seconds: float
    cost_share: float
    interval: int
    """Steps until the next look at the present costs."""


class SharpnessMonitor:
    """Call :meth:`step` right after each ``optimizer.step()``; it looks when it is due and the budget allows.

    ``loss_fn(model, batch)`` None is the next-token loss of a Hugging Face causal LM. ``probe``: minibatches of its own, fixed
    for the whole run; the edge is read on the first one, the dimension on all. ``optimizer`` (or a function that gives it) is
    read live at every look.
    ``budget`` is the part of the process's CPU time that looks may take, ``every`` the steps between two of them ("auto": as
    often as the budget allows). ``sd_every`` None measures no dimension. ``steps`` products a look. ``jacobian`` "gd" is the
    paper's I - rate H whatever the optimizer. ``mode`` is the train/eval flag during the probe. With ``run_dir`` every reading
    is a line of ``sharpness.jsonl`` there, every dimension a file; ``start`` is the step that a resumed run goes on from.

    Training is the same to the last bit with and without a monitor. Raises what
    :class:`~telltale.train.sharpness.probe.Probe` and :func:`~telltale.train.sharpness.edges.edge_of` raise, on construction;
    an optimizer whose edge is not known is read as "gd", with a warning.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        probe: Iterable[Any],
        *,
        optimizer: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer],
        budget: float = 0.05,
        every: int | str = "auto",
        sd_every: int | None = None,
        sd_runs: int = 10,
        sd_steps: int = 20,
        steps: int = 6,
        jacobian: str = "optimizer",
        mode: str = "eval",
        seed: int = 0,
        start: int = 0,
        run_dir: str | Path | None = None,
        on_reading: Sequence[Callable[[Reading], None]] = (),
    ) -> None:
        check_choice("jacobian", jacobian, JACOBIANS)
        check_integer("start", start, low=0)
        if sd_every is not None:
            check_integer("sd_every", sd_every, low=1)
        check_integer("sd_runs", sd_runs, low=1)
        check_integer("sd_steps", sd_steps, low=1)
        self._optimizer = optimizer
        self.jacobian = self._known(jacobian)
        self.tracker = ExtremeTracker(steps=steps, seed=seed)
        self.pace = Pace(budget, every)
        with self.pace.look("probe"):
            self.probe = Probe(model, loss_fn, probe, mode=mode, seed=seed)
        forward = self.pace.spent / len(self.probe.batches)
        self.pace.expect("edge", forward * FORWARDS_PER_PRODUCT * (self.tracker.cold_steps + 1))
        self.pace.expect("dimension", forward * FORWARDS_PER_PRODUCT * sd_steps * max(sd_runs, len(self.probe.batches)))
        self.sd_every, self.sd_runs, self.sd_steps, self.seed = sd_every, sd_runs, sd_steps, seed
        self.steps_done = start
        self.readings: list[Reading] = []
        self.dimensions: list[tuple[int, Sharpness]] = []
        self.on_reading = list(on_reading)
        self.run_path = None if run_dir is None else Path(run_dir)
        if self.run_path is not None:
            self._open(self.run_path, start)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose steps are watched."""
        given = self._optimizer
        return underlying(given if isinstance(given, torch.optim.Optimizer) or hasattr(given, "optimizer") else given())

    @property
    def state(self) -> str:
        """Of the newest reading; "stable" before there is one."""
        return self.readings[-1].state if self.readings else STABLE

    def step(self, *, loss: float | None = None) -> Reading | None:
        """Count an optimizer step; the reading if it was time for one. ``loss``: the training loss, if it is at hand.

        None as well while an adaptive optimizer has no state to read. A training loss that is not finite is read at once.
        """
        self.steps_done += 1
        self.pace.tick()
        if loss is not None and not math.isfinite(loss):
            return self._keep(self._broken(loss))
        if not self._ready() or not self.pace.due():
            return None
        return self.check(loss=loss)

    def check(self, *, loss: float | None = None) -> Reading:
        """A reading now, whatever the budget.

        Raises :class:`~telltale.errors.DataError` for an adaptive optimizer that has not stepped yet.
        """
        wanted = self.sd_every is not None and self.pace.due("dimension", every=self.sd_every)
        with self.pace.look():
            try:
                reading = self._read(loss)
            except NumericalError:
                reading = self._broken(math.nan if loss is None else loss)
        if wanted and reading.state != DIVERGING and reading.rate > 0:
            with self.pace.look("dimension"):
                found = self.measure()
            self.dimensions.append((self.steps_done, found))
            reading = dataclasses.replace(reading, sd=found.sd, sd_interval=found.interval)
            if self.run_path is not None:
                found.save(self.run_path / f"sharpness-step-{self.steps_done:06d}.json")
        return self._keep(reading)

    def measure(self) -> Sharpness:
        """The Sharpness Dimension at the present step over all probe minibatches."""
        return measure(
            self.probe.model,
            self.probe.loss_fn,
            self.probe.batches,
            optimizer=self.optimizer,
            runs=max(self.sd_runs, len(self.probe.batches)),
            steps=self.sd_steps,
            jacobian=self.jacobian,
            mode=self.probe.mode,
            seed=self.seed,
        )

    def close(self) -> None:
        """Drop what is only needed for further looks."""
        self.tracker.forget()

    def __enter__(self) -> SharpnessMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, loss: float | None) -> Reading:
        view = self._view()
        rate = self._rate()
        hessian = self.probe.operator()
        operator: Operator = hessian if view.wrap is None else view.wrap(hessian)
        found = self.tracker.look(operator, scale=operator.scale if isinstance(operator, Scaled) else None)
        # In units of rate * curvature: the wrapped operator has the rate inside, the plain Hessian does not.
        factor = rate if view.wrap is None else 1.0
        threshold = view.threshold if view.wrap is not None else 2.0
        ratio, error = found.largest * factor / threshold, found.error * factor / threshold
        value = hessian.loss if loss is None else loss
        return self._reading(
            found, factor, rate, threshold, ratio, error, value, no_curvature=not hessian.has_curvature
        )

    def _reading(
        self,
        found: Extreme | None,
        factor: float,
        rate: float,
        threshold: float,
        ratio: float,
        error: float,
        loss: float,
        *,
        no_curvature: bool = False,
    ) -> Reading:
        curvature = factor / rate if rate > 0 else None
        known = found is not None and curvature is not None
        return Reading(
            step=self.steps_done,
            lambda_max=found.largest * curvature if known else None,  # type: ignore[union-attr, operator]
            lambda_min=found.smallest * curvature if known else None,  # type: ignore[union-attr, operator]
            error=found.error * curvature if known else None,  # type: ignore[union-attr, operator]
            rate=rate,
            threshold=threshold,
            ratio=ratio,
            ratio_error=error,
            state=self._state(ratio, error, loss),
            loss=loss,
            slope=self._slope(ratio),
            sd=None,
            sd_interval=None,
            no_curvature=no_curvature,
            cost_seconds=self.pace.spent,
            cost_share=self.pace.share,
            interval=self.pace.interval,
        )

    def _broken(self, loss: float) -> Reading:
        """Loss or parameters are not finite: there is no Hessian to read."""
        return self._reading(None, 1.0, self._rate(), math.nan, math.nan, math.nan, loss)

    def _state(self, ratio: float, error: float, loss: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(ratio)):
            return DIVERGING
        last = [(reading.ratio, reading.loss) for reading in self.readings[-RISING:]] + [(ratio, loss)]
        rising = len(last) > RISING and all(after[1] > before[1] for before, after in itertools.pairwise(last))
        if rising and all(seen > EDGE[1] for seen, _ in last[1:]):
            return DIVERGING
        if ratio > EDGE[1]:
            return PAST_EDGE
        return AT_EDGE if ratio + error >= EDGE[0] else STABLE

    def _slope(self, ratio: float) -> float | None:
        last = [(r.step, r.ratio) for r in self.readings[-SLOPE_READINGS + 1 :]] + [(self.steps_done, ratio)]
        if len(last) < 3 or not all(math.isfinite(value) for _, value in last):
            return None
        steps, values = (torch.tensor(part, dtype=torch.float64) for part in zip(*last, strict=True))
        steps = steps - steps.mean()
        spread = float(steps @ steps)
        return 1000.0 * float(steps @ values) / spread if spread > 0 else None

    def _known(self, jacobian: str) -> str:
        if jacobian == "gd":
            return jacobian
        try:
            edge_of(self.optimizer)
        except ConfigError as error:
            if "is not known" not in str(error):
                raise
            warnings.warn(f"{error} It is read as I - rate H ('gd').", stacklevel=3)
            return "gd"
        return jacobian

    def _view(self) -> View:
        view = None if self.jacobian == "gd" else view_of(self.optimizer, self.probe.parameters)
        return paper_view(self._rate()) if view is None else view

    def _rate(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _ready(self) -> bool:
        return self.jacobian == "gd" or type(self.optimizer) is torch.optim.SGD or any(self.optimizer.state.values())

    def _keep(self, reading: Reading) -> Reading:
        self.readings.append(reading)
        if self.run_path is not None:
            try:
                with (self.run_path / READINGS_FILE).open("a") as stream:
                    stream.write(json.dumps(dataclasses.asdict(reading)) + "\n")
            except OSError as error:
                raise CheckpointError(f"could not append to {self.run_path / READINGS_FILE}: {error}") from error
        for tell in self.on_reading:
            tell(reading)
        return reading

    def _open(self, folder: Path, start: int) -> None:
        """Settings into the folder; of a run that is resumed, readings up to ``start`` stay."""
        settings = {
            "optimizer": type(self.optimizer).__name__,
            "jacobian": self.jacobian,
            "parameters": self.probe.size,
            "excluded": self.probe.excluded,
            "minibatches": len(self.probe.batches),
            "budget": self.pace.budget,
            "every": self.pace.every,
            "sd_every": self.sd_every,
            "seed": self.seed,
        }
        write_atomically(folder / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
        self.readings = [reading for reading in read_readings(folder) if reading.step <= start]
        text = "".join(json.dumps(dataclasses.asdict(reading)) + "\n" for reading in self.readings)
        write_atomically(folder / READINGS_FILE, text)
        for file in folder.glob("sharpness-step-*.json"):
            if int(file.stem.rpartition("-")[2]) > start:
                file.unlink()


def read_readings(folder: str | Path) -> list[Reading]:
    """The readings that a monitor has left in ``folder``; a last line that a kill cut short is left out."""
    path = Path(folder) / READINGS_FILE
    readings = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        interval = values.get("sd_interval")
        readings.append(Reading(**values | {"sd_interval": None if interval is None else tuple(interval)}))
    return readings
