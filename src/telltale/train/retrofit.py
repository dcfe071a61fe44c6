"""Draft exits for an ordinary checkpoint: the trunk stays as it is, what leads from an early exit to a draft is trained beside it.

The model writes texts behind the user's prompts, since acceptance counts on its own output. One pass of the frozen trunk over
them gives all that training needs: the states after the exits and the last layer, and the late layers' values. The exits' linear
maps are solved by least squares first; then all exits learn the last layer's distribution over the shortlist together. What is
trained, and why, is in :mod:`telltale.models.draft_exits`.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.config import check_integer, check_range, check_seed
from telltale.errors import CheckpointError, ConfigError, NumericalError
from telltale.models.decoder import Decoder
from telltale.models.draft_exits import (
    BIASES,
    MATRICES,
    NORMS,
    READS,
    STEPS,
    DraftExit,
    DraftExits,
    checkpoint_fingerprint,
    draft_states,
    rms_norm,
)
from telltale.models.draft_heads import check_head
from telltale.runs.files import JsonLines
from telltale.runs.progress import Interruption, interruptible
from telltale.runs.run_dir import RunDir
from telltale.train.loop import check_settings
from telltale.train.own_text import Prompts, TrunkStates, Written, collect, write

TOGETHER = 64
"""Prompts that the model carries on together."""
DEPTHS = 4
"""Draft steps that are trained and reported, those behind the third through its map."""
_RIDGE = 1e-3
"""Of the least squares, relative to the features' variance."""
_STATE_FILE = "retrofit.pt"
Progress = Callable[[str, int, int, str], None]
"""What is being done, how much of it is done, how much there is, and a note."""


@dataclass(frozen=True)
class RetrofitConfig:
    """How draft exits are made; the defaults take about half an hour on two cores for a model of 135M parameters."""

    exits: tuple[int, ...] | None = None
    """Early layers to draft from. None: the second, and the one at a sixth of the depth."""
    shortlist: int = 8192
    """Tokens that can be drafted."""
    texts: int = 768
    """Prompts that the model carries on; an eighth as many are held out for the report."""
    new_tokens: int = 128
    """Longest text behind a prompt, and longest prompt, in tokens."""
    temperature: float = 0.8
    """At which half of the texts are written; the others take the most likely tokens."""
    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 1024
    """Tokens a step."""
    learning_rate: float = 1e-3
    """The highest, behind a short warm-up; it falls along a cosine."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        for name, low in (("shortlist", 2), ("texts", 1), ("new_tokens", 8), ("steps", 0), ("batch_size", 4)):
            check_integer(name, getattr(self, name), low=low)
        if self.exits is not None and not (isinstance(self.exits, (tuple, list)) and self.exits):
            raise ConfigError(f"exits={self.exits!r}; expected layers in a list, such as [2, 5].")
        check_range("temperature", self.temperature, low=0.0)
        check_range("learning_rate", self.learning_rate, above=0.0)
        check_seed(self.seed)

    def exits_of(self, layers: int) -> tuple[int, ...]:
        """The exits for a model of so many layers. Raises :class:`~telltale.errors.ConfigError` for one that it does not have."""
        if layers < 2:
            raise ConfigError("the model has a single layer, so no layer can draft for it.")
        second = min(2, layers - 1)
        chosen = self.exits or (second, max(second, layers // 6))
        for one in chosen:
            check_integer("exits", one, low=1, high=layers - 1)
        return tuple(sorted(set(chosen)))

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, 0-based."""
        warm = min(1.0, (step + 1) / 20)
        return self.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps))))


@dataclass(frozen=True)
class ExitReport:
    """How often an exit's draft is the last layer's most likely token, by draft step, on held-out text that the model wrote;
    ``before``: of its first draft when it was read by the final norm and the whole head."""

    exit_layer: int
    before: float
    acceptance: list[float]


