"""Traces of several teachers for the same prompts: read, judged by the verifier of the rollouts, and counted.

Two files: ``prompts.jsonl`` has ``id``, ``prompt`` (text) or ``messages``, ``answer`` and whatever else the verifier reads;
``teachers.jsonl`` has ``prompt_id``, ``teacher``, ``text`` and, if the teacher recorded them, ``log_probs`` of its tokens. A prompt
may have any number of traces, or none. No trace is taken for correct because a teacher wrote it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telltale.align.oger.verification import Verifier, checked_verifier, judge_texts, text_of
from telltale.config import check_choice
from telltale.errors import DataError, MissingExtraError
from telltale.models.conversations import read_messages

ON_INCORRECT = ("drop", "keep", "raise")
RESERVED = ("prompts", "completions", "completion_ids", "completion", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Prompt:
    """One row of ``prompts.jsonl``: ``prompt`` is a text or a list of messages; ``columns`` is the rest."""

    id: str
    prompt: Any
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """One teacher's solution with the verifier's reward of it."""

    prompt_id: str
    teacher: str
    text: str
    reward: float
    log_probs: tuple[float, ...] | None = None


@dataclass
class TeacherCounts:
    """What became of one teacher's rows; ``dropped`` counts by reason."""

    given: int = 0
    correct: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class TeacherStore:
    """Prompts and the traces that passed, in the order of the files.

    Made by :meth:`from_jsonl`, :meth:`from_rows` or :meth:`from_datasets`. ``counts`` says per teacher what was given, correct,
    kept and dropped. ``cache``: a file that keeps embeddings between runs (None: they live as long as the process).
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        traces: Sequence[Trace],
        counts: Mapping[str, TeacherCounts],
        *,
        verifier: Verifier,
        cache: str | Path | None = None,
    ) -> None:
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.counts = dict(counts)
        self.verifier = verifier
        self.cache = None if cache is None else Path(cache)
        self._traces: dict[str, list[Trace]] = {}
        for trace in traces:
            self._traces.setdefault(trace.prompt_id, []).append(trace)

    @classmethod
    def from_jsonl(
        cls,
        prompts: str | Path,
        teachers: str | Path,
        *,
        verifier: Verifier,
        on_incorrect: str = "drop",
        cache: str | Path | None = None,
    ) -> TeacherStore:
        """Read and judge two JSON-lines files (fields: this module's head).

        on_incorrect: "drop" a trace that the verifier does not reward, "keep" it with its own reward (never 1), or "raise".
        Raises :class:`~telltale.errors.DataError` with file and line for what cannot be read.
        """
        check_choice("on_incorrect", on_incorrect, ON_INCORRECT)
        options: dict[str, Any] = {"verifier": checked_verifier(verifier), "on_incorrect": on_incorrect, "cache": cache}
        return cls.from_rows(_read_lines(prompts), _read_lines(teachers), **options)

    @classmethod
    def from_datasets(cls, prompts: Any, teachers: Any, **options: Any) -> TeacherStore:
        """As :meth:`from_jsonl`, from two ``datasets.Dataset`` with those columns."""
        named = [
            [(f"row {index} of the {name}", dict(row)) for index, row in enumerate(rows)]
            for name, rows in (("prompts", prompts), ("teachers", teachers))
        ]
        return cls.from_rows(*named, **options)

    @classmethod
    def from_rows(
        cls,
        prompts: Iterable[tuple[str, Mapping[str, Any]]],
        teachers: Iterable[tuple[str, Mapping[str, Any]]],
        *,
        verifier: Verifier,
        on_incorrect: str = "drop",
        cache: str | Path | None = None,
    ) -> TeacherStore:
        """As :meth:`from_jsonl`, from (where, row) pairs; ``where`` names the row in errors."""
        check_choice("on_incorrect", on_incorrect, ON_INCORRECT)
        verifier = checked_verifier(verifier)
        known = _prompts(prompts)
        rows = [_teacher_row(where, row) for where, row in teachers]
        matching = [(where, row) for where, row in rows if row.prompt_id in known]
        if rows and not matching:
            raise DataError(
                f"no teacher's prompt_id is the id of a prompt; {rows[0][0]} has {rows[0][1].prompt_id!r}, the first prompt is "
                f"{next(iter(known), None)!r}."
            )
        rewards = _rewards(verifier, known, [row for _, row in matching])
        counts: dict[str, TeacherCounts] = {}
        for _, row in rows:
            counts.setdefault(row.teacher, TeacherCounts()).given += 1
            if row.prompt_id not in known:
                counts[row.teacher].dropped["unknown prompt"] += 1
        kept, seen = [], set()
        for (where, row), reward in zip(matching, rewards, strict=True):
            count = counts[row.teacher]
            correct = reward > 0  # false for NaN
            count.correct += correct
            key = (row.prompt_id, row.teacher, row.text)
            reason = _reason(correct, reward, on_incorrect, repeated=key in seen)
            if reason == "incorrect" and on_incorrect == "raise":
                raise DataError(
                    f"{where}: the verifier gives the trace of teacher {row.teacher!r} the reward {reward}; expected one above 0. "
                    f"on_incorrect='drop' leaves such traces out."
                )
            seen.add(key)
            if reason is None:
                count.kept += 1
                kept.append(Trace(row.prompt_id, row.teacher, row.text, reward, row.log_probs))
            else:
                count.dropped[reason] += 1
        return cls(list(known.values()), kept, counts, verifier=verifier, cache=cache)

    def traces(self, prompt_id: str | None = None) -> list[Trace]:
        """The traces of one prompt (an empty list if it has none), or all of them."""
        if prompt_id is not None:
            return list(self._traces.get(prompt_id, ()))
        return [trace for traces in self._traces.values() for trace in traces]

    def check_prompt(self, prompt_id: str, prompt: Any) -> None:
        """Raise :class:`~telltale.errors.DataError` if the store's prompt of this id is another one than ``prompt``.

        Its traces would stand in a group that answers something else. An id that is not in the store has no traces.
        """
        own = self.prompts.get(prompt_id)
        if own is not None and _turns(own.prompt) != _turns(prompt):
            raise DataError(
                f"the training data's prompt with the id {prompt_id!r} is not the teacher store's; it begins "
                f"{text_of(prompt)[:60]!r}, the store's {text_of(own.prompt)[:60]!r}. Expected the same prompt under one id."
            )

    def teachers(self) -> list[str]:
        """Names of all teachers, in the order of their first row."""
        return list(self.counts)

    def dataset(self, keep: Callable[[Prompt], bool] | None = None) -> Any:
        """The prompts (those that ``keep`` passes) as a ``datasets.Dataset`` with ``id``, ``prompt`` and the other columns."""
        try:
            from datasets import Dataset
        except ImportError as error:
            raise MissingExtraError("training with teachers needs: pip install 'telltale[align]'") from error
        chosen = [prompt for prompt in self.prompts.values() if keep is None or keep(prompt)]
        names = list(dict.fromkeys(name for p in chosen for name in p.columns))
        rows = [{"id": p.id, "prompt": p.prompt} | {name: p.columns.get(name) for name in names} for p in chosen]
        try:
            return Dataset.from_list(rows)
        except (ValueError, TypeError) as error:  # pyarrow's errors are of these
            raise DataError(
                f"the prompts make no table: {error}. Expected each field to be of one type in all rows, such as answer a text."
            ) from error

    def statistics(self) -> list[dict[str, Any]]:
        """Per teacher: given, correct, correctness, kept, dropped (by reason), prompts covered and mean words of a kept trace."""
        rows = []
        for name, count in self.counts.items():
            own = [trace for trace in self.traces() if trace.teacher == name]
            rows.append(
                {
                    "teacher": name,
                    "given": count.given,
                    "correct": count.correct,
                    "correctness": count.correct / count.given if count.given else math.nan,
                    "kept": count.kept,
                    "dropped": dict(count.dropped),
                    "prompts": len({trace.prompt_id for trace in own}),
                    "mean_words": sum(len(t.text.split()) for t in own) / len(own) if own else math.nan,
                }
            )
        return rows


@dataclass(frozen=True)
class _Row:
    prompt_id: str
    teacher: str
    text: str
    log_probs: tuple[float, ...] | None


def _reason(correct: bool, reward: float, on_incorrect: str, *, repeated: bool) -> str | None:
    if repeated:
        return "repeated"
    if correct or (on_incorrect == "keep" and not math.isnan(reward)):
        return None
    return "no verdict" if math.isnan(reward) else "incorrect"


def _prompts(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {}
    for where, row in rows:
        name = _field(where, row, "id", (str, int))
        prompt = row.get("messages") if row.get("prompt") is None else row["prompt"]
        if not prompt or not isinstance(prompt, (str, list)):
            raise DataError(f"{where} has neither a prompt (a text) nor messages (a list of role and content).")
        if not isinstance(prompt, str):
            prompt = read_messages(prompt, name=f"{where}: messages", null_content=True)
        if found and isinstance(prompt, str) != isinstance(next(iter(found.values())).prompt, str):
            raise DataError(
                f"{where} has another kind of prompt than the rows before; expected texts or messages in all of them."
            )
        for key in RESERVED:
            if key in row:
                raise DataError(f"{where} has a field {key!r}, a name that TRL uses itself; rename it.")
        if str(name) in found:
            raise DataError(f"{where}: the id {name!r} stands there for a second time; expected one row per id.")
        columns = {key: value for key, value in row.items() if key not in ("id", "prompt", "messages")}
        found[str(name)] = Prompt(str(name), prompt, columns)
    if not found:
        raise DataError("there are no prompts; expected at least one row with id and prompt or messages.")
    return found


def _teacher_row(where: str, row: Mapping[str, Any]) -> tuple[str, _Row]:
    log_probs = row.get("log_probs")
    if log_probs is not None:
        try:
            log_probs = tuple(float(value) for value in log_probs)
        except (TypeError, ValueError):
            raise DataError(f"{where}: log_probs are {str(log_probs)[:60]}; expected a list of numbers.") from None
        if isinstance(row["log_probs"], str) or not all(-math.inf < value <= 0 for value in log_probs):
            raise DataError(
                f"{where}: log_probs are {str(row['log_probs'])[:60]}; expected finite numbers of at most 0."
            )
    name = str(_field(where, row, "prompt_id", (str, int)))
    return where, _Row(
        name, str(_field(where, row, "teacher", (str,))), str(_field(where, row, "text", (str,))), log_probs
    )


def _field(where: str, row: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, kinds) or (isinstance(value, str) and not value.strip()):
        expected = " or ".join({"str": "a text", "int": "a whole number"}[kind.__name__] for kind in kinds)
        found = (
            f"is {str(value)[:60]!r}" if name in row else f"is missing among {', '.join(sorted(map(str, row)))[:60]}"
        )
        raise DataError(f"{where}: {name} {found}; expected {expected}.")
    return value


def _rewards(verifier: Verifier, known: Mapping[str, Prompt], rows: Sequence[_Row]) -> list[float]:
    prompts = [known[row.prompt_id] for row in rows]
    names = sorted({key for prompt in prompts for key in prompt.columns})
    columns: dict[str, list[Any]] = {key: [prompt.columns.get(key) for prompt in prompts] for key in names}
    columns["id"] = [prompt.id for prompt in prompts]
    return judge_texts(verifier, [prompt.prompt for prompt in prompts], [row.text for row in rows], columns)


def _turns(prompt: Any) -> Any:
    """A prompt in the form that the store has: of messages, role and text alone."""
    return prompt if isinstance(prompt, str) else read_messages(prompt, name="a prompt", null_content=True)


def prompt_text(prompt: Prompt) -> str:
    """What an encoder reads of a prompt."""
    return text_of(prompt.prompt)


def told_drops(counts: Mapping[str, TeacherCounts], more: Mapping[str, Counter[str]] | None = None) -> str:
    """What was dropped of each teacher and why, as part of a sentence; ``more`` adds a policy's own reasons."""
    parts = []
    for name, count in counts.items():
        reasons = count.dropped + (more or {}).get(name, Counter())
        parts.append(f"{name}: " + (", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "none given"))
    return "; ".join(parts) or "the store is empty"


def _read_lines(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} holds {type(row).__name__}; expected an object with fields.")
        rows.append((f"{path}, line {number}", row))
    return rows
