"""The failure taxonomy: which of five ways of level 2 a failed episode shows, by rules, with the evidence.

The five modes are the paper's (drift, aliasing, action insensitivity, constraint violation, miscalibration; arXiv
2604.22748, section on failure modes); it gives no rules. Here each has one, and an episode that no rule explains is the
planner's where oracle dynamics fail from the same start too, and else the model's, unattributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from telltale.world.metrics import worst_rate
from telltale.world.prediction import NORMAL_90
from telltale.world.protocol import adapt
from telltale.world.worlds.base import World

MODES = ("insensitivity", "violation", "drift", "aliasing", "miscalibration")
RULES = {
    "insensitivity": "divergence under interventions is below .2 of the engine's",
    "violation": "more than 5% of the episode's predictions break a hard law before enforcement",
    "drift": "the error at the planner's horizon is above half the spread of the states, and above the oracle's",
    "aliasing": "two steps with equal beliefs and actions had different outcomes",
    "miscalibration": "90% intervals cover more than 5 points more or less than 90% of the episode's steps",
    "planner": "no rule fired, and the planner fails from this start with oracle dynamics too",
    "model, unattributed": "no rule fired, and the planner succeeds from this start with oracle dynamics",
    "environment or planner": "no rule fired, and there is no oracle arm to tell them apart",
}


@dataclass(frozen=True)
class Failure:
    """One failed start: its label (the first rule that fired), all rules that fired, and the figures behind them."""

    seed: int
    label: str
    fired: list[str]
    evidence: dict[str, Any]


def failures(certificate: Any, model: Any, world: World) -> list[Failure]:
    """A label for every failed episode of a certificate's evaluation, in the order of :data:`MODES`."""
    if certificate.evaluation is None:
        return []
    oracle = (
        dict(zip(certificate.oracle.seeds, certificate.oracle.successes, strict=True)) if certificate.oracle else {}
    )
    return [
        _label(record, certificate, model, world, oracle.get(record.episode.seed))
        for record in certificate.evaluation.records
        if not record.success
    ]


def _label(record: Any, certificate: Any, model: Any, world: World, oracle_won: bool | None) -> Failure:
    fired: list[str] = []
    evidence: dict[str, Any] = {}
    found = certificate.sensitivity
    if found is not None and found.ratio < 0.2:
        fired.append("insensitivity")
        evidence["insensitivity"] = {"ratio": found.ratio}
    rates = [worst_rate(step, certificate.evaluation.hard()) for step in record.broken]
    if rates and sum(rates) / len(rates) > 0.05:
        worst = max(range(len(rates)), key=rates.__getitem__)
        fired.append("violation")
        evidence["violation"] = {"rate": sum(rates) / len(rates), "step": worst, "laws": record.broken[worst]}
    if certificate.coherence is not None:
        at = min(int(certificate.evaluation.planner["horizon"]), len(certificate.coherence.errors)) - 1
        error = certificate.coherence.excess()[at]
        if error > 0.5:
            fired.append("drift")
            evidence["drift"] = {"horizon": at + 1, "error": error}
    twin = _aliased(record, model, world)
    if twin is not None:
        fired.append("aliasing")
        evidence["aliasing"] = {"steps": list(twin)}
    coverage = _coverage(record, model, world)
    if coverage is not None and abs(coverage - 0.9) > 0.05:
        fired.append("miscalibration")
        evidence["miscalibration"] = {"coverage": coverage}
    if fired:
        label = fired[0]
    elif oracle_won is None:
        label = "environment or planner"
    else:
        label = "model, unattributed" if oracle_won else "planner"
    return Failure(record.episode.seed, label, fired, evidence)


def _aliased(record: Any, model: Any, world: World) -> tuple[int, int] | None:
    """The first two steps at which the model's belief and the action were the same, and what followed was not."""
    infer = adapt(model).infer
    seen: dict[Any, tuple[int, torch.Tensor]] = {}
    episode = record.episode
    for t, action in enumerate(episode.actions):
        seen_now = world.belief(episode.observations[t])
        belief = infer(seen_now if world.plain else seen_now.unsqueeze(0))
        key = (tuple(belief.reshape(-1).tolist()) if isinstance(belief, torch.Tensor) else belief, str(action))
        after = world.embed(world.belief(episode.observations[t + 1]))
        if key in seen and float((seen[key][1] - after).norm()) > 1e-3:
            return seen[key][0], t
        seen.setdefault(key, (t, after))
    return None


def _coverage(record: Any, model: Any, world: World) -> float | None:
    if world.plain or len(record.episode) < 20:
        return None
    adapted = adapt(model)
    beliefs = torch.stack([world.belief(o) for o in record.episode.observations])
    stated = adapted.predict(adapted.infer(beliefs[:-1]), world.batch_actions(record.episode.actions))
    if stated is None:
        return None
    mean, deviation = stated
    return float(((beliefs[1:] - mean).abs() <= NORMAL_90 * deviation).float().mean())
