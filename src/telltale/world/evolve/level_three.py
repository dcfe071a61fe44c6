"""Level 3 is a property of a life, not of a model: six conditions, each with a rule, computed from what a life left behind.

The paper (arXiv 2604.22748) has two lists of three; both are asked for. From its definitions: diagnosis on evidence, an asset
that persists, governed validation. From its section 5: active information expansion, autonomous execution, belief revision under
challenge. Levels 1 and 2 of the revised model count first; untested and inconclusive never count as passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from telltale.errors import ConfigError
from telltale.world.certificate import FAIL, INCONCLUSIVE, PASS, UNTESTED, Certificate, Condition
from telltale.world.evaluation import evaluate
from telltale.world.evolve.chain import digest
from telltale.world.evolve.diagnosis import CANNOT_TELL
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.gates import recomputed
from telltale.world.evolve.life import LifeLog, Round, contiguous
from telltale.world.evolve.monitor import same_predictions
from telltale.world.evolve.version_registry import WORDS, Registry
from telltale.world.metrics import mean_at_least, paired_difference
from telltale.world.records import plain_value
from telltale.world.worlds.base import World, run_episode

RULES = {
    "diagnosis": "every promotion follows a diagnosis that names a component, on evidence that verifies",
    "asset": "the promoted version is read back from disk, its hash is its id, and it predicts otherwise than its parent",
    "validation": "every promotion has a receipt that can be computed again, a shadow and a canary; a candidate was rejected; a "
    "rollback brought a version back whose bytes are its id",
    "expansion": "probes by disagreement were made before a promotion, and leave less error where decisions are made than random "
    "ones of equal budget (lower 95% bound)",
    "autonomy": "rounds without gap or doubling, nobody's approval or handover, and episodes that the engine repeats bit for bit",
    "revision": "after the change the promoted version succeeds within 5 points of the oracle on at least 100 paired starts, and "
    "more than the version before it (lower 95% bound)",
}
"""The rule of each condition."""
POINTS, STARTS, REPLAYED = 0.05, 100, 10


@dataclass(frozen=True)
class Recovery:
    """Successes by paired start after the change: of the promoted version, the one before it, and the oracle."""

    revised: list[bool]
    before: list[bool]
    oracle: list[bool]


def recover(
    registry: Registry,
    changed: World,
    promoted: str,
    *,
    episodes: int = STARTS,
    laws: Sequence[Any] | None = None,
    **planner: Any,
) -> Recovery:
    """Play the promoted version, its parent and the world's oracle in the ``changed`` world from the same starts."""
    version = registry.version(promoted)
    assert version.parent is not None
    models = version.load(), registry.version(version.parent).load(), changed.oracle()
    settings = {"batch": episodes, **planner}
    return Recovery(*(evaluate(m, changed, episodes=episodes, laws=laws, **settings).successes for m in models))


def certify_life(
    path: str | Path,
    world: World,
    *,
    levels: Certificate | None = None,
    recovery: Recovery | None = None,
    probing: Sequence[tuple[float, float]] = (),
) -> Certificate:
    """The certificate of the life in ``path``, lived in ``world``.

    ``levels``: the certificate of levels 1 and 2 of the promoted version in the changed world; without it level 3 cannot be earned.
    ``probing``: pairs (error after probes, error after as many random steps) of repeated trials, the error that of the candidate in
    states and actions of planned episodes. ``world`` is played again for
    :data:`REPLAYED` of the life's episodes.
    """
    registry, evidence, life = Registry(path), Evidence(Path(path) / "evidence"), LifeLog(Path(path) / "life")
    rounds = life.rounds()
    conditions = dict(levels.conditions) if levels is not None else {
        "levels 1 and 2": Condition(2, UNTESTED, "the promoted version was not certified; pass levels=")
    }  # fmt: skip
    promotions = _promotions(rounds)
    conditions |= recorded(rounds, registry, evidence)
    conditions["expansion"] = _expanded(rounds, promotions, probing)
    conditions["autonomy"] = _autonomous(rounds, registry, life, world)
    conditions["revision"] = _revised(rounds, promotions, recovery)
    name = registry.active().document["kind"]
    found = Certificate(world.id, f"{name} ({len(registry.versions())} versions)", 3, conditions)
    found.cpu_seconds = 0.0 if levels is None else levels.cpu_seconds
    return found


