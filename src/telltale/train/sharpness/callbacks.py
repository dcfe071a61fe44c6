"""The monitor inside a training loop: Hugging Face's Trainer, telltale's own loop, and the pipeline's reference.

In the pipeline's one-process reference it shows what stale weights do to the edge and to the attractor: the reference
calls a hook after each update of a stage, and this hook reads the newest weights with the state of all stages' optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from telltale.config import check_integer
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.train.loop import Callback, StepState, TrainResult
from telltale.train.pipeline.reference import Reference
from telltale.train.sharpness.monitor import EdgeReading, SharpnessMonitor
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
        on_reading: Iterable[Callable[[EdgeReading], None]] = (),
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
        on_reading: Iterable[Callable[[EdgeReading], None]] = (),
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


class StalenessSharpness:
    """Give it to a ``Reference`` as ``on_update`` and then hand it the reference::

        watch = StalenessSharpness(loss_fn, probe, every=10, budget=1.0)
        run = Reference(layered, plan, optimizer=optimizer, on_update=watch)
        watch.follow(run)
        run.run(batches, stop=1000)
        watch.readings

    ``loss_fn(root, batch)`` is a loss of the whole model (None: the next-token loss of a causal LM); ``options`` are those
    of :class:`~telltale.train.sharpness.monitor.SharpnessMonitor`. A step is an update of the last stage. The threshold is that
    of the optimizer without delay. Delay moves the edge, either way: with a part p of the steepest direction's square in the
    first of two stages, plain SGD goes unstable at a ratio of min(1 / (1 - 2 p), 1 / (2 p)) for p < 1/2 and 1 / (2 p) above.
    Where a delayed run settles is what to look for.
    """

    def __init__(self, loss_fn: LossFunction | None, probe: Iterable[Any], **options: Any) -> None:
        self._loss_fn, self._probe, self._options = loss_fn, list(probe), options
        self._reference: Reference | None = None
        self.monitor: SharpnessMonitor | None = None

    @property
    def readings(self) -> list[EdgeReading]:
        """All of them so far."""
        return [] if self.monitor is None else self.monitor.readings

    def follow(self, reference: Reference) -> None:
        """Read the optimizers of ``reference``; call it again after :meth:`Reference.switch`."""
        self._reference = reference

    def __call__(self, stage: int, version: int, root: nn.Module) -> None:
        """After an update of ``stage``, with the newest weights in ``root``."""
        if self._reference is None:
            raise ConfigError("the reference is not known; call follow(reference) before running it.")
        if stage != len(self._reference.stages) - 1:
            return
        if self.monitor is None:
            self.monitor = SharpnessMonitor(
                root, self._loss_fn, self._probe, optimizer=self._optimizer, **self._options
            )
        self.monitor.step()

    def _optimizer(self) -> torch.optim.Optimizer:
        """One optimizer on the whole model's parameters with the groups and the state of the stages' own."""
        assert self._reference is not None
        return whole_optimizer(self._reference)


def whole_optimizer(reference: Reference) -> torch.optim.Optimizer:
    """The stages' optimizers as one on the model's own parameters; state tensors are shared, nothing is stepped with it.

    A tied weight is read at its first owner. Raises :class:`~telltale.errors.ConfigError` for stages whose optimizers are of
    different kinds.
    """
    own = dict(reference.model.root.named_parameters())
    seen: set[str] = set()
    groups: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    kinds: set[type] = set()
    for stage, keeper in zip(reference.stages, reference.optimizers, strict=True):
        optimizer = keeper.optimizer
        if optimizer is None:
            continue
        kinds.add(type(optimizer))
        name_of = {id(parameter): name for name, parameter in stage.live.items()}
        for group in optimizer.param_groups:
            names = [name_of[id(parameter)] for parameter in group["params"] if name_of[id(parameter)] not in seen]
            seen.update(names)
            states |= {name: optimizer.state.get(stage.live[name], {}) for name in names}
            if names:
                groups.append(group | {"params": [own[name] for name in names]})
    if len(kinds) != 1:
        raise ConfigError(f"the stages have optimizers of {len(kinds)} kinds; expected one kind for all.")
    whole: torch.optim.Optimizer = kinds.pop()(groups)
    for name, state in states.items():
        if state:
            whole.state[own[name]] = state
    return whole
