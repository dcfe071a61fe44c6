"""``telltale oger train``: a checkpoint and two files in, a run folder with metrics, checkpoints and the trained policy out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from telltale.align.oger.config import OGERConfig
from telltale.align.oger.teachers import TeacherStore
from telltale.align.oger.trainer import OGERTrainer
from telltale.align.oger.verification import Verifier
from telltale.config import check_integer
from telltale.errors import CheckpointError, ConfigError
from telltale.models.loading import load, without_progress_bars
from telltale.runs.files import atomic_directory
from telltale.runs.progress import Interruption, interruptible
from telltale.runs.run_dir import RunDir

Progress = Callable[[str, int, int, str], None]


def train_policy(
    checkpoint: str | Path,
    prompts: str | Path,
    teachers: str | Path,
    out: str | Path,
    *,
    verifier: Verifier,
    encoder: Any = "hidden",
    fields: dict[str, Any] | None = None,
    resume: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the policy in ``checkpoint`` with the teachers of two JSON-lines files; returns the run's summary.

    fields: of :class:`OGERConfig`, over the defaults of this command (a group of one prompt per device and step, every metric
    logged, a checkpoint at the end). ``out`` gets ``config.yaml``, ``metrics.jsonl``, ``trainer/checkpoint-N`` and ``model``. The
    first Ctrl-C saves at the next generation's end and stops.

    Raises children of :class:`~telltale.errors.TelltaleError`, before anything is trained where that can be known.
    """
    given = dict(fields or {})
    check_integer("max_steps", given.get("max_steps", 100), low=1)
    store = TeacherStore.from_jsonl(prompts, teachers, verifier=verifier, cache=cache)
    model, tokenizer = load(checkpoint, any_family=True, dtype=torch.float32)
    folder = Path(out)
    config = _config(folder, given)
    settings = {
        "checkpoint": str(checkpoint),
        "prompts": _digest(prompts),
        "teachers": _digest(teachers),
        "verifier": f"{verifier.__module__}.{getattr(verifier, '__name__', type(verifier).__name__)}",
        "encoder": str(getattr(encoder, "identity", encoder)),
        **given,
    }
    last = _checkpoint_of(folder, settings) if resume else None
    if not resume and (folder / "config.yaml").exists():
        raise CheckpointError(f"{folder} already holds a run. Give another folder, or resume it (--resume at the CLI).")
    with interruptible() as interruption, without_progress_bars():
        trainer = OGERTrainer(
            model,
            config,
            teachers=store,
            encoder=encoder,
            processing_class=tokenizer,
        )
        # Only now, when nothing is refused any more, is there a run.
        run = RunDir.open(folder) if resume else RunDir.create(folder, settings)
        with run.alone():
            if last is not None:
                run.truncate_metrics(int(last.rpartition("-")[2]))
            trainer.add_callback(_Reporting(run, config, interruption, progress))
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=last)
    with atomic_directory(folder / "model") as aside, without_progress_bars():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    metrics = run.metrics()
    return {
        "model": str(folder / "model"),
        "steps": trainer.state.global_step,
        "finished": trainer.state.global_step >= config.max_steps,
        "teacher_encodes": trainer.teacher_encodes,
        "teachers": store.statistics(),
        "last": metrics[-1] if metrics else {},
    }


def _config(folder: Path, given: dict[str, Any]) -> OGERConfig:
    group = given.get("num_generations", 8)
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": group,
        "num_generations": group,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_steps": 100,
        "save_strategy": "steps",
        "save_steps": given.get("max_steps", 100),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": not given.get("use_cpu", False),
        "gradient_checkpointing": not given.get("use_cpu", False),
    }
    try:
        return OGERConfig(**(defaults | given))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"TRL refuses this config: {error}") from error


def _digest(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _checkpoint_of(folder: Path, settings: dict[str, Any]) -> str:
    """The last checkpoint of the run in ``folder``, which has to be one of these settings (but for its length)."""
    begun = RunDir.open(folder).config()
    for name in (begun | settings).keys() - {"max_steps"}:
        if begun.get(name) != settings.get(name):
            raise ConfigError(
                f"{folder} was begun with {name}={begun.get(name)!r}, not {settings.get(name)!r}; expected the same, "
                f"or a new folder."
            )
    last = get_last_checkpoint(str(folder / "trainer")) if (folder / "trainer").is_dir() else None
    if last is None:
        raise CheckpointError(f"{folder} has no checkpoint to resume from; start it anew in another folder.")
    return last


class _Reporting(TrainerCallback):
    """Metrics to the run's file, progress to the terminal, and a clean stop on Ctrl-C."""

    def __init__(self, run: RunDir, config: OGERConfig, interruption: Interruption, progress: Progress | None) -> None:
        self.run, self.interruption, self.progress = run, interruption, progress
        self.every = config.steps_per_generation * config.num_iterations
        self.accumulated = config.gradient_accumulation_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write what TRL logs."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.run.log({"step": state.global_step, **logs})
            if self.progress is not None and "reward" in logs:
                solved = logs.get("oger/online_solved")
                note = f"reward {logs['reward']:.3f}" + ("" if solved is None else f", solved {solved:.2f}")
                self.progress("training", state.global_step, state.max_steps, note)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where a resumed run would be the same: at a generation's end."""
        if self.interruption.requested and not (state.global_step * self.accumulated) % self.every:
            control.should_save = control.should_training_stop = True
