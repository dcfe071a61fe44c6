"""Is a step of a chain right, and if not, what is wrong with it? Exact, given the values that were accepted before.

A step is judged by the steps before it, not by the true solution: a correct computation from a wrong value that was accepted is no
new mistake.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from telltale.config import check_choice
from telltale.errors import DataError
from telltale.tasks.chains import (
    DELIMITER,
    MODULUS,
    OPERATIONS,
    Problem,
    Statement,
    apply,
    number_of,
    segment,
    step_text,
)
from telltale.tasks.step_labels import StepLabel

ERRORS = ("form", "order", "grounding", "arithmetic")
"""Not a step at all; a value that cannot be known yet or is known already; an operand or statement that is not what the
problem and the accepted steps say; a result that does not follow from the operands as written."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one step. ``name`` and ``value`` are what it sets (None for a step that is none, "answer" for the last)."""

    right: bool
    error: str | None
    name: str | None
    value: int | None


@dataclass(frozen=True)
class SolutionVerdict:
    """The verdict on a whole solution."""

    steps: tuple[Verdict, ...]
    answer: int | None
    """What it answers; None without an answer."""
    correct: bool
    """Whether that is the true answer."""
    complete: float
    """Share of the needed values that were computed, right or wrong."""

    @property
    def valid(self) -> bool:
        """Whether every step is right."""
        return bool(self.steps) and all(verdict.right for verdict in self.steps)


def check_step(problem: Problem, accepted: dict[str, int], step: str) -> Verdict:
    """Judge ``step`` (without its blank line) given the values ``accepted`` so far, the problem's own included.

    :func:`accept` adds a step's value to the accepted ones.
    """
    words = step.split()
    if len(words) == 2 and words[0] == "answer":
        return _answer(problem, accepted, words[1])
    if len(words) != 11 or words[1] != "has" or words[5] != "=" or words[9] != "=" or not _digit(words[10]):
        return Verdict(False, "form", None, None)
    name, value = words[0], int(words[10])
    statement = problem.statement(name)
    if statement is None or statement.operation is None or not (_digit(words[6]) and _digit(words[8])):
        return Verdict(False, "form", name if statement is not None else None, value)
    if words[3] not in OPERATIONS or words[7] not in OPERATIONS:
        return Verdict(False, "form", name, value)
    known = all(isinstance(operand, int) or operand in accepted for operand in statement.operands)
    if name in accepted or not known:
        return Verdict(False, "order", name, value)
    numbers = [str(number_of(operand, accepted)) for operand in statement.operands]
    if " ".join(words[2:5]) != statement.expression or words[6:9] != [numbers[0], statement.operation, numbers[1]]:
        return Verdict(False, "grounding", name, value)
    if OPERATIONS[words[7]](int(words[6]), int(words[8])) != value:
        return Verdict(False, "arithmetic", name, value)
    return Verdict(True, None, name, value)


def accept(accepted: dict[str, int], verdict: Verdict) -> dict[str, int]:
    """``accepted`` with the value that the step sets, right or wrong; the first value of a name stays."""
    if verdict.name is None or verdict.value is None or verdict.name in accepted or verdict.name == "answer":
        return accepted
    return accepted | {verdict.name: verdict.value}


def check_solution(problem: Problem, solution: str) -> SolutionVerdict:
    """Judge every step of a solution; an ending after the answer, and blank ends, do not count."""
    accepted, verdicts, answer = problem.given, [], None
    for step in segment(_bare(solution)):
        if not step.strip():
            continue
        verdict = check_step(problem, accepted, step)
        verdicts.append(verdict)
        accepted = accept(accepted, verdict)
        if verdict.name == "answer":
            answer = verdict.value
            break
    needed = [statement.name for statement in problem.needed]
    done = sum(name in accepted for name in needed) / len(needed) if needed else 1.0
    return SolutionVerdict(tuple(verdicts), answer, answer == problem.answer, done)


class ChainLabeler:
    """The checker as a :class:`~telltale.tasks.step_labels.StepLabeler`; it always knows."""

    errors = ERRORS
    exact = True

    def label(self, problem: Problem, accepted_steps: Sequence[str], step: str) -> StepLabel:
        """:func:`check_step` given the values that the accepted steps set, right or wrong."""
        accepted = problem.given
        for before in map(_bare, accepted_steps):
            accepted = accept(accepted, check_step(problem, accepted, before))
        verdict = check_step(problem, accepted, _bare(step))
        return StepLabel(verdict.right, verdict.error)

    def answer_right(self, problem: Problem, text: str) -> bool:
        """Whether the first answer in ``text`` is the true one."""
        return check_solution(problem, text).correct


def corrupted(problem: Problem, error: str, chance: random.Random) -> str:
    """The true solution with one error of the given kind planted, what follows from it carried on consistently.

    Raises :class:`~telltale.errors.DataError` where the problem cannot have it (an order error needs two steps).
    """
    check_choice("error", error, ERRORS)
    needed = list(problem.needed)
    if error == "order":
        places = [i for i in range(len(needed) - 1) if needed[i].name in needed[i + 1].operands]
        if not places:
            raise DataError("an order error needs a step that depends on the one before; this problem has none.")
        place = chance.choice(places)
        true = problem.values
        texts = [step_text(statement, true) for statement in needed]
        texts[place], texts[place + 1] = texts[place + 1], texts[place]
        return _joined(texts, true[problem.question])
    place = chance.randrange(len(needed))
    values, texts = problem.given, []
    for index, statement in enumerate(needed):
        values[statement.name] = apply(statement, values)
        text = step_text(statement, values)
        if index == place:
            text, values = _planted(statement, values, error, chance)
        texts.append(text)
    return _joined(texts, values[problem.question])


def _planted(
    statement: Statement, values: dict[str, int], error: str, chance: random.Random
) -> tuple[str, dict[str, int]]:
    words = step_text(statement, values).split()
    if error == "arithmetic":
        words[10] = str((int(words[10]) + chance.randrange(1, MODULUS)) % MODULUS)
    elif error == "grounding":
        side = chance.choice([6, 8])
        words[side] = str((int(words[side]) + chance.randrange(1, MODULUS)) % MODULUS)
        words[10] = str(OPERATIONS[words[7]](int(words[6]), int(words[8])))
    else:
        del words[chance.choice([1, 3, 5, 7, 9])]
    return " ".join(words), values | {statement.name: int(words[-1])}


def _bare(text: str) -> str:
    return text.replace("<eos>", "")


def _answer(problem: Problem, accepted: dict[str, int], word: str) -> Verdict:
    if not _digit(word):
        return Verdict(False, "form", "answer", None)
    if problem.question not in accepted:
        return Verdict(False, "order", "answer", int(word))
    right = accepted[problem.question] == int(word)
    return Verdict(right, None if right else "grounding", "answer", int(word))


def _joined(steps: list[str], answer: int) -> str:
    return f" {DELIMITER} ".join([*steps, f"answer {answer}"])


def _digit(word: str) -> bool:
    return len(word) == 1 and word.isdigit() and int(word) < MODULUS
