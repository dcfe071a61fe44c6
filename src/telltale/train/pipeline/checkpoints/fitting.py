"""A training run that survives its processes: spans of minibatches, a checkpoint after each, and on from the newest one.

Under ``torchrun --max-restarts`` a rank that dies ends the others (see ``faults``); torchrun starts all of them again, and
the same :func:`fit` goes on from the newest step that every stage has written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telltale.configuration import check_integer
from telltale.errors import CheckpointError, ConfigError
from telltale.runs.run_dir import RunDir
from telltale.train.pipeline.checkpoints import checkpoint
from telltale.train.pipeline.checkpoints.steps import complete_steps

if TYPE_CHECKING:
    from telltale.train.pipeline.trainer import PipelineTrainer

Progress = Callable[[int, list[float]], None]
"""(next minibatch, losses of the span that has just ended); called on every rank."""


def fit(
    trainer: PipelineTrainer,
    batches: Callable[[int], Any] | Sequence[Any],
    *,
    stop: int,
    directory: str | Path | None = None,
    save_every: int | None = None,
    keep: int = 2,
    resume: bool = True,
    on_progress: Progress | None = None,
) -> list[float]:
    """Train up to minibatch ``stop`` (not included); returns the losses of the minibatches that this process trained on.

    ``directory`` is a run folder on a disk that all ranks share: steps go to ``checkpoints/``, and the first rank appends
    one record per span to ``metrics.jsonl`` (``step``: minibatches done, ``loss``: mean of the span, in the loss's own unit,
    ``losses``, ``seconds``). A step is saved every ``save_every`` minibatches, a multiple of the policy's alignment, since
    the pipe drains there; None saves at the end alone. The newest ``keep`` steps stay. With ``resume`` training goes on from
    the newest complete step, if there is one.

    Raises :class:`~telltale.errors.ConfigError` for a ``save_every`` inside a round and
    :class:`~telltale.errors.CheckpointError` for a folder that holds steps and ``resume=False``, or what resuming raises.
    """
    check_integer("stop", stop, low=1)
    alignment = trainer.policy.alignment
    if save_every is not None:
        check_integer("save_every", save_every, low=1)
        if save_every % alignment:
            raise ConfigError(
                f"save_every={save_every} is inside a round; expected a multiple of {alignment} minibatches."
            )
        if directory is None:
            raise ConfigError(f"save_every={save_every} was given without a directory; expected both.")
    run = RunDir(Path(directory)) if directory is not None else None
    if run is not None:
        _enter(trainer, run, stop=stop, resume=resume)
    losses: list[float] = []
    while trainer.minibatch < stop:
        start, began = trainer.minibatch, time.perf_counter()
        end = stop if save_every is None else min(stop, (start // save_every + 1) * save_every)
        span = trainer.train(batches, stop=end)
        losses += span
        if run is not None:
            _log(trainer, run, span, time.perf_counter() - began)
            checkpoint.save(trainer, run.checkpoints_path, keep=keep)
        if on_progress is not None:
            with trainer.record.published():
                on_progress(end, span)
    return losses


def _enter(trainer: PipelineTrainer, run: RunDir, *, stop: int, resume: bool) -> None:
    def refuse_old() -> None:
        if not resume and complete_steps(run.checkpoints_path):
            raise CheckpointError(
                f"{run.checkpoints_path} already holds steps; expected an empty folder, or resume=True."
            )

    checkpoint.together(trainer, refuse_old)
    checkpoint.resume_newest(trainer, run.checkpoints_path, stop=stop)

    def forget_what_was_lost() -> None:
        if trainer.rank == 0 and run.metrics_path.exists():
            run.truncate_metrics(trainer.minibatch)

    checkpoint.together(trainer, forget_what_was_lost)


def _log(trainer: PipelineTrainer, run: RunDir, span: list[float], seconds: float) -> None:
    def write() -> None:
        if trainer.rank == 0:
            run.path.mkdir(parents=True, exist_ok=True)
            mean = sum(span) / len(span)
            run.log({"step": trainer.minibatch, "loss": mean, "losses": span, "seconds": round(seconds, 3)})

    checkpoint.together(trainer, write)
