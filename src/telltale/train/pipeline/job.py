"""A causal LM trained through a pipeline: what ``telltale train --pipeline`` runs on every rank.

Texts, batches, learning rates, clipping and the LayerSkip recipe are those of the plain loop (``train/loop.py``). An optimizer
step's batch is cut into the plan's m minibatches under vertical, 2bw, flush and gpipe; under stash and none a minibatch is a
whole step's batch. So one replica per stage under flush trains what the plain loop trains with m accumulation steps.

A run is a row of drained spans, each at most about ten seconds long, so that Ctrl-C is answered; where it is cut changes nothing
but the bubbles in between (and, under the ablation "none", the training, which is therefore cut at checkpoints alone).

Model and plan are checked against each other before any process waits for another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import ConfigError, MissingExtraError, PlanError
from telltale.models.exits import ExitQuality, exit_quality
from telltale.runs.progress import Interruption, interruptible
from telltale.runs.run_dir import RunDir
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.loop import (
    Corpus,
    TrainResult,
    adamw,
    batch_at,
    check_corpus,
    check_settings,
    held_out_batches,
    identity,
)
from telltale.train.pipeline.export import export
from telltale.train.pipeline.layers import LayeredModel
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.torch_schedules import TorchPipelineTrainer, check_plan
from telltale.train.pipeline.schedule import Policy, policy_of
from telltale.train.pipeline.simulation import gantt
from telltale.train.pipeline.simulation.timeline import Event, Timeline
from telltale.train.pipeline.split import split
from telltale.train.pipeline.stage_checkpoint import on_all_ranks, resume_newest, save
from telltale.train.pipeline.trainer import PipelineTrainer
from telltale.train.run_config import TrainConfig

SPAN_SECONDS = 10.0
"""How long a span may take, so that an interruption is answered before torchrun loses patience (30 s)."""

BATCHES_PER_STAGE = 4
"""Microbatches a stage of a plan without a profile: the bubble is then below a fifth (GPipe, section 2.3)."""

RECORDED = 256
"""Minibatches in the recorded timeline."""


Trainer = PipelineTrainer | TorchPipelineTrainer


class Watcher:
    """What the first rank shows of a run; override what is needed. Losses are in nats per predicted token."""

    def on_step(self, step: int, loss: float | None) -> None:
        """Optimizer step ``step`` begins, or is the last and done; ``loss`` is the newest that is known."""

    def on_evaluate(self, step: int, loss: float) -> None:
        """After each held-out evaluation."""

    def close(self) -> None:
        """Once, when the run is over, was interrupted or failed."""


def train_pipeline(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    plan: Plan,
    *,
    run_dir: str | Path,
    layerskip: LayerSkipConfig | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    timeout: float = 300.0,
    watcher: Watcher | None = None,
    weights: str | Path | None = None,
) -> TrainResult:
    """Train ``model`` on ``corpus`` as one rank of ``plan``; every rank calls it with the same arguments under ``torchrun``.

    ``run_dir`` is on a disk that all ranks share. It gets ``config.yaml``, ``plan.json``, ``metrics.jsonl``, ``checkpoints/``,
    ``timeline.json`` with ``timeline.html`` (the longest uncut span as it ran), and the whole model in ``model/``. ``resume`` goes
    on from the newest checkpoint that all stages have; the plan may be another one with as many minibatches per step, ``steps`` may
    have grown (from there on the schedules are those of the new number), and how often is saved, logged and evaluated may change.
    SIGINT or SIGTERM saves and returns with ``finished=False``. ``timeout`` in seconds bounds every wait for another rank.
    ``weights``: the checkpoint that every rank reads its own stage from, for a ``model`` without weights
    (:func:`~telltale.train.pipeline.stage_weights.without_weights`); then no rank ever holds the whole model, which leaves the last
    measurement of every exit out.

    Raises what :func:`~telltale.train.pipeline.job.check_job`, :func:`~telltale.train.loop.train` and
    :class:`~telltale.train.pipeline.trainer.PipelineTrainer` raise, and
    :class:`~telltale.train.pipeline.runtime.failures.RankFailure` if another rank fails.
    """
    check_corpus(corpus, config)
    recipe = layerskip and dataclasses.replace(layerskip, total_steps=layerskip.total_steps or config.steps)
    per_step = minibatches_per_step(plan)
    layered = layered_for_training(model, precision=config.precision, layerskip=recipe, per_step=per_step)
    check_job(layered, plan, config)
    settings = {
        "train": config.to_dict(),
        "layerskip": recipe.to_dict() if recipe else None,
        "on": identity(model, corpus),
        "pipeline": {"minibatches_per_step": per_step},
    }
    make: Callable[..., Trainer] = (
        TorchPipelineTrainer if plan.policy == "interleaved" else partial(PipelineTrainer, record=True)
    )
    trainer = make(
        layered,
        plan,
        optimizer=lambda named: adamw([parameter for _, parameter in named], config, learning_rate=1.0),
        schedule=lambda minibatch: config.learning_rate_at(minibatch // per_step),
        grad_clip=config.grad_clip or None,
        recompute=plan.recompute or config.activation_checkpointing,
        seed=config.seed,
        timeout=timeout,
        weights=weights,
    )
    run = _enter(trainer, Path(run_dir), settings, resume=resume)
    with contextlib.ExitStack() as held:
        on_all_ranks(trainer, lambda: held.enter_context(run.alone()) if trainer.rank == 0 else None)
        resume_newest(trainer, run.checkpoints_path, stop=config.steps * per_step)

        def accept() -> None:
            # Not before: a run that is refused leaves the folder as it was.
            if trainer.rank == 0:
                run.truncate_metrics(trainer.minibatch // per_step)
                RunDir.create(run.path, settings, exist_ok=True)
                plan.save(run.path / "plan.json")

        on_all_ranks(trainer, accept)
        job = _Job(trainer, corpus, config, run, watcher if watcher and trainer.rank == 0 else Watcher())
        began = time.perf_counter()
        try:
            with interruptible() as interruption:
                finished = job.run(interruption)
        finally:
            job.watcher.close()
        job.keep_timeline()
        quality = job.leave_model(tokenizer) if finished else None
        seconds = time.perf_counter() - began
        return TrainResult(
            trainer.minibatch // per_step,
            finished,
            run.path,
            run.path / "model" if finished else None,
            quality,
            seconds,
        )


def _enter(trainer: Trainer, path: Path, settings: dict[str, Any], *, resume: bool) -> RunDir:
    """The run directory, made by the first rank or found with the same settings."""

    def make() -> None:
        if trainer.rank == 0 and not (resume and (path / "config.yaml").exists()):
            RunDir.create(path, settings)

    on_all_ranks(trainer, make)
    run = on_all_ranks(trainer, lambda: RunDir.open(path))
    check_settings(run, _as_started(run.config(), settings))
    return run


MAY_CHANGE = ("checkpoint_every", "evaluate_every", "log_every")
"""Settings that a resumed run may have otherwise."""


def _as_started(started: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with what a resumed run may change as it was when the run began."""
    before, now = started.get("train") or {}, dict(settings["train"])
    now |= {name: before[name] for name in MAY_CHANGE if name in before}
    checked = settings | {"train": now}
    if now["steps"] > before.get("steps", now["steps"]):
        recipe, old = settings["layerskip"], started.get("layerskip") or {}
        if recipe and recipe["total_steps"] == now["steps"] and old.get("total_steps") == before["steps"]:
            checked["layerskip"] = recipe | {"total_steps": before["steps"]}
        now["steps"] = before["steps"]
    return checked


