"""Is a step of a grade-school solution right, as far as its ``<<expression=value>>`` marks show?

The check is exact: a marked calculation has to hold, and the number written after it has to be its value. What cannot be checked is
left open: a step without marks, or with names in them, is neither right nor wrong, and a step whose arithmetic holds may still
compute the wrong thing.

:class:`Sources` collects the numbers that a step may use: those of the question and of earlier steps, in digits or in words. It
reads prose, so it errs. A number without a source is therefore reported next to the verdict and is no error by itself; one in
twenty reference solutions has a good reason for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from telltale.config import check_choice
from telltale.errors import DataError
from telltale.tasks.arithmetic import as_number, evaluate, number, numbers, places
from telltale.tasks.gsm8k import Problem, final_answer, same_number, segment
from telltale.tasks.step_labels import StepLabel

ERRORS = ("form", "arithmetic", "transcription", "grounding")
"""A mark or an answer that cannot be read; sides of a mark that differ; a number after the mark that is not its value; an answer
that is none of the numbers before it (and, if the labeler is asked to, an operand without a source)."""
END_WORDS = ("<eos>", "<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>")
_MARK = re.compile(r"<<([^<>\n]*)>>([^<\n]*)")
_SPACED = re.compile(r"^\s*\$?\s*\d{1,3}(?: \d{3})+(?!\d)")
"""Right after a mark: thousands separated by spaces, or two numbers in a row."""
_FOREIGN = re.compile(r"[^\d\s.,+\-*/()%$=−–×÷¼-¾⅐-⅞]|\.\.")
_WORD = re.compile(r"[a-z]+")
_UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_WORDS = (
    dict(zip(_UNITS, range(1, 10), strict=True))
    | dict(zip(_TEENS, range(10, 20), strict=True))
    | dict(zip(_TENS, range(20, 100, 10), strict=True))
    | {"zero": 0, "no": 0, "dozen": 12, "score": 20, "hundred": 100, "thousand": 1000, "million": 10**6}
    | {"half": 2, "halves": 2, "twice": 2, "double": 2, "doubled": 2, "doubles": 2, "couple": 2, "pair": 2, "both": 2}
    | {"triple": 3, "tripled": 3, "triples": 3, "thrice": 3, "third": 3, "quadruple": 4, "fourth": 4, "quarter": 4}
    | {"fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
)
_COMMON = frozenset(
    map(Fraction, (0, 1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 24, 28, 30, 31, 36, 52, 60, 100, 365, 1000, 3600, 5280))
) | {Fraction(1, part) for part in (2, 4, 10, 20, 100)}
"""Small numbers, hours and days, inches and ounces, percent, coins: common knowledge that needs no source."""


def check_step(problem: Problem, accepted_steps: Sequence[str], step: str) -> Verdict:
    """Judge one ``step`` given the texts of the steps accepted before it."""
    known = Sources(problem.question)
    for accepted in map(_bare, accepted_steps):
        known.add(accepted, _ends_in(accepted))
    return _judged(problem, known, _bare(step))


def check_solution(problem: Problem, solution: str) -> SolutionVerdict:
    """Judge every step of a stepwise solution (see :func:`telltale.tasks.gsm8k.stepwise`); blank steps do not count."""
    known, verdicts = Sources(problem.question), []
    for step in map(_bare, segment(solution)):
        if not step.strip():
            continue
        verdict = _judged(problem, known, step)
        verdicts.append(verdict)
        known.add(step, _ends_in(step))
        if verdict.kind == "answer":
            break
    answer = verdicts[-1].value if verdicts and verdicts[-1].kind == "answer" else None
    return SolutionVerdict(tuple(verdicts), answer, answer is not None and same_number(answer, problem.answer))


LABELS = ("right", "unknown", "wrong")


class Gsm8kLabeler:
    """The checker as a :class:`~telltale.tasks.step_labels.StepLabeler`. It has blind spots, so it is not ``exact``.

    Arithmetic that holds may still compute the wrong thing. The reference solution can confirm a step, not refute it: there are
    other ways to the answer. ``unconfirmed``: the label of a step whose arithmetic holds and whose values, or whose answer, occur
    neither in the reference nor in the question. ``untraced``: that of a step whose arithmetic holds but uses a number without
    a source. Either is "right", "unknown" or "wrong" (a "grounding" error).
    """

    errors = ERRORS
    exact = False

    def __init__(self, *, untraced: str = "right", unconfirmed: str = "unknown") -> None:
        check_choice("untraced", untraced, LABELS)
        check_choice("unconfirmed", unconfirmed, LABELS)
        self.untraced, self.unconfirmed = untraced, unconfirmed
        self.settings = f"untraced {untraced}, unconfirmed {unconfirmed}"
        """What its labels depend on, for those who keep them."""

    def label(self, problem: Problem, accepted_steps: Sequence[str], step: str) -> StepLabel:
        """:func:`check_step` as a label, as far as the reference confirms it."""
        verdict = check_step(problem, accepted_steps, step)
        if not verdict.right:
            return StepLabel(verdict.right, verdict.error)
        doubts = [self.untraced] if verdict.untraced else []
        if not _confirmed(problem, verdict):
            doubts.append(self.unconfirmed)
        if "wrong" in doubts:
            return StepLabel(False, "grounding")
        return StepLabel(None if "unknown" in doubts else True, None)

    def answer_right(self, problem: Problem, text: str) -> bool:
        """Whether the answer that ``text`` gives first is the true one."""
        return check_solution(problem, text).correct


@dataclass(frozen=True)
class Verdict:
    """The verdict on one step."""

    kind: str
    """"marked", "unmarked" or "answer"."""
    right: bool | None
    """Whether all that can be checked holds; None if nothing can be, or something cannot."""
    error: str | None
    value: Fraction | None
    """Of its last mark, or its answer."""
    marks: tuple[Mark, ...]

    @property
    def untraced(self) -> tuple[str, ...]:
        """The untraced operands of all its marks."""
        return tuple(operand for mark in self.marks for operand in mark.untraced)


@dataclass(frozen=True)
class SolutionVerdict:
    """The verdict on a whole solution, up to its answer."""

    steps: tuple[Verdict, ...]
    answer: Fraction | None
    correct: bool
    """Whether that is the true answer."""

    @property
    def wrong(self) -> int:
        """Steps that are wrong for certain."""
        return sum(verdict.right is False for verdict in self.steps)

    @property
    def untraced(self) -> int:
        """Steps with an untraced operand."""
        return sum(bool(verdict.untraced) for verdict in self.steps)


@dataclass(frozen=True)
class Mark:
    """One ``<<expression=value>>``."""

    text: str
    right: bool | None
    error: str | None
    value: Fraction | None
    untraced: tuple[str, ...]
    """Operands that are neither in the question nor in accepted steps and are not common knowledge."""


def is_answer(step: str) -> bool:
    """Whether one of the step's lines begins with ``####`` or ``A:``."""
    return any(line.lstrip(" \t").startswith(("####", "A:")) for line in step.split("\n"))


