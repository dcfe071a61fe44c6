"""What a certificate says of the user's own model: breakdowns fail, exactness passes, odd laws and worlds are told apart."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from telltale.errors import ConfigError, DataError
from telltale.world import Law, Transition, certify, collect, evaluate, make
from telltale.world.laws import library
from telltale.world.mrep import identity_of
from telltale.world.prediction import predict_held_out
from telltale.world.protocol import adapt

LITTLE = {"samples": 10, "iterations": 1, "horizon": 2}
CHEAP = {"samples": 16, "iterations": 2, "horizon": 4}
BOX = spaces.Box(-1, 1, (1,))
PENDULUM = make("physical/Pendulum-v1")


def push(state, action):
    return np.array([state[0] + 0.1 * state[1], state[1] + 0.1 * action[0]])


def cart(simulator=push, **settings):
    chosen = {
        "initial": lambda rng: rng.uniform(-1, 1, 2), "action_space": BOX, "name": "cart", "max_steps": 12,
        "success": lambda e: abs(e.observations[-1][0]) < 5, "reward": lambda b, a, c: -(c[..., 0] ** 2),
        "laws": [library.kinematics(0, 1, 0.1, tolerance=1e-3)],
    }  # fmt: skip
    return make(simulator, **{**chosen, **settings})


class Cart(nn.Module):
    """The truth, in double precision, left in training mode."""

    def __init__(self):
        super().__init__()
        self.dt = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def step(self, belief, action):
        position, speed = belief.unbind(-1)
        return torch.stack([position + self.dt * speed, speed + self.dt * action[..., 0]], -1)


def statuses(found):
    return {name: condition.status for name, condition in found.conditions.items()}


@pytest.mark.long
def test_an_exact_model_of_the_users_own_simulator_earns_level_two():
    found = certify(Cart(), cart(), 2, **CHEAP)
    assert set(statuses(found).values()) == {"pass"}, found.conditions
    assert found.conditions["calibration"].figures["source"] == "predictions exact to rounding"
    assert set(found.conditions["sensitivity"].figures["by_step"]) == {"1", "2", "4"}


@pytest.mark.long
def test_a_model_in_a_space_of_its_own_earns_it_too():
    class Latent(Cart):
        def infer(self, observation):
            return torch.cat([observation.flip(-1) * 3, torch.ones_like(observation)], -1)

        def decode(self, belief):
            return belief[..., :2].flip(-1) / 3

        def step(self, belief, action):
            return self.infer(super().step(self.decode(belief), action))

    found = certify(Latent(), cart(), 2, **CHEAP)
    assert set(statuses(found).values()) == {"pass"}, found.conditions


@pytest.mark.long
@pytest.mark.parametrize("limit", [0.0, 2.5])
def test_nan_is_a_failed_condition_and_no_crash(limit, tmp_path):
    class Brittle(Cart):
        def step(self, belief, action):
            return torch.where(belief.abs() > limit, torch.nan, super().step(belief, action))

    found = certify(Brittle(), cart(), 2, episodes=2, **CHEAP)
    assert statuses(found)["robustness"] == "fail"
    if limit == 0.0:
        assert statuses(found)["likelihood"] == statuses(found)["coherence"] == statuses(found)["sensitivity"] == "fail"
        with pytest.raises(ConfigError, match="no evaluated episodes"):
            found.save(tmp_path / "b")


def test_an_exception_under_perturbed_inputs_fails_robustness():
    class Strict(Cart):
        def step(self, belief, action):
            if float(belief.abs().max()) > 2.5:
                raise ValueError("outside")
            return super().step(belief, action)

    assert statuses(certify(Strict(), cart(), 1))["robustness"] == "fail"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["state", "noise"])
def test_what_cannot_be_asked_twice_fails_the_null_control_and_the_reason_says_why(kind):
    noise = np.random.default_rng(1)

    class Deaf(nn.Module):
        calls = 0

        def step(self, belief, action):
            self.calls += 1
            drift = self.calls if kind == "state" else noise.normal()
            return belief + 0.01 * drift

    found = certify(Deaf(), cart(max_steps=6), 2, episodes=1, **LITTLE).conditions["sensitivity"]
    assert found.status == "fail"
    assert found.figures["null"] > 0
    assert "keeps state" in found.reason
    if kind == "noise":
        assert "deaf" in found.reason


def test_a_law_that_objects_to_the_engine_says_nothing_about_the_model():
    wrong = Law("stands still", lambda b, a, c: (c - b).abs().amax(-1), tolerance=1e-3)
    found = certify(Cart(), cart(), 2, laws=[wrong], episodes=1, **CHEAP).conditions["consistency"]
    assert found.status == "inconclusive"
    assert "stands still" in found.reason
    assert found.figures["engine"]["stands still"] > 0.5


def test_reject_on_a_model_that_never_obeys_is_a_failed_consistency():
    class Lawless(Cart):
        def step(self, belief, action):
            return super().step(belief, action) + 0.01

    found = certify(Lawless(), cart(), 2, episodes=1, mode="reject", **CHEAP)
    assert statuses(found)["coherence"] == statuses(found)["consistency"] == "fail"
    assert "broke down" in found.conditions["coherence"].reason


def test_episodes_shorter_than_the_horizon_are_judged_over_their_length():
    found = certify(Cart(), cart(max_steps=3), 2, samples=16, iterations=2, horizon=8)
    assert statuses(found)["coherence"] == "pass"
    assert "3 steps" in found.conditions["coherence"].reason


def test_an_episode_that_the_changed_action_ends_is_compared_where_it_ended():
    class Cliff(gymnasium.Env):
        observation_space, action_space = spaces.Box(-9, 9, (2,), np.float64), BOX

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.state = self.np_random.uniform(-0.1, 0.1, 2)
            return self.state.copy(), {}

        def step(self, action):
            self.state = self.state * 0.5 + float(action[0])
            return self.state.copy(), 0.0, bool(self.state[0] > 1.2), False, {}

    class Same:
        def step(self, belief, action):
            return belief * 0.5 + action

    world = make(Cliff(), success=lambda e: True, max_steps=10, reward=lambda b, a, c: -c[..., 0].abs())
    found = certify(Same(), world, 2, episodes=2, **CHEAP)
    assert found.conditions["sensitivity"].figures["ratio"] == pytest.approx(1, abs=1e-4)
    assert found.conditions["sensitivity"].figures["direction"] == pytest.approx(1, abs=1e-6)


@pytest.mark.long
def test_a_world_with_noise_of_its_own_is_judged_above_its_floor():
    def gust(state, action, rng):
        return push(state, action) + 0.4 * rng.normal(size=2)

    world = cart(gust, laws=[], max_steps=6)
    found = certify(world.oracle(), world, 2, episodes=1, **{**LITTLE, "horizon": 4})
    assert found.coherence.floor
    assert found.conditions["coherence"].figures["reach"] >= 4


def test_interventions_in_a_world_that_does_not_repeat_itself_are_untested():
    noise = np.random.default_rng(0)
    world = cart(lambda s, a: push(s, a) + noise.normal(size=2) * 0.1, laws=[])
    world.oracle = lambda: None
    found = certify(Cart(), world, 2, episodes=1, **CHEAP)
    assert statuses(found)["sensitivity"] == "untested"


class TestHeldOut:
    def test_another_world_or_too_little(self):
        with pytest.raises(DataError, match="scientific/other"):
            certify(Cart(), cart(), 1, held_out=collect(cart(name="other"), steps=50))
        with pytest.raises(DataError, match="10"):
            certify(Cart(), cart(), 1, held_out=collect(cart(), steps=5))

    @pytest.mark.parametrize(
        ("stated", "word"),
        [
            (lambda b, a: b, "two tensors"), (lambda b, a: (b, b[..., :1]), "deviation"), (lambda b, a: (b, b * 0 - 1), "negative"),
            (lambda b, a: b[9999], "predict raised IndexError"),
        ],
    )  # fmt: skip
    def test_what_predict_may_return(self, stated, word):
        model = Cart()
        model.predict = stated
        with pytest.raises(Exception, match=word):
            predict_held_out(model, cart(), collect(cart(), steps=40))

    def test_coverage_by_hand(self):
        """A model that states twice the true deviation covers 99.9%, one that states half of it 59%."""
        world = cart(lambda s, a, rng: push(s, a) + 0.2 * rng.normal(size=2))
        data = collect(world, steps=3000, seed=1)
        for factor, expected in ((1.0, 0.9), (2.0, 0.999), (0.5, 0.589)):
            model = Cart().float()
            model.predict = lambda b, a, f=factor, m=model: (m.step(b, a).detach(), torch.full_like(b, 0.2 * f))
            assert predict_held_out(model, world, data).coverage == pytest.approx(expected, abs=0.02)


class TestResume:
    def run(self, folder, **settings):
        return evaluate(Cart(), cart(), episodes=5, batch=2, kept=folder, **{**CHEAP, **settings})

    def test_a_stopped_evaluation_ends_as_one_that_was_never_stopped(self, tmp_path, monkeypatch):
        whole = self.run(tmp_path / "whole")
        played = []

        def stop(done, total):
            played.append(done)
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "part", progress=stop)
        stepped = []
        original = Cart.step
        monkeypatch.setattr(Cart, "step", lambda self, b, a: stepped.append(1) or original(self, b, a))
        again = self.run(tmp_path / "part")
        assert 0 < len(stepped) < 12 * 20  # the last batch alone
        one, two = whole.summary(), again.summary()
        assert {k: v for k, v in one.items() if k != "cpu_seconds"} == {
            k: v for k, v in two.items() if k != "cpu_seconds"
        }
        for mine, other in zip(whole.records, again.records, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.predicted, other.predicted, strict=True))
            assert mine.broken == other.broken
            assert [o.dtype for o in mine.episode.observations] == [o.dtype for o in other.episode.observations]

    def test_another_model_seed_or_task_starts_anew(self, tmp_path):
        first = self.run(tmp_path / "k")
        other = Cart()
        other.dt.data += 0.05
        second = evaluate(other, cart(), episodes=5, batch=2, kept=tmp_path / "k", **CHEAP)
        assert not torch.equal(first.records[0].predicted[0], second.records[0].predicted[0])
        third = self.run(tmp_path / "k", seed=5)
        assert third.seed == 5
        assert third.returns != first.returns

    def test_what_makes_a_model_another_one(self):
        class Plain:
            def __init__(self, gain, net):
                self.gain, self.model, self.table = gain, net, np.arange(3)

            def step(self, belief, action):
                return belief * self.gain

        net, other = nn.Linear(2, 2), nn.Linear(2, 2)
        same = identity_of(Plain(1.0, net))
        assert identity_of(Plain(1.0, net)) == same == identity_of(adapt(Plain(1.0, net)))
        assert identity_of(Plain(-1.0, net)) != same
        assert identity_of(Plain(1.0, other)) != same
        changed = Plain(1.0, net)
        changed.table[1] = 7
        assert identity_of(changed) != same
        assert identity_of(PENDULUM.oracle()) != identity_of(type(PENDULUM.oracle())(gain=-1.0))

    @pytest.mark.long
    def test_a_certificate_goes_on_too(self, tmp_path):
        def stop(stage, done, total):
            if stage == "oracle":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            certify(Cart(), cart(), 2, episodes=3, resume=tmp_path / "r", progress=stop, **CHEAP)
        assert (tmp_path / "r" / "model").is_dir()
        found = certify(Cart(), cart(), 2, episodes=3, resume=tmp_path / "r", **CHEAP)
        fresh = certify(Cart(), cart(), 2, episodes=3, **CHEAP)
        assert found.evaluation.returns == fresh.evaluation.returns
        assert {n: c.reason for n, c in found.conditions.items()} == {n: c.reason for n, c in fresh.conditions.items()}

    def test_plain_states_survive_the_disk(self, tmp_path):
        orders = make("digital/orders")
        one, two = (evaluate(orders.oracle(), orders, episodes=2, kept=tmp_path / "o") for _ in range(2))
        assert [r.episode.observations for r in one.records] == [r.episode.observations for r in two.records]
        assert [r.predicted for r in one.records] == [r.predicted for r in two.records]

    def test_a_folder_of_somebody_elses_is_left_alone(self, tmp_path):
        (tmp_path / "precious.txt").write_text("x")
        with pytest.raises(Exception, match="other files"):
            self.run(tmp_path)
        assert (tmp_path / "precious.txt").exists()


def test_a_reward_that_the_model_learned_is_enough():
    class Paying(Cart):
        def step(self, belief, action):
            after = super().step(belief, action)
            return Transition(after, -(after[..., 0] ** 2))

    found = evaluate(
        Paying(), cart(lambda s, a: (push(s, a), 1.0, False), reward=None), episodes=1, reward="learned", **CHEAP
    )
    assert found.reward == "learned"
