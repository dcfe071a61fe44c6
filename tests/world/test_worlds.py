"""Worlds: oracles against engines, replay, the user's own environment and simulator, and what is refused."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from telltale.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from telltale.world import make, names
from telltale.world.collection import collect, episodes
from telltale.world.laws import library
from telltale.world.protocol import adapt
from telltale.world.transitions import Transitions, check_disjoint
from telltale.world.worlds.equations import lotka_volterra_invariant

NUMERIC = [name for name in names() if name.startswith(("physical", "scientific"))]


def random_episode(world, seed, steps=50):
    return episodes(world, steps=steps, seed=seed)[0]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("physical/Pendulum-v1", 3e-6),
        ("physical/CartPole-v1", 3e-6),
        ("physical/Acrobot-v1", 2e-5),
        ("physical/Reacher-v5", 5e-3),
        ("physical/DoublePendulum", 1e-5),
        ("scientific/lotka_volterra", 1e-5),
        ("scientific/sir", 3e-6),
        ("scientific/enzyme", 1e-5),
    ],
)
def test_an_oracle_follows_its_engine_for_fifty_steps(name, tolerance):
    world = make(name)
    episode, oracle = random_episode(world, 3), world.oracle()
    belief = world.belief(episode.observations[0]).unsqueeze(0)
    for action, observation in zip(episode.actions, episode.observations[1:], strict=True):
        belief = oracle.step(belief, world.batch_actions([action])).belief
        assert float((belief[0] - world.belief(observation)).abs().max()) <= tolerance


def test_the_cheetahs_oracle_is_its_engine_for_one_step():
    world = make("physical/HalfCheetah-v5")
    episode, oracle = random_episode(world, 3, 20), world.oracle()
    for t, action in enumerate(episode.actions):
        made = oracle.step(world.belief(episode.observations[t]).unsqueeze(0), world.batch_actions([action])).belief
        torch.testing.assert_close(made[0], world.belief(episode.observations[t + 1]), atol=2e-3, rtol=1e-3)
    assert all(receipt["penetration"] >= 0 and "contacts" in receipt for receipt in episode.receipts)


@pytest.mark.parametrize("name", [*NUMERIC, "digital/orders", "digital/files", "social/kuhn_poker"])
def test_a_replay_is_bit_equal_and_a_spawned_world_is_the_same_world(name):
    world = make(name)
    first = random_episode(world, 8, 20)
    second = random_episode(world.spawn(), 8, 20)
    assert all(np.array_equal(a, b) for a, b in zip(first.observations, second.observations, strict=True))
    assert first.rewards == second.rewards
    assert world.task_hash() == world.spawn().task_hash()
    assert all(world.versions().values())


def test_a_frictionless_double_pendulum_keeps_its_energy():
    world = make("physical/DoublePendulum")
    world.reset(0)
    world.data.qpos[:], world.data.qvel[:] = (1.5, 0.7), 0.0
    row = torch.tensor(np.concatenate([world.data.qpos, world.data.qvel]))
    start = float(world.energy(row))
    for _ in range(1000):
        outcome = world.step([0.0])
    end = float(world.energy(torch.as_tensor(outcome.observation)))
    assert abs(end - start) / abs(start) <= 1e-7
    assert outcome.receipt["energy"] == pytest.approx(end, rel=1e-9, abs=1e-9)


def test_lotka_volterra_without_harvest_keeps_its_invariant():
    world = make("scientific/lotka_volterra")
    world.reset(0, state=(5.0, 2.0))
    values = [float(lotka_volterra_invariant(torch.as_tensor(world.step([0.0]).observation))) for _ in range(150)]
    assert max(values) - min(values) <= 2e-9


def test_measurement_noise_is_seeded_and_leaves_the_state_alone():
    clean, noisy = make("scientific/enzyme"), make("scientific/enzyme", noise=0.05)
    runs = [random_episode(world, 4, 20) for world in (clean, noisy, make("scientific/enzyme", noise=0.05))]
    assert np.array_equal(runs[1].observations[7], runs[2].observations[7])
    off = np.abs(runs[1].observations[9] / runs[0].observations[9] - 1)
    assert 0 < off.max() < 0.3
    assert runs[0].rewards == runs[1].rewards


class Sliding(gymnasium.Env):
    """A user's own environment: push a point to the middle."""

    observation_space = spaces.Box(-10, 10, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-2, 2, 2)
        return self.state.copy(), {}

    def step(self, action):
        speed = self.state[1] + 0.1 * float(action[0])
        self.state = np.array([self.state[0] + 0.1 * speed, speed])
        return (
            self.state.copy(),
            -float(self.state[0] ** 2),
            False,
            False,
            {"note": "text is no receipt", "speed": speed},
        )


