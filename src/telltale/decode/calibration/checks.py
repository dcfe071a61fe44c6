"""What is said before and beside figures: is there anything to guard, and how much does the labeler see?

A pair that answers nothing right wastes the hours of every later stage, and a labeler with blind spots makes every figure that
rests on its labels look better than it is. Both are looked at on a few problems first, and told at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from telltale.decode.calibration.trials import Coverage, Trials
from telltale.decode.step_config import Normaliser, StepVerifiedConfig

FIRST = 16
"""Problems on which a pair is looked at before anything else."""
MUCH = 0.1
"""From this share on, wrong answers without a flagged step and steps without a label are warned about."""
Decode = Callable[[str, StepVerifiedConfig], Trials]
""""target alone" or "draft alone", and its configuration -> the trials of the first problems."""


def alone(config: StepVerifiedConfig, role: str) -> StepVerifiedConfig:
    """The "target" or the "draft" alone, one sample a step."""
    return replace(config, policy=role, normaliser=Normaliser(), record_signals=False)


def pair_notes(decode: Decode, config: StepVerifiedConfig) -> list[str]:
    """Sentences about a pair with which a calibration or a report would be of little use; none where answers are not judged."""
    found = {role: decode(f"{role} alone", alone(config, role)) for role in ("target", "draft")}
    rates = {role: trials.accuracy for role, trials in found.items()}
    target, draft = rates["target"], rates["draft"]
    if target is None or draft is None:
        return []
    count, notes = len(found["target"].trials), []
    cut = sum(trial.stop_reason == "length" for trial in found["target"].trials)
    hint = f" {cut} of these answers were cut at max_new_tokens." if cut else ""
    if target == 0:
        notes.append(
            f"degenerate pair: the target answers none of the first {count} problems right, so there is nothing to "
            f"guard.{hint} Look at its outputs and at the prompts' form before you go on."
        )
    elif draft == 0:
        notes.append(
            f"degenerate pair: the draft answers none of the first {count} problems right (the target {target:.0%}); expect the "
            f"target to redo nearly everything."
        )
    elif target == draft == 1:
        notes.append(
            f"degenerate pair: both models answer all of the first {count} problems right; no signal can show anything."
        )
    return notes


def coverage_notes(coverage: Coverage | None, *, unknown: str) -> list[str]:
    """Sentences about mistakes that the labeler does not see and steps that it cannot judge, counted as ``unknown`` says."""
    if coverage is None:
        return []
    notes = []
    if coverage.missed >= MUCH:
        notes.append(
            f"the labeler found no wrong step in {coverage.unflagged} of {coverage.wrong} wrong answers ({coverage.missed:.0%}): "
            f"it is a checker with blind spots, and what rests on its labels is about the mistakes that it sees."
        )
    if unknown == "skip" and coverage.unknown_share >= MUCH:
        notes.append(
            f"the labeler could not judge {coverage.unknown} of {coverage.steps} drafted steps ({coverage.unknown_share:.0%}), "
            f"which are left out; count them as wrong (unknown='wrong'), or label by roll-outs."
        )
    return notes


def name_of(labeler: Any) -> str:
    """What accepting exactly the steps that ``labeler`` finds right may be called: an oracle only where it is exact."""
    return "oracle" if getattr(labeler, "exact", False) else str(getattr(labeler, "called", "checker"))
