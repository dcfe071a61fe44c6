"""A life among strangers and interruptions: offers, hands that roll back, other versions of telltale, settings of all kinds."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
from gymnasium import spaces

from telltale import world
from telltale.errors import CheckpointError, ConfigError
from telltale.world.evolve.diagnosis import CANNOT_TELL, Operators, diagnose
from telltale.world.evolve.earlier_versions import best_earlier, newest_pairs, parent_gain
from telltale.world.evolve.evolver import Evolver
from telltale.world.evolve.gates import CONFIDENCE, GateConfig, probe_starts, random_episodes
from telltale.world.evolve.life import EvolveConfig, LifeLog, State
from telltale.world.evolve.life_bundle import verify_life, write_life
from telltale.world.evolve.monitor import Monitor, residuals, shuffled
from telltale.world.evolve.receipts import REQUIRED, Check, Receipt
from telltale.world.evolve.structure import identify
from telltale.world.evolve.version_registry import Registry
from telltale.world.metrics import paired_difference, pairs_needed
from telltale.world.mrep import seal
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import Outcome, World
from telltale.world.worlds.changing import Changing


@pytest.fixture(scope="module")
def pendulum():
    place = world.make("physical/Pendulum-v1")
    return place, world.fit("motion", world.collect(place, steps=60, seed=1), world=place)


def begun(pendulum, folder, **more):
    place, model = pendulum
    found = Evolver(model, place, folder, **more)
    found._events, found._active = [], found.registry.active().id
    return found


def passed(life, candidate, trial=1):
    checks = {name: Check("pass", "as it should be") for name in REQUIRED}
    given = Receipt(candidate, life.registry.active().id, trial, 0.03, checks, ["e" * 16], ["b"], ["gate"])
    return life.registry.record(given.sealed())


def test_offers_wait_for_quiet_and_none_passes_for_the_life_s_own(pendulum, tmp_path):
    place, _ = pendulum
    data = world.collect(place, steps=30, seed=5)
    offers = iter([
        ("stream", data), (" Gate", data), ("partner", replace(data, world="physical/CartPole-v1")),
        ("partner", replace(data, actions=data.actions.repeat(1, 2))), ("partner", data), ("partner", data), None,
    ])  # fmt: skip
    life = begun(pendulum, tmp_path / "r", feed=lambda place, number: next(offers))
    state = State(phase="revise")
    for _ in range(4):
        life._offers(state)
    assert [e["what"] for e in life._events] == ["refused offer"] * 4
    assert life.evidence.total() == 0
    # after an alarm the life's own revision comes first
    life._offers(state)
    assert (state.phase, state.trying, len(state.offered)) == ("revise", [], 1)
    assert life.seen.newer(state) is None
    state.phase, state.round = "watch", 1
    life._offers(state)  # what was offered before adds nothing
    assert (state.phase, len(state.trying), state.offered) == ("revise", 1, [])
    assert len(life.seen.newer(state)) == 30
    # one try, then a round of the stream before the next
    state.resume()
    state.phase, state.offered = "watch", ["another"]
    life._offers(state)
    assert state.phase == "watch"
    with pytest.raises(ConfigError, match="the feed returned int"):
        begun(pendulum, tmp_path / "r", feed=lambda place, number: 3)._offers(state)


def test_a_candidate_that_a_person_rolled_back_is_not_promoted_again(pendulum, tmp_path):
    life = begun(pendulum, tmp_path / "r")
    first = life.registry.active().id
    other = world.fit("motion", world.collect(pendulum[0], steps=50, seed=2), world=pendulum[0])
    version = life.registry.add(other).id
    receipt = passed(life, version)
    life.registry.promote(version, receipt, note="round 7")
    life.registry.rollback()
    state = State(round=7, phase="canary", attempts=1, active=first, candidate=version, receipt=receipt.seal)
    life._promote(state)
    assert [e["what"] for e in life._events] == ["rejected"]
    assert (state.phase, life.registry.active().id) == ("revise", first)
    # numbers that were taken by hand are not taken again; those of the round that is repeated are
    assert life.registry.next_trial(0, life_round=7) == 2
    mine = life.registry.add(other, about={"round": 7}).id
    passed(life, mine, trial=2)
    assert [life.registry.next_trial(1, life_round=n) for n in (7, 8)] == [2, 3]


def test_a_life_goes_on_after_a_person_rolled_back(pendulum, tmp_path):
    life = begun(pendulum, tmp_path / "r")
    first, data = life.registry.active().id, world.collect(pendulum[0], steps=40, seed=3)
    version = life.registry.add(world.fit("motion", data, world=pendulum[0])).id
    life.registry.promote(version, passed(life, version), note="round 7")
    state = State(round=8, active=version, promoted=7)
    life.registry.rollback(reason="worse on the night shift")
    life._take_over(state)
    assert [e["what"] for e in life._events] == ["handover"]
    assert state.active == life._active == first
    assert not life._parent_predicts_better(state, data)
    with pytest.raises(CheckpointError, match="could not write"):
        Evolver(pendulum[1], pendulum[0], "/dev/null")


def test_a_life_waits_for_a_person_and_goes_on_by_the_word(pendulum, tmp_path):
    place, _ = pendulum
    registry = Registry(tmp_path / "r", approval=True)
    life = begun(pendulum, registry)
    other = world.fit("motion", world.collect(place, steps=50, seed=2), world=place)
    version = life.registry.add(other).id
    receipt = passed(life, version)
    life.state = State(
        phase="waiting", active=registry.active().id, candidate=version, receipt=receipt.seal, attempts=1
    )
    assert life.run(100).round == 0  # nobody said anything: nothing happens, and nothing is written
    assert life.life.rounds() == []
    said = life.state.copy()
    registry.decline(version, by="R. Franklin")
    assert life._decided()
    life._waiting(said)
    assert (said.phase, said.candidate, life._events[-1]["words"]) == ("revise", None, "a person declined it")
    registry.approve(version, by="R. Franklin")
    said = life.state.copy()
    life._waiting(said)
    assert (said.phase, registry.active().id) == ("calibrate", version)


def test_a_gate_that_finds_nothing_new_says_so(pendulum, tmp_path):
    place, _ = pendulum
    life = begun(pendulum, tmp_path / "r")
    life.seen.begin_round()
    own = random_episodes(place, probe_starts(life.gate.config, life.seed, 1), life.gate.config.length)
    life.seen.keep(Transitions.from_episodes(place, own), "stream", "round 0")
    state = State(phase="revise", attempts=2)
    life._revise(state)
    assert life._events[0]["what"] == "no evidence"
    assert state.candidate is None


def test_settings_read_back_as_they_were_written_and_another_format_is_refused(pendulum, tmp_path):
    for _ in range(2):
        begun(pendulum, tmp_path / "r", options={"hidden": (8, 8)})
    with pytest.raises(ConfigError, match="cannot be written down"):
        begun(pendulum, tmp_path / "other", planner={"planner": object()})
    log = LifeLog(tmp_path / "r" / "life")
    log._log.append("round", {"state": {"mood": "good"}, "events": [], "figures": {}, "episodes": []})
    with pytest.raises(CheckpointError, match="another telltale"):
        begun(pendulum, tmp_path / "r", options={"hidden": (8, 8)})


def test_a_life_without_evidence_has_a_bundle(pendulum, tmp_path):
    begun(pendulum, tmp_path / "r")
    out = write_life(tmp_path / "r", tmp_path / "bundle", world=pendulum[0])
    assert verify_life(out, world=pendulum[0]).findings == []
    file = out / "manifest.json"
    for stated in (1, 3, None):  # whole, and of other rules: not a forgery
        document = {**json.loads(file.read_text()), "version": stated}
        document["seal"] = seal(document)
        file.write_text(json.dumps(document))
        with pytest.raises(
            CheckpointError, match=f"bundle was written by format {stated}; this version of telltale reads"
        ):
            verify_life(out, world=pendulum[0])
    shutil.rmtree(out)
    write_life(tmp_path / "r", out, world=pendulum[0])
    file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    assert verify_life(out, world=pendulum[0]).findings[0].problem == "was changed after it was sealed"
    file.write_text(file.read_text().replace('"files": {', '"files": [], "more": {'))
    with pytest.raises(CheckpointError, match="names no files"):
        verify_life(out)


def test_a_bundle_replayed_in_another_task_is_found(pendulum, tmp_path):
    begun(pendulum, tmp_path / "r")
    out = write_life(tmp_path / "r", tmp_path / "bundle", world=pendulum[0])
    found = verify_life(out, world=world.make("physical/Pendulum-v1", gain=-1.0)).findings
    assert [f.problem for f in found] == ["names another task than physical/Pendulum-v1 is here (task_hash)"]


def test_too_few_starts_for_the_margin_are_refused():
    least = pairs_needed(0.1, confidence=CONFIDENCE)
    for count, holds in ((least, True), (least - 1, False)):
        same = [True] * count
        assert (paired_difference(same, same, confidence=CONFIDENCE).low >= -0.1) == holds
    GateConfig(asr_episodes=least)
    with pytest.raises(ConfigError, match=f"asr_episodes is {least - 1}: .* expected at least {least}"):
        GateConfig(asr_episodes=least - 1)
    assert pairs_needed(0.9, confidence=CONFIDENCE) == 1


def test_a_state_of_the_monitor_is_a_copy():
    watch = Monitor([0.1 * n for n in range(200)], block=3)
    watch.update([1.0])
    state = watch.state()
    watch.update([2.0])
    assert state["open"] == [1.0]


def test_a_reward_that_is_no_number_alarms_and_a_swap_has_to_fit(pendulum):
    place, model = pendulum
    reference, data = (world.collect(place, steps=60, seed=seed) for seed in (1, 2))

    def broken(before, action, after):
        return torch.full((len(after),), torch.nan)

    found = diagnose(Operators(model, None, broken), reference, data)
    assert found.excess["reward"] == 0.0  # it was none on the reference either
    nan_now = Operators(model, None, lambda b, a, s: place.reward(b, a, s) if len(s) == 60 else broken(b, a, s))
    assert diagnose(nan_now, reference, data).excess["reward"] > 3
    flipped = world.collect(world.make("physical/Pendulum-v1", gain=-1.0), steps=60, seed=2)
    cartpole = world.fit("mlp", world.collect(world.make("physical/CartPole-v1"), steps=60, seed=1), epochs=1)
    operators = Operators(model, None, place.reward)
    with pytest.raises(ConfigError, match="dynamics that was given to swap in does not fit"):
        diagnose(operators, reference, flipped, swaps={"dynamics": cartpole})
    with pytest.raises(ConfigError, match="swap"):
        diagnose(operators, reference, flipped, swaps={"policy": model})


def test_two_faults_of_which_one_hides_the_other_are_not_told_apart(pendulum):
    place, model = pendulum
    reference = world.collect(place, steps=200, seed=10)
    data = world.collect(world.make("physical/Pendulum-v1", gain=0.5), steps=200, seed=100)
    columns = torch.tensor([1.0, 2.0, 1.0])
    operators = Operators(model, None, place.reward)

    def said(evidence):
        return diagnose(operators, reference, evidence, refit=lambda half: [identify(model, half)])

    both = replace(data, before=data.before * columns, after=data.after * columns)
    assert (said(both).component, "both may be" in said(both).reason) == (CANNOT_TELL, True)
    usual = world.collect(place, steps=200, seed=100)
    assert said(replace(usual, before=usual.before * columns, after=usual.after * columns)).component == "observation"


def test_what_is_offered_is_tried_by_itself(pendulum, tmp_path, monkeypatch):
    place, _ = pendulum
    life = begun(pendulum, tmp_path / "r", gate=GateConfig(clusters=8, length=2))
    life.seen.keep(world.collect(place, steps=30, seed=1), "stream", "round 1")
    offered = life.seen.keep(world.collect(place, steps=20, seed=2), "partner", "offered in round 2")
    given = {}

    def captured(model, world, newer, **more):
        given.update(more, newer=newer)
        return [], ["nothing"]

    monkeypatch.setattr("telltale.world.evolve.evolver.candidates", captured)
    # the last alarm lies behind: what was lived through before it is of another law
    life._revise(State(round=9, phase="revise", since=1, batches=2, trying=[offered.key]))
    assert (len(given["newer"]), given["older"]) == (20, None)
    assert life.evidence.withdrawn() == {offered.key}


def test_a_rollback_withdraws_what_came_after_the_change_and_nothing_from_before_it(pendulum, tmp_path):
    place, model = pendulum
    life = begun(pendulum, tmp_path / "r")
    before, after = (
        life.seen.keep(world.collect(place, steps=30, seed=seed), "stream", f"round {seed}") for seed in (1, 2)
    )
    used = life.evidence.transitions([before, after]).ids()
    version = life.registry.add(identify(model, life.evidence.read(after.key)), evidence=used, about={"since": 1})
    life.registry.promote(version.id, passed(life, version.id))
    life._roll_back(State(round=3), version, version.parent, "the old law is back")
    assert life.evidence.withdrawn() == {after.key}


def test_without_the_stream_s_evidence_a_revision_starts_from_none(pendulum, tmp_path):
    life = begun(pendulum, tmp_path / "r", config=EvolveConfig(stream_evidence=False))
    assert life._before_last(State(batches=7)) == 7
    assert life._before_last(State(batches=7, watched=[[0, 5], [100, 6]])) == 5


def test_rounds_of_few_episodes_are_compared_with_the_parent_together():
    config, episodes = GateConfig(), torch.arange(50) // 10
    pairs = newest_pairs([], torch.ones(50), torch.full((50,), 2.0), episodes)
    assert parent_gain(pairs, config).low == -math.inf  # five episodes decide nothing
    for _ in range(2):  # the parent is right again
        pairs = newest_pairs(pairs, torch.ones(50) + 0.1 * episodes, torch.zeros(50), episodes)
    assert len(pairs) == 8
    assert parent_gain(pairs, config).low > 0
    # a round that has more than eight is taken whole, and no older one with it
    assert len(newest_pairs(pairs, torch.ones(20), torch.ones(20), torch.arange(20) // 2)) == 10
    assert best_earlier(torch.ones(50), {"a": torch.ones(50), "b": 0.9 * torch.ones(50)}, episodes, config) is None
    rows = torch.arange(100) // 10
    found = best_earlier(torch.ones(100), {"a": torch.full((100,), 0.4), "b": torch.zeros(100)}, rows, config)
    assert found == (1.0, "b")


def test_a_model_that_claims_to_be_exact_to_rounding_is_judged_as_a_point(pendulum):
    _, model = pendulum
    flipped = world.make("physical/Pendulum-v1", gain=-1.0)
    held_out = world.collect(flipped, steps=200, seed=5)
    exact = identify(model, world.collect(flipped, steps=10, seed=2))
    assert float(exact.deviation.max()) < 1e-6
    assert world.certify(exact, flipped, 1, held_out=held_out).conditions["calibration"].status == "pass"
    wrong = identify(model, world.collect(world.make("physical/Pendulum-v1", gain=-0.9), steps=10, seed=2))
    assert world.certify(wrong, flipped, 1, held_out=held_out).conditions["calibration"].status == "fail"


def test_another_life_is_refused_by_the_settings_that_differ(pendulum, tmp_path):
    begun(pendulum, tmp_path / "r", planner={"samples": 32})
    with pytest.raises(
        CheckpointError, match=r"r holds another life \(config.block was 10, now 5; planner.samples was 32, now 8\)"
    ):
        begun(pendulum, tmp_path / "r", planner={"samples": 8}, config=EvolveConfig(block=5))


def test_blocks_of_a_round_are_watched_in_random_order():
    scores = [float(n) for n in range(64)]
    found = shuffled(scores, 10, seed=[3, 5])
    assert found != scores
    assert sorted(found[:60:10]) == scores[:60:10]  # blocks stay whole
    assert all(found[n + 1] - found[n] == 1.0 for n in range(60) if n % 10 != 9)
    assert found[60:] == scores[60:]
    assert found == shuffled(scores, 10, seed=[3, 5])
    assert shuffled([1.0], 10, seed=[0]) == [1.0]
    # four scores of the round before are an open block; six complete it, and the others stay whole
    later = shuffled(scores, 10, seed=[3, 5], pending=4)
    assert later[:6] == scores[:6]
    assert later[56:] == scores[56:]
    assert later[6:56:10] != scores[6:56:10]
    assert sorted(later[6:56:10]) == scores[6:56:10]
    assert shuffled([1.0, 2.0], 10, seed=[0], pending=4) == [1.0, 2.0]


def test_a_round_whose_steps_fill_no_whole_blocks_mixes_no_blocks():
    monitor = Monitor([0.5] * 200, block=3)
    seen = []
    monitor.p_value = lambda mean: seen.append(mean) or 1.0
    for number in range(3):
        scores = [10.0 * number + n for n in range(7)]
        monitor.update(shuffled(scores, 3, seed=[number], pending=monitor.pending))
    assert sorted(seen) == [1.0, 4.0, 9.0, 13.0, 17.0, 22.0, 25.0]  # seven blocks of three consecutive scores


def test_evidence_of_the_old_law_that_alarmed_teaches_no_candidate(pendulum, tmp_path, monkeypatch):
    place, _ = pendulum
    config = EvolveConfig(probe_steps=20)
    life = begun(pendulum, tmp_path / "r", config=config, gate=GateConfig(clusters=8, length=2))
    for seed in (1, 2):
        life.seen.keep(world.collect(place, steps=60, seed=seed), "stream", f"round {seed}")
    life.world = life.gate.world = world.make("physical/Pendulum-v1", gain=-1.0)  # the change comes after a false alarm
    given = {}

    def captured(model, world, newer, **more):
        given.update(newer=newer)
        return [], ["nothing"]

    monkeypatch.setattr("telltale.world.evolve.evolver.candidates", captured)
    state = State(round=9, phase="revise", since=1, batches=2)
    life._revise(state)
    assert life._events[0]["diagnosis"]["quiet"]
    assert (state.since, len(given["newer"])) == (2, 20)


def test_a_revision_goes_on_where_nothing_passed_and_the_model_is_still_broken(pendulum, tmp_path):
    place, _ = pendulum
    life = begun(pendulum, tmp_path / "r")
    same, other = (world.collect(w, steps=50, seed=1) for w in (place, world.make("physical/Pendulum-v1", gain=-1.0)))
    state = State()
    assert not life._unfinished(state, same)  # the first phase sets the level
    found = [life._unfinished(state, other) for _ in range(3)]
    assert found == [True, True, False]  # twice an alarm, and then it stands still
    assert not life._unfinished(State(level=state.level), same)


class Tanks(World):
    """A user's own: three tanks of nine and a heater. ``cold`` blocks the pipe between the first two until something is heated."""

    id, regime, plain, max_steps, planner, horizon = "physical/tanks", "physical", True, 24, "breadth_first", 12
    columns = ("first", "second", "third", "heat")

    def __init__(self, cold=False):
        self.cold, self.action_space = cold, spaces.Discrete(5)

    def reset(self, seed):
        draw = random.Random(seed)
        self.state, self.steps = (draw.randrange(4), draw.randrange(3), draw.randrange(3), draw.randrange(2)), 0
        return self.state

    def step(self, action):
        a, b, c, heat = self.state
        if action == 0 and a < 9:
            a += 1
        elif action == 1 and a and b < 9 and (heat or not self.cold):
            a, b = a - 1, b + 1
        elif action == 2 and b and c < 9:
            b, c = b - 1, c + 1
        elif action == 3 and c:
            c -= 1
        elif action == 4 and b and heat < 9:
            heat += 1
        self.state, self.steps = (a, b, c, heat), self.steps + 1
        done = self.goal(self.state)
        return Outcome(self.state, float(done), done, self.steps >= self.max_steps, {})

    def goal(self, state):
        return state[2] >= 5 and state[3] >= 1

    def embed(self, belief):
        return torch.tensor(belief, dtype=torch.float32) / 9

    def spawn(self):
        return Tanks(self.cold)

    def success(self, episode):
        return self.goal(episode.observations[-1])

    def rebuildable(self):
        return False


