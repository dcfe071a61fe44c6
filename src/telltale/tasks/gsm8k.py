"""Grade-school mathematics in words (GSM8K, arXiv 2110.14168), read from the public JSONL files; nothing is downloaded.

A problem has a ``question`` and an ``answer``: one step a line, calculations marked ``<<48/2=24>>``, and ``#### 24`` on the last
line. As a solution to decode, its lines are steps that end with a blank line: every newline is doubled, and halving them gives
the original text back, byte for byte. :mod:`telltale.tasks.gsm8k_checker` judges the steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from telltale.errors import DataError
from telltale.tasks.arithmetic import number

DELIMITER = "\n\n"
_ANSWER = re.compile(r"^[ \t]*(?:####|A:)(.*)$", re.MULTILINE)
_NOISE = Fraction(1, 10**9)


@dataclass(frozen=True)
class Problem:
    """A question and its reference solution, as the file has them."""

    question: str
    solution: str
    """Steps, one a line; the last line has the answer (``#### 42``, or ``A: 42`` in files with model solutions)."""

    @property
    def prompt(self) -> str:
        """The question, ending with a blank line."""
        return f"{self.question}{DELIMITER}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a conversation, for a tokenizer's chat template."""
        return [{"role": "user", "content": self.question}]

    @property
    def steps(self) -> list[str]:
        """The reference solution, step by step, the answer's line included, each without its blank line."""
        return segment(stepwise(self.solution))

    @property
    def answer(self) -> Fraction:
        """The true answer."""
        found = final_answer(self.solution)
        if found is None:
            raise DataError(f"the solution {self.solution[-60:]!r} has no answer; expected a line like '#### 42'.")
        return found


@dataclass(frozen=True)
class ModelSolution:
    """What one model wrote, and whether the dataset's authors found its answer right."""

    model: str
    solution: str
    correct: bool


@dataclass(frozen=True)
class AnsweredProblem:
    """A problem with what models wrote for it."""

    problem: Problem
    answers: tuple[ModelSolution, ...]


def read(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file with ``question`` and ``answer`` on every line (``train.jsonl``, ``test.jsonl``).

    Raises :class:`~telltale.errors.DataError` that names file, line and what was expected.
    """
    found = []
    for place, record in _records(path):
        problem = Problem(_text(record, "question", place), _text(record, "answer", place))
        if final_answer(problem.solution) is None:
            raise DataError(f"{place}: 'answer' ends in {_tail(problem)!r}; expected a last line like '#### 42'.")
        found.append(problem)
    return found


def read_model_solutions(path: str | Path) -> list[AnsweredProblem]:
    """The problems of ``example_model_solutions.jsonl``: ``question``, ``ground_truth`` and, under each model's name, an object
    with ``solution`` and ``is_correct``.

    Raises :class:`~telltale.errors.DataError` that names file, line and what was expected.
    """
    found = []
    for place, record in _records(path):
        problem = Problem(_text(record, "question", place), _text(record, "ground_truth", place))
        if final_answer(problem.solution) is None:
            raise DataError(f"{place}: 'ground_truth' ends in {_tail(problem)!r}; expected a last line like 'A: 42'.")
        names = [name for name in record if name not in ("question", "ground_truth")]
        if not names:
            raise DataError(
                f"{place}: there are no model solutions; expected objects with 'solution' and 'is_correct'."
            )
        found.append(AnsweredProblem(problem, tuple(_model_solution(name, record[name], place) for name in names)))
    return found


def stepwise(text: str) -> str:
    """``text`` with every newline doubled, so that a step ends with a blank line."""
    return text.replace("\n", DELIMITER)


def linewise(text: str) -> str:
    """The inverse of :func:`stepwise`."""
    return text.replace(DELIMITER, "\n")


def segment(text: str) -> list[str]:
    """The steps of a stepwise text, to the byte: joined by blank lines they are the text. Empty ones are kept."""
    return text.split(DELIMITER)


def few_shot_prompt(problem: Problem, examples: Sequence[Problem]) -> str:
    """The prompt of ``problem`` after worked ``examples`` in the same form, for a model without a chat template."""
    worked = "".join(f"{example.prompt}{stepwise(example.solution)}{DELIMITER}" for example in examples)
    return worked + problem.prompt


def final_answer(text: str) -> Fraction | None:
    """The number on the last line that begins with ``####`` or ``A:`` (commas, dollars, signs, decimals); None without one."""
    found = _ANSWER.findall(text)
    return number(found[-1]) if found else None


def same_number(left: Fraction, right: Fraction) -> bool:
    """Equal but for the noise of a 64-bit calculator, a billionth of the larger one."""
    return abs(left - right) <= _NOISE * max(abs(left), abs(right))


def _records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line's place (``file, line 3``) and object."""
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror or error}; expected GSM8K problems as JSONL."
        ) from error
    # Only newlines end a record: JSON strings may hold other line separators.
    lines = data.removesuffix(b"\n").split(b"\n") if data.strip() else []
    if not lines:
        raise DataError(f"{file} is empty; expected GSM8K problems as JSONL.")
    found = []
    for index, line in enumerate(lines, 1):
        place = f"{file}, line {index}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not valid JSON ({error}); expected one object a line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{place} is a JSON {type(record).__name__}; expected an object with 'question'.")
        found.append((place, record))
    return found


def _text(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise DataError(f"{place}: {field!r} is missing among {', '.join(sorted(record)) or 'no fields'}; expected it.")
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {field!r} is {str(value)[:40]!r}; expected a text that is not empty.")
    return value


def _model_solution(name: str, value: Any, place: str) -> ModelSolution:
    if not isinstance(value, dict) or not isinstance(value.get("is_correct"), bool):
        raise DataError(
            f"{place}: {name!r} is {str(value)[:40]!r}; expected 'solution' and 'is_correct' (true or false)."
        )
    return ModelSolution(name, _text(value, "solution", f"{place}, {name}"), value["is_correct"])


def _tail(problem: Problem) -> str:
    return problem.solution[-40:]
