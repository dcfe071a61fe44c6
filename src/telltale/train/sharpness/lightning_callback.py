"""The monitor as a callback of Lightning's Trainer. A file of its own, since its base class is in an optional package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from telltale.errors import MissingExtraError, UnsupportedModelError
from telltale.train.sharpness.monitor import EdgeReading, SharpnessMonitor
from telltale.train.sharpness.probe import LossFunction

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingExtraError("the Lightning callback needs Lightning: pip install 'telltale[monitor]'") from error


class EdgeOfStability(Callback):
    """``lightning.Trainer(callbacks=[EdgeOfStability(loss_fn, probe)])`` for training with one optimizer.

    ``loss_fn(module, batch)`` is the mean loss of a minibatch (no call of ``training_step``, which may log). Readings go to
    ``run_dir`` (None: nowhere), to the Trainer's logger as ``sharpness/...`` and to ``on_reading``. Of several processes the
    first one reads. :class:`~telltale.errors.UnsupportedModelError` at the start for more than one optimizer, and for
    strategies that shard the weights over processes, so that none has the whole Hessian.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        probe: Iterable[Any],
        *,
        run_dir: str | Path | None = None,
        on_reading: Iterable[Callable[[EdgeReading], None]] = (),
        **options: Any,
    ) -> None:
        self._loss_fn, self._probe = loss_fn, list(probe)
        self._run_dir, self._options = run_dir, options | {"on_reading": tuple(on_reading)}
        self.monitor: SharpnessMonitor | None = None
        self._steps = 0
        self._rates: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget an earlier fit, and refuse what cannot be read."""
        self.monitor, self._steps = None, trainer.global_step
        if len(trainer.optimizers) != 1:
            raise UnsupportedModelError(
                f"the module has {len(trainer.optimizers)} optimizers; expected one, since the edge is that of one step."
            )
        strategy = type(trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise UnsupportedModelError(
                f"{strategy} shards the weights, so no process has the whole Hessian; expected training with whole weights "
                f"(one process or DDP)."
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the rates of this step: the schedule has stepped when the reading is taken."""
        self._rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look if an optimizer step was taken (gradients may be accumulated) and it is time."""
        taken, self._steps = trainer.global_step > self._steps, trainer.global_step
        if not taken or not trainer.is_global_zero:
            return
        if self.monitor is None:
            self.monitor = SharpnessMonitor(
                pl_module,
                self._loss_fn,
                [self._as_trained_on(trainer, part, pl_module.device) for part in self._probe],
                optimizer=trainer.optimizers[0],
                run_dir=self._run_dir,
                start=trainer.global_step - 1,
                **self._options,
            )
        with _rates(trainer.optimizers[0], self._rates):
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

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the model."""
        self.on_train_end(trainer, pl_module)

    @staticmethod
    def _as_trained_on(trainer: Any, batch: Any, device: torch.device) -> Any:
        return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch, device))


@contextmanager
def _rates(optimizer: torch.optim.Optimizer, rates: Sequence[Any]) -> Iterator[None]:
    """``optimizer`` with the learning rates ``rates`` inside the block."""
    after = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, after, strict=True):
            group["lr"] = rate
