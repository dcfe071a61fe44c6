"""``certify``: the level of a world model is earned by tests on the real engine, never declared.

Level 1 asks for calibrated one-step prediction; level 2 adds the three boundary conditions of a simulator (arXiv
2604.22748, section 4): long-horizon coherence, sensitivity to interventions, consistency with laws. The paper gives no
thresholds; :data:`THRESHOLDS` is this project's, in one table. A condition is pass, fail, inconclusive (the sample cannot
say) or untested; untested never counts as passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, check_seed
from telltale.errors import ConfigError
from telltale.world.coherence import Coherence, coherence, objections, segments
from telltale.world.collection import collect
from telltale.world.collection import episodes as random_episodes
from telltale.world.counterfactuals import Sensitivity, response
from telltale.world.evaluation import Evaluation, evaluate
from telltale.world.laws.law import Enforcement, InfeasibleLaw, Law, checked_laws, enforcement
from telltale.world.metrics import PlanningGap, bootstrap, planning_gap
from telltale.world.planners.planning import planner_for
from telltale.world.prediction import Prediction, predict_held_out
from telltale.world.protocol import DivergedError, adapt
from telltale.world.transitions import Transitions, check_disjoint
from telltale.world.worlds.base import Episode, World, replays

PASS, FAIL, INCONCLUSIVE, UNTESTED = "pass", "fail", "inconclusive", "untested"


@dataclass(frozen=True)
class Threshold:
    """One number of the table, and what it bounds."""

    value: float
    meaning: str


THRESHOLDS: dict[str, Threshold] = {
    "likelihood_gain": Threshold(
        0.0, "level 1: held-out log-likelihood above the baseline's by more than this (lower 95% bound)"
    ),
    "coverage_low": Threshold(0.87, "level 1: 90% intervals cover at least this share of held-out outcomes"),
    "coverage_high": Threshold(0.93, "level 1: and at most this share (numeric states)"),
    "error": Threshold(0.5, "level 2, coherence: H* is the last horizon with normalised error up to this"),
    "asr_margin": Threshold(0.1, "level 2, coherence: ASR at most this much below oracle dynamics (lower 95% bound)"),
    "ratio_low": Threshold(0.5, "level 2, sensitivity: divergence over the engine's at least this"),
    "ratio_high": Threshold(2.0, "level 2, sensitivity: and at most this"),
    "direction": Threshold(0.8, "level 2, sensitivity: mean cosine with the engine's change (lower 95% bound)"),
    "null": Threshold(0.0, "level 2, sensitivity: divergence under the null intervention, exactly"),
    "raw_violations": Threshold(
        0.05, "level 2, consistency: share of raw predictions, per particle, that break a hard law"
    ),
    "enforced_violations": Threshold(0.0, "level 2, consistency: the same after enforcement"),
    "objections": Threshold(
        0.01, "level 2, consistency: share of the engine's own transitions to which a hard law may object"
    ),
    "episodes": Threshold(30, "level 2: least number of paired starts"),
}
"""Every number that decides a certificate."""


@dataclass(frozen=True)
class Condition:
    """One tested condition: ``status``, the ``figures`` that decided it, and a sentence that says why."""

    level: int
    status: str
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Certificate:
    """What was tested and found. ``level`` is the highest level whose conditions, and those below, all pass; 0 if none."""

    world: str
    model: str
    requested: int
    conditions: dict[str, Condition]
    cpu_seconds: float = 0.0
    evaluation: Evaluation | None = field(default=None, repr=False)
    oracle: Evaluation | None = field(default=None, repr=False)
    gap: PlanningGap | None = None
    coherence: Coherence | None = field(default=None, repr=False)
    sensitivity: Sensitivity | None = field(default=None, repr=False)
    prediction: Prediction | None = field(default=None, repr=False)

    @property
    def level(self) -> int:
        """The earned level."""
        earned = 0
        for level in range(1, self.requested + 1):
            statuses = [c.status for c in self.conditions.values() if c.level == level]
            if not statuses or any(status != PASS for status in statuses):
                break
            earned = level
        return earned

    @property
    def passed(self) -> bool:
        """Whether the requested level was earned."""
        return self.level >= self.requested

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "world": self.world, "model": self.model, "requested_level": self.requested, "level": self.level,
            "conditions": {name: asdict(condition) for name, condition in self.conditions.items()},
            "planning_gap": None if self.gap is None else asdict(self.gap),
            "asr": None if self.evaluation is None else self.evaluation.asr,
            "oracle_asr": None if self.oracle is None else self.oracle.asr,
            "cpu_seconds": round(self.cpu_seconds, 2),
        }  # fmt: skip

    def save(self, path: Any, **extra: Any) -> Any:
        """Write the bundle of the evaluation with this certificate in it: see :func:`telltale.world.mrep.write_bundle`.

        Raises :class:`~telltale.errors.ConfigError` for a certificate without evaluated episodes: of level 1 alone, or of a model
        in which nothing could be planned.
        """
        if self.evaluation is None:
            raise ConfigError(
                "the certificate has no evaluated episodes to bundle; certify level 2, of a model in which the planner can plan."
            )
        return self.evaluation.save(path, certificate=self, **extra)


def certify(
    model: Any,
    world: World,
    level: int = 2,
    *,
    planner: Any = None,
    episodes: int = 30,
    horizon: int | None = None,
    laws: Sequence[Law] | None = None,
    mode: str | Enforcement = "project",
    held_out: Transitions | None = None,
    fitted_on: Transitions | None = None,
    reward: str = "known",
    oracle: Any | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Certificate:
    """Test ``model`` in ``world`` for ``level`` 1 or 2 and say what it earned.

    ``held_out``: transitions that the model was not fitted on; None collects 600 random ones from seeds of its own.
    ``fitted_on``: what it was fitted on, to prove that none of it is held out (numeric worlds; plain states repeat).
    ``oracle`` None takes the world's; without one the comparison with oracle dynamics is untested. Counterfactuals are compared
    with the engine itself, by replaying the episode up to the intervention, where the world is deterministic. ``resume`` is a
    folder for finished episodes: after an interruption the same call goes on from there. ``settings`` are fields of the planner.
    ``progress(stage, done, total)``.

    Raises :class:`~telltale.errors.ConfigError` for another level or an argument out of range.
    """
    check_seed(seed)
    if level not in (1, 2):
        raise ConfigError(f"level={level!r} cannot be certified here; expected 1 or 2. Level 3 is a life, not a model.")
    check_integer("episodes", episodes, low=1)
    began = time.process_time()
    certificate = Certificate(world.id, type(model).__name__, level, {})
    chosen_laws = checked_laws(world.laws if laws is None else laws, plain=world.plain)
    evidence = held_out if held_out is not None else collect(world, steps=600, seed=seed + 77_777)
    if fitted_on is not None and not world.plain:
        check_disjoint(fitted_on, evidence)
    certificate.prediction = predict_held_out(model, world, evidence, seed=seed)
    certificate.conditions.update(_level_one(certificate.prediction, plain=world.plain))
    if level == 2:
        truth = oracle if oracle is not None else world.oracle()
        acting = planner_for(world, planner, **settings)
        common = {"planner": acting, "episodes": episodes, "horizon": horizon, "seed": seed}
        broken = ""
        try:
            certificate.evaluation = evaluate(
                model, world, laws=chosen_laws, mode=mode, reward=reward, progress=_stage(progress, "model"),
                kept=_part(resume, "model"), **common,
            )  # fmt: skip
        except (DivergedError, InfeasibleLaw) as error:
            broken = str(error)
        if truth is not None and certificate.evaluation is not None:
            certificate.oracle = evaluate(
                truth, world, laws=(), progress=_stage(progress, "oracle"), kept=_part(resume, "oracle"), **common
            )
            certificate.gap = planning_gap(
                certificate.evaluation.successes, certificate.oracle.successes, margin=THRESHOLDS["asr_margin"].value
            )
        steps = next(steps for steps in (horizon, acting.horizon, world.horizon) if steps is not None)
        _test_simulator(certificate, model, world, chosen_laws, enforcement(mode), truth, seed, steps, broken)
    certificate.cpu_seconds = time.process_time() - began
    return certificate


def _part(folder: str | Path | None, name: str) -> Path | None:
    return None if folder is None else Path(folder) / name


def _stage(progress: Callable[[str, int, int], None] | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _level_one(found: Prediction, *, plain: bool) -> dict[str, Condition]:
    better = found.gain_low > THRESHOLDS["likelihood_gain"].value
    unit = "share of exact states" if plain else "nats per transition"
    low, high = THRESHOLDS["coverage_low"].value, THRESHOLDS["coverage_high"].value
    base = "no change" if plain else "the mean change"
    covers = found.coverage >= low and (found.exact or found.coverage <= high)
    return {
        "likelihood": Condition(
            1, PASS if better else FAIL, f"{found.gain:+.3g} {unit} over the baseline that predicts {base}",
            {"gain": found.gain, "low": found.gain_low, "transitions": found.transitions, "one_step_r_squared": found.r_squared},
        ),
        "calibration": Condition(
            1, PASS if covers else FAIL, f"90% intervals cover {found.coverage:.1%}; from {found.source}",
            {"coverage": found.coverage, "source": found.source},
        ),
        "robustness": Condition(
            1, PASS if found.finite else FAIL,
            "finite under perturbed inputs" if found.finite else "NaN, infinity or an exception under perturbed inputs",
        ),
    }  # fmt: skip


def _test_simulator(
    certificate: Certificate, model: Any, world: World, laws: tuple[Law, ...], mode: Enforcement, truth: Any, seed: int,
    horizon: int, broken: str,
) -> None:  # fmt: skip
    played = [record.episode for record in certificate.evaluation.records] if certificate.evaluation else []
    played += random_episodes(world, steps=min(600, 4 * world.max_steps), seed=seed + 55_555)
    noisy = not world.deterministic or world.regime == "social" or getattr(world, "noise", 0.0) > 0
    floor = truth if noisy or getattr(truth, "stochastic", False) else None
    certificate.coherence = coherence(
        model,
        world,
        played,
        length=max(horizon, min(50, world.max_steps)),
        laws=laws,
        mode=mode,
        oracle=floor,
        seed=seed,
    )
    if broken:
        certificate.conditions["coherence"] = Condition(2, FAIL, f"planning in the model broke down: {broken}")
    else:
        certificate.conditions["coherence"] = _coherent(certificate, horizon, above_floor=floor is not None)
    try:
        certificate.sensitivity = _probed(model, world, played, truth, horizon, seed)
        certificate.conditions["sensitivity"] = _sensitive(certificate.sensitivity, seed)
    except DivergedError as error:
        certificate.conditions["sensitivity"] = Condition(2, FAIL, f"an intervention broke the model down: {error}")
    objected = objections(world, played, [law for law in laws if law.hard])
    certificate.conditions["consistency"] = _consistent(certificate.coherence, objected, mode)


def _coherent(certificate: Certificate, horizon: int, *, above_floor: bool) -> Condition:
    assert certificate.coherence is not None
    assert certificate.evaluation is not None
    reach = certificate.coherence.reach(THRESHOLDS["error"].value, above_floor=above_floor)
    figures: dict[str, Any] = {"reach": reach, "horizon": horizon, "asr": certificate.evaluation.asr}
    measured = len(certificate.coherence.errors)
    far = reach >= min(horizon, measured)
    words = f"H* = {reach} for a planner's horizon of {horizon}"
    if measured < horizon:
        words += f" (no episode lasted longer than {measured} steps)"
    gap, count = certificate.gap, len(certificate.evaluation.records)
    if gap is None:
        return Condition(2, UNTESTED if far else FAIL, f"{words}; no oracle dynamics to compare the ASR with", figures)
    figures |= {"oracle_asr": gap.oracle, "gap_low": gap.gap.low, "gap_high": gap.gap.high, "bottleneck": gap.verdict}
    words += f"; ASR {gap.model:.2f} against {gap.oracle:.2f} with oracle dynamics ({count} paired starts)"
    margin = -THRESHOLDS["asr_margin"].value
    if not far or gap.gap.high < margin:
        return Condition(2, FAIL, words, figures)
    least = THRESHOLDS["episodes"].value
    doubt = ""
    if count < least:
        doubt = f"at least {least:.0f} starts are needed"
    elif gap.oracle == 0:
        doubt = "the planner fails even with oracle dynamics, so the model cannot show anything"
    elif gap.gap.low < margin:
        doubt = f"the interval allows a gap of {-gap.gap.low:.2f}, so run more starts"
    return Condition(2, INCONCLUSIVE, f"{words}; {doubt}", figures) if doubt else Condition(2, PASS, words, figures)


def _probed(model: Any, world: World, played: list[Episode], truth: Any, horizon: int, seed: int) -> Sensitivity | None:
    """Interventions at the first, middle and last step of segments, in the model and in the engine."""
    parts = [part for part in segments(world, played, horizon, 24, seed=seed + 1) if len(part.actions) >= 1]
    if not parts:
        return None
    generator = torch.Generator().manual_seed(seed)
    replayable = world.deterministic and world.regime != "social" and replays(world, parts[0].episode)
    if not replayable and truth is None:
        return None
    found = Sensitivity([], [], [], 0.0)
    engine = world.spawn() if replayable else None
    adapted = adapt(model)
    try:
        for number, part in enumerate(parts):
            actions: Any = part.actions if world.plain else world.batch_actions(part.actions)
            for k in sorted({1, (len(part.actions) + 1) // 2, len(part.actions)}):
                other = _alternative(world, part.actions[k - 1], part, k, generator)
                if other is None:
                    continue
                alternative = other if world.plain else world.batch_actions([other])[0]
                noise = torch.Generator().manual_seed(seed + number)
                if engine is not None:
                    at, real = _engines_response(world, engine, part, k, other)
                else:
                    at = None
                    real, _ = response(
                        truth, part.belief, actions, k, alternative, embed=world.embed, generator=noise, null=False
                    )
                mine, null = response(
                    adapted, part.belief, actions, k, alternative, embed=world.embed, generator=noise, at=at
                )
                found = found.extended(mine, real, null, k)
    finally:
        if engine is not None:
            engine.close()
    return found if found.divergence else None


def _engines_response(world: World, engine: World, part: Any, k: int, other: Any) -> tuple[int, Tensor]:
    """What the k-th action changes in the engine, by replay of the episode up to it; and after how many steps that was seen.

    Where the engine ends the changed episode early, that is earlier than the last step of the segment.
    """
    changed = [*part.actions]
    changed[k - 1] = other
    engine.reset(part.episode.seed)
    for action in part.episode.actions[: part.start]:
        engine.step(action)
    steps = 0
    for action in changed:
        outcome = engine.step(action)
        steps += 1
        if outcome.terminated:
            break
    ends = (world.belief(outcome.observation), part.after[steps - 1])
    one, two = (world.embed(end).double().reshape(-1) for end in ends)
    return steps, one - two


def _alternative(world: World, action: Any, part: Any, k: int, generator: torch.Generator) -> Any:
    """Another action, as far away as the space allows; only legal ones in a game. None where there is no other."""
    if hasattr(world, "legal"):
        options = [a for a in (world.legal(part.belief) if k == 1 else []) if a != action]
        return options[int(torch.randint(len(options), (), generator=generator))] if options else None
    if world.discrete:
        shift = 1 + int(torch.randint(world.action_width - 1, (), generator=generator)) if world.action_width > 1 else 0
        return (int(action) + shift) % world.action_width if shift else None
    low, high = (
        torch.as_tensor(bound, dtype=torch.float64).reshape(-1)
        for bound in (world.action_space.low, world.action_space.high)
    )
    now = torch.as_tensor(action, dtype=torch.float64).reshape(-1)
    return torch.where(now > (low + high) / 2, low, high).tolist()


def _sensitive(found: Sensitivity | None, seed: int) -> Condition:
    if found is None:
        return Condition(2, UNTESTED, "no oracle, and no replay of the engine, to compare interventions with")
    if not found.direction:
        return Condition(2, INCONCLUSIVE, "no intervention changed the real outcome", {"probes": len(found.oracle)})
    low = bootstrap(found.direction, statistic=_mean, confidence=0.9, resamples=500, seed=seed).low
    mean = sum(found.direction) / len(found.direction)
    ratio = found.ratio
    figures = {
        "ratio": ratio, "direction": mean, "direction_low": low, "null": found.null, "probes": len(found.oracle),
        "responding": found.responding, "divergence": sum(found.divergence) / len(found.divergence),
        "engine_divergence": sum(found.oracle) / len(found.oracle),
        "by_step": {str(k): {"model": m, "engine": e} for k, (m, e) in found.by_step().items()},
    }  # fmt: skip
    words = f"divergence {ratio:.2f} of the engine's, direction {mean:.3f} (at least {low:.3f}), null {found.null:g}"
    if found.null != THRESHOLDS["null"].value:
        above = [change - null for change, null in zip(found.divergence, found.nulls, strict=True)]
        heard = bootstrap(above, statistic=_mean, confidence=0.9, resamples=500, seed=seed).low > 0
        figures["divergence_above_null"] = sum(above) / len(above)
        words += "; the model keeps state between calls, or draws noise that no generator replays"
        return Condition(2, FAIL, words if heard else f"{words}, and beyond that it is deaf to actions", figures)
    if not THRESHOLDS["ratio_low"].value <= ratio <= THRESHOLDS["ratio_high"].value:
        return Condition(2, FAIL, words, figures)
    if low >= THRESHOLDS["direction"].value:
        return Condition(2, PASS, words, figures)
    return Condition(2, INCONCLUSIVE if mean >= THRESHOLDS["direction"].value else FAIL, words, figures)


def _consistent(found: Coherence, objected: dict[str, float], mode: Enforcement) -> Condition:
    """``objected``: by hard law, the share of the engine's own transitions that break it."""
    if not objected:
        return Condition(2, UNTESTED, "the world has no hard law; pass laws=")
    figures = {
        "raw": found.raw,
        "enforced": found.enforced,
        "unenforced_trajectories": found.free,
        "mode": mode.mode,
        "by_law": found.by_law,
        "engine": objected,
    }
    worst = max(objected, key=objected.__getitem__)
    if objected[worst] > THRESHOLDS["objections"].value:
        return Condition(
            2, INCONCLUSIVE,
            f"law {worst!r} objects to {objected[worst]:.1%} of the engine's own transitions; calibrate its tolerance", figures,
        )  # fmt: skip
    words = f"{found.raw:.2%} of raw predictions break a hard law, {found.enforced:.2%} after {mode.mode}"
    if found.enforced > THRESHOLDS["enforced_violations"].value:
        return Condition(2, FAIL, words, figures)
    if found.raw > THRESHOLDS["raw_violations"].value:
        return Condition(2, FAIL, f"{words}: enforced only", figures)
    return Condition(2, PASS, words, figures)


def _mean(values: Any) -> float:
    return float(values.mean())
