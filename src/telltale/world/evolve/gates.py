"""The gate: may a candidate replace the incumbent? Judged on evidence that the candidate's author did not supply.

Cheap checks come first and a failed one ends the trial. ``independence`` and ``gain`` protect from a candidate that is only good
on its own evidence, ``interventions`` from one that is deaf to actions, ``regression`` from forgetting, ``laws`` and ``robustness``
from one that is accurate and unlawful or brittle, ``asr`` from one that predicts better and decides worse. The gain's
error is spent over all candidates that a registry has ever judged.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from telltale.config import check_integer, check_range
from telltale.errors import ConfigError, TelltaleError
from telltale.world.coherence import objections
from telltale.world.counterfactuals import Sensitivity, response
from telltale.world.evaluation import Evaluation, evaluate
from telltale.world.evolve.evidence import Batch, Evidence
from telltale.world.evolve.monitor import residuals
from telltale.world.evolve.receipts import FAIL, PASS, SKIPPED, Check, Receipt, overspent, spent
from telltale.world.laws.law import Law
from telltale.world.metrics import mean_at_least, paired_difference, pairs_needed
from telltale.world.protocol import DivergedError, adapt
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import Episode, World, replays, run_episode

OWN_PROBES = "gate"
"""The source of evidence that the gate collected itself."""
CONFIDENCE = 0.9
"""Of the two-sided interval of the success rate, so that its lower bound errs with 5%."""
TWIN, MOST_TWINS = 1e-3, 0.1
"""Rows are twins within this share of each column's spread; evidence of others with a larger share of twins is a copy."""


@dataclass(frozen=True)
class GateConfig:
    """Settings of a gate. ``alpha``: error of the gain over all candidates of a registry. ``margin``: a gain below this share of
    the incumbent's error is none, and neither is one below ``floor`` (in mean squared changes: 1e-4 is an
    error of 1%). ``clusters`` probes of ``length``
    steps are collected. ``asr_margin``: how much worse the success rate may be, by ``asr_episodes`` paired starts.
    ``regression_error``: a case passes up to this root mean square error, in spreads of the changes.

    Raises :class:`~telltale.errors.ConfigError` for too few ``asr_episodes`` to let a candidate pass that succeeds just where the
    incumbent does."""

    alpha: float = 0.05
    margin: float = 0.05
    floor: float = 1e-4
    clusters: int = 60
    length: int = 10
    asr_episodes: int = 30
    asr_margin: float = 0.1
    regression_error: float = 0.1
    law_slack: float = 0.005
    counterfactuals: int = 24

    def __post_init__(self) -> None:
        for name in ("alpha", "margin", "regression_error", "law_slack"):
            check_range(name, getattr(self, name), low=0.0, below=1.0)
        check_range("asr_margin", self.asr_margin, above=0.0, below=1.0)
        check_range("floor", self.floor, low=0.0)
        for name, low in (("clusters", 8), ("length", 1), ("asr_episodes", 1), ("counterfactuals", 4)):
            check_integer(name, getattr(self, name), low=low)
        least = pairs_needed(self.asr_margin, confidence=CONFIDENCE)
        if self.asr_episodes < least:
            raise ConfigError(
                f"asr_episodes is {self.asr_episodes}: so few starts cannot show that a candidate as good as the incumbent is at "
                f"most {self.asr_margin:g} worse (asr_margin); expected at least {least}."
            )


def errors(model: Any, evidence: Transitions) -> torch.Tensor:
    """One number per transition: 0 or 1 for plain states; else the squared residual in units of the column's mean squared change
    on this evidence, mean over columns, at most 100. Squared, because what a step predicts is a mean."""
    off = residuals(model, evidence)
    if evidence.plain:
        return off[:, 0]
    change = (evidence.after - evidence.before).pow(2).mean(0).sqrt().clamp(min=1e-6)
    return (off / change).pow(2).mean(1).clamp(max=100.0)