Promotions = list[tuple[Round, dict[str, Any]]]


def recorded(rounds: Sequence[Round], registry: Registry, evidence: Evidence) -> dict[str, Condition]:
    """The conditions that a life's folder decides alone: whoever has it can compute them again."""
    promotions = _promotions(rounds)
    return {
        "diagnosis": _diagnosed(rounds, promotions, evidence),
        "asset": _kept(promotions, registry, evidence),
        "validation": _governed(rounds, promotions, registry, evidence),
    }


def _promotions(rounds: Sequence[Round]) -> Promotions:
    return [(r, e) for r in rounds for e in r.events if e["what"] == "promotion"]


def _diagnosed(rounds: Sequence[Round], promotions: Promotions, evidence: Evidence) -> Condition:
    if not promotions:
        return Condition(3, UNTESTED, "nothing was promoted")
    named, before = [], 0
    for done, _ in promotions:
        earlier = [e for r in rounds[before : done.number] for e in r.events if e["what"] == "diagnosis"]
        named.append(earlier[-1]["diagnosis"]["component"] if earlier else "none")
        before = done.number
    broken = evidence.verify().findings
    words = f"components named before the promotions: {', '.join(named)}"
    if broken:
        return Condition(3, FAIL, f"the evidence does not verify: {broken[0].file}: {broken[0].problem}")
    if any(name == "none" for name in named):
        return Condition(3, FAIL, words)
    return Condition(3, INCONCLUSIVE if CANNOT_TELL in named else PASS, words, {"components": named})


def _kept(promotions: Promotions, registry: Registry, evidence: Evidence) -> Condition:
    if not promotions:
        return Condition(3, UNTESTED, "nothing was promoted")
    for _, event in promotions:
        version = registry.version(event["version"])
        assert version.parent is not None
        data = evidence.read(event["batches"][0])
        if same_predictions(version.load(), registry.version(version.parent).load(), data):
            return Condition(3, FAIL, f"version {version.id[:12]} predicts the same bits as its parent")
    return Condition(3, PASS, f"{len(promotions)} promoted versions read back, and none predicts as its parent does")


def _governed(rounds: Sequence[Round], promotions: Promotions, registry: Registry, evidence: Evidence) -> Condition:
    broken = registry.verify().findings
    if broken:
        return Condition(3, FAIL, f"the registry does not verify: {broken[0].file}: {broken[0].problem}")
    events = [(r.number, e) for r in rounds for e in r.events]
    receipts = {r.seal: r for r in registry.receipts()}
    for done, event in promotions:
        for stage in ("shadow", "canary"):
            if not any(
                e["what"] == stage and e.get("version") == event["version"] for n, e in events if n <= done.number
            ):
                return Condition(3, FAIL, f"version {event['version'][:12]} became active without a {stage}")
        if event["receipt"] not in receipts:
            return Condition(3, FAIL, f"the registry has no receipt of version {event['version'][:12]}")
        receipt = receipts[event["receipt"]]
        sides = registry.version(receipt.candidate).load(), registry.version(receipt.incumbent).load()
        if not recomputed(receipt, evidence, *sides):
            return Condition(
                3, FAIL, f"the receipt of version {event['version'][:12]} does not follow from its evidence"
            )
    rejected = sum(e["what"] == "gate" and not e["passed"] for _, e in events)
    back = [e for _, e in events if e["what"] == "rollback"]
    for event in back:
        registry.version(event["version"]).load()
    figures = {"promotions": len(promotions), "rejected": rejected, "rollbacks": len(back), "trials": registry.trials()}
    words = f"{len(promotions)} promotions with receipts computed again, {rejected} candidates rejected, {len(back)} rollbacks"
    if not promotions or not rejected or not back:
        return Condition(3, UNTESTED, f"{words}; each has to have happened", figures)
    return Condition(3, PASS, words, figures)


