"""Accuracy against cost: policies on the same problems, each beside random acceptance at its own share of target tokens.

Random acceptance costs nothing to decide and needs no signal, so a score is worth only what it gains over it *at equal share*. The
matched policy mixes the two random rates whose shares enclose the score's, which is itself a way of accepting at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telltale.decode.decoders import StepVerified
from telltale.decode.step_verified.report.comparisons import Estimate, mcnemar, mean_with_interval
from telltale.decode.step_verified.trials.trial import Trials
from telltale.errors import DataError

Floats = NDArray[np.float64]


@dataclass
class PolicyRuns:
    """One policy over all problems, once for each sampling seed."""

    name: str
    runs: list[Trials]
    threshold: float | None = None

    @property
    def right(self) -> Floats:
        """For each problem, the share of seeds with a right answer, (n,). Raises DataError if nobody can tell."""
        rows = [[trial.right for trial in run.trials] for run in self.runs]
        if any(value is None for row in rows for value in row):
            raise DataError("the labeler cannot tell whether answers are right; expected one that can.")
        return np.asarray(rows, dtype=np.float64).mean(0)

    @property
    def share(self) -> float:
        """Target tokens over all tokens of the output."""
        return float(np.mean([run.target_share for run in self.runs]))

    @property
    def risk(self) -> float:
        """Mean over problems of the share of drafted steps that were accepted and wrong."""
        losses = []
        for run in self.runs:
            for trial in run.trials:
                labels = [step for step in trial.steps if step.right is not None]
                losses.append(
                    sum(step.accepted and step.right is False for step in labels) / len(labels) if labels else 0.0
                )
        return float(np.mean(losses))

    def cost(self, name: str) -> float:
        """A count or time, per token of the output."""
        total = sum(run.cost.get("tokens", 0.0) for run in self.runs)
        return sum(run.cost.get(name, 0.0) for run in self.runs) / total if total else 0.0

    @property
    def wrong_among_accepted(self) -> float | None:
        """Of accepted steps with a label, those that are wrong."""
        labels = [s.right for run in self.runs for s in run.steps if s.accepted and s.right is not None]
        return labels.count(False) / len(labels) if labels else None


@dataclass(frozen=True)
class Sizes:
    """Weights of the draft and of the target, the embedding not counted."""

    draft: int
    target: int


def sizes(guard: StepVerified) -> Sizes:
    """Of ``guard``'s models; a draft of the target's first layers has their share."""
    target = _body(guard.target.model)
    if guard.draft is not None:
        return Sizes(_body(guard.draft.model), target)
    return Sizes(round(target * (guard.exit_layer or 0) / guard.target.layers), target)


def random_at(random: Sequence[PolicyRuns], share: float) -> tuple[Floats, float]:
    """Right answers (n,) that accepting at random gives at a target ``share``, and the share itself.

    A mixture of the two policies whose shares enclose it; beyond the ends, the end.
    """
    ordered = sorted(random, key=lambda policy: policy.share)
    shares = [policy.share for policy in ordered]
    if share <= shares[0]:
        return ordered[0].right, shares[0]
    if share >= shares[-1]:
        return ordered[-1].right, shares[-1]
    above = int(np.searchsorted(shares, share))
    low, high = ordered[above - 1], ordered[above]
    weight = (share - low.share) / (high.share - low.share)
    return (1 - weight) * low.right + weight * high.right, share


def point(
    policy: PolicyRuns,
    *,
    target: PolicyRuns,
    random: Sequence[PolicyRuns],
    sizes: Sizes,
    strata: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What is to be known of a policy, as JSON writes it. ``strata``: groups that problems are resampled within."""

    def estimate(values: Floats) -> Estimate:
        return mean_with_interval(values, strata=strata, seed=seed)

    matched, matched_share = random_at(random, policy.share)
    steps = [step for run in policy.runs for step in run.steps]
    return {
        "policy": policy.name,
        "threshold": policy.threshold,
        "accuracy": estimate(policy.right).to_dict(),
        "target_share": policy.share,
        "acceptance": sum(step.accepted for step in steps) / len(steps) if steps else None,
        "wrong_among_accepted": policy.wrong_among_accepted,
        "accepted_and_wrong": policy.risk,
        "over_target": estimate(policy.right - target.right).to_dict(),
        "over_random": estimate(policy.right - matched).to_dict() | {"random_share": matched_share},
        "mcnemar_target": mcnemar(*_first(policy, target)),
        "compute": compute(policy, target, sizes),
        "scored_per_token": policy.cost("scored_tokens"),
        "drafted_per_token": policy.cost("drafted_tokens"),
        "milliseconds_per_token": 1e3 * policy.cost("seconds"),
        "cpu_milliseconds_per_token": 1e3 * policy.cost("cpu_seconds"),
    }


def compute(policy: PolicyRuns, target: PolicyRuns, sizes: Sizes) -> float:
    """Weights passed per token of the output, in units of what the target alone passes; from the engine's own counters.

    Prompts, dropped candidates and padding are part of it. Where weights are read once for many tokens, time is less.
    """
    alone = target.cost("target_layers_passed")
    passed = policy.cost("target_layers_passed") + policy.cost("draft_layers_passed") * sizes.draft / sizes.target
    return passed / alone if alone else 0.0


def _first(policy: PolicyRuns, target: PolicyRuns) -> tuple[list[bool], list[bool]]:
    """Answers under the first seed, which both have."""
    return [bool(t.right) for t in policy.runs[0].trials], [bool(t.right) for t in target.runs[0].trials]


def _body(model: Any) -> int:
    embedding = model.get_input_embeddings().weight
    return sum(parameter.numel() for parameter in model.parameters() if parameter is not embedding)