class TestTheUsersOwn:
    def test_a_gymnasium_object(self):
        world = make(Sliding(), success=lambda episode: abs(episode.observations[-1][0]) < 1, max_steps=30)
        episode = random_episode(world, 1, 30)
        assert len(episode) == 30
        assert episode.truncated
        assert not episode.terminated
        assert episode.receipts[0].keys() == {"speed"}
        other = random_episode(world.spawn(), 1, 30)
        assert np.array_equal(episode.observations[-1], other.observations[-1])

    def test_a_gymnasium_id_with_its_registered_threshold(self):
        world = make("MountainCarContinuous-v0")
        assert world.id == "physical/MountainCarContinuous-v0"
        assert world.success_return == 90.0

    def test_without_a_task_the_question_is_asked(self):
        world = make(Sliding(), max_steps=5)
        with pytest.raises(ConfigError, match="success"):
            world.success(random_episode(world, 0, 5))

    def test_a_callable_is_its_own_oracle(self):
        def fall(state, action):
            return state + 0.1 * action

        world = make(
            fall, initial=lambda rng: rng.normal(size=2), action_space=spaces.Box(-1, 1, (2,)), success=lambda e: True,
            reward=lambda b, a, c: -c.norm(dim=-1), laws=[library.limits(0, -50, 50)], name="fall",
        )  # fmt: skip
        assert world.id == "scientific/fall"
        episode = random_episode(world, 2, 10)
        start = torch.tensor(np.stack(episode.observations[:-1]))
        after = world.oracle().step(start, torch.tensor(np.stack(episode.actions))).belief
        np.testing.assert_allclose(after.numpy(), np.stack(episode.observations[1:]), rtol=1e-12)

    def test_a_simulator_may_pay_and_end(self):
        world = make(
            lambda s, a: (s + a, 1.0, bool(s[0] > 3)),
            initial=[0.0],
            action_space=2,
            success=lambda e: e.terminated,
            name="n",
        )
        assert sum(random_episode(world, 0, 40).rewards) > 0
        made = adapt(world.oracle()).step(torch.tensor([[9.0]]), torch.tensor([1]))
        assert (made.reward.item(), bool(made.terminated)) == (1.0, True)


class TestRefusals:
    def test_unknown_worlds_are_told_the_nearest(self):
        with pytest.raises(ConfigError, match="digital/orders"):
            make("digital/order")
        with pytest.raises(ConfigError, match="Gymnasium"):
            make("physical/Pendulumm-v1")
        with pytest.raises(ConfigError, match="int"):
            make(5)
        with pytest.raises(ConfigError, match="noises"):
            make("scientific/sir", noises=0.1)

    def test_spaces_that_do_not_fit(self):
        class Pair(Sliding):
            observation_space = spaces.Dict({"a": spaces.Box(0, 1)})

        class Many(Sliding):
            action_space = spaces.MultiDiscrete([2, 2])

        for kind, word in ((Pair, "FlattenObservation"), (Many, "MultiDiscrete")):
            with pytest.raises(UnsupportedModelError, match=word):
                make(kind())

    @pytest.mark.parametrize(
        ("name", "action", "word"),
        [
            ("physical/Pendulum-v1", [3.0], "bounds"),
            ("physical/Pendulum-v1", [float("nan")], r"action\[0\]"),
            ("physical/Pendulum-v1", [0.0, 0.0], "2 numbers"),
            ("physical/CartPole-v1", 2, "0 to 1"),
            ("digital/orders", 1.5, "0 to 7"),
            ("digital/orders", "pay", "an integer"),
            ("digital/orders", None, "an integer"),
            ("physical/Pendulum-v1", "left", "1 numbers"),
        ],
    )
    def test_actions_outside_the_space(self, name, action, word):
        world = make(name)
        world.reset(0)
        with pytest.raises(DataError, match=word):
            world.step(action)

    def test_a_reward_or_observation_that_is_no_number(self):
        class Broken(Sliding):
            def step(self, action):
                observation, _, *rest = super().step(action)
                return observation, float("nan"), *rest

        with pytest.raises(DataError, match="reward"):
            collect(make(Broken(), success_return=0, max_steps=5), steps=5)


