"""The user's own environment or simulator at the plug, and bundles made of it."""

from __future__ import annotations

import subprocess
import sys
import threading

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.world import Law, collect, evaluate, make, verify
from telltale.world.collection import episodes
from telltale.world.plugs import UserCodeError

CHEAP = {"samples": 12, "iterations": 1, "horizon": 3}
BOX = spaces.Box(-1, 1, (1,))


class Slide(gymnasium.Env):
    """Push a point to the middle; float64, unbounded."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = BOX

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-2, 2, 2)
        return self.state.copy(), {}

    def step(self, action):
        speed = self.state[1] + 0.1 * float(action[0])
        self.state = np.array([self.state[0] + 0.1 * speed, speed])
        return self.state.copy(), -float(self.state[0] ** 2), False, False, {"speed": speed}


class Adding:
    def step(self, belief, action):
        speed = belief[..., 1:] + 0.1 * action
        return torch.cat([belief[..., :1] + 0.1 * speed, speed], -1)


def slide(environment=None, **settings):
    chosen = {"success": lambda e: True, "max_steps": 8, "reward": lambda b, a, c: -(c[..., 0] ** 2), **settings}
    return make(environment or Slide(), **chosen)


def changed(**methods):
    return type("Changed", (Slide,), methods)()


class TestEnvironmentsThatDoNotFit:
    @pytest.mark.parametrize(
        ("attribute", "space", "word"),
        [
            ("action_space", spaces.MultiDiscrete([2, 3]), "MultiDiscrete"),
            ("action_space", spaces.MultiBinary(3), "MultiBinary"),
            ("action_space", spaces.Dict({"a": BOX}), "Dict"),
            ("action_space", spaces.Discrete(3, start=1), "from 0"),
            ("action_space", spaces.Box(0, 9, (1,), np.int64), "int64"),
            ("observation_space", spaces.Tuple([BOX, BOX]), "FlattenObservation"),
            ("observation_space", spaces.Discrete(5), "FlattenObservation"),
        ],
    )
    def test_spaces(self, attribute, space, word):
        with pytest.raises(UnsupportedModelError, match=word):
            slide(changed(**{attribute: space}))

    def test_wrappers_that_are_advised_work(self):
        class Pair(Slide):
            observation_space = spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})

            def reset(self, **options):
                super().reset(**options)
                return {"a": np.zeros(1, np.float32), "b": 2}, {}

            def step(self, action):
                return {"a": np.ones(1, np.float32), "b": 1}, 0.0, False, False, {}

        world = slide(gymnasium.wrappers.FlattenObservation(Pair()))
        assert collect(world, steps=20).before.shape == (20, 4)

    def test_unbounded_actions_are_refused_where_they_are_drawn(self):
        with pytest.raises(ConfigError, match="infinite bounds"):
            collect(slide(changed(action_space=spaces.Box(-np.inf, np.inf, (1,)))), steps=3)

    def test_vectors_and_classes(self):
        with pytest.raises(UnsupportedModelError, match="vector"):
            slide(gymnasium.make_vec("Pendulum-v1", 2))
        with pytest.raises(ConfigError, match=r"Slide\(\)"):
            make(Slide)

    def test_an_environment_that_cannot_be_copied(self):
        world = slide(changed(lock=None))
        world.env.lock = threading.Lock()
        with pytest.raises(UnsupportedModelError, match=r"gymnasium\.register"):
            collect(world, steps=3)

    @pytest.mark.parametrize(
        ("methods", "error", "word"),
        [
            ({"step": lambda self, action: 1 / 0}, UserCodeError, "ZeroDivisionError"),
            ({"step": lambda self, action: (np.zeros(2), 0.0, False, {})}, ConfigError, "4; expected"),
            ({"step": lambda self, action: (np.zeros(3), 0.0, False, False, {})}, ConfigError, r"\(3,\)"),
            ({"reset": lambda self, seed=None: np.zeros(2)}, ConfigError, r"\(observation, info\)"),
        ],
    )
    def test_broken_methods_are_one_sentence(self, methods, error, word):
        with pytest.raises(error, match=word):
            collect(slide(changed(**methods)), steps=3)

    @pytest.mark.parametrize(
        ("settings", "word"),
        [
            ({"regime": "magical"}, "regime"), ({"horizon": 0}, "horizon"), ({"max_steps": 0}, "max_steps"),
            ({"success_return": float("nan")}, "success_return"), ({"columns": ["a"]}, "columns"),
            ({"laws": [lambda b, a, c: 0]}, "law"), ({"lawss": []}, "lawss"),
        ],
    )  # fmt: skip
    def test_settings(self, settings, word):
        with pytest.raises(ConfigError, match=word):
            slide(**settings)

    def test_a_setting_that_is_no_ones(self):
        with pytest.raises(ConfigError, match="lawss"):
            make("MountainCarContinuous-v0", lawss=[])

    def test_ids_that_gymnasium_cannot_make(self):
        for name in ("nosuchmodule:Env-v0", "physical/Pendulum-v0", "NoSuch/Env-v3"):
            with pytest.raises(ConfigError, match=r"Env-v|Pendulum"):
                make(name)

    def test_a_task_is_asked_for_before_anything_is_played(self):
        class Counting(Slide):
            def step(self, action):
                raise AssertionError("played")

        with pytest.raises(ConfigError, match="success_return"):
            evaluate(Adding(), slide(Counting(), success=None), episodes=1, **CHEAP)

    def test_a_success_that_raises(self):
        with pytest.raises(UserCodeError, match="success of physical/Slide raised KeyError"):
            evaluate(Adding(), slide(success=lambda e: {}["x"]), episodes=1, **CHEAP)


class TestSimulators:
    def world(self, simulator, width=2, **settings):
        chosen = {"initial": [0.5] * width, "action_space": BOX, "success": lambda e: True, "name": "sim",
                  "reward": lambda b, a, c: c[..., 0], "max_steps": 5, **settings}  # fmt: skip
        return make(simulator, **chosen)

    def test_a_state_may_be_a_tuple_of_numbers(self):
        for width in (2, 3):
            found = collect(self.world(lambda s, a: tuple(x + 0.1 for x in s), width), steps=5)
            torch.testing.assert_close(found.after - found.before, torch.full((5, width), 0.1))
        paid = collect(self.world(lambda s, a: (s[0] + 1, 7.0, False), 1), steps=5)
        assert paid.rewards.tolist() == [7.0] * 5

    def test_a_simulator_that_works_in_place_spoils_nothing(self):
        def step(state, action):
            state += 0.1
            return state

        world = self.world(step, reward=lambda b, a, c: (c - b).sum(-1))
        assert collect(world, steps=3).rewards.tolist() == pytest.approx([0.2] * 3)
        rows = torch.zeros(4, 2, dtype=torch.float64)
        world.oracle().step(rows, torch.zeros(4, 1))
        assert rows.abs().sum() == 0

    def test_built_in_functions_have_no_signature(self):
        assert len(collect(self.world(np.add), steps=5)) == 5

    @pytest.mark.parametrize(
        ("settings", "word"),
        [
            ({"regime": "economic"}, "regime"), ({"action_space": 0}, "action_space"), ({"max_steps": 0}, "max_steps"),
            ({"horizon": -1}, "horizon"), ({"action_space": spaces.MultiBinary(2)}, "action_space"),
        ],
    )  # fmt: skip
    def test_settings(self, settings, word):
        with pytest.raises(ConfigError, match=word):
            self.world(lambda s, a: s, **settings)

    def test_what_is_missing_is_named(self):
        with pytest.raises(ConfigError, match="success"):
            make(lambda s, a: s, initial=[0.0], action_space=2)

    @pytest.mark.parametrize(
        ("simulator", "settings", "error", "word"),
        [
            (lambda s, a: s[9], {}, UserCodeError, "IndexError"),
            (lambda s, a: "left", {}, UserCodeError, "state that"),
            (lambda s, a: s * np.nan, {}, DataError, "not finite"),
            (lambda s, a: s, {"initial": lambda rng: 1 / 0}, UserCodeError, "initial"),
            (lambda s, a: s, {"initial": [np.nan, 0.0]}, DataError, "initial"),
            (lambda s, a: s, {"reward": lambda b, a, c: c[..., 9]}, UserCodeError, "reward"),
        ],
    )
    def test_what_goes_wrong_inside_is_one_sentence(self, simulator, settings, error, word):
        with pytest.raises(error, match=word):
            collect(self.world(simulator, **settings), steps=3)


class TestBundlesOfUsersWorlds:
    def bundle(self, world, path, **settings):
        return evaluate(Adding(), world, episodes=2, **{**CHEAP, **settings}).save(path)

    def test_a_gymnasium_id_with_settings_of_the_task_is_rebuilt_as_it_was(self, tmp_path):
        columns = ["position", "velocity"]
        world = make("MountainCarContinuous-v0", success_return=-5.0, max_steps=12, horizon=7, columns=columns)
        found = verify(evaluate(_Still(), world, reward="learned", episodes=2, **CHEAP).save(tmp_path / "b"))
        assert found.ok, found.findings
        assert found.replayed == 2

    def test_what_a_built_in_world_is_of_has_an_id_of_its_own(self):
        mine = make("Pendulum-v1", g=5.0, success_return=-200.0)
        for same in (mine, mine.spawn(), make(mine.id, **mine.settings()), make(gymnasium.make("Pendulum-v1"))):
            assert same.id == "physical/gymnasium:Pendulum-v1"
        again = make(mine.id, **mine.settings())
        assert (again.task_hash(), again.env.unwrapped.g) == (mine.task_hash(), 5.0)
        assert make("physical/Pendulum-v1").id == make("physical/Pendulum-v1", gain=-1.0).id == "physical/Pendulum-v1"
        with pytest.raises(ConfigError, match="cannot be imported"):
            make("physical/no_such_module:Pendulum-v1")

    def test_functions_cannot_be_rebuilt_and_that_is_said_and_is_no_finding(self, tmp_path):
        world = make("MountainCarContinuous-v0", success=lambda e: True, max_steps=12)
        bundle = evaluate(_Still(), world, reward="learned", episodes=2, **CHEAP).save(tmp_path / "b")
        alone = verify(bundle)
        assert alone.ok, alone.findings
        assert "world=" in alone.replay
        assert verify(bundle, world=world).replayed == 2
        other = make("MountainCarContinuous-v0", success=lambda e: False, max_steps=12)
        assert not verify(bundle, world=other).ok

    def test_an_environment_that_does_not_repeat_itself_is_found_out(self, tmp_path):
        wind = np.random.default_rng(0)

        class Windy(Slide):
            def step(self, action):
                observation, *rest = super().step(action)
                return observation + wind.normal(size=2), *rest

        world = slide(Windy())
        found = verify(self.bundle(world, tmp_path / "b"), world=world)
        assert found.ok, found.findings
        assert "did not repeat" in found.replay

    def test_receipts_may_be_nan_or_differ_where_the_rest_repeats(self, tmp_path):
        class Clocked(Slide):
            ticks = 0

            def step(self, action):
                Clocked.ticks += 1
                *rest, _ = super().step(action)
                return *rest, {"tick": Clocked.ticks, "nothing": float("nan")}

        class Silent(Slide):
            def step(self, action):
                *rest, _ = super().step(action)
                return *rest, {"nothing": float("nan")}

        for kind in (Clocked, Silent):
            world = slide(kind())
            bundle = self.bundle(world, tmp_path / kind.__name__)
            assert not any("NaN" in path.read_text() for path in bundle.rglob("*.json*"))  # any reader takes it
            found = verify(bundle, world=world)
            assert found.ok, found.findings
            assert found.replayed == 2

    def test_the_users_world_is_neither_stepped_nor_closed(self, tmp_path):
        class Closing(Slide):
            closed = False

            def close(self):
                self.closed = True

        world = slide(Closing())
        world.reset(3)
        state = world.env.state.copy()
        verify(self.bundle(world, tmp_path / "b"), world=world)
        assert not world.env.closed
        assert np.array_equal(world.env.state, state)

    def test_the_laws_that_were_checked_are_the_ones_named(self, tmp_path):
        import json

        law = Law("soft spot", lambda b, a, c: c[..., 0].abs() * 0 + 1, hard=False)
        evaluation = evaluate(Adding(), slide(), laws=[law], episodes=1, **CHEAP)
        assert evaluation.violation_rate() == 0.0  # soft laws are reported, and decide nothing
        manifest = json.loads((evaluation.save(tmp_path / "b") / "manifest.json").read_text())
        assert manifest["laws"] == {"mode": "report", "names": ["soft spot"], "hard": []}


class _Still:
    """Stays where it is, and pays for pushing."""

    def step(self, belief, action):
        from telltale.world import Transition

        return Transition(belief, -action[..., 0].abs())


def test_an_end_by_the_environment_is_no_time_limit():
    class Ending(Slide):
        def step(self, action):
            observation, reward, *_ = super().step(action)
            return observation, reward, bool(observation[0] > 0), False, {}

    world = slide(Ending())
    found = episodes(world, steps=60, seed=1)
    assert {(e.terminated, e.truncated) for e in found[:-1]} >= {(True, False), (False, True)}


def test_temporary_folders_are_gone_when_nobody_closed_the_world(tmp_path):
    script = "from telltale.world import make; w = make('digital/files'); w.reset(0); o = w.oracle(); w.spawn()"
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    assert not list(tmp_path.glob("telltale-*"))