def test_a_life_in_a_discrete_world_of_ones_own(tmp_path):
    place = Changing([(0, Tanks()), (1500, Tanks(cold=True))])
    model = world.fit("program", world.collect(Tanks(), steps=1500, seed=1), world=Tanks())
    settings = EvolveConfig(episodes=32, block=2, canary_rounds=1)
    life = Evolver(model, place, tmp_path / "r", config=settings, gate=GateConfig(clusters=40), seed=1)
    assert life.active().source == model.source
    life.run(2800)  # to the round of the promotion
    found = [e["what"] for r in life.life.rounds() for e in r.events]
    assert [found.count(what) for what in ("alarm", "promotion")] == [1, 1]
    data = world.collect(Tanks(cold=True), steps=400, seed=5)
    errors = [float(residuals(m, data).mean()) for m in (model, life.active(), life.registry.active().load())]
    assert errors[1] == errors[2] < 0.2 * errors[0]
    out = write_life(tmp_path / "r", tmp_path / "bundle", world=place)
    again = Changing([(0, Tanks()), (1500, Tanks(cold=True))])
    assert verify_life(out, world=again, replay=8).summary() == {
        "ok": True, "findings": [], "replayed": 8, "episodes": 8, "replay": "8 of 8 episodes replayed bit for bit",
    }  # fmt: skip
    assert "the user's own objects" in verify_life(out).replay