@dataclass(frozen=True)
class RetrofitResult:
    """What came of a retrofit. ``exits`` is None after an interruption; ``covered``: the held-out tokens' part on the shortlist."""

    finished: bool
    step: int
    exits: DraftExits | None
    reports: list[ExitReport]
    covered: float
    seconds: float


def late_layers_of(layers: int) -> tuple[int, ...]:
    """The layers whose values draft exits read: the last ones, further apart the earlier they are."""
    return tuple(sorted({max(0, layers - 1 - back) for back in (0, 1, 4, 8)}))


def untrained(decoder: Decoder, config: RetrofitConfig) -> DraftExits:
    """Draft exits of the right shape, all zeros, to measure what a draft costs."""
    check_head(decoder.parts.head)
    exits = {layer: DraftExit(layer, _zeros(decoder)) for layer in config.exits_of(decoder.layers)}
    count = min(config.shortlist, decoder.vocabulary_size)
    return DraftExits(exits, late_layers_of(decoder.layers), torch.arange(count), "", {})


def retrofit(
    decoder: Decoder,
    tokenizer: Any,
    prompts: Prompts,
    config: RetrofitConfig,
    *,
    checkpoint: str | Path,
    run_dir: str | Path,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> RetrofitResult:
    """Train draft exits for ``decoder``'s model, loaded from ``checkpoint``, on what it writes behind ``prompts``.

    Texts, metrics and checkpoints go to ``run_dir``; ``resume`` goes on with them. Ctrl-C saves and returns with
    ``finished=False``. The model's weights are only read. Raises :class:`~telltale.errors.DataError` for prompts that do not fit,
    :class:`~telltale.errors.CheckpointError` if ``run_dir`` holds a run and ``resume`` is false,
    :class:`~telltale.errors.ConfigError` for a run with other settings, :class:`~telltale.errors.UnsupportedModelError` for a model
    without a plain head, and :class:`~telltale.errors.NumericalError` if the loss is not finite.
    """
    check_head(decoder.parts.head)
    exits = config.exits_of(decoder.layers)
    if 2 * config.new_tokens > decoder.max_positions:
        raise ConfigError(
            f"new_tokens={config.new_tokens}: a prompt and the text behind it make up to {2 * config.new_tokens} positions; the "
            f"model has {decoder.max_positions}."
        )
    settings = {
        "retrofit": asdict(config) | {"exits": list(exits)},
        "on": {
            "weights": checkpoint_fingerprint(checkpoint),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "texts": prompts.names,
            "read": prompts.digest,
        },
    }
    run = _opened(Path(run_dir), settings, resume=resume)
    began = time.perf_counter()
    with run.alone(), interruptible() as interruption:
        job = _Job(decoder, config, exits, run, progress, interruption)
        step = job.run(prompts, tokenizer)
    if step < config.steps or job.interrupted:
        return RetrofitResult(False, step, None, [], 0.0, time.perf_counter() - began)
    reports, covered = job.reports, job.covered
    report = {"exits": [asdict(one) for one in reports], "shortlist_covers": covered, "texts": config.texts}
    made = {
        layer: DraftExit(layer, {name: one.detach() for name, one in job.weights[layer].items()}) for layer in exits
    }
    found = DraftExits(made, job.late, job.shortlist, settings["on"]["weights"], report)
    return RetrofitResult(True, step, found, reports, covered, time.perf_counter() - began)


def _opened(path: Path, settings: dict[str, Any], *, resume: bool) -> RunDir:
    if not (resume and (path / "config.yaml").exists()):
        return RunDir.create(path, settings)
    run = RunDir.open(path)
    check_settings(run, settings)
    return run


class _Job:
    """One retrofit's moving parts."""

    def __init__(
        self,
        decoder: Decoder,
        config: RetrofitConfig,
        exits: tuple[int, ...],
        run: RunDir,
        progress: Progress,
        interruption: Interruption,
    ) -> None:
        self.decoder, self.config, self.exits, self.run_dir = decoder, config, exits, run
        self.progress, self.interruption = progress, interruption
        self.late = late_layers_of(decoder.layers)
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.shortlist = torch.empty(0, dtype=torch.int64)
        self.head = torch.empty(0)
        self.bias: Tensor | None = None
        self.reports: list[ExitReport] = []
        self.covered = 0.0
        self.states: TrunkStates
        self.held_out: TrunkStates

    @property
    def interrupted(self) -> bool:
        """Whether the user asked to stop before there was a report."""
        return not self.reports

    def run(self, prompts: Prompts, tokenizer: Any) -> int:
        """Texts, states, least squares, training, report; the last finished step."""
        config = self.config
        texts = self._texts("texts", prompts, tokenizer, config.texts, held_out=False)
        held_out = self._texts("held_out", prompts, tokenizer, max(1, config.texts // 8), held_out=True)
        if texts is None or held_out is None:
            return 0
        self.shortlist = self._shortlist(texts)
        head = self.decoder.parts.head
        self.head = head.weight.detach()[self.shortlist]
        self.bias = None if head.bias is None else head.bias.detach()[self.shortlist]
        read = partial(collect, self.decoder, exits=self.exits, late_layers=self.late, report=self._reading)
        with (
            read(texts, path=self.run_dir.path / "states.bin") as self.states,
            read(held_out, path=self.run_dir.path / "held_out.bin") as self.held_out,
        ):
            if self.interruption.requested:
                return 0
            step = self._train()
            if step == config.steps:
                self.reports, self.covered = self._report()
            return step

    def _report(self) -> tuple[list[ExitReport], float]:
        """Of each exit what it is worth on the held-out texts, and the part of their tokens that the shortlist has."""
        states, decoder = self.held_out, self.decoder
        rows = states.written.nonzero().view(-1)
        last = torch.cat([decoder.greedy(part) for part in states.last(rows).split(TOGETHER)])
        reports = []
        for layer in self.exits:
            before = torch.cat([decoder.greedy(part) for part in states.exit(layer, rows).split(TOGETHER)])
            acceptance = []
            for step in range(DEPTHS):
                drafts = []
                for part in rows.split(4 * TOGETHER):
                    with torch.no_grad():
                        drafts.append(self.shortlist[self._logits(layer, states, part, step).argmax(-1).cpu()])
                acceptance.append(float((torch.cat(drafts) == last.cpu()).float().mean()))
            reports.append(ExitReport(layer, float((before == last).float().mean()), acceptance))
        return reports, float(torch.isin(last.cpu(), self.shortlist).float().mean())

    def _texts(
        self, name: str, prompts: Prompts, tokenizer: Any, count: int, *, held_out: bool
    ) -> list[Written] | None:
        """The model's texts, read from the run's file as far as they are there; None if it was interrupted."""
        lines = JsonLines(self.run_dir.path / f"{name}.jsonl")
        found = [Written(**line) for line in lines]
        # Prompts that are carried on together share the random numbers: of those that a kill cut short nothing is kept.
        if len(found) < count and len(found) % TOGETHER:
            found = found[: len(found) // TOGETHER * TOGETHER]
            lines.replace(asdict(one) for one in found)
        config = self.config
        drawn = prompts.draw(count, held_out=held_out)
        ends, stage = _end_tokens(self.decoder, tokenizer), f"writing {name.replace('_', '-')}"
        while len(found) < count:
            seed = (2 * len(found) + held_out + 0x9E3779B1 * config.seed) & 0xFFFFFFFF
            generator = torch.Generator().manual_seed(seed)
            part = drawn[len(found) : len(found) + TOGETHER]
            heat = [0.0 if held_out or place % 2 else config.temperature for place in range(len(part))]
            made = write(
                self.decoder,
                part,
                new_tokens=config.new_tokens,
                temperatures=heat,
                end_tokens=ends,
                generator=generator,
                report=partial(self._writing, stage, len(found), count),
            )
            if made is None:
                return None
            lines.append(*(asdict(one) for one in made))
            found += made
        self.progress(stage, count, count, "")
        return found[:count]

    def _shortlist(self, texts: Sequence[Written]) -> Tensor:
        """The tokens that stand in the texts most often; among equals, those that a BPE tokenizer learnt first."""
        size = self.decoder.vocabulary_size
        counts = torch.bincount(torch.tensor([token for one in texts for token in one.tokens]), minlength=size)[:size]
        score = counts.double() + 1.0 / (torch.arange(size) + 2)
        return score.topk(min(self.config.shortlist, size)).indices.sort().values

    def _writing(self, stage: str, done: int, total: int, tokens: int) -> bool:
        """Report how far the texts that are being written have come; whether to go on."""
        self.progress(stage, done, total, f"token {tokens} behind each of the next {min(TOGETHER, total - done)}")
        return not self.interruption.requested

    def _reading(self, done: int, total: int) -> bool:
        """Report how many texts the trunk has read; whether to go on."""
        self.progress("reading the texts", done, total, "")
        return not self.interruption.requested

    def _autocast(self) -> torch.autocast:
        device, low = self.decoder.device.type, self.decoder.dtype == torch.bfloat16
        return torch.autocast(device, dtype=torch.bfloat16, enabled=low)

    def _train(self) -> int:
        config = self.config
        self.weights = {layer: _zeros(self.decoder) for layer in self.exits}
        every = [weight for layer in self.exits for weight in self.weights[layer].values()]
        matrices, vectors = [one for one in every if one.ndim > 1], [one for one in every if one.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
        start = self._restored(optimizer)
        if start == 0:
            for layer in self.exits:
                self.progress("least squares", self.exits.index(layer), len(self.exits), "")
                self._solve(layer)
        for one in every:
            one.requires_grad_(True)
        self.run_dir.truncate_metrics(start)
        step = start
        while step < config.steps and not self.interruption.requested:
            losses = self._step(step, optimizer)
            step += 1
            if step % 20 == 0 or step == config.steps:
                self.run_dir.log({"step": step, "losses": losses})
                note = "  ".join(f"exit {layer}: {loss:.3f}" for layer, loss in losses.items())
                self.progress("training", step, config.steps, note)
            if step % 200 == 0 and step < config.steps:
                self._save(step, optimizer)
        if step > start:
            self._save(step, optimizer)
        return step

    def _logits(self, layer: int, states: TrunkStates, rows: Tensor, step: int) -> Tensor:
        """The shortlist's logits (n, tokens), float32, of tokens drafted in ``step``."""
        with self._autocast():
            given = states.exit(layer, rows).float(), states.values(rows, step).float()
            normed = draft_states(self.weights[layer], *given, step)
            return functional.linear(normed.to(self.head.dtype), self.head, self.bias).float()

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[int, float]:
        """One update of all exits; each exit's cross-entropy to the last layer's distribution over the shortlist, in nats."""
        config, states = self.config, self.states
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        generator = torch.Generator().manual_seed((step + 0x9E3779B1 * config.seed) & 0xFFFFFFFF)
        rows = torch.randint(states.tokens, (config.batch_size,), generator=generator)
        with torch.no_grad(), self._autocast():
            normed = self.decoder.parts.norm(states.last(rows))
            wanted = functional.linear(normed, self.head, self.bias).float().softmax(-1)
        losses = {}
        for layer in self.exits:
            logits = [self._logits(layer, states, part, depth) for depth, part in enumerate(rows.chunk(DEPTHS))]
            loss = functional.cross_entropy(torch.cat(logits), wanted)
            loss.backward()
            losses[layer] = float(loss.detach())
            if not math.isfinite(losses[layer]):
                raise NumericalError(
                    f"the loss of exit {layer} is {losses[layer]} at step {step}; expected a finite number. Lower learning_rate "
                    f"({config.learning_rate})."
                )
            nn.utils.clip_grad_norm_(list(self.weights[layer].values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses

    @torch.no_grad()
    def _solve(self, layer: int) -> None:
        """The linear maps by least squares: from state and late values to what the last layer's head reads."""
        states, weights = self.states, self.weights[layer]
        hidden, size = self.decoder.hidden_size, weights[READS[0]].shape[1]
        spread = states.values(torch.arange(min(states.tokens, 4096)), 0).float().std(0).clamp(min=1e-4)
        total = hidden + STEPS * (size + 1)
        device = self.decoder.device
        gram, right = torch.zeros(total, total, device=device), torch.zeros(total, hidden, device=device)
        power, count = torch.zeros(hidden, device=device), 0
        for rows in torch.arange(states.tokens).split(2048):
            state = rms_norm(states.exit(layer, rows).float(), weights["state_norm"])
            target = self.decoder.parts.norm(states.last(rows)).float()
            power += target.square().sum(0)
            count += len(rows)
            for step in range(STEPS):
                values = states.values(rows, step).float() / spread
                late = torch.cat([values, torch.ones(len(rows), 1, device=device)], 1)
                first = hidden + step * (size + 1)
                features = ((slice(hidden), state), (slice(first, first + size + 1), late))
                for at, one in features:
                    right[at] += one.T @ target
                    for beside, other in features:
                        gram[at, beside] += one.T @ other
        scale = (power / count).sqrt().clamp(min=1e-6)
        gram.diagonal().add_(_RIDGE * STEPS * count)
        solved = torch.linalg.solve(gram, right / scale)
        weights["state"].copy_(solved[:hidden].T)
        for step in range(STEPS):
            first = hidden + step * (size + 1)
            weights[READS[step]].copy_((solved[first : first + size] / spread.unsqueeze(1)).T)
            weights[BIASES[step]].copy_(solved[first + size])
        weights["norm"].copy_(scale)
        generator = torch.Generator().manual_seed(self.config.seed)
        for name in ("gate", "up"):
            weights[name].copy_(torch.randn(weights[name].shape, generator=generator) / hidden**0.5)

    def _save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        state = {"step": step, "weights": self.weights, "optimizer": optimizer.state_dict()}
        self.run_dir.save_checkpoint(step, lambda folder: torch.save(state, folder / _STATE_FILE))

    def _restored(self, optimizer: torch.optim.Optimizer) -> int:
        """The step of the newest checkpoint, which is loaded; 0 if there is none."""
        found = self.run_dir.latest_checkpoint()
        if found is None:
            return 0
        step, folder = found
        try:
            state = torch.load(folder / _STATE_FILE, weights_only=True, map_location=self.decoder.device)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{folder} cannot be read: {error}. Delete it to resume from the one before."
            ) from error
        with torch.no_grad():
            for layer, own in self.weights.items():
                for name, weight in own.items():
                    weight.copy_(state["weights"][layer][name])
        optimizer.load_state_dict(state["optimizer"])
        return step


def _zeros(decoder: Decoder) -> dict[str, Tensor]:
    """Weights of one exit, norms of ones."""
    hidden, late = decoder.hidden_size, len(late_layers_of(decoder.layers)) * decoder.kv_heads * decoder.head_dim
    width = 2 * hidden
    shapes = {"state": (hidden, hidden), "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    shapes |= dict.fromkeys(READS, (hidden, late))
    found = {name: torch.zeros(shapes[name], device=decoder.device) for name in MATRICES}
    found |= {name: torch.zeros(hidden, device=decoder.device) for name in BIASES}
    return found | {name: torch.ones(hidden, device=decoder.device) for name in NORMS}


def _end_tokens(decoder: Decoder, tokenizer: Any) -> list[int]:
    """Tokens behind which the model's text is over."""
    generation = getattr(decoder.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