def _expanded(rounds: Sequence[Round], promotions: Promotions, probing: Sequence[tuple[float, float]]) -> Condition:
    probes = [e for r in rounds for e in r.events if e["what"] == "probes" and e["directed"]]
    if not promotions or not probes:
        return Condition(3, UNTESTED, "no probes were made")
    if len(probing) < 5:
        return Condition(3, UNTESTED, f"{len(probes)} rounds of probes; not compared with random ones at equal budget")
    gains = [random - probed for probed, random in probing]
    low = mean_at_least(gains, alpha=0.05)
    mean = sum(gains) / len(gains)
    words = f"{mean:+.4g} less error where decisions are made than after random steps (at least {low:+.4g}, {len(gains)} trials)"
    return Condition(3, PASS if low > 0 else INCONCLUSIVE if mean > 0 else FAIL, words, {"gain": mean, "low": low})


def _autonomous(rounds: Sequence[Round], registry: Registry, life: LifeLog, world: World) -> Condition:
    if life.findings() or not contiguous(rounds):
        return Condition(3, FAIL, "rounds are missing, doubled or damaged")
    asked = [e for e in registry.log() if e["kind"] in WORDS]
    if asked:
        return Condition(3, FAIL, f"a person approved or declined {len(asked)} promotions")
    if any(e["what"] == "handover" for r in rounds for e in r.events):
        return Condition(3, FAIL, "a person made a version active by hand")
    if not world.deterministic:
        return Condition(3, UNTESTED, "the engine does not repeat itself, so that no episode can be checked")
    different = replayed_differently(rounds, world, REPLAYED)
    if different:
        return Condition(3, FAIL, f"the engine does not repeat episode {different[0]}")
    words = f"{len(rounds)} rounds without gap, no approval, {REPLAYED} episodes replayed bit for bit"
    return Condition(3, PASS, words, {"rounds": len(rounds)})


def replayed_differently(rounds: Sequence[Round], world: World, count: int) -> list[int]:
    """Starts of those among ``count`` episodes, spread over the life, whose observations, return or success it does not give.

    A success only where one is claimed: an episode without a plan counts as failed, whatever came of it.
    """
    before = [0, *(r.state.steps for r in rounds)]
    kept = [(first, episode) for first, r in zip(before, rounds, strict=False) for episode in r.episodes]
    wrong = []
    for clock, episode in kept[:: max(1, len(kept) // max(1, count))][:count]:
        if hasattr(world, "clock"):
            world.clock = clock
        engine, actions = world.spawn(), iter(episode["actions"])
        played = run_episode(engine, episode["seed"], partial(_next, actions), max_steps=len(episode["actions"]))
        engine.close()
        same = (
            digest(plain_value(played.observations)) == episode["observed"] and float(played.total) == episode["return"]
        )
        if not same or (episode["success"] and not world.success(played)):
            wrong.append(int(episode["seed"]))
    return wrong


def _next(actions: Iterator[Any], observation: Any) -> Any:
    """What was done next, whatever is observed."""
    return next(actions)


def _revised(rounds: Sequence[Round], promotions: Promotions, recovery: Recovery | None) -> Condition:
    alarms = [e for r in rounds for e in r.events if e["what"] == "alarm"]
    if not alarms or not promotions:
        return Condition(3, UNTESTED, "nothing challenged the model, or it was not revised")
    if recovery is None:
        return Condition(3, UNTESTED, "the promoted version was not played in the changed world; pass recovery=")
    count = len(recovery.revised)
    if not count or {len(recovery.before), len(recovery.oracle)} != {count}:
        sizes = f"{count}, {len(recovery.before)} and {len(recovery.oracle)}"
        raise ConfigError(f"recovery has {sizes} starts; expected the same starts of all three.")
    wins = [sum(side) for side in (recovery.revised, recovery.before, recovery.oracle)]
    low = paired_difference(recovery.revised, recovery.before, confidence=0.9).low
    rates = [w / count for w in wins]
    words = f"ASR {rates[0]:.2f} on {count} starts, {rates[1]:.2f} before, {rates[2]:.2f} with oracle dynamics"
    figures = {"revised": rates[0], "before": rates[1], "oracle": rates[2], "starts": count, "gain_low": low}
    if count < STARTS:
        return Condition(3, INCONCLUSIVE, f"{words}; at least {STARTS} starts are needed", figures)
    good = rates[0] >= rates[2] - POINTS and low > 0
    return Condition(3, PASS if good else FAIL, words, figures)
