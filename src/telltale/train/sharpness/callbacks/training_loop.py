"""The monitor as a callback of telltale's plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from telltale.configuration import check_integer
from telltale.train.loop import Callback, StepState, TrainResult
from telltale.train.sharpness.monitor import Reading, SharpnessMonitor


class SharpnessCallback(Callback):
    """Reads the edge of stability along ``telltale.train.loop.train``; with ``run_dir`` it leaves its files there.

    ``probe`` None keeps the first ``rows`` sequences of the first batch that it sees; the loss is the next-token loss of the
    last layer. ``options`` are those of :class:`~telltale.train.sharpness.monitor.SharpnessMonitor`. Under several processes
    the first one reads, the others wait for it at their next gradient.
    """

    def __init__(
        self,
        probe: Iterable[Any] | None = None,
        *,
        rows: int = 4,
        run_dir: str | Path | None = None,
        on_reading: Iterable[Callable[[Reading], None]] = (),
        **options: Any,
    ) -> None:
        check_integer("rows", rows, low=1)
        self._probe = None if probe is None else list(probe)
        self._rows, self._run_dir = rows, run_dir
        self._options = options | {"on_reading": tuple(on_reading)}
        self.monitor: SharpnessMonitor | None = None

    def on_step_end(self, state: StepState) -> None:
        """Count the step, and look if it is time."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        if self.monitor is None:
            probe = [state.batch[: self._rows]] if self._probe is None else self._probe
            self.monitor = SharpnessMonitor(
                state.model,
                None,
                probe,
                optimizer=state.optimizer,
                run_dir=self._run_dir,
                start=state.step - 1,
                **self._options,
            )
        self.monitor.step(loss=state.loss)

    def on_end(self, result: TrainResult) -> None:
        """Let go of the model."""
        self.on_abort()

    def on_abort(self) -> None:
        """Let go of the model."""
        if self.monitor is not None:
            self.monitor.close()