class Sources:
    """The numbers of a question and of the steps so far."""

    def __init__(self, question: str) -> None:
        self.numbers = mentioned(question)
        """Without signs."""
        self.last: Fraction | None = None
        """The last number that a step ended in, with its sign; None before any."""

    def copy(self) -> Sources:
        """A copy to add to without changing this one."""
        other = Sources("")
        other.numbers, other.last = set(self.numbers), self.last
        return other

    def add(self, step: str, last: Fraction | None) -> None:
        """Add the numbers of an accepted step; ``last`` is what it ends in, None if that cannot be read."""
        self.numbers |= mentioned(step)
        if last is not None:
            self.numbers.add(abs(last))
            self.last = last

    def trace(self, operand: str) -> bool:
        """Whether a written number is known: as it is, rounded, as a percentage, or as what a percentage leaves or adds up to."""
        value = as_number(operand)
        if value in self.numbers or value in _COMMON:
            return True
        shapes = (value / 100, value * 100, 1 - value, value - 1, 100 - value, value - 100)
        if any(shape in self.numbers for shape in (*shapes, 100 * (1 - value), 100 * (value - 1))):
            return True
        decimals = places(operand)
        return decimals > 0 and any(abs(known - value) < Fraction(1, 10**decimals) for known in self.numbers)


def mentioned(text: str) -> set[Fraction]:
    """The numbers in ``text``, in digits and in words ("twenty-five", "half" for 2), without signs."""
    found = {as_number(written) for written in numbers(text)}
    words = [word for word in _WORD.findall(text.lower()) if word in _WORDS]
    found.update(Fraction(_WORDS[word]) for word in words)
    found.update(
        Fraction(_WORDS[tens] + _WORDS[unit]) for tens, unit in pairwise(words) if tens in _TENS and unit in _UNITS
    )
    return found


def _confirmed(problem: Problem, verdict: Verdict) -> bool:
    """Whether every value that a step arrives at is in the reference solution or in the question; an answer is the true one."""
    if verdict.kind == "answer" and (verdict.value is None or not same_number(verdict.value, problem.answer)):
        return False
    known = mentioned(problem.question) | mentioned(problem.solution)
    values = [abs(mark.value) for mark in verdict.marks if mark.value is not None]
    return all(any(same_number(value, other) for other in known) for value in values)


