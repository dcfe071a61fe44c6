"""What every task with checkable steps offers to calibration and reports: a label for one step, and for a whole answer.

A labeler looks at text alone: the problem, the steps accepted before, the candidate. It never sees the model or its scores. The
reference solution's values may confirm a step; its wording never counts. A labeler that may find a wrong step right has blind
spots, and is not ``exact``: reports call it a checker then, never an oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class StepProblem(Protocol):
    """A problem whose solution is written step by step."""

    @property
    def prompt(self) -> str:
        """The text that a model continues; it ends with a blank line."""

    @property
    def steps(self) -> list[str]:
        """The reference solution, step by step, each without its blank line."""


ProblemT = TypeVar("ProblemT", contravariant=True)


@dataclass(frozen=True)
class StepLabel:
    """The label of one step, given the steps accepted before it."""

    right: bool | None
    """None if the labeler cannot decide."""
    error: str | None
    """Which of the labeler's ``errors`` a wrong step makes; None unless ``right`` is False."""


class StepLabeler(Protocol[ProblemT]):
    """Labels steps of one kind of problem."""

    @property
    def errors(self) -> tuple[str, ...]:
        """The names that :attr:`StepLabel.error` can have."""

    def label(self, problem: ProblemT, accepted_steps: Sequence[str], step: str) -> StepLabel:
        """Judge ``step`` given the texts of the steps accepted before it, in order, right or wrong.

        Texts are of single steps; a blank line or an end-of-text word at their end does not count.
        """

    def answer_right(self, problem: ProblemT, text: str) -> bool:
        """Whether the solution ``text`` (without the prompt) ends in the true answer; no answer is not right."""
