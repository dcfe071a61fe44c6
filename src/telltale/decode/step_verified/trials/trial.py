"""One problem under one policy, and many of them: what was drafted, accepted, right, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from telltale.decode.results import StepSignals
from telltale.decode.step_verified.calibration.risk import Judged


@dataclass(frozen=True)
class StepTrial:
    """One step that the draft proposed. ``right`` is None where the labeler cannot tell."""

    place: int
    length: int
    """Tokens."""
    accepted: bool
    right: bool | None
    error: str | None = None
    score: float | None = None
    """None for a step that was rejected unscored."""
    reason: str | None = None
    agreement: float | None = None
    draft: StepSignals | None = None
    target: StepSignals | None = None


@dataclass(frozen=True)
class Trial:
    """One problem under one policy. ``right`` is whether its final answer is, None where nobody can tell."""

    problem: int
    """Place among the problems."""
    right: bool | None
    stop_reason: str
    accepted_tokens: int
    """Of the output, written by the draft."""
    target_tokens: int
    """Of the output, written by the target."""
    steps: tuple[StepTrial, ...]

    def judged(self, *, unknown: str = "skip") -> Judged:
        """Scores and labels of the drafted steps, as :mod:`telltale.decode.step_verified.calibration.risk` takes them."""
        steps = [step for step in self.steps if step.right is not None or unknown != "skip"]
        return Judged(
            tuple(float("nan") if step.score is None else step.score for step in steps),
            tuple(step.right is False or (step.right is None and unknown == "wrong") for step in steps),
        )


@dataclass
class Trials:
    """All problems under one policy, in order."""

    trials: list[Trial]
    cost: dict[str, float] = field(default_factory=dict)
    """Summed over batches: seconds, CPU seconds, counts of ``StepVerifiedStatistics``, and tokens through each model's layers
    (prompts, dropped candidates and padding of the batch included; the mean over layers)."""

    @property
    def steps(self) -> list[StepTrial]:
        """All drafted steps."""
        return [step for trial in self.trials for step in trial.steps]

    @property
    def accuracy(self) -> float | None:
        """Share of problems whose answer is right; None if nobody can tell."""
        known = [trial.right for trial in self.trials if trial.right is not None]
        return sum(known) / len(known) if known else None

    @property
    def target_share(self) -> float:
        """Share of the output's tokens that the target decoded."""
        target = sum(trial.target_tokens for trial in self.trials)
        total = target + sum(trial.accepted_tokens for trial in self.trials)
        return target / total if total else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted over drafted steps; 0.0 if none was drafted."""
        steps = self.steps
        return sum(step.accepted for step in steps) / len(steps) if steps else 0.0

    @property
    def wrong_among_accepted(self) -> float | None:
        """Share of accepted steps with a label that are wrong."""
        labels = [step.right for step in self.steps if step.accepted and step.right is not None]
        return labels.count(False) / len(labels) if labels else None

    def judged(self, *, unknown: str = "skip") -> list[Judged]:
        """:meth:`Trial.judged` of each."""
        return [trial.judged(unknown=unknown) for trial in self.trials]


def to_dict(trial: Trial) -> dict[str, Any]:
    """``trial`` in plain values, its place among the problems left out."""
    found = asdict(trial)
    del found["problem"]
    return found


def from_dict(values: dict[str, Any], place: int) -> Trial:
    """The trial of problem ``place`` that :func:`to_dict` wrote down."""
    steps = tuple(
        StepTrial(**(step | {role: _reading(step[role]) for role in ("draft", "target")})) for step in values["steps"]
    )
    return Trial(**(values | {"steps": steps, "problem": place}))


def _reading(values: dict[str, Any] | None) -> StepSignals | None:
    return None if values is None else StepSignals(**{name: tuple(numbers) for name, numbers in values.items()})