def _judged(problem: Problem, known: Sources, step: str) -> Verdict:
    marks, own = [], known.copy()
    for text, after in _MARK.findall(step):
        mark = _mark(text, after, own)
        marks.append(mark)
        own.add("", mark.value)
    right, error = _worst(marks)
    value = marks[-1].value if marks else None
    if _broken(step):
        right, error = False, "form"
    if not is_answer(step):
        return Verdict("marked" if marks or error else "unmarked", right, error, value, tuple(marks))
    answer = final_answer(step)
    if right is not False:
        right, error = _answer(problem, known, answer, value)
    return Verdict("answer", right, error, answer, tuple(marks))


def _mark(text: str, after: str, known: Sources) -> Mark:
    sides = text.split("=")
    if _FOREIGN.search(text):
        return Mark(text, None, None, _value(sides[-1]), ())
    if len(sides) < 2:
        return Mark(text, False, "form", None, ())
    untraced = tuple(operand for side in sides[:-1] for operand in numbers(side) if not known.trace(operand))
    try:
        exact, *stated = map(evaluate, sides)
    except DataError:
        return Mark(text, False, "form", None, ())
    except ZeroDivisionError:
        return Mark(text, False, "arithmetic", None, untraced)
    value = stated[-1]
    if not all(_agree(exact, side, other) for side, other in zip(sides[1:], stated, strict=True)):
        return Mark(text, False, "arithmetic", value, untraced)
    if not _copied((value, exact), after):
        return Mark(text, False, "transcription", value, untraced)
    return Mark(text, True, None, value, untraced)


def _agree(exact: Fraction, written: str, stated: Fraction) -> bool:
    """Equal, or rounded or cut off at the last of the decimals that are written."""
    decimals = places(written.strip().lstrip("-−$ "))
    return same_number(exact, stated) or (decimals > 0 and _shortened(exact, stated, decimals))


def _shortened(exact: Fraction, stated: Fraction, decimals: int) -> bool:
    """Whether ``stated`` is ``exact`` rounded, or cut off, at so many decimals."""
    unit = Fraction(1, 10**decimals)
    return abs(exact - stated) <= unit / 2 or (0 <= abs(exact) - abs(stated) < unit and exact * stated >= 0)


def _copied(values: Iterable[Fraction], after: str) -> bool:
    """Whether the number that follows the mark at once, if one does, is one of ``values`` up to rounding, sign, or percent."""
    if not re.match(r"\s*\$?\s*-?\.?\d", after):
        return True
    joined = _SPACED.sub(lambda grouped: grouped[0].replace(" ", ""), after)
    return any(_same_written(value, reading) for reading in {after, joined} for value in values)


def _same_written(value: Fraction, text: str) -> bool:
    written = number(text)
    if written is None:  # longer than anything that is read
        return True
    decimals = places(numbers(text)[0])
    for shape in map(abs, (value, value * 100, value / 100)):
        # Whole things are rounded up as well: six and a third trips are seven.
        if abs(abs(written) - shape) < 1 if decimals == 0 else _shortened(shape, abs(written), decimals):
            return True
        if same_number(abs(written), shape):
            return True
    return False


def _answer(
    problem: Problem, known: Sources, answer: Fraction | None, own: Fraction | None
) -> tuple[bool | None, str | None]:
    """An answer is no mistake of its own if it is true, or repeats the last number before it."""
    if answer is None:
        return False, "form"
    last = known.last if own is None else own
    if same_number(answer, problem.answer) or (last is not None and same_number(answer, last)):
        return True, None
    if abs(answer) in known.numbers or last is None:
        return None, None
    return False, "grounding"


def _worst(marks: Sequence[Mark]) -> tuple[bool | None, str | None]:
    for error in ERRORS:
        if any(mark.error == error for mark in marks):
            return False, error
    return (True, None) if marks and all(mark.right for mark in marks) else (None, None)


def _broken(step: str) -> bool:
    rest = _MARK.sub(r"\2", step)
    return "<<" in rest or ">>" in rest


def _ends_in(step: str) -> Fraction | None:
    """The value of the step's last mark, or else its last number."""
    marks = _MARK.findall(step)
    value = _value(marks[-1][0].rpartition("=")[2]) if marks else None
    written = numbers(step)
    return value if value is not None else as_number(written[-1]) if written else None


def _value(side: str) -> Fraction | None:
    try:
        return evaluate(side)
    except (DataError, ZeroDivisionError):
        return None


def _bare(step: str) -> str:
    """``step`` without an end-of-text word and blank lines at its end."""
    bare = step.rstrip()
    for word in END_WORDS:
        bare = bare.removesuffix(word).rstrip()
    return bare
