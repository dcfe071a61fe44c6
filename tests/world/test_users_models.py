"""The user's own module at the plug: dtypes, modes, hidden randomness, state between calls, exceptions, odd endings."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import nn

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.world.plugs import UserCodeError, modules_of
from telltale.world.protocol import Transition, adapt
from telltale.world.rollouts import rollout

ROWS, ACTIONS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 4, 2)


class Net(nn.Module):
    """A network over (belief, action) with whatever layers it is given before the last."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3))

    def step(self, belief, action):
        return belief + self.layers(torch.cat([belief, action], -1))


class Wrapper:
    """A plain class around a module, as adapters are."""

    def __init__(self, net):
        self.parts = {"net": net}

    def step(self, belief, action):
        return self.parts["net"].step(belief, action)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_of_another_dtype_is_stepped_in_its_own_and_answers_in_the_callers(dtype):
    for model in (Net().to(dtype), Wrapper(Net().to(dtype))):
        made = adapt(model).step(ROWS, ACTIONS[:, 0])
        assert made.belief.dtype == torch.float32
        torch.testing.assert_close(made.belief, Net().step(ROWS, ACTIONS[:, 0]), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)])
def test_a_module_left_in_training_mode_is_run_in_evaluation_mode_and_left_as_it_was(layer):
    net = Net(layer)
    net.layers[0].eval()  # a user's own choice is restored, not overwritten
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = rollout(net, ROWS, ACTIONS, common=True).beliefs[0]
    alone = rollout(net, ROWS[2:3], ACTIONS[2:3], common=True).beliefs[0]
    torch.testing.assert_close(made[2:3], alone)
    assert not adapt(net).stochastic(ROWS, ACTIONS[:, 0])
    assert net.training
    assert layer.training
    assert not net.layers[0].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_dropout_that_the_user_keeps_on_is_noise_like_any_other():
    net = Net(nn.Dropout(0.5)).eval()
    net.layers[1].train()
    assert adapt(net).stochastic(ROWS, ACTIONS[:, 0])
    rows = ROWS[:1].repeat(5, 1)
    made = rollout(net, rows, ACTIONS[:5], common=True).beliefs[0]
    assert all(torch.equal(made[0], row) for row in made)


def test_noise_in_rare_states_is_found_too():
    class Gusty:
        def step(self, belief, action):
            return belief + torch.where(belief[..., :1] > 0.9, torch.randn_like(belief), torch.zeros_like(belief))

    rows = torch.zeros(6, 3)
    rows[4, 0] = 1.0
    assert adapt(Gusty()).stochastic(rows, ACTIONS[:, 0])


def test_generators_inside_a_wrapped_module_are_replayed():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.rngs = [np.random.default_rng(0)]
            self.inner = nn.Identity()
            self.inner.generator = torch.Generator()

        def step(self, belief, action):
            return belief + torch.rand((), generator=self.inner.generator) + belief.new_tensor(self.draw())

        def draw(self):
            return self.source.random() if hasattr(self, "source") else 0.0

    inner = Drawing()
    inner.source = inner.rngs[0]
    made = [
        adapt(model).step(ROWS, ACTIONS[:, 0], generator=torch.Generator().manual_seed(3)).belief
        for model in (Wrapper(inner), Wrapper(inner), types.SimpleNamespace(step=inner.step))
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_a_model_that_keeps_state_between_calls_is_not_repeatable():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.hidden = nn.GRUCell(2, 3), None

        def step(self, belief, action):
            self.hidden = self.cell(action, self.hidden)
            return belief + self.hidden

    adapted = adapt(Recurrent())
    assert adapted.stochastic(ROWS, torch.ones(6, 2))
    assert not adapted.repeatable
    fine = adapt(Net())
    fine.stochastic(ROWS, ACTIONS[:, 0])
    assert fine.repeatable


def test_an_exception_in_a_step_is_one_sentence_with_the_line():
    with pytest.raises(UserCodeError, match=r"Net\.step raised RuntimeError: .*test_users_models\.py, line") as found:
        adapt(Net()).step(torch.zeros(6, 7), ACTIONS[:, 0])
    assert "\n" not in str(found.value)


class TestEndings:
    def ending(self, value):
        class Ending:
            def step(self, belief, action):
                return Transition(belief, torch.ones(len(belief)), value)

        return rollout(Ending(), ROWS, ACTIONS)

    def test_a_probability_ends_an_episode_from_a_half_on(self):
        made = self.ending(torch.tensor([0.01, 0.49, 0.5, 0.99, 0.0, 1.0]))
        assert made.returns().tolist() == [4, 4, 1, 1, 4, 1]

    def test_booleans_and_integers(self):
        for value in (torch.tensor([0, 1] * 3), torch.tensor([0, 1] * 3).bool()):
            assert self.ending(value).returns().tolist() == [4, 1] * 3

    def test_a_logit_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="sigmoid"):
            self.ending(torch.tensor([-3.0, 0.2, 0, 0, 0, 5.0]))


def test_a_reward_of_the_wrong_shape_is_found_whenever_it_comes():
    class Late:
        calls = 0

        def step(self, belief, action):
            self.calls += 1
            return Transition(belief, torch.ones(len(belief) if self.calls < 3 else 1))

    with pytest.raises(UnsupportedModelError, match="reward of shape"):
        rollout(Late(), ROWS, ACTIONS)


def test_particles_need_their_own_step():
    class Half:
        particles = 3

        def step(self, belief, action):
            return belief

    with pytest.raises(UnsupportedModelError, match="step_particles"):
        adapt(Half())
    Half.particles = 0
    with pytest.raises(ConfigError, match="particles"):
        adapt(Half())


@pytest.mark.parametrize("after", [[1, 2], (1, 2, 3), torch.ones(2), "12"])
def test_a_plain_state_is_followed_by_one_of_its_kind(after):
    class Odd:
        def step(self, belief, action):
            return after

    with pytest.raises(UnsupportedModelError, match="2 fields"):
        adapt(Odd()).step((0, 0), 1)


def test_the_search_for_modules_ends_and_leaves_libraries_alone():
    class Loop:
        def __init__(self):
            self.me, self.library, self.net = self, np, [Net()]

    assert len(list(modules_of(Loop()))) == 1


def test_user_code_gets_tensors_that_it_can_view():
    from telltale.world import Law

    class Viewing:
        def step(self, belief, action):
            return belief + action.view(-1).view(*action.shape)[:, :1]

    law = Law("viewed", lambda before, action, after: after.view(-1).view(-1, 3).sum(-1) * 0)
    actions = torch.randn(6, 4, 2)
    made = rollout(
        Viewing(), ROWS, actions, laws=[law], reward=lambda b, a, c: c.view(-1).view(-1, 3)[:, 0] + a.view(-1).view(-1, 2)[:, 0],
    )  # fmt: skip
    torch.testing.assert_close(made.beliefs[0, :, 2], ROWS + actions[:, :2, :1].sum(1))
    torch.testing.assert_close(made.rewards[0], made.beliefs[0, :, 1:, 0] + actions[..., 0])
