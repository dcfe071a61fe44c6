"""What the specguard commands open: the pair of models, the problems with their labeler, and progress that Ctrl-C can stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from telltale.configuration import check_choice, check_integer, parse_overrides
from telltale.errors import ConfigError, DataError
from telltale.runs.interrupt import Interruption, interruptible
from telltale.runs.progress import ProgressBar

if TYPE_CHECKING:
    from telltale.decode.step_verified import StepVerified
    from telltale.decode.step_verified.trials.labelers import AnyLabeler

TASKS = ("chains", "gsm8k")
LABELERS = ("checker", "rollouts", "agreement")
LONGEST_OUTPUT = 512
INSTRUCTION = (
    "Solve the problem step by step, each step in a paragraph of its own. Write every calculation as <<48/2=24>>24. End with a "
    "last paragraph that is #### and the answer, a number."
)
"""Put behind a question of gsm8k for a model with a chat template."""


@dataclass
class Opened:
    """Models under a configuration, problems, and who labels their steps."""

    guard: StepVerified
    problems: Sequence[Any]
    labeler: AnyLabeler
    encode: Callable[[Any, Any], list[int]]
    max_new_tokens: int


def open_models(
    target: Path,
    draft: Path | None,
    exit_layer: int | None,
    *,
    options: dict[str, Any],
    overrides: list[str] | None,
    dtype: str | None,
    backend: str,
) -> StepVerified:
    """The pair of models. ``options`` that are None are left to the configuration's defaults; ``overrides`` come last.

    Raises :class:`~telltale.errors.ConfigError` unless exactly one of ``draft`` and ``exit_layer`` is given, and
    :class:`~telltale.errors.DataError` for a draft with another vocabulary.
    """
    from telltale.configuration import from_mapping
    from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
    from telltale.models.loading import load, load_draft

    if (draft is None) == (exit_layer is None):
        raise ConfigError("expected either --draft, or --exit-layer to have the target's first layers draft.")
    values = {name: value for name, value in options.items() if value is not None} | parse_overrides(overrides or ())
    config = from_mapping(StepVerifiedConfig, values | {"exit_layer": exit_layer})
    model, tokenizer = load(target, dtype=dtype)
    drafting = None if draft is None else load_draft(draft, tokenizer, dtype=dtype)
    return StepVerified(model, drafting, tokenizer, config, backend=backend)


def open_task(
    guard: StepVerified,
    *,
    task: str | None,
    data: Path | None,
    count: int | None,
    labeler: str,
    rollouts: int,
    shots: int | None,
    max_new_tokens: int | None,
    sampling: dict[str, Any],
    seed: int,
) -> Opened:
    """The problems and their labeler. Raises :class:`~telltale.errors.TelltaleError` for what does not fit together."""
    from telltale.decode.step_verified.trials.labelers import AgreementLabeler, RolloutLabeler

    task = task or ("chains" if data is None else "gsm8k")
    check_choice("task", task, TASKS)
    check_choice("labeler", labeler, LABELERS)
    if count is not None:
        check_integer("problems", count, low=1)
    problems, checker, encode = (_chains if task == "chains" else _gsm8k)(data, count, seed, shots)
    longest = max(len(encode(guard.tokenizer, problem)) for problem in problems)
    sides = [side for side in (guard.target, guard.draft) if side is not None]
    room = min(side.max_positions for side in sides) - longest
    if room < 1:
        raise DataError(f"the longest prompt has {longest} tokens, which leaves no room for an answer.")
    limit = min(LONGEST_OUTPUT, room) if max_new_tokens is None else max_new_tokens
    found: AnyLabeler = checker
    if labeler == "agreement":
        found = AgreementLabeler(
            guard.target,
            guard.tokenizer,
            answer_right=checker.answer_right,
            max_step_tokens=guard.config.max_step_tokens,
            delimiter=guard.config.delimiter,
        )
    elif labeler == "rollouts":
        found = RolloutLabeler(
            guard.target,
            guard.tokenizer,
            checker.answer_right,
            rollouts=rollouts,
            max_new_tokens=limit,
            seed=seed,
            delimiter=guard.config.delimiter,
            **sampling,
        )
    return Opened(guard, problems, found, encode, limit)


def _chains(data: Path | None, count: int | None, seed: int, shots: int | None) -> tuple[Sequence[Any], Any, Any]:
    from telltale.decode.step_verified.trials.running import prompt_ids
    from telltale.tasks import chains
    from telltale.tasks.chain_checker import ChainLabeler

    if data is not None:
        raise ConfigError("--data was given with --task chains, which makes its problems from --seed; leave it out.")
    if shots is not None:
        raise ConfigError("--shots is for --task gsm8k; leave it out.")
    return chains.generate(count or 300, seed=seed), ChainLabeler(), prompt_ids


def _gsm8k(data: Path | None, count: int | None, seed: int, shots: int | None) -> tuple[Sequence[Any], Any, Any]:
    from telltale.tasks import gsm8k
    from telltale.tasks.gsm8k_checker import Gsm8kLabeler

    if data is None:
        raise ConfigError("--task gsm8k needs --data, a local file such as test.jsonl of openai/grade-school-math.")
    problems = gsm8k.read(data)
    check_integer("shots", 0 if shots is None else shots, low=0)

    def encode(tokenizer: Any, problem: Any) -> list[int]:
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": f"{problem.question}\n\n{INSTRUCTION}"}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(gsm8k.few_shot_prompt(problem, examples))["input_ids"])

    # A model without a chat template learns the form from worked examples, which are then no problems.
    number = 4 if shots is None else shots
    examples = problems[:number]
    rest = problems[number:][: count or None]
    if not rest:
        raise DataError(f"{data} has {len(problems)} problems, of which {number} are examples; expected more.")
    return rest, Gsm8kLabeler(), encode


class Stages:
    """A progress bar for each stage of a job. ``tell`` raises KeyboardInterrupt once the user has asked to stop."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self._stage = ""
        self._bar: ProgressBar | None = None
        self._done = 0

    def tell(self, stage: str, done: int, of: int) -> None:
        """``done`` of a stage's problems are finished."""
        if stage != self._stage or self._bar is None or done < self._done:
            self._close()
            self._stage, self._bar = stage, ProgressBar(stage, of, unit="problem").__enter__()
        self._done = done
        self._bar.update(done)
        if self._interruption.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


@contextmanager
def stoppable() -> Iterator[Stages]:
    """Progress in the block; Ctrl-C ends it after the batch under way, which is kept."""
    from telltale.cli import INTERRUPTED

    with interruptible() as interruption, Stages(interruption) as stages:
        try:
            yield stages
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