class TestTransitions:
    def test_saved_and_loaded_bit_for_bit(self, tmp_path):
        for name in ("physical/Pendulum-v1", "digital/orders"):
            data = collect(make(name), steps=60, seed=1)
            data.save(tmp_path / "data")
            again = Transitions.load(tmp_path / "data")
            assert again.ids() == data.ids()
            assert again.receipts == data.receipts
            assert torch.equal(again.terminated, data.terminated)

    def test_truncation_is_no_termination(self):
        data = collect(make("physical/Pendulum-v1"), steps=200, seed=1)
        assert not bool(data.terminated.any())
        fallen = collect(make("physical/CartPole-v1"), steps=200, seed=1)
        assert int(fallen.terminated.sum()) >= int(fallen.episodes.max())

    @pytest.mark.parametrize("name", ["physical/Pendulum-v1", "digital/orders"])
    def test_a_split_has_no_id_in_both_parts_and_one_leaked_id_raises(self, name):
        data = collect(make(name), steps=600, seed=1)
        fitted, held = data.split(0.5, seed=1)
        assert len(fitted) + len(held) == len(data)
        assert min(len(fitted), len(held)) > 0
        check_disjoint(fitted, held)
        with pytest.raises(DataError, match="fitted on"):
            check_disjoint(fitted, held.joined(fitted.select(torch.tensor([0]))))

    def test_nan_is_named(self):
        data = collect(make("physical/Pendulum-v1"), steps=20, seed=1)
        broken = data.before.clone()
        broken[3, 1] = float("nan")
        with pytest.raises(DataError, match=r"before\[3, 1\]"):
            Transitions(data.world, broken, data.actions, data.rewards, data.after, data.terminated, data.episodes)


class TestForeignTransitions:
    BEFORE = np.arange(12.0).reshape(6, 2)

    def arrays(self, **changes):
        after = self.BEFORE + 2
        return {"before": self.BEFORE, "after": after, "actions": np.zeros((6, 1)), **changes}

    def test_arrays_of_ones_own_in_a_file(self, tmp_path):
        after = self.BEFORE + 2
        after[2] += 50  # the fourth row does not go on from here: another episode
        np.savez(tmp_path / "log.npz", **self.arrays(after=after, rewards=np.ones(6), extra=np.zeros(2)))
        data = Transitions.load(tmp_path / "log.npz", world="physical/own")
        assert data.world == "physical/own"
        assert data.episodes.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.before.dtype == torch.float32
        assert data.rewards.tolist() == [1.0] * 6
        assert Transitions.from_arrays("w", **self.arrays(actions=np.arange(6))).actions.dtype == torch.int64

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"after": np.zeros((5, 2))}, "5 rows for 6"), ({"after": np.zeros((6, 3))}, "one width"),
            ({"rewards": np.ones(4)}, "rewards has 4"), ({"episodes": np.zeros(7)}, "episodes has 7"),
            ({"before": np.full((6, 2), "x")}, "before holds"), ({"actions": np.full((6, 1), np.inf)}, "actions"),
            ({"terminated": np.zeros(1)}, "terminated has 1"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_named(self, changes, word):
        with pytest.raises(DataError, match=word):
            Transitions.from_arrays("w", **self.arrays(**changes))

    def test_files_that_are_something_else(self, tmp_path):
        np.savez(tmp_path / "other.npz", states=np.zeros(3))
        with pytest.raises(DataError, match=r"lacks before, actions, after.*states"):
            Transitions.load(tmp_path / "other.npz", world="w")
        np.savez(tmp_path / "pickled.npz", **self.arrays(before=np.array([object()] * 6)))
        (tmp_path / "text.npz").write_text("no archive")
        (tmp_path / "table.parquet").write_bytes(b"PAR1")
        for name in ("pickled.npz", "text.npz", "none.npz", "table.parquet", "folder"):
            with pytest.raises(CheckpointError, match=name):
                Transitions.load(tmp_path / name, world="w")
        np.savez(tmp_path / "log.npz", **self.arrays())
        with pytest.raises(DataError, match="world="):
            Transitions.load(tmp_path / "log.npz")

    def test_a_saved_folder_that_lost_a_field(self, tmp_path):
        data = collect(make("scientific/sir"), steps=12, seed=1)
        data.save(tmp_path / "d")
        document = tmp_path / "d" / "transitions.json"
        document.write_text(document.read_text().replace('"world"', '"word"'))
        with pytest.raises(CheckpointError, match="world"):
            Transitions.load(tmp_path / "d")