def random_episodes(world: World, seeds: Sequence[int], length: int) -> list[Episode]:
    """One episode of random actions a seed, which fixes start and actions, on one engine."""
    engine, found = world.spawn(), []
    try:
        for seed in seeds:
            draw = torch.Generator().manual_seed(seed)

            def act(observation: Any, draw: torch.Generator = draw) -> Any:
                return engine.sample_action(draw)

            found.append(run_episode(engine, seed, act, max_steps=length))
    finally:
        engine.close()
    return found


def probe_starts(config: GateConfig, seed: int, trial: int) -> range:
    """The starts of the gate's own probes: whoever has the engine can collect them again."""
    first = 50_000_000 + seed * 1_000_003 + trial * 1009
    return range(first, first + config.clusters)


@dataclass(frozen=True)
class Gain:
    """``relative``: share of the incumbent's error that goes; ``low``: lower bound of the gain above margin and floor, in the unit
    of :func:`errors`; it has to be above 0."""

    relative: float
    low: float
    incumbent: float
    candidate: float
    clusters: int


def gain_of(
    incumbent: torch.Tensor,
    candidate: torch.Tensor,
    episodes: torch.Tensor,
    *,
    alpha: float,
    margin: float,
    floor: float,
) -> Gain:
    """Test the mean over episodes of (1 - margin) * incumbent - candidate - floor against 0, one-sided
    (:func:`~telltale.world.metrics.mean_at_least`).

    Steps of one episode are not independent, so an episode is one observation. Fewer than eight decide nothing.
    """
    _, where = episodes.unique(return_inverse=True)
    count = int(where.max()) + 1
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
    both = [
        torch.zeros(count, dtype=torch.float64).index_add_(0, where, e.double()) / sizes for e in (incumbent, candidate)
    ]
    found = ((1 - margin) * both[0] - both[1] - floor).numpy()
    means = float(both[0].mean()), float(both[1].mean())
    relative = (means[0] - means[1]) / max(means[0], 1e-12)
    if count < 8:
        return Gain(relative, -math.inf, *means, count)
    return Gain(relative, mean_at_least(found, alpha=alpha), *means, count)


