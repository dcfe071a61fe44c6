"""From the runs of the policy benchmark to its figures: one entry a policy over all model seeds, realised risks, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from telltale.decode.calibration.calibration_report import PolicyRuns, Sizes, compute, random_at, sizes
from telltale.signals.statistics import mcnemar, mean_with_interval

RANDOM_RATES = (0.0, 0.5, 0.7, 0.85, 1.0)
TARGETS = {"over_random": 0.08, "share": 0.35}
"""Of the target-scored policy: gain over random acceptance at equal share, and largest target-token share."""


def combined(slices: Sequence[Any], group: str, ends: str = "ends") -> dict[str, dict[str, Any]]:
    """Every policy of a group over all slices (one a model seed), beside its slice's target alone and random acceptance."""
    found = {}
    for name in slices[0].found[group]:
        policies = [one.found[group][name] for one in slices]
        targets = [one.found[ends]["target alone"] for one in slices]
        if name.endswith("greedy"):
            targets = [one.found["ends"]["target alone, greedy"] for one in slices]
        sides = [sizes(one.pair.guard) for one in slices]
        matched = [
            random_at([one.found[ends][f"random {rate:g}"] for rate in RANDOM_RATES], policy.share)
            for one, policy in zip(slices, policies, strict=True)
        ]
        found[name] = _figures(policies, targets, matched, sides)
    return found


def _figures(
    policies: Sequence[PolicyRuns], targets: Sequence[PolicyRuns], matched: Sequence[Any], sides: Sequence[Sizes]
) -> dict[str, Any]:
    right = [policy.right for policy in policies]
    strata = np.repeat(np.arange(len(right)), [len(one) for one in right])

    def estimate(values: Sequence[np.ndarray]) -> dict[str, float]:
        return vars(mean_with_interval(np.concatenate(list(values)), strata=strata))

    first = [[bool(t.right) for p in side for t in p.runs[0].trials] for side in (policies, targets)]
    return {
        "accuracy": estimate(right),
        "accuracy_by_model": [float(one.mean()) for one in right],
        "target_share": float(np.mean([policy.share for policy in policies])),
        "target_share_by_model": [policy.share for policy in policies],
        "acceptance": float(np.mean([run.acceptance for policy in policies for run in policy.runs])),
        "wrong_among_accepted": [policy.wrong_among_accepted for policy in policies],
        "accepted_and_wrong": [policy.risk for policy in policies],
        "over_target": estimate([a - b.right for a, b in zip(right, targets, strict=True)]),
        "over_random": estimate([a - b for a, (b, _) in zip(right, matched, strict=True)]),
        "random_share": float(np.mean([share for _, share in matched])),
        "mcnemar_target": mcnemar(*first),
        "sampling_seeds": len(policies[0].runs),
        "compute": float(np.mean([compute(p, t, s) for p, t, s in zip(policies, targets, sides, strict=True)])),
        "scored_per_token": float(np.mean([policy.cost("scored_tokens") for policy in policies])),
        "drafted_per_token": float(np.mean([policy.cost("drafted_tokens") for policy in policies])),
        "wall_ms_per_token": float(np.mean([1e3 * policy.cost("seconds") for policy in policies])),
        "cpu_ms_per_token": float(np.mean([1e3 * policy.cost("cpu_seconds") for policy in policies])),
        "thresholds": [
            None if p.threshold is None else p.threshold if math.isfinite(p.threshold) else str(p.threshold)
            for p in policies
        ],
    }


def risks(slices: Sequence[Any]) -> dict[str, Any]:
    """Realised risk of every calibrated threshold over model and sampling seeds, and whether alpha lies in its interval."""
    found = {}
    for name in slices[0].calibrations:
        own = [one.calibrations[name] for one in slices]
        policies = [one.found["calibrated"][name] for one in slices]
        losses = []
        for policy in policies:
            threshold = math.inf if policy.threshold is None else policy.threshold
            per_run = [[problem.loss(threshold) for problem in run.judged()] for run in policy.runs]
            losses.append(np.mean(per_run, axis=0))
        strata = np.repeat(np.arange(len(losses)), [len(one) for one in losses])
        rate = mean_with_interval(np.concatenate(losses), strata=strata)
        found[name] = {
            "alpha": own[0]["alpha"],
            "realised": vars(rate),
            "within": rate.low <= own[0]["alpha"],
            "by_model": [
                {"threshold": one["threshold"], "rate": float(loss.mean()), "clopper_pearson": one["realised"]}
                for one, loss in zip(own, losses, strict=True)
            ],
        }
    return found


def verdicts(risk: dict[str, Any], policies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The acceptance of the benchmark: what target-scored ``policies`` gain and keep, and which realised risks hold."""
    found: dict[str, Any] = {
        name: {
            "over_random": one["over_random"],
            "over_random_reached": one["over_random"]["value"] >= TARGETS["over_random"],
            "over_target": one["over_target"],
            "share": one["target_share"],
            "target_accuracy_kept": one["over_target"]["low"] <= 0 <= one["over_target"]["high"],
            "share_reached": one["target_share"] <= TARGETS["share"],
        }
        for name, one in policies.items()
    }
    return found | {"realised_risk_kept": {name: one["within"] for name, one in risk.items()}}