class _Job:
    """One rank's run, span by span. Steps are optimizer steps, minibatches the pipeline's."""

    def __init__(self, trainer: Trainer, corpus: Corpus, config: TrainConfig, run: RunDir, watcher: Watcher) -> None:
        self.trainer, self.corpus, self.config, self.run_dir, self.watcher = trainer, corpus, config, run, watcher
        self.per_step = minibatches_per_step(trainer.plan)
        self.stop = config.steps * self.per_step
        self._loss: float | None = None
        self._span = max(trainer.policy.alignment, 2 * trainer.plan.workers)
        """Minibatches that a span may have."""
        self._recorded: list[Event] = []
        self._recorded_minibatches = 0
        small = dataclasses.replace(config, batch_size=config.batch_size // self.per_step, gradient_accumulation=1)
        windows = list(held_out_batches(corpus.held_out, small))
        self._held_out = [{"input_ids": ids} for ids in windows if len(ids) == len(windows[0])]

    def run(self, interruption: Interruption) -> bool:
        """Train to the last step; False if a signal came before."""
        trainer, config = self.trainer, self.config
        while trainer.minibatch < self.stop:
            start, end = trainer.minibatch, self._span_end()
            self._train(end)
            if end == self._mark(start, config.evaluate_every):
                self._evaluate()
            interrupted = any(trainer.groups.all_gather_object(interruption.requested))
            if interrupted or end in (self._mark(start, config.checkpoint_every), self.stop):
                save(trainer, self.run_dir.checkpoints_path)
            if interrupted and end < self.stop:
                return False
        self.watcher.on_step(config.steps, self._loss)
        return True

    def keep_timeline(self) -> None:
        """Write what the longest span looked like, as JSON and, where Plotly is installed, as a page."""
        trainer = self.trainer
        recorded = trainer.groups.all_gather_object(self._recorded)

        def write() -> None:
            if trainer.rank or not any(recorded):
                return
            timeline = Timeline.from_events(itertools.chain.from_iterable(recorded), trainer.plan, label="recorded")
            timeline.save(self.run_dir.path / "timeline.json")
            with contextlib.suppress(MissingExtraError):
                gantt.html(timeline, self.run_dir.path / "timeline.html", title=str(self.run_dir.path))

        on_all_ranks(trainer, write)

    def leave_model(self, tokenizer: Any) -> ExitQuality | None:
        """Export the whole model; the first rank also measures it on the held-out text, exit by exit."""
        trainer = self.trainer
        export(trainer, self.run_dir.path / "model", tokenizer=tokenizer)
        if trainer.rank != 0 or any(parameter.is_meta for parameter in trainer.model.root.parameters()):
            return None
        model = trainer.model.root.to(trainer.device)
        with autocast(trainer.device.type, enabled=self.config.precision == "bfloat16"):
            batches = (ids.to(trainer.device) for ids in held_out_batches(self.corpus.held_out, self.config))
            quality = exit_quality(model, batches)
        record = {"losses": quality.losses, "agreement": quality.agreement}
        self.run_dir.log({"step": self.config.steps, "held_out": record})
        return quality

    def _train(self, end: int) -> None:
        trainer, start, began = self.trainer, self.trainer.minibatch, time.perf_counter()
        recorder = trainer if isinstance(trainer, PipelineTrainer) else None  # torch's schedules keep no record
        if recorder is not None:
            recorder.spans.clear()
        losses = trainer.train(self._batch, stop=end)
        seconds = time.perf_counter() - began
        if recorder is not None and end - start >= self._recorded_minibatches:
            self._recorded_minibatches = end - start
            place = (trainer.rank, *trainer.plan.place(trainer.rank))
            self._recorded = [
                Event(*place, kind, minibatch, begin, finish, version)
                for kind, minibatch, version, begin, finish in recorder.recorded()
                if minibatch < start + RECORDED
            ]
        self._span = max(1, min(2 * (end - start), int(SPAN_SECONDS * (end - start) / max(seconds, 1e-6))))
        self._loss = losses[-1]
        on_all_ranks(trainer, lambda: self._log(start, losses, seconds) if trainer.rank == 0 else None)

    def _batch(self, minibatch: int) -> dict[str, Tensor]:
        step, part = divmod(minibatch, self.per_step)
        if part == 0:
            self.watcher.on_step(step, self._loss)
        return {"input_ids": batch_at(self.corpus.train, self.config, step).chunk(self.per_step)[part]}

    def _log(self, start: int, losses: list[float], seconds: float) -> None:
        config, per_step = self.config, self.per_step
        tokens_per_second = round(len(losses) / per_step * config.batch_size * config.sequence_length / seconds)
        for offset in range(0, len(losses), per_step):
            step = (start + offset) // per_step + 1
            if step % config.log_every == 0 or step in (1, config.steps):
                loss = statistics.fmean(losses[offset : offset + per_step])
                rate = config.learning_rate_at(step - 1)
                record = {"step": step, "loss": loss, "learning_rate": rate, "tokens_per_second": tokens_per_second}
                self.run_dir.log(record)

    def _evaluate(self) -> None:
        trainer, step = self.trainer, self.trainer.minibatch // self.per_step
        loss = trainer.evaluate(self._held_out, len(self._held_out))
        record = {"step": step, "held_out": {"objective": loss}}
        on_all_ranks(trainer, lambda: self.run_dir.log(record) if trainer.rank == 0 else None)
        self.watcher.on_evaluate(step, loss)

    def _span_end(self) -> int:
        """Where the next span ends: the next mark, or as far as ten seconds go, on every rank alike."""
        now, alignment = self.trainer.minibatch, self.trainer.policy.alignment
        marks = [self._mark(now, every) for every in (self.config.checkpoint_every, self.config.evaluate_every)]
        if self.trainer.policy.name == "none":
            return min(self.stop, marks[0])
        length = self.trainer.groups.broadcast_object(self._span)
        return min(self.stop, *marks, -(-(now + length) // alignment) * alignment)

    def _mark(self, minibatch: int, every: int) -> int:
        """The first end of a round after ``minibatch`` at or next behind a multiple of ``every`` steps, or the stop."""
        alignment = self.trainer.policy.alignment
        for count in itertools.count(minibatch // (every * self.per_step)):
            mark = -(-count * every * self.per_step // alignment) * alignment
            if mark > minibatch:
                return min(mark, self.stop)
        raise AssertionError


def minibatches_per_step(plan: Plan) -> int:
    """Minibatches of one optimizer step of every stage: m for policies by batch, else 1."""
    policy = _policy(plan)
    return policy.microbatches if policy.synchronous else 1


def _policy(plan: Plan) -> Policy:
    """What trains alike under our schedules: an interleaved batch is that of flush."""
    interleaved = plan.policy == "interleaved"
    return Policy("flush", plan.replicas, plan.microbatches) if interleaved else policy_of(plan)


def straight_plan(layers: int, stages: int, batch_size: int) -> Plan:
    """A plan without a profile: ``stages`` runs of layers of equal length under flush, and as many minibatches per step, up to
    four a stage, as divide ``batch_size``."""
    m = next(m for m in range(min(batch_size, BATCHES_PER_STAGE * stages), 0, -1) if batch_size % m == 0)
    return Plan.even(layers, stages, policy="flush", microbatches=m)


def tied_across_stages(model: LayeredModel, plan: Plan) -> list[str]:
    """Names of the weights that layers of different stages share."""
    stage_of = {layer: number for number, stage in enumerate(plan.stages) for layer in stage.layers}
    shared = model.shared_parameters().items()
    return [name for name, layers in shared if len({stage_of.get(layer) for layer in layers}) > 1]


def check_job(model: LayeredModel, plan: Plan, config: TrainConfig) -> None:
    """Refuse what does not go together before any process waits for another.

    Raises :class:`~telltale.errors.PlanError` for a plan of another model or one that a tied weight forbids, and
    :class:`~telltale.errors.ConfigError` for a batch that cannot be cut into the plan's minibatches.
    """
    per_step = minibatches_per_step(plan)
    if plan.n_layers != len(model.layers):
        raise PlanError(
            f"the plan has {plan.n_layers} layers and the model {len(model.layers)}; expected a plan of this model."
        )
    if config.batch_size % per_step:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be cut into the plan's {per_step} minibatches per optimizer step; "
            f"expected a multiple of {per_step}."
        )
    if config.gradient_accumulation not in (1, per_step):
        raise ConfigError(
            f"gradient_accumulation={config.gradient_accumulation} contradicts the plan, which has {per_step} minibatches per "
            f"optimizer step; leave it out."
        )
    tied = tied_across_stages(model, plan)
    if plan.policy == "interleaved":
        check_plan(plan)
        steps = range(0, config.steps * per_step, per_step)
        if len({model.pattern(minibatch) for minibatch in steps}) > 1:
            raise PlanError(
                "the recipe's active exits change from step to step, and an interleaved plan runs on torch's schedule, which needs "
                "the same tensors in every step; expected a plan with --policy flush, or --recipe none."
            )
    if tied and not _policy(plan).synchronous:
        raise PlanError(
            f"{tied[0]} is tied across stages, which policy {plan.policy!r} updates at different times; add --untie (untie the "
            f"model and plan it so), or make a plan with --policy 2bw or flush."
        )


def layered_for_training(
    model: nn.Module, *, precision: str, layerskip: LayerSkipConfig | None, per_step: int = 1
) -> LayeredModel:
    """``model`` as layers, with the recipe if given, whose forwards run under autocast for ``precision="bfloat16"``."""
    layered = split(model, layerskip=layerskip, minibatches_per_step=per_step)
    if precision == "float32":
        return layered
    layers = tuple(dataclasses.replace(layer, call=_under_autocast(layer.call)) for layer in layered.layers)
    return dataclasses.replace(layered, layers=layers, loss=_under_autocast(layered.loss))


def autocast(device: str, *, enabled: bool) -> torch.autocast:
    """bfloat16 autocast on a device type, or nothing."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)


def _under_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(values: tuple[Tensor, ...], batch: Any, minibatch: int) -> Any:
        device = values[0].device.type if values else "cpu"
        with autocast(device, enabled=True):
            return call(values, batch, minibatch)

    return run