class Gate:
    """A gate of ``world`` that keeps its evidence in ``evidence``. ``seed`` fixes its probes and its starts."""

    def __init__(
        self,
        world: World,
        evidence: Evidence,
        config: GateConfig | None = None,
        *,
        seed: int = 0,
        planner: dict[str, Any] | None = None,
    ) -> None:
        self.world, self.evidence, self.config, self.seed = world, evidence, config or GateConfig(), seed
        self.planner = planner or {}
        self.suspended: tuple[str, ...] = ()
        self.env_steps = 0

    @property
    def enforced(self) -> tuple[Law, ...]:
        """The world's laws without those that are suspended."""
        return tuple(law for law in self.world.laws if law.name not in self.suspended)

    def contested(self, own: Sequence[Episode]) -> set[str]:
        """Hard laws that more than 1% of the engine's own steps break."""
        hard = [law for law in self.world.laws if law.hard]
        return {name for name, share in objections(self.world, own, hard).items() if share > 0.01} if own else set()

    def probes(self, trial: int) -> tuple[Batch, list[Episode]]:
        """New evidence of the gate's own: ``clusters`` random episodes of ``length`` steps from starts that nobody else uses."""
        found = random_episodes(self.world, probe_starts(self.config, self.seed, trial), self.config.length)
        self.env_steps += sum(len(e) for e in found)
        kept = self.evidence.add(
            Transitions.from_episodes(self.world, found), source=OWN_PROBES, role="gate", note=f"trial {trial}"
        )
        return kept, found

    def judge(
        self,
        candidate: Any,
        incumbent: Any,
        *,
        candidate_id: str,
        incumbent_id: str,
        fitted_on: Sequence[str],
        trial: int,
        batches: Sequence[Batch] | None = None,
        probed: Sequence[Episode] | None = None,
        suite: Sequence[Episode] = (),
    ) -> Receipt:
        """Judge one candidate. ``batches`` None collects the gate's own probes; else those of at least two sources, each of which
        has to see the gain. ``suite``: the regression cases, as episodes that are replayed on the engine first.
        """
        own: list[Episode] = list(probed or [])
        if batches is None:
            kept, own = self.probes(trial)
            batches = [kept]
        batches = [b for b in batches if b.count]
        data = self.evidence.transitions(batches)
        alpha = spent(trial, self.config.alpha)
        checks: dict[str, Check] = {}
        sources = sorted({b.source for b in batches})
        steps: dict[str, Callable[[], Check]] = {
            "independence": lambda: self._independent(data, fitted_on, batches),
            "gain": lambda: self._gain(candidate, incumbent, batches, alpha),
            "interventions": lambda: self._interventions(candidate, own, trial),
            "regression": lambda: self._regression(candidate, incumbent, suite),
            "laws": lambda: self._laws(candidate, incumbent, data, own),
            "robustness": lambda: self._robust(candidate, incumbent, data, trial),
            "asr": lambda: self._asr(candidate, incumbent, trial),
        }
        for name, step in steps.items():
            before = next((n for n, c in checks.items() if c.status != PASS), None)
            if before is not None:
                checks[name] = Check(SKIPPED, f"{before} failed")
                continue
            try:
                checks[name] = step()
            except (TelltaleError, ArithmeticError) as error:
                checks[name] = Check(FAIL, f"the candidate broke down: {error}")
        return Receipt(
            candidate_id, incumbent_id, trial, alpha, checks, [] if data is None else [n[:16] for n in data.ids()],
            [b.key for b in batches], sources, asdict(self.config),
        ).sealed()  # fmt: skip

    def _independent(self, data: Transitions | None, fitted_on: Sequence[str], batches: Sequence[Batch]) -> Check:
        if data is None or not len(data):
            return Check(FAIL, "there is no evidence to judge on")
        sources = sorted({b.source for b in batches})
        shared = {n[:16] for n in fitted_on} & {n[:16] for n in data.ids()}
        figures = {"transitions": len(data), "sources": sources, "shared": len(shared)}
        out = self.evidence.withdrawn()
        others = [b for b in batches if b.role != "gate" or b.key in out]
        if others:
            return Check(FAIL, f"{len(others)} batches are not gate evidence, or were withdrawn", figures)
        if shared:
            return Check(FAIL, f"{len(shared)} transitions were fitted on", figures)
        if sources != [OWN_PROBES] and distinct_sources(batches) < 2:
            return Check(
                FAIL, f"{sources[0]} alone is no quorum; at least two sources, or the gate's own probes", figures
            )
        copied = self._copied(batches) if sources != [OWN_PROBES] else ""
        if copied:
            return Check(FAIL, copied, figures)
        return Check(PASS, f"{len(data)} transitions of {', '.join(sources)}, none of them fitted on", figures)

    def _copied(self, batches: Sequence[Batch]) -> str:
        """Which supplier's rows are another's, or fit evidence, but for a little noise; the store drops equal ones only."""
        sides = {"the fit evidence": self.evidence.transitions(self.evidence.chosen("fit"))}
        for source in sorted({b.source for b in batches}):
            mine = self.evidence.transitions([b for b in batches if b.source == source])
            assert mine is not None
            for other, theirs in sides.items():
                share = 0.0 if theirs is None else twins(mine, theirs)
                if share > MOST_TWINS:
                    return f"{share:.0%} of the rows of {source} are those of {other}, but for noise"
            sides[source] = mine
        return ""

    def _gain(self, candidate: Any, incumbent: Any, batches: Sequence[Batch], alpha: float) -> Check:
        by_source: dict[str, Gain] = {}
        for source in sorted({b.source for b in batches}):
            data = self.evidence.transitions([b for b in batches if b.source == source])
            assert data is not None
            by_source[source] = gain_of(
                errors(incumbent, data), errors(candidate, data), data.episodes, alpha=alpha, margin=self.config.margin,
                floor=self.config.floor,
            )  # fmt: skip
        worst = min(by_source.values(), key=lambda g: g.low)
        words = f"error {worst.candidate:.3g}, the incumbent's {worst.incumbent:.3g}; "
        words += f"gain above the margin at least {worst.low:+.4f} at {alpha:.2g}"
        if len(by_source) > 1:
            words = f"the least of {len(by_source)} sources: {words}"
        status = PASS if worst.low > 0 else FAIL
        return Check(status, words, {source: asdict(gain) for source, gain in by_source.items()})

    def _interventions(self, candidate: Any, own: Sequence[Episode], trial: int) -> Check:
        """Change the first action of the gate's own episodes, in the engine and in the candidate, and compare what comes of it."""
        if not own:
            first = 60_000_000 + self.seed * 1_000_003 + trial * 1009
            own = random_episodes(self.world, range(first, first + self.config.counterfactuals), self.config.length)
        own = [e for e in own if len(e)][: self.config.counterfactuals]
        if own and not replays(self.world, own[0]):
            return Check(FAIL, "the engine does not repeat an episode from its seed, so that nothing can be compared")
        engine = self.world.spawn()
        generator = torch.Generator().manual_seed(self.seed * 31 + trial)
        found = Sensitivity([], [], [], 0.0)
        adapted = adapt(candidate)
        for episode in own:
            other = self.world.sample_action(generator)
            actions = [other, *episode.actions[1:]]
            changed = self._replayed(engine, episode.seed, actions)
            at = min(len(changed), len(episode))
            ends = (self.world.belief(changed.observations[at]), self.world.belief(episode.observations[at]))
            real = self.world.embed(ends[0]).double().reshape(-1) - self.world.embed(ends[1]).double().reshape(-1)
            taken: Any = episode.actions if self.world.plain else self.world.batch_actions(episode.actions)
            mine, null = response(
                adapted, self.world.belief(episode.observations[0]), taken, 1,
                other if self.world.plain else self.world.batch_actions([other])[0],
                embed=self.world.embed, generator=generator, at=at,
            )  # fmt: skip
            found = found.extended(mine, real, null, 1)
        engine.close()
        if not found.direction:
            return Check(FAIL, "no intervention changed the engine's outcome, so that nothing can be said")
        direction = sum(found.direction) / len(found.direction)
        figures = {"ratio": found.ratio, "direction": direction, "null": found.null, "probes": len(found.oracle)}
        good = 0.5 <= found.ratio <= 2.0 and direction >= 0.8 and found.null == 0.0
        words = f"response {found.ratio:.2f} of the engine's, direction {direction:.2f}, null {found.null:g}"
        return Check(PASS if good else FAIL, words, figures)

    def _replayed(self, engine: World, seed: int, actions: Sequence[Any]) -> Episode:
        taken = iter(actions)
        episode = run_episode(engine, seed, lambda observation: next(taken), source=OWN_PROBES, max_steps=len(actions))
        self.env_steps += len(episode)
        return episode

    def _regression(self, candidate: Any, incumbent: Any, suite: Sequence[Episode]) -> Check:
        """Cases that the engine itself does not repeat any more are retired; any other pass that becomes a fail is a veto."""
        cases = [c for c in suite if len(c)]
        held = [case for case in cases if replays(self.world, case)]
        self.env_steps += sum(len(case) for case in cases)
        lost, passed = [], 0
        for case in held:
            before, after = self.case_passes(incumbent, case), self.case_passes(candidate, case)
            passed += after
            if before and not after:
                lost.append(case.seed)
        figures = {"cases": len(held), "retired": len(cases) - len(held), "passed": passed, "lost": lost}
        words = (
            f"{passed} of {len(held)} cases pass, {len(lost)} of them lost; {figures['retired']} retired by the engine"
        )
        return Check(FAIL if lost else PASS, words, figures)

    def case_passes(self, model: Any, case: Episode) -> bool:
        """Whether the model predicts every step of a case: exactly for plain states, else to ``regression_error``."""
        data = Transitions.from_episodes(self.world, [case])
        return float(errors(model, data).mean()) <= (0.0 if data.plain else self.config.regression_error**2)

    def _laws(self, candidate: Any, incumbent: Any, data: Transitions | None, own: Sequence[Episode]) -> Check:
        assert data is not None
        hard = [law for law in self.world.laws if law.hard]
        contested = self.contested(own) | set(self.suspended)
        laws = [law for law in hard if law.name not in contested]
        rates = [self._violations(model, data, laws) for model in (incumbent, candidate)]
        figures: dict[str, Any] = {
            "incumbent": rates[0], "candidate": rates[1], "laws": [law.name for law in laws],
            "contested": sorted(contested),
        }  # fmt: skip
        words = f"{rates[1]:.2%} of predictions break a hard law, {rates[0]:.2%} of the incumbent's"
        words = words if laws else "the world has no hard law that holds, so that none was checked"
        if figures["contested"]:
            words += f"; the engine itself breaks {', '.join(figures['contested'])}"
        return Check(PASS if rates[1] <= rates[0] + self.config.law_slack else FAIL, words, figures)

    @staticmethod
    def _violations(model: Any, data: Transitions, laws: Sequence[Law]) -> float:
        if not laws:
            return 0.0
        adapted = adapt(model)
        if data.plain:
            triples = zip(data.before, data.actions.tolist(), strict=True)
            found = [(b, a, adapted.observed(adapted.step(adapted.infer(b), a).belief)) for b, a in triples]
            return sum(any(not bool(law.holds(*triple)) for law in laws) for triple in found) / len(found)
        after = adapted.observed(adapted.step(adapted.infer(data.before), data.actions).belief)
        broken = torch.stack([~law.holds(data.before, data.actions, after) for law in laws]).any(0)
        return float(broken.float().mean())

    def _robust(self, candidate: Any, incumbent: Any, data: Transitions | None, trial: int) -> Check:
        """On disturbed inputs the candidate stays finite, and its answer moves no more than 1.5 times as far as the incumbent's."""
        assert data is not None
        adapted = [adapt(model) for model in (incumbent, candidate)]
        if data.plain:
            generator = torch.Generator().manual_seed(self.seed + trial)
            for before, action in zip(data.before, data.actions.tolist(), strict=True):
                field = int(torch.randint(len(before), (), generator=generator))
                near = tuple(v + (i == field) for i, v in enumerate(before))
                adapted[1].step(adapted[1].infer(near), action)
            return Check(PASS, f"no failure on {len(data)} states with one field moved", {"states": len(data)})
        noise = torch.randn(data.before.shape, generator=torch.Generator().manual_seed(self.seed + trial))
        near = data.before + 0.05 * data.before.std(0) * noise
        moves = []
        for model in adapted:
            answers = [
                model.observed(model.step(model.infer(rows), data.actions).belief) for rows in (data.before, near)
            ]
            moves.append(float((answers[1] - answers[0] - (near - data.before)).norm(dim=-1).mean()))
        finite = math.isfinite(moves[1])
        moves[0] = moves[0] if math.isfinite(moves[0]) else math.inf  # a broken incumbent holds no candidate back
        least = 1e-3 * float((data.after - data.before).norm(dim=-1).mean())
        good = finite and moves[1] <= 1.5 * moves[0] + least
        return Check(
            PASS if good else FAIL, f"a change of state moves by {moves[1]:.3g} under a disturbed input, {moves[0]:.3g} before",
            {"incumbent": moves[0], "candidate": moves[1]},
        )  # fmt: skip

    def _asr(self, candidate: Any, incumbent: Any, trial: int) -> Check:
        starts = [70_000_000 + self.seed * 100_003 + trial * 1009 + i for i in range(self.config.asr_episodes)]
        played = [self.played(candidate, starts)]
        try:
            played.append(self.played(incumbent, starts))
            said = ""
        except DivergedError:
            said = " (it broke down)"  # nor does one that cannot plan any more
        self.env_steps += sum(e.env_steps for e in played)
        sides = [played[0].successes, [False] * len(starts) if said else played[1].successes]
        wins = [sum(side) for side in sides]
        found = paired_difference(*sides, confidence=CONFIDENCE)
        figures = {
            "candidate": wins[0] / len(starts),
            "incumbent": wins[1] / len(starts),
            "low": found.low,
            "starts": len(starts),
        }
        words = f"succeeds in {wins[0]} of {len(starts)} starts, the incumbent in {wins[1]}{said}"
        words += f"; difference at least {found.low:+.2f}"
        return Check(PASS if found.low >= -self.config.asr_margin else FAIL, words, figures)

    def played(self, model: Any, starts: Sequence[int]) -> Evaluation:
        """The model's plans on the real engine, all starts side by side: a hundred cost twice what five do."""
        settings = {"batch": len(starts), **self.planner}
        return evaluate(model, self.world, seeds=list(starts), seed=self.seed, laws=self.enforced, **settings)


