"""The monitor as a callback of Hugging Face's Trainer, and of every trainer that is built on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from telltale.errors import UnsupportedModelError
from telltale.train.sharpness.monitor import Reading, SharpnessMonitor
from telltale.train.sharpness.probe import LossFunction


class EdgeOfStabilityCallback(TrainerCallback):
    """``Trainer(..., callbacks=[EdgeOfStabilityCallback(probe)])``: reads the edge right after optimizer steps.

    ``probe``: minibatches of its own, as ``loss_fn(model, batch)`` takes them; None is the next-token loss of a causal LM on
    batches such as the Trainer's (mappings with input_ids). Readings go to ``run_dir`` (None: the Trainer's output
    directory), into ``state.log_history`` and to ``on_reading``. ``options`` are those of
    :class:`~telltale.train.sharpness.monitor.SharpnessMonitor`.

    Gradient accumulation and resuming are followed; of several processes the first one reads. Weights that are sharded over
    processes (FSDP, DeepSpeed ZeRO-3) have no Hessian in one place:
    :class:`~telltale.errors.UnsupportedModelError` at the start of training.
    """

    def __init__(
        self,
        probe: Iterable[Any],
        loss_fn: LossFunction | None = None,
        *,
        run_dir: str | Path | None = None,
        on_reading: Iterable[Callable[[Reading], None]] = (),
        **options: Any,
    ) -> None:
        self._probe, self._loss_fn = list(probe), loss_fn
        self._run_dir, self._options = run_dir, options | {"on_reading": tuple(on_reading)}
        self.monitor: SharpnessMonitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse sharded training before the first step."""
        self.monitor = None
        plugins = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        if plugins:
            raise UnsupportedModelError(
                f"the Trainer shards the weights ({', '.join(plugins)}), so no process has the whole Hessian; expected "
                f"training with whole weights (one process or DistributedDataParallel)."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Between ``optimizer.step`` and the schedule's step: the rate is the one that was used."""
        if not state.is_world_process_zero:
            return
        if self.monitor is None:
            self.monitor = SharpnessMonitor(
                kwargs["model"],
                self._loss_fn,
                self._probe,
                optimizer=kwargs["optimizer"],
                run_dir=args.output_dir if self._run_dir is None else self._run_dir,
                start=state.global_step,
                **self._options,
            )
        reading = self.monitor.step()
        if reading is not None:
            values = {"sharpness_ratio": reading.ratio, "sharpness_state": reading.state, "sharpness_sd": reading.sd}
            state.log_history.append(
                {"step": reading.step} | {name: value for name, value in values.items() if value is not None}
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the model."""
        if self.monitor is not None:
            self.monitor.close()
