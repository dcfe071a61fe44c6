"""The monitor as a callback of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from telltale.errors import MissingExtraError
from telltale.train.sharpness.monitor import Reading, SharpnessMonitor
from telltale.train.sharpness.probe import LossFunction

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingExtraError("the Lightning callback needs Lightning: pip install 'telltale[monitor]'") from error


class EdgeOfStability(Callback):
    """``lightning.Trainer(callbacks=[EdgeOfStability(loss_fn, probe)])`` for automatic optimization with one optimizer.

    ``loss_fn(module, batch)`` is the mean loss of a minibatch (no call of ``training_step``, which may log). Readings go to
    ``run_dir`` (None: nowhere), to the Trainer's logger as ``sharpness/...`` and to ``on_reading``. A schedule has already
    stepped when Lightning calls its callbacks, so the rate is the next step's. Of several processes the first one reads.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        probe: Iterable[Any],
        *,
        run_dir: str | Path | None = None,
        on_reading: Iterable[Callable[[Reading], None]] = (),
        **options: Any,
    ) -> None:
        self._loss_fn, self._probe = loss_fn, list(probe)
        self._run_dir, self._options = run_dir, options | {"on_reading": tuple(on_reading)}
        self.monitor: SharpnessMonitor | None = None
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget an earlier fit."""
        self.monitor, self._steps = None, trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look if an optimizer step was taken (gradients may be accumulated) and it is time."""
        taken, self._steps = trainer.global_step > self._steps, trainer.global_step
        if not taken or not trainer.is_global_zero:
            return
        if self.monitor is None:
            device = pl_module.device
            self.monitor = SharpnessMonitor(
                pl_module,
                self._loss_fn,
                [trainer.strategy.batch_to_device(part, device) for part in self._probe],
                optimizer=trainer.optimizers[0],
                run_dir=self._run_dir,
                start=trainer.global_step - 1,
                **self._options,
            )
        reading = self.monitor.step()
        if reading is not None and trainer.logger is not None:
            values = {"ratio": reading.ratio, "lambda_max": reading.lambda_max, "sd": reading.sd}
            trainer.logger.log_metrics(
                {f"sharpness/{name}": value for name, value in values.items() if value is not None}, step=reading.step
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the model."""
        if self.monitor is not None:
            self.monitor.close()