def recomputed(receipt: Receipt, evidence: Evidence, candidate: Any, incumbent: Any) -> bool:
    """Whether a receipt follows, to rounding, from the two models and the batches that it names: its evidence, its sources, what
    it spends, and the gain that it states for each source."""
    names = {b.key: b for b in evidence.batches()}
    batches = [names[key] for key in receipt.batches if key in names]
    data = evidence.transitions(batches)
    if len(batches) < len(receipt.batches) or receipt.evidence != (
        [] if data is None else [n[:16] for n in data.ids()]
    ):
        return False
    if receipt.sources != sorted({b.source for b in batches}) or overspent(receipt):
        return False
    gain, config = receipt.checks["gain"], GateConfig(**receipt.settings)
    if gain.status == PASS and (sorted(gain.figures) != receipt.sources or any(b.role != "gate" for b in batches)):
        return False
    for source, stated in gain.figures.items():
        part = evidence.transitions([b for b in batches if b.source == source])
        if part is None:
            return False
        found = gain_of(
            errors(incumbent, part), errors(candidate, part), part.episodes, alpha=receipt.alpha, margin=config.margin,
            floor=config.floor,
        )  # fmt: skip
        low = -math.inf if stated["low"] is None else stated["low"]
        if not np.isclose(found.low, low, rtol=1e-6, atol=1e-9) or (gain.status == PASS and found.low <= 0):
            return False
    return True


