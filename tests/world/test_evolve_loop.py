"""Monitor, diagnosis, probes, revision, gates, and a life with all of it: killed, resumed, certified, bundled, replayed."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from telltale import world
from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.world.certificate import PASS, Certificate, Condition
from telltale.world.evolve.chain import ChainedLog
from telltale.world.evolve.diagnosis import CANNOT_TELL, Operators, diagnose
from telltale.world.evolve.evidence import Evidence
from telltale.world.evolve.evolver import Evolver
from telltale.world.evolve.exploration import explore
from telltale.world.evolve.gates import (
    Gate,
    GateConfig,
    check_quorum,
    errors,
    gain_of,
    random_episodes,
    recomputed,
)
from telltale.world.evolve.hypotheses import equations, programs
from telltale.world.evolve.level_three import Recovery, certify_life, replayed_differently
from telltale.world.evolve.life import EvolveConfig, contiguous
from telltale.world.evolve.life_bundle import disagreements, probes_differ, verify_life, write_life
from telltale.world.evolve.monitor import Monitor, block_means, false_alarm_rate, residuals
from telltale.world.evolve.poison import poisoned
from telltale.world.evolve.probes import Prober, entropy, mutual_information
from telltale.world.evolve.receipts import Receipt, spent
from telltale.world.evolve.revision import candidates
from telltale.world.evolve.structure import error_of, grow, identify, repair
from telltale.world.mrep import MANIFEST, file_hash, seal
from telltale.world.protocol import adapt
from telltale.world.transitions import Transitions
from telltale.world.worlds.changing import Changing

# monitor


def test_a_false_alarm_is_as_rare_as_is_said():
    assert 0.08 < false_alarm_rate(120, threshold=100, runs=1000) < 0.18
    assert false_alarm_rate(120, threshold=1000, runs=1000) < 0.03


def test_the_monitor_needs_200_blocks_and_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="at least 200"):
        Monitor(rng.random(199))
    with pytest.raises(DataError, match="not finite"):
        Monitor([*rng.random(199), math.nan])
    scores = [*rng.random(300), *(0.8 + rng.random(300))]
    one, two = (Monitor(block_means(rng.random(2000), 10), seed=1) for _ in range(2))
    two = Monitor(one.calibration, seed=1)
    whole = one.update(scores)
    assert whole is not None
    assert 300 < whole <= 360
    assert two.update(scores[:155]) is None
    again = Monitor.from_state(two.state())
    assert again.update(scores[155:]) == whole
    assert again.state() == one.state()


def test_ties_are_broken_evenly():
    watch = Monitor([0.0] * 200)
    found = []
    for _ in range(400):
        found.append(watch.p_value(0.0))
        watch.blocks += 1
    assert abs(np.mean(found) - 0.5) < 0.06
    assert watch.p_value(1.0) < 0.01


# structure and revision


@pytest.fixture(scope="module")
def pendulum():
    place = world.make("physical/Pendulum-v1")
    return place, world.fit("motion", world.collect(place, steps=150, seed=1), world=place)


def test_parameters_are_identified_on_five_transitions_and_not_where_the_truth_is_elsewhere(pendulum):
    _, model = pendulum
    flipped = world.make("physical/Pendulum-v1", gain=-1.0)
    found = identify(model, world.collect(flipped, steps=5, seed=2))
    test = world.collect(flipped, steps=200, seed=3)
    assert error_of(found, test) < 1e-4 < 0.2 < error_of(model, test)
    terms = {tuple(p): c for p, c in zip(found.exponents.tolist(), found.coefficients[2].tolist(), strict=True) if c}
    assert terms == pytest.approx({(0, 1, 0, 0): 15.0, (0, 0, 0, 1): -3.0}, rel=1e-3)
    thick = world.make("physical/Pendulum-v1", drag=0.18)
    data, test = (world.collect(thick, steps=300, seed=seed) for seed in (4, 5))
    assert error_of(identify(model, data), test) > 0.8 * error_of(model, test)
    with pytest.raises(DataError, match="do not determine"):
        identify(model, data.select(torch.arange(0)))


def test_the_oracle_of_a_changed_pendulum_is_gymnasium_s_engine():
    for settings in ({"gain": -1.0}, {"gain": 0.5, "drag": 0.3}):
        place = world.make("physical/Pendulum-v1", **settings)
        data = world.collect(place, steps=200, seed=1)
        assert float((place.oracle().step(data.before, data.actions).belief - data.after).abs().max()) < 1e-5
        assert place.spawn().settings() == settings


def test_a_falsified_mechanism_gets_another_term():
    before, after = (world.make("scientific/lotka_volterra", harvested=h) for h in ("prey", "both"))
    model = world.fit("sindy", world.collect(before, steps=200, hold=30, seed=1), world=before)
    data, test = (world.collect(after, steps=60, seed=seed) for seed in (2, 3))
    found = grow(model, data)
    assert error_of(found, test) < 1e-3 < 0.2 * error_of(identify(model, data), test)
    assert "predators u" in found.explain()


def test_a_repaired_program_keeps_the_rules_that_hold():
    before, after = world.make("digital/orders"), world.make("digital/orders", migrated=True)
    model = world.fit("program", world.collect(before, steps=600, seed=1), world=before)
    data = world.collect(after, steps=600, seed=2)
    fixed = repair(model, data)
    assert fixed.rules[0].effects == model.rules[0].effects
    assert fixed.rules[5] != model.rules[5]  # pay
    assert world.evaluate(model, after, episodes=10).asr == 0.0
    plans = world.evaluate(fixed, after, episodes=10, mode="report")
    assert plans.asr == 1.0
    made, missing = candidates(model, after, data.select(torch.arange(0)))
    assert made == []
    assert len(missing) == 3


# diagnosis


def test_diagnosis_names_the_component_or_says_that_it_cannot(pendulum):
    place, model = pendulum
    reference = world.collect(place, steps=200, seed=10)
    data = world.collect(place, steps=200, seed=11)
    flipped = world.collect(world.make("physical/Pendulum-v1", gain=-1.0), steps=200, seed=11)
    operators = Operators(model, None, place.reward, None)

    def said(evidence, **more):
        return diagnose(operators, reference, evidence, refit=lambda half: [identify(model, half)], **more).component

    wrong = {name: getattr(data, name).clone() for name in ("before", "after")}
    for rows in wrong.values():
        rows[:, 2] *= 0.5
    assert said(flipped) == "dynamics"
    assert said(replace(data, rewards=1.5 * data.rewards)) == "reward"
    assert said(replace(data, **wrong)) == "observation"
    assert said(data) == CANNOT_TELL
    # two faults at once: no single component explains them
    assert said(replace(flipped, rewards=2 * flipped.rewards)) == CANNOT_TELL
    assert said(data.select(torch.arange(15))) == CANNOT_TELL
    oracle = world.make("physical/Pendulum-v1", gain=-1.0).oracle()
    assert diagnose(operators, reference, flipped, swaps={"dynamics": oracle}).component == "dynamics"


# probes


def test_information_is_entropy_and_what_one_outcome_says_of_another():
    assert entropy([(1,), (1,), (2,), (2,)], [1, 1, 1, 1]) == pytest.approx(math.log(2))
    assert entropy([(1,), (2,), (2,)], [1, 0, 0]) == 0.0
    one, weights = np.array([0.0, 0.0, 1.0, 1.0]), np.full(4, 0.25)
    said = mutual_information(one, np.array([one, 1 - one, [0, 1, 0, 1]]), weights)
    assert said == pytest.approx(2 * math.log(2) / 3)
    assert mutual_information(one, np.array([one]), np.array([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.0, abs=1e-9)


def test_probes_are_lawful_budgeted_and_go_where_hypotheses_disagree(pendulum):
    place, model = pendulum
    flipped = world.make("physical/Pendulum-v1", gain=-1.0)
    rival = identify(model, world.collect(flipped, steps=5, seed=1))
    act = Prober([model, rival], place, seed=1)
    actions = []
    for start in world.collect(place, steps=12, seed=3).before:
        act.begin()
        actions.append(act(start.numpy()))
    assert np.abs(actions).mean() > 1.6  # random torques have 1.0 on average
    known = world.collect(flipped, steps=3, seed=1)
    found = explore(model, flipped, known, budget=25, length=10, seed=2)
    assert sum(len(e) for e in found.episodes) == len(found.data) == 25
    assert 5 <= found.directed <= 20
    assert max(len(e) for e in found.episodes) <= 10
    again = explore(model, flipped, known, budget=25, length=10, seed=2)
    assert again.data.ids() == found.data.ids()
    assert explore(model, flipped, None, budget=5, batches=1).directed == 0
    with pytest.raises(ConfigError, match="at least two"):
        Prober([model], place)
    orders = world.make("digital/orders")
    forbidden = world.Law("no payment", lambda s, a, t: float(a == 5), plain=True)
    pays, still = (world.make("digital/orders", migrated=m).oracle() for m in (False, True))
    shielded = Prober([pays, still], orders, laws=[forbidden], seed=0)
    engine = orders.spawn()
    state = engine.reset(1)
    for _ in range(12):
        action = shielded(state)
        assert action != 5
        state = engine.step(action).observation
    assert shielded.shielded > 0


class Elsewhere:
    """A model whose belief is another than what is observed; what it says is the same."""

    def __init__(self, model, there, back):
        self.model, self.infer, self.decode = adapt(model), there, back

    def step(self, belief, action):
        return self.infer(self.model.step(self.decode(belief), action).belief)


def test_probes_of_models_with_beliefs_of_their_own_are_the_same(pendulum):
    place, model = pendulum
    data = world.collect(world.make("physical/Pendulum-v1", gain=-1.0), steps=5, seed=1)
    numeric = [model, identify(model, data)]
    wrapped = [Elsewhere(m, lambda o: torch.cat([4 * o, o], -1), lambda b: b[..., :3] / 4) for m in numeric]
    sides = [Prober(pair, place, evidence=data, seed=1) for pair in (numeric, wrapped)]
    for start in world.collect(place, steps=6, seed=3).before:
        one, two = (act(start.numpy()) for act in sides)
        assert one == pytest.approx(two)
    orders = world.make("digital/orders")
    plain = [world.make("digital/orders", migrated=m).oracle() for m in (False, True)]
    wrapped = [Elsewhere(m, lambda s: (*s, 7), lambda b: b[:-1]) for m in plain]
    sides = [Prober(pair, orders, seed=1) for pair in (plain, wrapped)]
    state, engine = orders.reset(1), orders.spawn()
    engine.reset(1)
    for _ in range(8):
        one, two = (act(state) for act in sides)
        assert one == two
        state = engine.step(one).observation


def test_hypotheses_hold_the_truth_and_what_the_evidence_does_not_rule_out(pendulum):
    _, model = pendulum
    flipped = world.make("physical/Pendulum-v1", gain=-1.0)
    few, more = (equations(model, world.collect(flipped, steps=n, seed=2), count=40, seed=0) for n in (3, 60))
    gains = [float(m.coefficients[2][(m.exponents == torch.tensor([0, 0, 0, 1])).all(1)]) for m in more]
    assert gains == pytest.approx([-3.0] * 41, abs=0.05)
    test = world.collect(flipped, steps=100, seed=3)
    spread = [np.std([error_of(m, test) for m in side[1:]]) for side in (few, more)]
    assert spread[0] > 10 * spread[1]
    before, after = world.make("digital/orders"), world.make("digital/orders", migrated=True)
    program = world.fit("program", world.collect(before, steps=600, seed=1), world=before)
    data = world.collect(after, steps=60, seed=2)
    drawn = programs(program, data, count=12, seed=0)
    wrong = [float(residuals(m, data).mean()) for m in drawn]
    assert max(wrong) <= 0.05 < float(residuals(program, data).mean())
    assert len({m.source for m in drawn}) > 6


def test_probes_teach_a_program_more_than_as_many_random_steps():
    before, after = world.make("digital/orders"), world.make("digital/orders", migrated=True)
    program = world.fit("program", world.collect(before, steps=600, seed=1), world=before)
    known, test = world.collect(after, steps=50, seed=10), world.collect(after, steps=500, seed=3)
    probed = explore(program, after, known, budget=100, batches=4, laws=[], seed=10).data
    sides = [known.joined(side) for side in (probed, world.collect(after, steps=100, seed=20))]
    found = [float(errors(repair(program, side), test).mean()) for side in sides]
    assert found[0] < 0.5 * found[1]


# gates


def test_alpha_is_spent_and_a_bit_equal_candidate_gains_nothing():
    assert sum(spent(trial, 0.05) for trial in range(1, 100_000)) == pytest.approx(0.05, abs=1e-6)
    same = torch.rand(400)
    found = gain_of(same, same, torch.arange(400) // 10, alpha=0.05, margin=0.05, floor=1e-4)
    assert found.relative == 0.0
    assert found.low < 0
    few = gain_of(same + 1, same, torch.arange(400) // 100, alpha=0.05, margin=0.05, floor=1e-4)
    assert few.low == -math.inf


@pytest.fixture
def gate(tmp_path):
    place = world.make("physical/Pendulum-v1", gain=-1.0)
    config = GateConfig(clusters=12, asr_episodes=2, asr_margin=0.9, counterfactuals=8)
    return Gate(place, Evidence(tmp_path / "e"), config, planner={"samples": 16, "horizon": 5, "max_steps": 5})


def judged(gate, model, incumbent, trial=1, fitted_on=(), **more):
    return gate.judge(
        model, incumbent, candidate_id="new", incumbent_id="old", fitted_on=fitted_on, trial=trial, **more
    )


def test_the_gate_promotes_the_truth_and_rejects_poison(gate, pendulum):
    _, model = pendulum
    data = world.collect(gate.world, steps=100, seed=2)
    good, bad = (identify(model, poisoned(data, gate.world, share=share)) for share in (0.0, 0.5))
    found = judged(gate, good, model)
    assert found.passed, found.checks
    assert not judged(gate, bad, model, trial=2).passed
    # on its own evidence, split by hash, the poisoned one shows a gain
    more = world.collect(gate.world, steps=300, seed=5)
    sides = replace(poisoned(more, gate.world, share=0.5), episodes=torch.arange(300) // 5).split(0.5, seed=1)
    fitted = identify(model, sides[0])
    pair = errors(model, sides[1]), errors(fitted, sides[1])
    assert gain_of(*pair, sides[1].episodes, alpha=0.05, margin=0.05, floor=1e-4).low > 0
    # a candidate that is as good as the incumbent is no gain
    assert judged(gate, good, good, trial=3).failed() == ["gain"]


def test_evidence_that_was_fitted_on_and_a_single_source_are_no_gate(gate, pendulum):
    _, model = pendulum
    good = gate.world.oracle()
    kept, _ = gate.probes(9)
    ids = gate.evidence.read(kept.key).ids()
    assert judged(gate, good, model, fitted_on=ids, batches=[kept]).failed() == ["independence"]
    parts = [replace(world.collect(gate.world, steps=100, seed=s), episodes=torch.arange(100) // 5) for s in (1, 2)]
    one = gate.evidence.add(parts[0], source="one", role="gate")
    liar = gate.evidence.add(poisoned(parts[1], gate.world, share=1.0), source="two", role="gate")
    assert "no quorum" in judged(gate, good, model, batches=[one]).checks["independence"].reason
    with pytest.raises(ConfigError, match="no quorum"):
        check_quorum([one])
    check_quorum([one, liar])
    # each source has to see the gain: one liar stops a promotion, and cannot make one
    assert judged(gate, good, model, batches=[one, liar]).failed() == ["gain"]
    assert judged(gate, model, good, batches=[one, liar]).failed() == ["gain"]


def test_one_source_under_two_names_is_no_quorum(gate, pendulum):
    _, model = pendulum
    good = gate.world.oracle()
    data = replace(world.collect(gate.world, steps=100, seed=1), episodes=torch.arange(100) // 5)
    noisy = replace(data, before=data.before + 1e-6)
    one, same, near, alias, fitted = (
        gate.evidence.add(rows, source=source, role=role)
        for rows, source, role in (
            (data, "one", "gate"), (data, "two", "gate"), (noisy, "three", "gate"), (noisy, " One", "gate"),
            (world.collect(gate.world, steps=100, seed=3), "four", "fit"),
        )
    )  # fmt: skip

    def reason(*batches):
        found = judged(gate, good, model, batches=batches)
        assert found.failed() == ["independence"]
        return found.checks["independence"].reason

    assert same.count == 0
    assert "no quorum" in reason(one, same)
    assert "but for noise" in reason(one, near)
    assert "no quorum" in reason(one, alias)
    assert "not gate evidence" in reason(one, fitted)
    again = world.collect(gate.world, steps=100, seed=3)
    copied = gate.evidence.add(replace(again, after=again.after + 1e-6), source="five", role="gate")
    assert "of the fit evidence" in reason(one, copied)


def test_a_broken_incumbent_holds_no_candidate_back_and_an_engine_that_varies_is_no_judge(gate, monkeypatch):
    class Broken:
        def step(self, belief, action):
            return belief * math.nan

    good = gate.world.oracle()
    found = judged(gate, good, Broken())
    assert found.passed, found.checks
    assert not judged(gate, Broken(), Broken(), trial=2).passed
    monkeypatch.setattr("telltale.world.evolve.gates.replays", lambda *a, **k: False)
    assert "does not repeat" in judged(gate, good, Broken(), trial=4).checks["interventions"].reason


def test_a_receipt_states_what_its_models_and_evidence_give(gate, pendulum, tmp_path):
    _, model = pendulum
    good = gate.world.oracle()
    found = judged(gate, good, model)
    assert recomputed(found, gate.evidence, good, model)
    gain = found.checks["gain"]
    for change in (
        {"evidence": found.evidence[1:]}, {"sources": ["partner"]}, {"alpha": 0.05 + found.alpha}, {"batches": []},
        {"checks": {**found.checks, "gain": replace(gain, figures={})}},
    ):  # fmt: skip
        assert not recomputed(replace(found, **change).sealed(), gate.evidence, good, model), change
    # too few episodes decide nothing: a bound of minus infinity, which the log has no number for
    few = replace(world.collect(gate.world, steps=100, seed=8), episodes=torch.arange(100) // 50)
    more = replace(world.collect(gate.world, steps=100, seed=9), episodes=torch.arange(100) // 50)
    batches = [gate.evidence.add(rows, source=name, role="gate") for rows, name in ((few, "a"), (more, "b"))]
    poor = judged(gate, good, model, trial=2, batches=batches)
    log = ChainedLog(tmp_path / "log")
    log.append("gate", asdict(poor))
    kept = Receipt.from_json(log.entries()[0]["body"])
    assert kept.failed() == ["gain"]
    assert recomputed(kept, gate.evidence, good, model)


def test_a_lost_case_is_a_veto_and_the_engine_retires_what_is_no_longer_so(gate, pendulum):
    usual, model = pendulum
    now = random_episodes(gate.world, range(3), 8)
    past = random_episodes(usual, range(5, 8), 8)
    good = gate.world.oracle()
    held = gate._regression(good, model, [*now, *past])
    assert (held.status, held.figures["cases"], held.figures["retired"]) == ("pass", 3, 3)
    veto = gate._regression(model, good, now)
    assert veto.status == "fail"
    assert veto.figures["lost"] == [0, 1, 2]


# a life


def life(folder, *, seed=3, budget_at=600, **changed):
    before, after = world.make("digital/orders"), world.make("digital/orders", migrated=True)
    model = world.fit("program", world.collect(before, steps=600, seed=1), world=before)
    place = Changing([(0, before), (budget_at, after), (1300, world.make("digital/orders"))])

    def feed(now, number):
        return ("partner", poisoned(world.collect(now, steps=100, seed=7), now, seed=1)) if number == 2 else None

    given = {"episodes": 32, "block": 2, "probe_steps": 400, "canary_rounds": 1, "attempts": 3, **changed}
    gate = GateConfig(clusters=40, asr_episodes=20, asr_margin=0.15)
    return Evolver(model, place, folder, config=EvolveConfig(**given), gate=gate, feed=feed, seed=seed)


BUDGET = 1600


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life") / "whole"
    one = life(folder)
    one.run(BUDGET)
    return one


def events(one, what):
    return [e for r in one.life.rounds() for e in r.events if e["what"] == what]


def test_a_life_rejects_poison_revises_itself_and_goes_back_when_the_change_is_undone(lived):
    kinds = [e["what"] for r in lived.life.rounds() for e in r.events]
    assert kinds.index("offer") < kinds.index("quarantine") < kinds.index("alarm") < kinds.index("promotion")
    before = events(lived, "gate")[:3]
    assert before
    assert not any(e["passed"] for e in before)
    assert events(lived, "diagnosis")[0]["diagnosis"]["component"] == "dynamics"
    assert events(lived, "laws")[0]["suspended"] == ["stage graph"]
    promoted = events(lived, "promotion")[0]
    changed = world.make("digital/orders", migrated=True)
    version = lived.registry.version(promoted["version"])
    assert world.evaluate(version.load(), changed, episodes=20, laws=()).asr >= 0.9
    assert events(lived, "rollback")
    founding = lived.registry.versions()[0]
    assert lived.registry.active().id == founding
    assert set(events(lived, "rollback")[0]["batches"]) <= lived.evidence.withdrawn()
    assert lived.registry.verify().ok
    assert lived.evidence.verify().ok
    assert contiguous(lived.life.rounds())


def stopped(*arguments, **named):
    raise KeyboardInterrupt


def test_a_killed_life_is_the_one_that_nobody_disturbed(lived, tmp_path):
    rng = random.Random(1)
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                life(tmp_path / "killed").run(BUDGET)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.1, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    again = life(tmp_path / "killed")
    assert again.registry.verify().ok
    while again.state.phase != "revise" or again.state.offered:
        again.round()
    # a process that stops in the middle of a revision leaves probes, which the round, repeated, must not be made of
    again.gate.judge = stopped
    with pytest.raises(KeyboardInterrupt):
        again.round()
    again = life(tmp_path / "killed")
    assert len(again.evidence.batches()) > again.state.batches
    again.run(BUDGET)
    assert again.life.head() == lived.life.head()
    assert [e["hash"] for e in again.registry.log()] == [e["hash"] for e in lived.registry.log()]
    assert again.evidence.total() == lived.evidence.total()


def test_a_folder_holds_one_life_and_games_have_none(lived):
    with pytest.raises(CheckpointError, match="seed"):
        life(lived.registry.path, seed=4)
    with pytest.raises(ConfigError, match="game"):
        Evolver(None, world.make("social/kuhn_poker"), lived.registry.path)


def test_six_conditions_decide_level_three(lived):
    earned = {"levels": Condition(2, PASS, "tried elsewhere"), "first": Condition(1, PASS, "tried elsewhere")}
    levels = Certificate("digital/orders", "Program", 2, earned)
    recovery = Recovery([True] * 100, [False] * 100, [True] * 100)
    probing = [(0.1, 0.3)] * 6
    found = certify_life(lived.registry.path, lived.world, levels=levels, recovery=recovery, probing=probing)
    assert {n: c.status for n, c in found.conditions.items() if c.level == 3 and c.status != PASS} == {}
    assert found.level == 3
    for change, name in (
        ({"recovery": None}, "revision"), ({"probing": ()}, "expansion"), ({"levels": None}, "levels 1 and 2"),
        ({"recovery": Recovery([True] * 90 + [False] * 10, [False] * 100, [True] * 100)}, "revision"),
        ({"recovery": Recovery([True] * 99, [False] * 99, [True] * 99)}, "revision"),
        ({"probing": [(0.3, 0.1)] * 6}, "expansion"),
    ):  # fmt: skip
        given = {"levels": levels, "recovery": recovery, "probing": probing, **change}
        other = certify_life(lived.registry.path, lived.world, **given)
        assert other.conditions[name].status != PASS
        assert other.level < 3
    with pytest.raises(ConfigError, match="100, 99 and 100 starts"):
        certify_life(lived.registry.path, lived.world, recovery=Recovery([True] * 100, [False] * 99, [True] * 100))


def test_the_bundle_of_a_life_is_checked_and_replayed(lived, tmp_path):
    out = write_life(lived.registry.path, tmp_path / "bundle", world=lived.world)
    found = verify_life(out, world=lived.world, replay=5)
    assert found.findings == []
    assert found.replayed == 5
    card = (out / "card.md").read_text()
    assert "promotion" in card
    assert "rollback" in card
    assert "Timeline" in (out / "page.html").read_text()
    for name in ("manifest.json", "card.md", sorted((out / "log").iterdir())[3].relative_to(out)):
        file = out / name
        kept = file.read_bytes()
        file.write_bytes(kept.replace(b"1", b"2", 1))
        assert not verify_life(out).ok, name
        file.write_bytes(kept)
    assert verify_life(out).ok
    with pytest.raises(CheckpointError, match="no bundle of a life"):
        verify_life(tmp_path)


def test_a_bundle_that_was_changed_and_sealed_again_contradicts_its_records(lived, tmp_path):
    certificate = certify_life(lived.registry.path, lived.world)
    out = write_life(lived.registry.path, tmp_path / "bundle", world=lived.world, certificate=certificate)
    assert verify_life(out, replay=0).findings == []
    kept = {name: (out / name).read_bytes() for name in ("certificate.json", "card.md", MANIFEST)}
    life_file, log_file = sorted((out / "life").iterdir())[4], sorted((out / "log").iterdir())[3]
    batch = sorted((out / "evidence" / "batches").iterdir())[0] / "transitions.json"
    model = out / "versions" / lived.registry.versions()[1] / "model.json"
    kept |= {str(f.relative_to(out)): f.read_bytes() for f in (life_file, log_file, batch, model)}
    for name, old, new, where, words in (
        ("certificate.json", b"promotions with receipts", b"promotions by receipts", "certificate.json", "another validation"),
        ("certificate.json", b"components named", b"components shown", "certificate.json", "another diagnosis"),
        ("card.md", b"promotion", b"Promotion", "card.md", "another story"),
        (str(life_file.relative_to(out)), b'"seed": ', b'"seed": 1', "life", "not the entry that was written"),
        (str(log_file.relative_to(out)), b'"version": "', b'"version": "0', "log", ""),
        (str(batch.relative_to(out)), b"[0, ", b"[1, ", str(batch.parent.relative_to(out)), ""),
        (str(model.relative_to(out)), b'"kind"', b'"kinds"', f"versions/{model.parent.name[:12]}", ""),
    ):  # fmt: skip
        assert old in kept[name]
        (out / name).write_bytes(kept[name].replace(old, new, 1))
        plain = verify_life(out, replay=0)
        assert name in [f.file for f in plain.findings]
        document = json.loads(kept[MANIFEST])
        document["files"][name] = file_hash(out / name)
        document["seal"] = seal(document)
        (out / MANIFEST).write_text(json.dumps(document))
        found = verify_life(out, replay=0)
        assert any(f.file == where and words in f.problem for f in found.findings), (name, found.findings)
        (out / name).write_bytes(kept[name])
        (out / MANIFEST).write_bytes(kept[MANIFEST])


def test_what_a_life_tells_is_what_its_registry_holds_and_its_gate_collected(lived):
    rounds, registry, evidence = lived.life.rounds(), lived.registry, lived.evidence
    assert disagreements(rounds, registry) == []
    assert probes_differ(lived.life, registry, evidence, lived.world) == []
    promoted = next(r.number for r in rounds for e in r.events if e["what"] == "promotion")
    assert "registry alone" in disagreements(rounds[: promoted - 1], registry)[0]
    first = next(e for r in rounds for e in r.events if e.get("cases"))
    kept, first["cases"] = first["cases"], first["cases"][1:]
    assert "regression cases of" in disagreements(rounds, registry)[0]
    first["cases"] = kept
    usual = world.make("digital/orders")
    assert probes_differ(lived.life, registry, evidence, usual) != []
    played = next(r for r in rounds if r.episodes)
    played.episodes[0]["by"] = "f" * 64
    played.figures["success"] += 0.01
    assert [words.split(" ", 2)[2] for words in disagreements(rounds, registry)] == [
        "states a success that its episodes do not have", "of round 1 was played by no version of the registry",
    ]  # fmt: skip


def test_a_return_or_a_success_that_the_engine_does_not_give_is_found(lived):
    rounds = lived.life.rounds()
    count = sum(len(r.episodes) for r in rounds)
    assert replayed_differently(rounds, lived.world, count) == []
    lost = next(
        e for r in rounds for e in r.episodes if not e["success"] and r.state.active != lived.registry.versions()[0]
    )
    lost["success"] = True
    rounds[0].episodes[0]["return"] += 1.0
    assert replayed_differently(rounds, lived.world, count) == [rounds[0].episodes[0]["seed"], lost["seed"]]


def test_a_changing_world_is_the_phase_of_its_clock():
    before, after = world.make("digital/orders"), world.make("digital/orders", migrated=True)
    place = Changing([(0, before), (10, after)])
    assert not place.spawn().migrated
    place.clock = 10
    assert place.spawn().migrated
    for phases in ([], [(1, before)], [(0, before), (0, after)], [(0, before), (5, world.make("digital/files"))]):
        with pytest.raises(ConfigError):
            Changing(phases)


def test_predictions_that_are_not_finite_are_far_off(pendulum):
    place, _ = pendulum

    class Broken:
        def step(self, belief, action):
            return belief * math.nan

    data = world.collect(place, steps=20, seed=1)
    assert float(residuals(Broken(), data).min()) == 1e6
    assert float(errors(Broken(), data).max()) == 100.0
    assert isinstance(data, Transitions)
