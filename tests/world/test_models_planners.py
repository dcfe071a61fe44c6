"""Networks and planners: calibration, determinism, saving, imagined environments, and who may plan where."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch

from telltale.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from telltale.world import collect, evaluate, fit, learn, load_model, make, plan, register_model, save_model
from telltale.world.models.ensemble import ONE_BY_ONE, Ensemble, EnsembleConfig
from telltale.world.models.ensemble_fitting import fit_ensemble
from telltale.world.models.imagined_env import ImaginedEnv
from telltale.world.planners.categorical import CategoricalCEM
from telltale.world.planners.sampling import CEM, ICEM, MPPI, coloured_noise
from world.small_models import Linear

PENDULUM = make("physical/Pendulum-v1")
QUICK = {"epochs": 8, "hidden": 32}


@pytest.fixture(scope="module")
def data():
    return collect(PENDULUM, steps=600, seed=0)


@pytest.fixture(scope="module")
def model(data):
    return fit("ensemble", data, world=PENDULUM, **QUICK)


class TestEnsemble:
    def test_a_gaussian_with_known_noise_is_covered_as_often_as_it_says(self):
        generator = torch.Generator().manual_seed(0)
        before, actions = (torch.randn(4000, n, generator=generator) for n in (2, 1))
        noise = torch.stack([0.1 + 0.2 * before[:, 0].abs(), torch.full((4000,), 0.3)], -1)
        after = before + 0.5 * actions + noise * torch.randn(4000, 2, generator=generator)
        nothing = torch.zeros(4000)
        parts = [value[:3000] for value in (before, actions, nothing, after, nothing.bool())]
        model = fit_ensemble(*parts, config=EnsembleConfig(2, 1, hidden=32, members=2), seed=0)
        mean, deviation = model.predict(before[3000:], actions[3000:])
        inside = ((after[3000:] - mean).abs() <= 1.6449 * deviation).float().mean(0)
        assert inside.tolist() == pytest.approx([0.9, 0.9], abs=0.04)

    def test_the_same_seed_gives_the_same_model_bit_for_bit(self, data, model):
        again = fit("ensemble", data, world=PENDULUM, **QUICK)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )

    @pytest.mark.parametrize("count", [50, ONE_BY_ONE])
    def test_the_fast_path_is_the_plain_one(self, model, count):
        rows, action = torch.randn(count, 3), torch.rand(count, 1)
        wide = model.inputs(rows, action).expand(4, count, 4)
        mean, log_variance, _ = model.heads((wide - model.input_mean) / model.input_scale)
        change, deviation, _ = model._fast(model._columns(rows, action))
        torch.testing.assert_close(change.mT, mean * model.target_scale + model.target_mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            deviation.mT, (0.5 * log_variance).exp() * model.target_scale * model.spread, atol=1e-5, rtol=1e-4
        )

    def test_a_column_that_never_changes_warns_and_works(self):
        before = torch.cat([torch.randn(60, 1), torch.ones(60, 1)], 1)
        after = torch.cat([before[:, :1] * 0.9, before[:, 1:]], 1)
        with pytest.warns(UserWarning, match="never varies"):
            model = fit_ensemble(
                before,
                torch.zeros(60, 1),
                torch.zeros(60),
                after,
                torch.zeros(60).bool(),
                config=EnsembleConfig(2, 1, members=1),
            )
        made = model.step(before, torch.zeros(60, 1)).belief
        assert made[:, 1].tolist() == pytest.approx([1.0] * 60, abs=1e-3)

    def test_deaf_to_actions(self, data):
        deaf = fit("ensemble", data, world=PENDULUM, hears_actions=False, epochs=2, hidden=8)
        rows = torch.randn(5, 3)
        one, two = (deaf.step(rows, torch.full((5, 1), value)).belief for value in (-2.0, 2.0))
        assert torch.equal(one, two)

    def test_reward_and_ending_are_learned_where_they_are_not_known(self):
        data = collect(make("physical/CartPole-v1"), steps=300, seed=0)
        model = fit("ensemble", data, world=None, epochs=20, hidden=32)
        assert model.config.learn_reward
        assert model.config.learn_termination
        made = model.step(data.before, data.actions)
        assert made.reward.shape == made.terminated.shape == (300,)
        assert float((made.terminated == data.terminated).float().mean()) > 0.9

    def test_data_that_does_not_fit(self, data, model):
        with pytest.raises(DataError, match="10"):
            fit("ensemble", data.select(torch.arange(5)), world=PENDULUM)
        with pytest.raises(DataError, match="width"):
            model.step(torch.zeros(1, 4), torch.zeros(1, 1))
        with pytest.raises(ConfigError, match="members"):
            fit("ensemble", data, world=PENDULUM, member=3)
        with pytest.raises(ConfigError, match="ensemble"):
            fit("ensembel", data)


class TestSaving:
    def test_weights_and_predictions_are_bit_equal(self, model, tmp_path):
        name = save_model(model, tmp_path / "m", about={"world": PENDULUM.id})
        again = load_model(tmp_path / "m")
        rows, actions = torch.randn(9, 3), torch.rand(9, 1)
        assert torch.equal(again.step(rows, actions).belief, model.step(rows, actions).belief)
        assert save_model(again, tmp_path / "n", about={"world": PENDULUM.id}) == name

    @pytest.mark.parametrize("damage", ["weights", "config", "missing"])
    def test_damage_is_found(self, model, tmp_path, damage):
        save_model(model, tmp_path / "m")
        weights, document = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "model.json"
        if damage == "weights":
            raw = bytearray(weights.read_bytes())
            raw[-1] ^= 1
            weights.write_bytes(raw)
        elif damage == "config":
            found = json.loads(document.read_text())
            found["config"]["hidden"] = 33
            document.write_text(json.dumps(found))
        else:
            weights.unlink()
        with pytest.raises(CheckpointError):
            load_model(tmp_path / "m")

    def test_a_model_that_cannot_describe_itself_is_refused(self, tmp_path):
        with pytest.raises(UnsupportedModelError, match="describe"):
            save_model(Linear(), tmp_path / "m")
        assert not (tmp_path / "m").exists()


class TestPlanners:
    @pytest.mark.parametrize("planner", [CEM(), ICEM(), MPPI()])
    def test_a_plan_does_not_depend_on_its_neighbours_and_repeats(self, planner):
        starts = torch.stack([PENDULUM.belief(PENDULUM.reset(s)) for s in range(5)])
        many = plan(PENDULUM.oracle(), PENDULUM, starts, planner=planner, seed=3)
        alone = plan(PENDULUM.oracle(), PENDULUM, starts[2], planner=planner, seed=3)
        torch.testing.assert_close(many.actions[2], alone.actions[0], atol=1e-4, rtol=1e-4)
        again = plan(PENDULUM.oracle(), PENDULUM, starts, planner=planner, seed=3)
        assert torch.equal(many.actions, again.actions)
        assert many.actions.abs().max() <= 2.0

    @pytest.mark.parametrize("planner", ["cem", "icem", "mppi"])
    def test_they_find_the_best_action_of_a_one_step_problem(self, planner):
        world = make(
            lambda s, a: s + a, initial=[0.0], action_space=gymnasium.spaces.Box(-1, 1, (1,)), success=lambda e: True,
            reward=lambda b, a, c: -((c[..., 0] - 0.6) ** 2), horizon=1, name="reach",
        )  # fmt: skip

        class Adding:
            def step(self, belief, action):
                return belief + action

        found = plan(Adding(), world, torch.zeros(1), planner=planner, iterations=8, samples=64)
        assert found.actions.item() == pytest.approx(0.6, abs=0.1)

    def test_categorical_cem_keeps_the_pole_up(self):
        cart = make("physical/CartPole-v1")
        assert len(evaluate(cart.oracle(), cart, episodes=1, max_steps=80).records[0].episode) == 80
        assert isinstance(CategoricalCEM().samples, int)

    def test_colour_lowers_high_frequencies_and_keeps_the_variance(self):
        white, red = (coloured_noise(400, 20, 1, color, torch.Generator().manual_seed(0)) for color in (0.0, 2.0))
        rough = [float((n[:, 1:] - n[:, :-1]).pow(2).mean()) for n in (white, red)]
        assert rough[1] < 0.6 * rough[0]
        assert float(red.var()) == pytest.approx(1.0, abs=0.1)

    @pytest.mark.parametrize(
        ("kind", "settings", "word"),
        [
            (CEM, {"samples": 5, "elites": 0.1}, "elites"),
            (CEM, {"samples": 1}, "samples"),
            (CEM, {"horizon": 0}, "horizon"),
            (MPPI, {"temperature": 0.0}, "temperature"),
            (CategoricalCEM, {"alpha": 1.0}, "alpha"),
        ],
    )
    def test_settings_out_of_range(self, kind, settings, word):
        with pytest.raises(ConfigError, match=word):
            kind(**settings)

    def test_the_wrong_planner_is_refused_with_those_that_fit(self):
        cart = make("physical/CartPole-v1")
        with pytest.raises(ConfigError, match="categorical_cem"):
            plan(cart.oracle(), cart, torch.zeros(4), planner="cem")
        with pytest.raises(ConfigError, match="mppi"):
            plan(PENDULUM.oracle(), PENDULUM, torch.zeros(3), planner="best_response")
        with pytest.raises(ConfigError, match="breadth_first"):
            plan(PENDULUM.oracle(), PENDULUM, torch.zeros(3), planner="annealing")


def test_an_imagined_environment_passes_gymnasiums_own_check(model):
    from gymnasium.utils.env_checker import check_env

    env = ImaginedEnv(model, PENDULUM, max_steps=30)
    check_env(env, skip_render_check=True)
    observation, _ = env.reset(seed=1)
    for _ in range(30):
        observation, reward, terminated, truncated, _ = env.step(np.array([0.5], np.float32))
        assert np.hypot(*observation[:2]) == pytest.approx(1, abs=1e-5)
    assert truncated
    assert not terminated
    assert reward <= 0


def test_learning_by_interaction_resumes_to_the_same_end(tmp_path):
    settings = {
        "steps": 260,
        "first_steps": 100,
        "seed": 1,
        "epochs": 3,
        "hidden": 8,
        "planner": CEM(samples=16, iterations=1, horizon=3),
    }
    kept = []
    whole, data = learn(PENDULUM, each_round=lambda m, found: kept.append(found), **settings)
    first = data.select(torch.arange(100))
    resumed, again = learn(PENDULUM, done=first, **settings)
    assert again.ids() == data.ids()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert len(kept) == 1


def test_torchrl_modules_are_adapted(data):
    tensordict = pytest.importorskip("tensordict")
    nn_module = pytest.importorskip("tensordict.nn")
    from telltale.world.models.torchrl_adapter import FromTorchRL

    linear = torch.nn.Linear(4, 3)
    module = nn_module.TensorDictModule(
        lambda o, a: linear(torch.cat([o, a], -1)),
        in_keys=["observation", "action"],
        out_keys=[("next", "observation")],
    )
    assert tensordict is not None
    made = FromTorchRL(module).step(data.before[:5], data.actions[:5])
    torch.testing.assert_close(made.belief, linear(torch.cat([data.before[:5], data.actions[:5]], -1)))
    with pytest.raises(UnsupportedModelError, match="next_key"):
        FromTorchRL(
            nn_module.TensorDictModule(lambda o: o, in_keys=["observation"], out_keys=["other"]), next_key="gone"
        ).step(data.before[:5], data.actions[:5])


def test_a_torchrl_module_that_writes_no_observation_is_refused_and_its_end_is_read(data):
    pytest.importorskip("tensordict")
    nn_module = pytest.importorskip("tensordict.nn")
    from telltale.world.models.torchrl_adapter import FromTorchRL

    def module(function, *keys):
        return FromTorchRL(nn_module.TensorDictModule(function, in_keys=["observation", "action"], out_keys=list(keys)))

    with pytest.raises(UnsupportedModelError, match="next_key"):
        module(lambda o, a: o.sum(-1, keepdim=True), "reward").step(data.before[:5], data.actions[:5])
    ending = module(lambda o, a: (o + 1, o[:, :1], o[:, :1] > 0), "observation", "reward", ("next", "terminated")).step(
        data.before[:5], data.actions[:5]
    )
    assert ending.terminated.tolist() == (data.before[:5, 0] > 0).tolist()
    torch.testing.assert_close(ending.belief, data.before[:5] + 1)
    assert ending.reward.shape == (5,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('">="', '"!= 0 or exit(3) or x0 >="'),
        ('"add"', '"exec"'),
        ('"minus"', '"__import__"'),
    ],
)
def test_a_program_from_a_file_runs_no_code_but_its_rules(tmp_path, old, new):
    """Whoever writes a model.json can set its hash right; what it says becomes no code."""
    from telltale.world.models.saving import identity

    orders = make("digital/orders")
    save_model(fit("program", collect(orders, steps=400, seed=1), world=orders), tmp_path / "m")
    text = (tmp_path / "m" / "model.json").read_text()
    assert old in text
    document = json.loads(text.replace(old, new))
    document["id"] = identity(document)
    (tmp_path / "m" / "model.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="the rule of action"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("kind", "world", "options", "word"),
    [
        ("program", "digital/orders", {"depth": 3}, "depth"),
        ("tabular", "digital/orders", {"smoothing": 1}, "smoothing"),
        ("sindy", "scientific/sir", {"degre": 3}, "degree"),
        ("opponent", "social/kuhn_poker", {"priors": 2}, "prior"),
        ("mlp", "digital/orders", {"epoch": 2}, "epochs"),
        ("mlp", "social/kuhn_poker", {}, "tuples of integers"),
        ("program", "social/kuhn_poker", {}, "tuples of integers"),
        ("ensemble", "digital/orders", {}, "numeric"),
        ("opponent", "digital/orders", {}, "game"),
        ("sindy", "digital/orders", {}, "numeric"),
    ],
)
def test_kinds_and_options_that_do_not_fit(kind, world, options, word):
    place = make(world)
    with pytest.raises((ConfigError, DataError), match=word):
        fit(kind, collect(place, steps=30), world=place, **options)


def test_learning_goes_on_where_the_model_offers_no_plan():
    model, data = learn(make("digital/orders"), "tabular", steps=140, first_steps=40)
    assert len(data) == 140
    assert int(data.episodes.max()) >= 3
    assert model.counts


def test_users_add_kinds_of_their_own(data):
    @register_model("still-for-this-test")
    def fit_still(transitions, *, world, seed):
        class Still:
            def step(self, belief, action):
                return belief

        return Still()

    assert torch.equal(fit("still-for-this-test", data).step(data.before, None), data.before)
    with pytest.raises(ConfigError, match="already"):
        register_model("program")(fit_still)


def test_an_untrained_ensemble_is_an_ensemble():
    made = Ensemble(EnsembleConfig(3, 2, discrete=True)).eval().step(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
    assert made.belief.shape == (4, 3)