def distinct_sources(batches: Sequence[Batch]) -> int:
    """How many supplied something, spellings that read the same counted once."""
    return len({unicodedata.normalize("NFKC", b.source).strip().casefold() for b in batches if b.count})


def twins(mine: Transitions, theirs: Transitions) -> float:
    """Share of the rows of ``mine`` that ``theirs`` has too, within :data:`TWIN` of each column's spread; 0 for plain states, of
    which the store keeps equal ones once."""
    if mine.plain:
        return 0.0
    rows = [torch.cat([t.before, t.actions.reshape(len(t), -1).float(), t.after], 1).double() for t in (mine, theirs)]
    scale = rows[0].std(0).nan_to_num(nan=1.0).clamp(min=1e-9)
    near = [(torch.cdist(part / scale, rows[1] / scale, p=math.inf) < TWIN).any(1) for part in rows[0].split(64)]
    return float(torch.cat(near).double().mean())


def check_quorum(batches: Sequence[Batch]) -> None:
    """Raise :class:`~telltale.errors.ConfigError` unless the batches are the gate's own, or of at least two sources."""
    if {b.source for b in batches} != {OWN_PROBES} and distinct_sources(batches) < 2:
        names = ", ".join(sorted({b.source for b in batches})) or "nobody"
        raise ConfigError(f"evidence of {names} is no quorum; give that of at least two sources.")
