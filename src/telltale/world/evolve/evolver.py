"""``Evolver``: a model lives in a world, notices that it is wrong, finds out where, and is replaced if a better one proves itself.

M_t -design-> a_t -execute-> o_t -observe-> d_t -reflect-> M_{t+1} (arXiv 2604.22748, section 5), one round at a time: calibrate
the monitor, watch, and after an alarm revise (diagnose, probe, make candidates, judge them), let the best one predict in the
shadow, act as a canary, and become active. An older version that explains the evidence again comes back bit for bit. Doing nothing
is always allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.stats import fisher_exact

from telltale.config import check_integer, check_seed
from telltale.errors import ConfigError
from telltale.runs.progress import Interruption
from telltale.world.evolve.chain import ConflictError
from telltale.world.evolve.diagnosis import CANNOT_TELL, Diagnosis, Operators, diagnose
from telltale.world.evolve.earlier_versions import best_earlier, newest_pairs, parent_gain
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.exploration import explore
from telltale.world.evolve.gates import Gate, GateConfig, errors, random_episodes
from telltale.world.evolve.life import EvolveConfig, Feed, LifeLog, Round, State, kept_case, kept_episode, offer_of
from telltale.world.evolve.life_evidence import LifeEvidence
from telltale.world.evolve.monitor import Monitor, block_means, column_scale, residuals, shuffled, step_scores
from telltale.world.evolve.receipts import ApprovalMissing, PromotionRefused, Receipt
from telltale.world.evolve.revision import Candidate, candidates
from telltale.world.evolve.stream import acted
from telltale.world.evolve.version_registry import Registry, Version
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import Episode, World


class Evolver:
    """A life of ``model`` in ``world``, kept in the folder of ``registry`` (a Registry or a path); a stopped one goes on.

    ``model`` founds an empty registry, and is not looked at in one that has versions. ``planner``: settings of
    :func:`~telltale.world.evaluate` (planner, horizon, samples, ...). ``options``: of the model kind's fit. ``feed``: evidence
    that others offer. ``operators`` None takes the world's known reward and termination.

    Raises :class:`~telltale.errors.ConfigError` for a social world and :class:`~telltale.errors.CheckpointError` for a folder that
    holds another life.
    """

    def __init__(
        self,
        model: Any,
        world: World,
        registry: Registry | str | Path,
        *,
        config: EvolveConfig | None = None,
        gate: GateConfig | None = None,
        planner: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        feed: Feed | None = None,
        evidence_of_model: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        if world.regime == "social":
            raise ConfigError(f"{world.id} is a game; lives are built for physical, digital and scientific worlds.")
        self.world, self.config, self.seed = world, config or EvolveConfig(), check_seed(seed)
        self.registry = registry if isinstance(registry, Registry) else Registry(registry)
        self.planner, self.options, self.feed = dict(planner or {}), dict(options or {}), feed
        if not self.registry.log():
            about = {"world": world.id, "operator": "founding"}
            self.registry.add(model, evidence=evidence_of_model or [], about=about)
        self.evidence = Evidence(self.registry.path / "evidence")
        self.seen = LifeEvidence(self.evidence)
        self.life = LifeLog(self.registry.path / "life")
        self.gate = Gate(world, self.evidence, gate, seed=self.seed, planner={"mode": self.config.mode, **self.planner})
        self.life.begin({
            "world": world.id, "settings": world.settings(), "seed": self.seed, "founding": self.registry.versions()[0],
            "config": vars(self.config), "gate": vars(self.gate.config), "planner": self.planner, "options": self.options,
        })  # fmt: skip
        self.state = self.life.state()
        self._active = self.state.active or self.registry.active().id
        self._models: dict[str, Any] = {}

    def run(
        self,
        budget: int,
        *,
        rounds: int | None = None,
        on_round: Callable[[Round], None] | None = None,
        interruption: Interruption | None = None,
    ) -> State:
        """Live until the stream has ``budget`` steps, ``rounds`` more rounds are done, or a promotion waits for a person.

        Steps of probes and gates are counted beside the budget (``state.probe_steps``, ``state.gate_steps``).
        """
        check_integer("budget", budget, low=1)
        left = rounds if rounds is not None else -1
        while self.state.steps < budget and left != 0 and not (interruption is not None and interruption.requested):
            if self.state.phase == "waiting" and not self._decided():
                break
            done = self.round()
            left -= 1
            if on_round is not None:
                on_round(done)
        return self.state

    def round(self) -> Round:
        """Live one round, and commit it."""
        after = self.state.copy()
        after.round += 1
        if hasattr(self.world, "clock"):
            self.world.clock = after.steps
        self.gate.env_steps = 0
        self.gate.suspended = tuple(after.suspended)
        self._events: list[dict[str, Any]] = []
        self._figures: dict[str, Any] = {}
        self._played: list[dict[str, Any]] = []
        self.seen.begin_round()
        self._take_over(after)
        self._offers(after)
        {
            "calibrate": self._calibrate, "watch": self._watch, "revise": self._revise, "shadow": self._shadow,
            "canary": self._canary, "waiting": self._waiting,
        }[after.phase](after)  # fmt: skip
        after.gate_steps += self.gate.env_steps
        after.batches = len(self.evidence.batches())
        self._figures |= {"active": after.active, "phase": self.state.phase}
        done = Round(after.round, after, self._events, self._figures, self._played)
        self.life.commit(done)
        self.state, self._active = after, after.active
        return done

    def active(self) -> Any:
        """The model that acts."""
        return self._model(self._active)

    def _take_over(self, state: State) -> None:
        """Who acts in this round. What the registry says may be further on: a process that was killed in this very round has
        promoted already, and the round is repeated as it was; or a person has decided, and a new phase begins."""
        now = self.registry.active().id
        mine = self.registry.last_note() == f"round {state.round}"
        if state.active and now != state.active and not mine and now != state.candidate:
            self._event("handover", f"version {now[:12]} was made active by hand", version=now)
            state.begin_phase()
            state.active, state.promoted = now, None
        self._active = state.active = state.active or now

    def _model(self, version: Version | str) -> Any:
        name = version if isinstance(version, str) else version.id
        if name not in self._models:
            self._models[name] = self.registry.version(name).load()
        return self._models[name]

    def _event(self, what: str, words: str, **more: Any) -> None:
        self._events.append({"what": what, "words": words, **more})

    def _stream(self, state: State, canary: Any = None) -> tuple[list[Episode], list[bool], int]:
        """Episodes of a round, their successes, and how many of them, the first ones, the ``canary`` played."""
        first = self.seed * 1_000_003 + 10_000 + state.episodes
        seeds = [first + i for i in range(self.config.episodes)]
        share = math.ceil(self.config.trial_share * len(seeds)) if canary is not None else 0
        found: list[Episode] = []
        wins: list[bool] = []
        sides = (canary, seeds[:share], state.candidate), (self.active(), seeds[share:], self._active)
        for model, chosen, by in (side for side in sides if side[1]):
            played, broken = acted(
                model, self.world, chosen, laws=self.gate.enforced, mode=self.config.mode, seed=self.seed,
                planner=self.planner,
            )  # fmt: skip
            if broken:
                self._event("broke down", f"planning: {broken}")
            found += [episode for episode, _ in played]
            wins += [won for _, won in played]
            self._played += [kept_episode(episode, won, str(by)) for episode, won in played]
        data = Transitions.from_episodes(self.world, found)
        if self.config.stream_evidence:
            state.watched.append([state.steps, self.seen.keep(data, "stream", f"round {state.round}").number])
        state.steps += len(data)
        state.episodes += len(found)
        self._figures |= {"success": sum(wins) / len(wins), "steps": state.steps}
        return found, wins, share

    def _scored(self, state: State, data: Transitions) -> list[float]:
        off = residuals(self.active(), data)
        if not state.scale:
            state.scale = column_scale(data, off)
        scores = step_scores(off, state.scale)
        self._figures["score"] = sum(scores) / len(scores)
        return scores

    def _calibrate(self, state: State) -> None:
        data = Transitions.from_episodes(self.world, self._stream(state)[0])
        state.scores += self._scored(state, data)
        if self._parent_predicts_better(state, data):
            return
        means = block_means(state.scores, self.config.block)
        if len(means) >= self.config.calibration_blocks:
            if self._unfinished(state, data):
                return
            monitor = Monitor(means, block=self.config.block, threshold=self.config.threshold, seed=self.seed)
            state.monitor, state.scores, state.phase, state.watched = monitor.state(), [], "watch", []
            first = self._new_cases(self._active, 0) if not self.life.cases() else []
            self._event("watch", f"calibrated on {len(means)} blocks of {self.config.block} steps", cases=first)

    def _unfinished(self, state: State, data: Transitions) -> bool:
        """Whether the phase that begins is worse than the first one was: then the revision goes on with what was learned since,
        up to ``attempts`` times an alarm, and what is only better than a broken model, or no better, is not the new normal."""
        now = float(errors(self.active(), data).mean())
        if state.level is None:
            state.level = now
        good = now <= 2 * state.level + 10 * self.gate.config.floor
        if good or state.unfinished >= self.config.attempts:
            return False
        state.unfinished += 1
        state.phase, state.attempts, state.trying = "revise", 0, []
        self._event("unfinished", f"error {now:.3g}, {state.level:.3g} in the first phase; the revision goes on")
        return True

    def _watch(self, state: State) -> None:
        assert state.monitor is not None
        before = state.steps
        data = Transitions.from_episodes(self.world, self._stream(state)[0])
        if self._parent_predicts_better(state, data):
            return
        monitor = Monitor.from_state(state.monitor)
        offset = before - monitor.steps
        scores = self._scored(state, data)
        order = shuffled(scores, monitor.block, seed=[self.seed, state.round], pending=monitor.pending)
        alarm = monitor.update(order)
        state.monitor = monitor.state()
        self._figures["cusum"] = monitor.cusum
        if alarm is None:
            return
        quiet = offset + monitor.quiet_until
        later = [number for steps, number in state.watched if steps >= quiet - self.config.block]
        state.since = later[0] - 1 if later else self._before_last(state)
        state.phase, state.attempts, state.trying, state.unfinished = "revise", 0, [], 0
        self._event(
            "alarm", f"at step {offset + alarm}; quiet until step {quiet}", step=offset + alarm, quiet=quiet,
            since_round_began=offset + alarm - before,
        )  # fmt: skip

    def _before_last(self, state: State) -> int:
        """How many batches there were before the newest one of the stream; all of finished rounds, where the stream keeps none."""
        return state.watched[-1][1] - 1 if state.watched else state.batches

    def _revise(self, state: State) -> None:
        state.attempts += 1
        state.trials = self.registry.next_trial(state.trials, life_round=state.round)
        kept, probed = self.gate.probes(state.trials)
        fresh = self.evidence.transitions([kept])
        assert fresh is not None
        if not kept.count:  # as in a world of few states, once its transitions are all known
            words = "the gate's own episodes hold no transition that was not seen before, so that nothing can be judged"
            self._event("no evidence", words)
        self._suspend(state, probed)
        if not state.trying and self._older_explains(state, fresh):
            return
        newer = self.seen.newer(state)
        found: Diagnosis | None = None
        if newer is not None and not state.trying:
            found = self._diagnosed(state, newer)
            self._event("diagnosis", f"{found.component}: {found.reason}", diagnosis=found.summary())
            if found.quiet:  # whatever alarmed: a candidate of this evidence would learn the old law from it
                state.since, newer = state.batches, None
            if found.component not in ("dynamics", CANNOT_TELL):
                self._stand_still(state, f"the {found.component} is at fault, which no operator here revises")
                return
        if not state.trying:
            newer = self._probed(state, newer)
        older = None if state.trying else self.seen.older(state)  # what is offered is tried by itself
        made, missing = (
            candidates(self.active(), self.world, newer, older=older, seed=self.seed, options=self.options)
            if newer is not None else ([], ["no evidence"])
        )  # fmt: skip
        self._events += [{"what": "no candidate", "words": reason} for reason in missing]
        best = self._judged(state, made, kept, probed)
        if best is not None:
            state.candidate, state.receipt = best.candidate, best.seal
            state.phase, state.done, state.wins = "shadow", 0, [[], []]
        elif state.trying:
            self.evidence.quarantine(state.trying, reason="no candidate made of it passed the gate")
            self._event("quarantine", f"{len(state.trying)} batches that were offered", batches=state.trying)
            state.resume()
        elif state.attempts >= self.config.attempts:
            self._stand_still(state, f"no candidate passed in {state.attempts} attempts")

    def _suspend(self, state: State, probed: list[Episode]) -> None:
        """A hard law that the engine itself breaks in the gate's own episodes binds no plan any more; one that holds again does."""
        found = sorted(self.gate.contested(probed))
        if found != state.suspended:
            gone = ", ".join(found) or "none"
            self._event("laws", f"laws that the engine breaks: {gone}; plans are held to the others", suspended=found)
        state.suspended = found
        self.gate.suspended = tuple(found)

    def _judged(self, state: State, made: list[Candidate], kept: Any, probed: list[Episode]) -> Receipt | None:
        """Judge every candidate on the same new evidence, each with a trial number of its own; the best that passes."""
        passed: list[tuple[float, Receipt]] = []
        incumbent = self.registry.version(self._active)
        suite = self.life.cases()
        for number, candidate in enumerate(made):
            if number:
                state.trials = self.registry.next_trial(state.trials, life_round=state.round)
            about = {"world": self.world.id, "operator": candidate.operator, "round": state.round}
            about["since"] = 0 if state.trying else state.since
            version = self.registry.add(candidate.model, parent=incumbent.id, evidence=candidate.evidence, about=about)
            receipt = self.gate.judge(
                candidate.model, self._model(incumbent), candidate_id=version.id, incumbent_id=incumbent.id,
                fitted_on=candidate.evidence, trial=state.trials, batches=[kept], probed=probed, suite=suite,
            )  # fmt: skip
            self.registry.record(receipt)
            gains = [g["relative"] for g in receipt.checks["gain"].figures.values()]
            verdict = "passed" if receipt.passed else f"rejected by {', '.join(receipt.failed())}"
            reasons = {name: check.reason for name, check in receipt.checks.items()}
            self._event(
                "gate", f"{candidate.operator}: {verdict}", version=version.id, operator=candidate.operator, checks=reasons,
                receipt=receipt.seal, passed=receipt.passed, fitted_on=len(candidate.evidence),
            )  # fmt: skip
            if receipt.passed:
                passed.append((min(gains), receipt))
        return max(passed, key=lambda pair: pair[0])[1] if passed else None

    def _shadow(self, state: State) -> None:
        """The candidate predicts beside the incumbent, which acts; worse predictions end its career."""
        data = Transitions.from_episodes(self.world, self._stream(state)[0])
        self._scored(state, data)
        ours, theirs = (float(errors(m, data).mean()) for m in (self._model(str(state.candidate)), self.active()))
        self._event("shadow", f"error {ours:.4g}, the incumbent's {theirs:.4g}", version=state.candidate)
        if ours > theirs:
            self._rejected(state, "worse than the incumbent in the shadow")
            return
        state.done += 1
        if state.done >= self.config.shadow_rounds:
            state.phase, state.done = "canary", 0

    def _canary(self, state: State) -> None:
        """The candidate acts in a share of the episodes. It is stopped if it predicts worse where it acts, or succeeds less."""
        model = self._model(str(state.candidate))
        found, wins, share = self._stream(state, canary=model)
        data = Transitions.from_episodes(self.world, found[:share])
        self._scored(state, Transitions.from_episodes(self.world, found))
        ours, theirs = (float(errors(m, data).mean()) for m in (model, self.active()))
        state.wins = [[*state.wins[0], *wins[:share]], [*state.wins[1], *wins[share:]]]
        mine, others = (sum(side) for side in state.wins)
        table = [[mine, len(state.wins[0]) - mine], [others, len(state.wins[1]) - others]]
        fewer = float(fisher_exact(table, alternative="less").pvalue) < 0.05
        words = f"{mine} of {len(state.wins[0])} succeed, {others} of {len(state.wins[1])} of the incumbent's"
        self._event("canary", f"{words}; error {ours:.4g} against {theirs:.4g}", version=state.candidate)
        if ours > theirs or fewer:
            self._rejected(state, f"the canary was stopped: {words}")
            return
        state.done += 1
        if state.done >= self.config.canary_rounds:
            self._promote(state)

    def _promote(self, state: State) -> None:
        receipt = next(r for r in self.registry.receipts() if r.seal == state.receipt)
        parent = receipt.incumbent
        try:
            version = self.registry.promote(str(state.candidate), receipt, note=f"round {state.round}")
        except ApprovalMissing as error:
            state.phase = "waiting"
            self._event("waiting", str(error), version=state.candidate)
            return
        except (PromotionRefused, ConflictError) as error:  # a person rolled back in the meantime
            self._rejected(state, str(error))
            return
        state.active = version.id
        cases = self._new_cases(version.id, receipt.trial)
        self._event(
            "promotion", f"version {version.id[:12]} is active, {parent[:12]} was", version=version.id, parent=parent,
            receipt=receipt.seal, batches=receipt.batches, operator=version.document["about"].get("operator"), cases=cases,
        )  # fmt: skip
        state.promoted = state.round
        state.begin_phase()

    def _decided(self) -> bool:
        """Whether a person has said something about the candidate, or made a version active by hand."""
        return (
            self.registry.active().id != self.state.active or self.registry.word(str(self.state.candidate)) is not None
        )

    def _waiting(self, state: State) -> None:
        if self.registry.active().id == state.candidate or self.registry.approved(str(state.candidate)):
            self._promote(state)
        elif self.registry.word(str(state.candidate)) == "decline":
            self._rejected(state, "a person declined it")

    def _new_cases(self, version: str, trial: int) -> list[dict[str, Any]]:
        """What the version gets right, in episodes of the gate's own, becomes the regression suite's."""
        model, seen = self._model(version), []
        first = 80_000_000 + self.seed * 1_000_003 + trial * 1009
        for case in random_episodes(self.world, range(first, first + self.config.cases), self.gate.config.length):
            self.gate.env_steps += len(case)
            if self.gate.case_passes(model, case):
                seen.append(case)
        if seen:
            data = Transitions.from_episodes(self.world, seen)
            self.evidence.add(data, source="gate", role="regression", note=f"trial {trial}")
        return [kept_case(case) for case in seen]

    def _offers(self, state: State) -> None:
        """Take what the feed offers. It is tried as soon as the life is quiet, and never mixed with one's own evidence."""
        offer = offer_of(self.feed, self.world, state.round) if self.feed is not None else None
        if offer is not None:
            source, data, problem = offer
            if data is None:
                self._event("refused offer", f"transitions from {source}: {problem}", source=source)
            else:
                batch = self.seen.keep(data, source, f"offered in round {state.round}")
                self._event("offer", f"{batch.count} transitions from {source}", batches=[batch.key], source=source)
                if batch.count and batch.key not in state.offered:
                    state.offered = [*state.offered, batch.key]
        # one try between two rounds of the stream: who offers without end does not keep the life from watching
        if state.offered and state.phase == "watch" and state.episodes > state.tried_at:
            state.trying, state.offered, state.tried_at = state.offered, [], state.episodes
            state.phase, state.attempts = "revise", 0

    def _diagnosed(self, state: State, newer: Transitions) -> Diagnosis:
        reference = self.seen.older(state)
        if reference is None:
            return Diagnosis(CANNOT_TELL, "nothing from before the alarm is left to compare with")
        operators = Operators(self.active(), None, self.world.reward, self.world.terminated)

        def refit(half: Transitions) -> list[Any]:
            made = candidates(self.active(), self.world, half, seed=self.seed, options=self.options)[0]
            return [c.model for c in made]

        return diagnose(operators, reference, newer, refit=refit)

    def _probed(self, state: State, newer: Transitions | None) -> Transitions:
        """Probe what the hypotheses that explain the evidence disagree about, and add it to the evidence since the change. Half
        of the steps are chance: hypotheses that are all wrong disagree about the wrong things."""
        seed, budget = 40_000_000 + self.seed * 1_000_003 + state.round * 1009, self.config.probe_steps
        found = explore(
            self.active(), self.world, newer, budget=budget, laws=self.gate.enforced, depth=self.config.probe_depth,
            length=self.config.probe_length, options=self.options, seed=seed,
        )  # fmt: skip
        state.probe_steps += len(found.data)
        self.seen.keep(found.data, "probe", f"round {state.round}")
        words = f"{found.directed} steps by disagreement, {budget - found.directed} by chance"
        self._event("probes", words, directed=found.directed, shielded=found.shielded)
        joined = self.seen.newer(state)
        return found.data if joined is None else joined

    def _parent_predicts_better(self, state: State, data: Transitions) -> bool:
        """For a while after a promotion: where the parent predicts the same stream better, the next round asks the gate's own
        evidence whether to go back."""
        version = self.registry.version(self._active)
        if state.promoted is None or state.round - state.promoted > self.config.watch_rounds or version.parent is None:
            return False
        ours, theirs = errors(self.active(), data), errors(self._model(version.parent), data)
        state.compared = newest_pairs(state.compared, ours, theirs, data.episodes)
        found = parent_gain(state.compared, self.gate.config)
        if found.low <= 0:
            return False
        self._event("suspicion", f"the parent's error on the stream is {found.relative:.0%} lower")
        state.phase, state.attempts, state.trying = "revise", 0, []
        state.since = self._before_last(state)
        return True

    def _older_explains(self, state: State, fresh: Transitions) -> bool:
        """Whether a version that was active before explains the gate's new evidence as the active one does not."""
        active = self.registry.version(self._active)
        earlier = {e["body"]["version"] for e in self.registry.log() if e["kind"] in ("found", "promote", "rollback")}
        others = {name: errors(self._model(name), fresh) for name in sorted(earlier - {active.id})}
        best = best_earlier(errors(self.active(), fresh), others, fresh.episodes, self.gate.config)
        if best is None:
            return False
        self._roll_back(state, active, best[1], f"an earlier version explains the gate's evidence {best[0]:.0%} better")
        return True

    def _roll_back(self, state: State, version: Version, to: str, reason: str) -> None:
        keys, note = self.seen.behind(version), f"round {state.round}"
        back = self.registry.rollback(to=to, reason=reason, quarantine=keys, away_from=version.id, note=note)
        state.active = back.id
        self.evidence.quarantine(keys, reason=f"version {version.id[:12]} was made of it")
        words = f"to version {back.id[:12]}: {reason}"
        self._event("rollback", words, version=back.id, given_up=version.id, batches=keys)
        state.promoted = None
        state.begin_phase()

    def _rejected(self, state: State, reason: str) -> None:
        self._event("rejected", reason, version=state.candidate)
        state.candidate, state.receipt = None, None
        if state.trying:
            self.evidence.quarantine(state.trying, reason=reason)
            state.resume()
        elif state.attempts >= self.config.attempts:
            self._stand_still(state, reason)
        else:
            state.phase = "revise"

    def _stand_still(self, state: State, reason: str) -> None:
        self._event("no-op", f"version {self._active[:12]} stays: {reason}")
        state.begin_phase()
