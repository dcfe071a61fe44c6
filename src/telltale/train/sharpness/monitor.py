"""How close a live training run is to its edge of stability, within a CPU budget and without touching the run.

A look takes the largest eigenvalue of the Hessian as the optimizer's step sees it (its own preconditioner, rates, momentum and
decay) and divides it by the threshold at which a step overshoots (arXiv 2604.19740; Cohen et al. 2021, 2022). Now and then
the Sharpness Dimension is measured with its controls. What is read is never fed back into training.

The watched optimizer is read live at every look, and checked before the first one.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import telltale
from telltale.config import check_integer
from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.signals.hessian import Operator, vector_like
from telltale.signals.lanczos import lanczos
from telltale.signals.quiet import own_precision
from telltale.signals.receipt import RoundedAway
from telltale.train.sharpness.critical_step import WINDOW, CriticalStep
from telltale.train.sharpness.edges import Block, LiveOptimizer, Scaled
from telltale.train.sharpness.forward_passes import Copies
from telltale.train.sharpness.measure import measure
from telltale.train.sharpness.probe import LossFunction, Probe, chosen_names
from telltale.train.sharpness.readings import (
    AT_EDGE,
    CONFIG_FILE,
    DIVERGING,
    EDGE,
    PAST_EDGE,
    READINGS_FILE,
    STABLE,
    EdgeReading,
    ReadingFiles,
    read_readings,
    reading_of,
    shares_by_module,
)
from telltale.train.sharpness.result import Sharpness
from telltale.train.sharpness.tracking import (
    DIMENSION_KIND,
    EDGE_KIND,
    FIRST_KIND,
    Clock,
    Cost,
    CpuBudget,
    ExtremeTracker,
)

__all__ = [
    "AT_EDGE",
    "CONFIG_FILE",
    "DIVERGING",
    "EDGE",
    "PAST_EDGE",
    "READINGS_FILE",
    "STABLE",
    "Cost",
    "EdgeReading",
    "SharpnessMonitor",
    "read_readings",
]

EDGE_PART = 0.5
"""Part of the budget for the edge where the dimension is measured too: a look at it costs some 30 times as much, and would
never be affordable if cheap looks took the whole budget."""


AFTERMATH = 1.25
"""What a look costs in all, in units of its own time: on an MLP whose step takes 4 ms, rounds measured .8 to 1.3 times as much."""
BLOCKS_KIND = "blocks"
_CHECKED = 6
"""What opening an operator costs with its check, in products."""


class SharpnessMonitor:
    """Call :meth:`step` right after each ``optimizer.step()``; it looks when it is due and the budget allows.

    ``loss_fn(model, batch)`` None is the next-token loss of a Hugging Face causal LM. ``probe``: minibatches of its own, fixed
    for the whole run; the edge is read on the first one, the dimension on all. ``optimizer`` (or a function that gives it) is
    read live at every look.
    ``budget`` is the CPU time that looks may take, as a part of training's (1: no limit), ``every`` the steps between two of
    them ("auto": as often as the budget allows). ``sd_every`` does the same for the dimension, which is measured together with
    a look; None measures none. Both put off what would go over the budget. ``steps`` products a look. ``jacobian`` "gd" is the
    paper's I - rate H whatever the optimizer. ``mode`` is the train/eval flag during the probe: "no dropout" leaves batch norm
    as training has it, since the loss with running statistics has another Hessian. With ``run_dir`` every reading is a line of
    ``sharpness.jsonl`` there, every dimension a file; ``start`` is the step that a resumed run goes on from, and what lies
    behind it there is removed. ``clock`` returns CPU seconds; give your own where the process does more than this training.
    ``forward`` reads the forward-only channel (:class:`~telltale.train.sharpness.critical_step.CriticalStep`) beside each look,
    as ``forward_ratio``; it copies the weights at the two or three steps ahead of one.
    ``parameters`` (names of parameters or modules, or patterns) watches some of them. Parameters that are frozen or unfrozen on
    the way are followed.

    The first look is at the first step, whatever the budget; the next ones wait until its cost is within the budget. Besides
    the graph of one minibatch and a copy of the parameters, a look takes the vectors of
    :class:`~telltale.train.sharpness.tracking.ExtremeTracker`. The products are checked when the monitor is made and at looks
    2, 4, 8 and so on (:mod:`telltale.signals.receipt`); should a check fail on the way, the monitor warns and reads no more (where
    rounding alone is to blame, only until the loss is larger again).

    Training is the same to the last bit with and without a monitor. Raises on construction what
    :class:`~telltale.train.sharpness.probe.Probe`, :class:`~telltale.signals.hessian.HessianOperator` and
    :func:`~telltale.train.sharpness.edges.edge_of` raise, but for weights or a loss that are not finite (those read as
    diverging), and :class:`~telltale.errors.DataError` for an optimizer that does not hold the trainable parameters. An
    optimizer whose edge is not known is read as "gd", with a warning.
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
        sd_every: int | str | None = None,
        sd_runs: int = 10,
        sd_steps: int = 20,
        steps: int = 6,
        parameters: Iterable[str] | None = None,
        jacobian: str = "optimizer",
        mode: str = "no dropout",
        seed: int = 0,
        start: int = 0,
        run_dir: str | Path | None = None,
        on_reading: Sequence[Callable[[EdgeReading], None]] = (),
        clock: Clock = time.process_time,
        forward: bool = False,
    ) -> None:
        check_integer("start", start, low=0)
        if sd_every is not None and sd_every != "auto":
            check_integer("sd_every", sd_every, low=1)
        check_integer("sd_runs", sd_runs, low=1)
        check_integer("sd_steps", sd_steps, low=1)
        if not (isinstance(on_reading, Iterable) and all(map(callable, on_reading))):
            raise ConfigError(f"on_reading is {type(on_reading).__name__}; expected a list of functions of a reading.")
        self._watched = LiveOptimizer(optimizer, jacobian)
        self.tracker = ExtremeTracker(steps=steps, seed=seed)
        self.pace = CpuBudget(budget, every, aftermath=AFTERMATH, clock=clock)
        with self.pace.look("probe"):
            self.probe = Probe(model, loss_fn, probe, parameters=parameters, mode=mode, seed=seed)
        self.channel: CriticalStep | None = None
        """The forward-only channel, where it was asked for."""
        self._kept_at = start - 1
        if forward:
            self.channel = self._new_channel()
        self._trainable = self._trainable_now()
        self._watched.check_holds(self.probe.parameters)
        self._watched.tell_of(self.probe.outside)
        self.refused: str | None = None
        """Why there are no further readings: a check of the products failed on the way."""
        self._looks = 0
        self._rounded = False
        self.sd_every, self.sd_runs, self.sd_steps, self.seed = sd_every, sd_runs, sd_steps, seed
        self._expect_costs()
        self.steps_done = start
        self._products, self._checked, self._product = 0, False, 0.0
        self.readings: list[EdgeReading] = []
        self.dimensions: list[tuple[int, Sharpness]] = []
        self.on_reading = list(on_reading)
        if self.channel is not None:
            self._keep_weights()
        self.run_path = None if run_dir is None else Path(run_dir)
        self._files: ReadingFiles | None = None
        if self.run_path is not None:
            self._files = ReadingFiles(self.run_path, self._settings(), start=start)
            self.readings = list(self._files.kept)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose steps are watched."""
        return self._watched.now

    @property
    def jacobian(self) -> str:
        """What is measured: "optimizer", or "gd" where that was given or the optimizer's edge is not known."""
        return self._watched.jacobian

    @property
    def state(self) -> str:
        """Of the newest reading; "stable" before there is one."""
        return self.readings[-1].state if self.readings else STABLE

    @property
    def cost(self) -> Cost:
        """CPU seconds of this process's looks, and their part of all."""
        return Cost(self.pace.spent, self.pace.share)

    def step(self, loss: float | Tensor | None = None) -> EdgeReading | None:
        """Count an optimizer step; the reading if it was time for one. ``loss``: the training loss, if it is at hand.

        None as well while an adaptive optimizer has no state to read. A training loss that is not finite is reported at once; as
        long as it stays so, further readings come at their usual pace.
        """
        self.steps_done += 1
        self.pace.tick()
        loss = _number(loss)
        if loss is not None and not math.isfinite(loss) and self._finite_so_far():
            return self._keep(self._broken(loss))
        if self.refused is not None or not (self._is_first or self.pace.due()) or not self._watched.ready:
            # The channel's readings are of three updates in a row.
            if self.channel is not None and self.refused is None and self.pace.interval <= WINDOW:
                self._keep_weights()
            return None
        try:
            return self.check(loss)
        except RoundedAway as error:
            # A loss that has come so near to 0 may rise again.
            if not self._rounded:
                warnings.warn(f"no reading at step {self.steps_done}, nor while this lasts: {error}", stacklevel=2)
            self._rounded = True
            return None
        except UnsupportedModelError as error:
            # Training goes on: what a monitor cannot read is no reason to end it.
            self.refused = str(error)
            warnings.warn(f"the monitor stops reading at step {self.steps_done}: {error}", stacklevel=2)
            return None

    def check(self, loss: float | Tensor | None = None) -> EdgeReading:
        """A reading now, whatever the budget; a dimension with it if one is due and the budget allows that.

        Raises :class:`~telltale.errors.DataError` for an adaptive optimizer that has not stepped yet.
        """
        self._follow_freezing()
        loss = _number(loss)
        try:
            # The first look does not count as one of those every so many steps.
            with self.pace.look(FIRST_KIND if self._is_first else EDGE_KIND):
                reading = self._read(loss)
        except NumericalError:
            reading = self._broken(math.nan if loss is None else loss)
        else:
            # The time of a cold look, or of one at rate 0, gives the cost of a product, not of the next look.
            if not (self._checked and self._product):
                self._product = self.pace.last_cost / (self._products + (_CHECKED if self._checked else 1))
            check = self._check_cost if self._check_is_due(self._looks + 1) else 0.0
            self.pace.expect(EDGE_KIND, self._product * (self.tracker.steps + 1) + check)
            if not self.dimensions:
                self._expect_dimension(self._product)
        if self._wants_dimension(reading):
            reading = self._with_dimension(reading)
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
            parameters=self.probe.chosen,
            seed=self.seed,
        )

    @own_precision()
    def by_block(self, blocks: Iterable[str] | None = None, *, steps: int = 8) -> dict[str, float]:
        """The ratio to the edge of each block alone, were the others held still: of the diagonal blocks of the operator.

        ``blocks`` are names of parameters or modules, or patterns; None takes the outermost modules. Each costs ``steps``
        products, which are charged to the budget: later looks wait for them. None is above the ratio of the whole.

        Raises :class:`~telltale.errors.ConfigError` for a block that names nothing that is measured.
        """
        check_integer("steps", steps, low=2)
        probe, found = self.probe, {}
        names, sizes = probe.names, [parameter.numel() for parameter in probe.parameters]
        with self.pace.look(BLOCKS_KIND):
            rate, view = self._watched.rate, self._watched.view(probe.parameters)
            hessian = probe.operator(check=False)
            operator: Operator = hessian if view.wrap is None else view.wrap(hessian)
            factor, threshold = (rate, 2.0) if view.wrap is None else (1.0, view.threshold)
            for block in dict.fromkeys(name.partition(".")[0] for name in names) if blocks is None else blocks:
                inside = chosen_names([block], probe.model)
                part = Block(operator, [name in inside for name in names], sizes)
                generator = torch.Generator().manual_seed(self.seed)
                start = torch.randn(part.size, generator=generator).to(vector_like(operator))
                found[block] = float(lanczos(part, start, steps).nodes.max()) * factor / threshold
        return found

    def close(self) -> None:
        """Drop what is only needed for further looks."""
        self.tracker.forget()
        if self.channel is not None:
            self.channel.forget()

    def __enter__(self) -> SharpnessMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @own_precision()
    def _read(self, loss: float | None) -> EdgeReading:
        rate, view = self._watched.rate, self._watched.view(self.probe.parameters)
        self._looks += 1
        self._checked = self._check_is_due(self._looks) or 0 not in self.probe.receipts
        began = self.pace.elapsed
        hessian = self.probe.operator(check=self._checked)
        if self._checked:
            self._check_cost = self.pace.elapsed - began
        self._rounded = False
        operator: Operator = hessian if view.wrap is None else view.wrap(hessian)
        found = self.tracker.look(operator, scale=operator.scale if isinstance(operator, Scaled) else None)
        beside = None
        if self.channel is not None and self._kept_at == self.steps_done - 1:
            beside = self.channel.after().ratio
        # In units of rate * curvature: the wrapped operator has the rate inside, the plain Hessian does not.
        factor = rate if view.wrap is None else 1.0
        threshold = view.threshold if view.wrap is not None else 2.0
        self._products = found.matvecs
        return reading_of(
            found,
            step=self.steps_done,
            factor=factor,
            rate=rate,
            threshold=threshold,
            loss=hessian.loss if loss is None else loss,
            probe_loss=hessian.loss,
            # A dead network has a graph and no curvature; at rate 0 there is nothing to see of it.
            no_curvature=not hessian.has_curvature or (rate > 0 and found.largest == found.smallest == 0.0),
            before=self.readings,
            leading=None
            if self.tracker.vector is None
            else shares_by_module(
                self.tracker.vector, self.probe.names, [parameter.numel() for parameter in self.probe.parameters]
            ),
            receipt=self.probe.receipts[0],
            forward_ratio=beside,
        )

    def _check_is_due(self, look: int) -> bool:
        """Checked when the monitor is made, and again at looks 2, 4, 8...: a hook may begin to clamp later on."""
        return self._rounded or (look > 1 and look & (look - 1) == 0)

    def _keep_weights(self) -> None:
        """Of this step, for a reading of the forward-only channel that comes up."""
        assert self.channel is not None
        with self.pace.look("weights"):
            if self._kept_at != self.steps_done - 1:
                self.channel.restart()
            self.channel.before()
        self._kept_at = self.steps_done

    def _new_channel(self) -> CriticalStep:
        """On the probe that there is."""
        return CriticalStep.of(Copies(self.probe), optimizer=self._watched.now)

    def _broken(self, loss: float) -> EdgeReading:
        """Loss or parameters are not finite: there is no Hessian to read."""
        return reading_of(None, step=self.steps_done, rate=self._watched.rate, loss=loss, before=self.readings)

    def _wants_dimension(self, reading: EdgeReading) -> bool:
        if self.sd_every is None or reading.state == DIVERGING or not reading.rate > 0:
            return False
        return self.pace.due(DIMENSION_KIND, every=self.sd_every)

    def _with_dimension(self, reading: EdgeReading) -> EdgeReading:
        try:
            with self.pace.look(DIMENSION_KIND):
                found = self.measure()
                if self._files is not None:
                    self._files.save(found, self.steps_done)
        except NumericalError:
            return dataclasses.replace(reading, state=DIVERGING)
        self.dimensions.append((self.steps_done, found))
        return dataclasses.replace(reading, sd=found.sd, sd_interval=found.interval, sd_minibatches=found.minibatches)

    @property
    def _is_first(self) -> bool:
        """Whether nothing was looked at yet, by this process or the run that it resumes."""
        return not self.readings

    def _finite_so_far(self) -> bool:
        return not self.readings or (math.isfinite(self.readings[-1].ratio) and math.isfinite(self.readings[-1].loss))

    def _trainable_now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.probe.model.parameters()]

    def _follow_freezing(self) -> None:
        """Parameters frozen or unfrozen since the last look change N: the probe is made anew."""
        now = self._trainable_now()
        if now == self._trainable:
            return
        old = self.probe
        with self.pace.look("probe"):
            self.probe = Probe(old.model, old.loss_fn, old.batches, parameters=old.chosen, mode=old.mode, seed=old.seed)
        self.tracker.forget()
        if self.channel is not None:
            self.channel = self._new_channel()
        self._trainable = now

    def _expect_costs(self) -> None:
        """From one checked operator: a model without a right second derivative is refused here, not in the middle of training."""
        product, self._check_cost = 0.0, 0.0
        try:
            with self.pace.look("trial"):
                self.probe.operator()
            self._check_cost = self.pace.last_cost
            product = self.pace.last_cost / _CHECKED
        except NumericalError:
            pass  # Read as diverging when the time comes; until then a look is taken for cheap.
        self.pace.expect(EDGE_KIND, product * (1 + self.tracker.cold_steps))
        self._expect_dimension(product)
        if self.sd_every is not None:
            self.pace.limit(EDGE_KIND, EDGE_PART)

    def _expect_dimension(self, product: float) -> None:
        batches = len(self.probe.batches)
        self.pace.expect(DIMENSION_KIND, product * (_CHECKED * batches + self.sd_steps * max(self.sd_runs, batches)))

    def _keep(self, reading: EdgeReading) -> EdgeReading:
        """Report and write it; that is charged as well, at the next reading."""
        reading = dataclasses.replace(
            reading, cost_seconds=self.pace.spent, cost_share=self.pace.share, interval=self.pace.interval
        )
        self.readings.append(reading)
        with self.pace.look("telling"):
            if self._files is not None:
                self._files.append(reading)
            for callback in self.on_reading:
                callback(reading)
        return reading

    def _settings(self) -> dict[str, Any]:
        return {
            "optimizer": type(self.optimizer).__name__,
            "jacobian": self.jacobian,
            "parameters": self.probe.size,
            "excluded": self.probe.excluded,
            "tracker_bytes": dict(
                zip(("between_looks", "within_a_look"), self.tracker.memory(self.probe.size), strict=True)
            ),
            "minibatches": len(self.probe.batches),
            "mode": self.probe.mode,
            "steps": self.tracker.steps,
            "budget": self.pace.budget,
            "every": self.pace.every,
            "sd_every": self.sd_every,
            "sd_runs": self.sd_runs,
            "sd_steps": self.sd_steps,
            "seed": self.seed,
            "versions": {
                "telltale": telltale.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }


def _number(loss: float | Tensor | None) -> float | None:
    """A training loss in a loop is a tensor with its graph; a reading keeps the number."""
    return float(loss.detach()) if isinstance(loss, Tensor) else loss
