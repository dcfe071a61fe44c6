"""Pipeline-parallel training on ``torch.distributed``: PipeDream's runtime (arXiv 1806.03377; SOSP'19, section 4).

Start it under ``torchrun``, one process per worker of the plan::

    layered = split(model)
    trainer = PipelineTrainer(layered, Plan.load("plan.json"), optimizer=lambda named: torch.optim.AdamW(named, lr=3e-4))
    losses = trainer.train(batch_at, stop=1000)

Every rank gives the same ``batch_at(minibatch)``. A run ends drained; a later one goes on with the weight versions that an
uncut run would have read, so evaluating or saving in between changes nothing. Tensor parallelism, sharded optimizers and
interleaved schedules are out of scope (the last are torch's: see ``torch_schedules``).

:func:`fit` trains in spans with a checkpoint after each. Under ``torchrun --max-restarts`` a rank that dies ends the others (see
``runtime.failures``); torchrun starts all of them again, and the same :func:`fit` goes on from the newest step that every stage
has written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_integer, check_range
from telltale.errors import CheckpointError, ConfigError, PlanError, TelltaleError
from telltale.runs.run_dir import RunDir
from telltale.train.pipeline import stage_checkpoint
from telltale.train.pipeline.checkpoint_files import complete_steps
from telltale.train.pipeline.export import export as export_model
from telltale.train.pipeline.layers import LayeredModel, as_layered, weighted_mean
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.collectives import Groups
from telltale.train.pipeline.runtime.failures import FlightRecord, default_device, rendezvous
from telltale.train.pipeline.runtime.optimizer import OptimizerFactory, RateDiscount, Schedule, StageOptimizer
from telltale.train.pipeline.runtime.stage import Stage, WeightVersions
from telltale.train.pipeline.runtime.worker import Batches, Span, Worker
from telltale.train.pipeline.schedule import policy_of
from telltale.train.pipeline.simulation.timeline import Event, StageSizes, Timeline
from telltale.train.pipeline.stage_checkpoint import StagePart, on_all_ranks
from telltale.train.pipeline.stage_weights import read_stage


class PipelineTrainer:
    """This rank's part of the pipeline of ``plan``.

    ``model`` is a :class:`LayeredModel` (see ``split``) or an ``nn.Sequential`` with ``loss(outputs, targets)``; every rank
    builds the same one, its stage's parameters are trained in place. ``optimizer`` makes a stage's optimizer from (name,
    parameter) pairs. ``schedule`` maps a minibatch number to a factor on the learning rate. ``grad_clip`` bounds the
    gradient norm of the whole model, or of each stage under stash; None and 0 leave it as it is. ``reduction="ordered"``
    makes sums over replicas independent of the backend. ``recompute=None`` follows the plan; recomputing changes no bit,
    except under "none". ``timeout`` is in seconds. ``weights`` is a folder of safetensors that this rank reads its own stage from,
    for a model that was built without (see :mod:`~telltale.train.pipeline.stage_weights`).

    Raises :class:`~telltale.errors.PlanError` on every rank if plan, model and number of processes do not fit.
    """

    def __init__(
        self,
        model: LayeredModel | nn.Sequential,
        plan: Plan,
        *,
        optimizer: OptimizerFactory,
        loss: Callable[[Any, Any], Tensor] | None = None,
        schedule: Schedule | None = None,
        discount: RateDiscount | None = None,
        replica_rates: bool = True,
        grad_clip: float | None = None,
        reduction: str = "all_reduce",
        recompute: bool | None = None,
        prefetch: int = 2,
        seed: int = 0,
        timeout: float = 300.0,
        record: bool = False,
        device: torch.device | str | None = None,
        weights: str | Path | None = None,
    ) -> None:
        _check_arguments(prefetch, timeout, grad_clip, reduction)
        self.model, self.plan = as_layered(model, loss), plan
        self.policy = policy_of(plan)
        self.rank, self.world = rendezvous(timeout)
        self.device = torch.device(device) if device is not None else default_device()
        self.record = FlightRecord(self.rank, timeout, world=self.world)
        self.minibatch = 0
        """The next minibatch."""
        groups = self.groups = Groups(self.model, plan, self.record, timeout)
        groups.agree(
            grad_clip=grad_clip, reduction=reduction, replica_rates=replica_rates, discount=discount, seed=seed
        )
        number, replica = plan.place(self.rank)
        first, stop = plan.stages[number].layers[0], plan.stages[number].layers[-1] + 1
        if weights is not None:
            on_all_ranks(self, lambda: read_stage(self.model, first, stop, weights))
        recompute = plan.recompute if recompute is None else recompute
        with self.record.published():
            self.stage = Stage(self.model, first, stop, seed=seed, recompute=recompute).to(self.device)
        groups.equalise(self.stage, number)
        self.versions = WeightVersions(self.stage, self.policy, number)
        named = self.model.parameter_names(first, stop)
        with self.record.published():
            self.optimizer = StageOptimizer(
                optimizer,
                named.items(),
                policy=self.policy,
                stage=number,
                schedule=schedule,
                discount=discount,
                replica_rates=replica_rates,
            )
        self.exchange = groups.exchange(named, number, replica, ordered=reduction == "ordered", device=self.device)
        self._worker = Worker(
            self.stage,
            groups.place(number, replica, self.device),
            self.policy,
            self.versions,
            self.optimizer,
            self.exchange,
            self.record,
            across_stages=bool(groups.ties) or bool(grad_clip and self.policy.synchronous),
            grad_clip=grad_clip,
            prefetch=prefetch,
            check_equal=lambda: groups.check_equal(self.stage, number),
        )
        self.spans: list[Span] = []
        self._worker.spans = self.spans if record else None
        self._origin = 0.0

    @property
    def trace(self) -> list[Any]:
        """Operations done in the last run, in order, with the versions that were used and made."""
        return self._worker.trace

    @property
    def parts(self) -> list[StagePart]:
        """What this rank contributes to a checkpoint."""
        place = self._worker.place
        return [StagePart(place.stage, place.replica, self.stage, self.versions, self.optimizer)]

    @property
    def most_versions(self) -> int:
        """Most weight versions that were alive on this rank at once."""
        return self._worker.most_versions

    def bytes_sent(self) -> dict[str, int]:
        """Bytes this rank has sent: activations (with a header of 4 KB per link and kind of minibatch) and gradients across
        cuts, and its share of the replicas' all-reduces."""
        place = self._worker.place
        return {
            "activations": sum(link.bytes for link in place.values_out),
            "gradients": sum(link.bytes for link in place.gradients_out),
            "replicas": self.exchange.bytes,
        }

    def train(self, batches: Callable[[int], Any] | Sequence[Any], *, stop: int) -> list[float]:
        """Train on the minibatches from :attr:`minibatch` to ``stop - 1``; returns their losses, on every rank.

        Raises :class:`~telltale.errors.NumericalError` for a loss that is not finite and
        :class:`~telltale.train.pipeline.runtime.failures.RankFailure` if another rank fails.
        """
        check_integer("stop", stop, low=0)
        self._check_whole()
        self.groups.agree(stop=stop)
        start = self.minibatch
        self._worker.trace = []
        if self._worker.spans is not None and not self.spans:
            self.groups.barrier()
            self._origin = time.perf_counter()
        self.stage.train()
        with self.record.published():
            self._worker.run(self._source(batches), start, stop)
            self._worker.check_equal()
            losses = self.groups.losses(self._worker.losses, start, stop)
        self.minibatch = max(stop, start)
        return losses

    def evaluate(self, batches: Callable[[int], Any] | Sequence[Any], count: int) -> float:
        """Mean loss over the terms of ``count`` minibatches with the newest weights of every stage, in eval mode; on every rank."""
        check_integer("count", count, low=1)
        self._check_whole()
        self.groups.agree(count=count)
        was_training = self.stage.training
        self.stage.eval()
        try:
            with self.record.published():
                self._worker.evaluate(self._source(batches), count)
                losses = self.groups.losses(self._worker.losses, 0, count)
                weights = self.groups.losses(self._worker.weights, 0, count)
        finally:
            self.stage.train(was_training)
        return weighted_mean(losses, weights)

    def _source(self, batches: Callable[[int], Any] | Sequence[Any]) -> Batches:
        return Batches(batches, self.model.weight, self.device)

    def fit(
        self,
        batches: Callable[[int], Any] | Sequence[Any],
        *,
        stop: int,
        directory: str | Path | None = None,
        save_every: int | None = None,
        keep: int = 2,
        resume: bool = True,
        on_progress: Progress | None = None,
    ) -> list[float]:
        """:meth:`train` in spans with a checkpoint after each, from the newest one on: see :func:`fit`."""
        return fit(
            self,
            batches,
            stop=stop,
            directory=directory,
            save_every=save_every,
            keep=keep,
            resume=resume,
            on_progress=on_progress,
        )

    def save(self, directory: str | Path, *, keep: int = 2) -> Path:
        """Write a step to ``directory``; every rank calls it. See :func:`checkpoint.save`."""
        self._check_whole()
        return stage_checkpoint.save(self, directory, keep=keep)

    def resume(self, directory: str | Path, *, switch_policy: bool = False) -> int:
        """Go on from the newest complete step in ``directory``; returns the next minibatch. See :func:`checkpoint.resume`."""
        self._check_whole()
        return stage_checkpoint.resume(self, directory, switch_policy=switch_policy)

    def export(self, path: str | Path, *, tokenizer: Any = None) -> None:
        """Write the whole model from rank 0; every rank calls it. See :func:`export.export`."""
        export_model(self, path, tokenizer=tokenizer)

    def _check_whole(self) -> None:
        if self._worker.broken:
            raise TelltaleError(
                f"this trainer stopped by an error after minibatch {self.minibatch} with others under way; expected a new "
                f"trainer on every rank (on NCCL: a new job, as torchrun --max-restarts starts it), resumed from a checkpoint."
            )

    def timeline(self, *, sizes: Sequence[StageSizes] | None = None) -> Timeline:
        """What all ranks did so far, on every rank; every rank calls it. Needs ``record=True``.

        ``sizes`` (see :func:`~telltale.train.pipeline.simulation.simulator.stage_costs`) adds the memory curve.
        """
        if self._worker.spans is None:
            raise PlanError("nothing was recorded; expected PipelineTrainer(..., record=True).")
        number, replica = self.plan.place(self.rank)
        own = [Event(self.rank, number, replica, kind, t, begin, end, v) for kind, t, v, begin, end in self.recorded()]
        return Timeline.from_events(chain.from_iterable(self.groups.all_gather_object(own)), self.plan, sizes=sizes)

    def recorded(self) -> list[tuple[str, int, int, float, float]]:
        """(kind, minibatch, version, start, end) of what this rank did, seconds from a common start; needs ``record=True``."""
        return [(s.kind, s.minibatch, s.version, s.start - self._origin, s.end - self._origin) for s in self.spans]


