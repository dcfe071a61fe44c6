"""The plain training loop: a causal LM, a token corpus, a run directory. Other methods plug in as recipe or callback.

Batches are a function of (seed, step), so that a resumed run sees exactly what an uninterrupted one would have seen and
its loss curve is the same to the last bit. Past one process it runs under ``torchrun`` with DistributedDataParallel.
Sharded training, mixed datasets and schedulers beyond cosine are out of scope.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from telltale.errors import ConfigError, DataError, NumericalError
from telltale.models.exits import ExitQuality, exit_quality
from telltale.models.families import unwrap
from telltale.runs.progress import interruptible
from telltale.runs.run_dir import RunDir
from telltale.train import checkpoint
from telltale.train.layerskip import LayerSkip, LayerSkipConfig, apply
from telltale.train.run_config import TrainConfig


class Corpus(Protocol):
    """What the loop trains on: two 1-D integer token tensors."""

    @property
    def train(self) -> Tensor: ...

    @property
    def held_out(self) -> Tensor: ...


@dataclass
class StepState:
    """What a callback sees. ``loss`` in nats per token; ``step`` counts finished optimizer steps."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: float
    learning_rate: float
    batch: Tensor


class Callback:
    """Base of what plugs into the loop; override what is needed. Callbacks must not change weights or random state."""

    def on_step_end(self, state: StepState) -> None:
        """After each optimizer step."""

    def on_evaluate(self, step: int, quality: ExitQuality) -> None:
        """After each held-out evaluation."""

    def on_end(self, result: TrainResult) -> None:
        """Once, when the run is over or was interrupted."""

    def on_abort(self) -> None:
        """Once, when the run ends in an exception."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. ``finished`` is false after an interruption; ``model_path`` is None then."""

    step: int
    finished: bool
    run_path: Path
    model_path: Path | None
    quality: ExitQuality | None
    seconds: float


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    *,
    run_dir: str | Path,
    layerskip: LayerSkipConfig | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train ``model`` (fresh or loaded) on ``corpus`` and leave a Hugging Face checkpoint in ``run_dir/model``.

    ``layerskip`` None trains plainly, on the last layer's loss. ``resume`` goes on from the newest checkpoint of
    ``run_dir``, or starts if there is none. Ctrl-C saves a checkpoint and returns with ``finished=False``.

    Raises :class:`~telltale.errors.DataError` if the corpus is shorter than one sequence,
    :class:`~telltale.errors.CheckpointError` if ``run_dir`` holds a run and ``resume`` is false, or cannot be written,
    :class:`~telltale.errors.ConfigError` if a resumed run was started with other settings, and
    :class:`~telltale.errors.NumericalError` naming the step if the loss is not finite.
    """
    ranks = Ranks.join(config)
    check_corpus(corpus, config)
    recipe_config = layerskip and dataclasses.replace(layerskip, total_steps=layerskip.total_steps or config.steps)
    settings = {
        "train": config.to_dict(),
        "layerskip": recipe_config.to_dict() if recipe_config else None,
        "on": identity(model, corpus),
    }
    run = _open_run(Path(run_dir), settings, resume=resume, ranks=ranks)
    with run.alone() if ranks.main else nullcontext():
        optimizer = _optimizer(model, config)
        start = checkpoint.restore(run, model, optimizer) if resume else 0
        run.truncate_metrics(start) if ranks.main else None
        recipe = apply(model, recipe_config or LayerSkipConfig(p_max=0.0, e_scale=0.0, curriculum="none"))
        began = time.perf_counter()
        try:
            with _training_mode(model, config), interruptible() as interruption:
                loop = _Loop(model, recipe, corpus, config, run, optimizer, ranks, tuple(callbacks))
                step = start
                while step < config.steps and not ranks.any(interruption.requested):
                    loop.step(step)
                    step += 1
                    if step % config.checkpoint_every == 0 and step < config.steps:
                        loop.save(step, tokenizer)
                finished = step >= config.steps
                if not finished and step > start:
                    loop.save(step, tokenizer)
        except BaseException:
            for callback in callbacks:
                callback.on_abort()
            raise
        finally:
            recipe.remove()
        if finished and ranks.main:
            checkpoint.export(run.path / "model", model, tokenizer)
        ranks.wait()
        result = TrainResult(
            step,
            finished,
            run.path,
            run.path / "model" if finished else None,
            loop.quality,
            time.perf_counter() - began,
        )
        for callback in callbacks:
            callback.on_end(result)
        return result


def batch_at(tokens: Tensor, config: TrainConfig, step: int) -> Tensor:
    """The batch of optimizer step ``step``: (batch_size, sequence_length + 1) windows of ``tokens``, drawn from the seed."""
    seed = config.seed if config.data_seed is None else config.data_seed
    # The CPU generator takes 32 bits of its seed: an odd factor spreads the seeds over them.
    generator = torch.Generator().manual_seed((step + 0x9E3779B1 * seed) & 0xFFFFFFFF)
    room = tokens.numel() - config.sequence_length
    starts = torch.randint(room, (config.batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(config.sequence_length + 1)].long()


def held_out_batches(tokens: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """The first ``evaluation_tokens`` held-out tokens as (rows, sequence_length + 1) batches, without overlap."""
    width = min(config.sequence_length + 1, tokens.numel())
    rows = min(tokens.numel() // width, max(1, config.evaluation_tokens // width))
    yield from tokens[: rows * width].view(rows, width).long().split(config.batch_size)


class _Loop:
    """One run's moving parts; ``step`` is one optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        recipe: LayerSkip,
        corpus: Corpus,
        config: TrainConfig,
        run: RunDir,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        callbacks: tuple[Callback, ...],
    ) -> None:
        self.model, self.recipe, self.corpus, self.config = model, recipe, corpus, config
        self.run, self.optimizer, self.ranks, self.callbacks = run, optimizer, ranks, callbacks
        self.forward = ranks.wrap(recipe)
        self.device = next(model.parameters()).device
        self.quality: ExitQuality | None = None
        self.seconds = time.perf_counter()

    def step(self, step: int) -> None:
        config = self.config
        self.recipe.set_step(step)
        rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch_at(self.corpus.train, config, step)
        loss, details = self._accumulate(self.ranks.share(batch).to(self.device))
        value = self.ranks.mean(loss)
        if not math.isfinite(value):
            raise NumericalError(
                f"the training loss is {value} at step {step}; expected a finite number. Lower learning_rate "
                f"({config.learning_rate}) or resume from the last checkpoint with another seed."
            )
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._report(step + 1, value, rate, details)
        for callback in self.callbacks:
            callback.on_step_end(StepState(step + 1, self.model, self.optimizer, value, rate, batch))

    def _accumulate(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        config = self.config
        total = torch.zeros((), device=self.device)
        details: dict[str, Any] = {}
        for index, part in enumerate(batch.chunk(config.gradient_accumulation)):
            last = index == config.gradient_accumulation - 1
            with self.ranks.reduction(self.forward, enabled=last), self._autocast():
                loss, details = self.forward(part)
            (loss / config.gradient_accumulation).backward()
            total += loss.detach() / config.gradient_accumulation
        return total, details

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _report(self, step: int, loss: float, rate: float, details: dict[str, Any]) -> None:
        config = self.config
        if not self.ranks.main:
            return
        if step % config.log_every == 0 or step == config.steps or step == 1:
            now = time.perf_counter()
            exits = {str(exit_layer): float(value) for exit_layer, value in details["exit_losses"].items()}
            tokens_per_second = config.log_every * config.batch_size * config.sequence_length / (now - self.seconds)
            self.seconds = now
            record = {"step": step, "loss": loss, "learning_rate": rate, "exit_losses": exits}
            self.run.log(record | {"tokens_per_second": round(tokens_per_second)})
        if step % config.evaluate_every == 0 or step == config.steps:
            with self._autocast():
                batches = (batch.to(self.device) for batch in held_out_batches(self.corpus.held_out, config))
                self.quality = exit_quality(self.model, batches)
            evaluation = {"losses": self.quality.losses, "agreement": self.quality.agreement}
            self.run.log({"step": step, "held_out": evaluation})
            for callback in self.callbacks:
                callback.on_evaluate(step, self.quality)

    def save(self, step: int, tokenizer: Any) -> None:
        if self.ranks.main:
            checkpoint.save(self.run, step, self.model, self.optimizer, tokenizer)
        self.ranks.wait()


def check_corpus(corpus: Corpus, config: TrainConfig) -> None:
    """Raise :class:`~telltale.errors.DataError` if ``corpus`` is too short for one batch or one evaluation."""
    for name, tokens, needed in (
        ("train", corpus.train, config.sequence_length + 1),
        ("held_out", corpus.held_out, 2),
    ):
        if tokens.numel() < needed:
            raise DataError(f"the corpus's {name} part has {tokens.numel()} tokens; expected at least {needed}.")


def identity(model: nn.Module, corpus: Corpus) -> dict[str, Any]:
    """What a resumed run must find again: the same text and a model of the same shape."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in unwrap(model).named_parameters()]
    digest = hashlib.sha256(repr((shapes, corpus.train.numel(), corpus.held_out.numel())).encode())
    digest.update(corpus.train.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return {"model_and_text": digest.hexdigest()[:16], "text": str(getattr(corpus, "source", "")) or None}


def _open_run(path: Path, settings: dict[str, Any], *, resume: bool, ranks: Ranks) -> RunDir:
    if not (resume and (path / "config.yaml").exists()):
        if ranks.main:
            RunDir.create(path, settings)
        ranks.wait()
        return RunDir.open(path)
    run = RunDir.open(path)
    check_settings(run, settings)
    return run


def check_settings(run: RunDir, settings: dict[str, Any]) -> None:
    """Raise :class:`~telltale.errors.ConfigError` naming the first field in which ``settings`` differ from the run's own."""
    started = run.config()
    for section, values in settings.items():
        before = started.get(section) or {}
        for key in sorted(set(values or {}) | set(before)):
            if (values or {}).get(key) != before.get(key):
                raise ConfigError(
                    f"{section}.{key}={(values or {}).get(key)!r} differs from the {before.get(key)!r} that {run.path} was "
                    f"started with; resume with the same settings or give another run directory."
                )


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig, *, learning_rate: float) -> torch.optim.Optimizer:
    """The loop's optimizer on ``parameters``; weight decay leaves out vectors (norms, biases)."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, fused=True)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    return adamw(model.parameters(), config, learning_rate=config.learning_rate)


@contextmanager
def _training_mode(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Train mode and activation checkpointing inside the block; as it was before afterwards."""
    was_training = model.training
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if config.activation_checkpointing and not checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    try:
        yield
    finally:
        if config.activation_checkpointing and not checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        model.train(was_training)


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``world`` processes. Rank 0 (``main``) writes files."""

    rank: int
    world: int

    @classmethod
    def join(cls, config: TrainConfig) -> Ranks:
        """Join the job that ``torchrun`` describes in the environment; alone without one.

        Raises :class:`~telltale.errors.ConfigError` if the batch cannot be shared out evenly.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(0, 1)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        share = config.batch_size // config.gradient_accumulation
        if share % world:
            raise ConfigError(
                f"batch_size={config.batch_size} over gradient_accumulation={config.gradient_accumulation} cannot be "
                f"shared by {world} processes; expected a multiple of {world * config.gradient_accumulation}."
            )
        return cls(dist.get_rank(), world)

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradient averaging over the ranks."""
        return module if self.world == 1 else DistributedDataParallel(module)

    def reduction(self, module: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Gradients are averaged in the backward of the forward run in this block only if ``enabled``."""
        if enabled or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return module.no_sync()

    def share(self, batch: Tensor) -> Tensor:
        """This rank's rows of the whole batch (rows, length)."""
        return batch if self.world == 1 else batch.chunk(self.world)[self.rank]

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the ranks."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.world
        return float(value)

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag: an interruption stops all of them after the same step."""
        if self.world == 1:
            return flag
        count = torch.tensor(float(flag))
        dist.all_reduce(count)
        return bool(count.item() > 0)

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()