def _check_arguments(prefetch: int, timeout: float, grad_clip: float | None, reduction: str) -> None:
    check_integer("prefetch", prefetch, low=0)
    check_range("timeout", timeout, low=1.0)
    if grad_clip is not None:
        check_range("grad_clip", grad_clip, low=0.0)
    if reduction not in ("all_reduce", "ordered"):
        raise PlanError(f"reduction={reduction!r} is unknown; expected 'all_reduce' or 'ordered'.")


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
            stage_checkpoint.save(trainer, run.checkpoints_path, keep=keep)
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

    stage_checkpoint.on_all_ranks(trainer, refuse_old)
    stage_checkpoint.resume_newest(trainer, run.checkpoints_path, stop=stop)

    def forget_what_was_lost() -> None:
        if trainer.rank == 0 and run.metrics_path.exists():
            run.truncate_metrics(trainer.minibatch)

    stage_checkpoint.on_all_ranks(trainer, forget_what_was_lost)


def _log(trainer: PipelineTrainer, run: RunDir, span: list[float], seconds: float) -> None:
    def write() -> None:
        if trainer.rank == 0:
            run.path.mkdir(parents=True, exist_ok=True)
            mean = sum(span) / len(span)
            run.log({"step": trainer.minibatch, "loss": mean, "losses": span, "seconds": round(seconds, 3)})

    stage_checkpoint.on_all_ranks(trainer, write)
