"""Planners when some candidates may not be judged: shields, rejected particles, and models that break down on some actions."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces

from telltale.errors import ConfigError
from telltale.world import Law, make, plan
from telltale.world.laws.law import InfeasibleLaw
from telltale.world.protocol import DivergedError, Transition
from telltale.world.rollouts import rollout

PLANNERS = ["cem", "icem", "mppi"]


class Adding:
    def step(self, belief, action):
        return belief + action


class Brittle(Adding):
    """Breaks down on pushes to the right."""

    def step(self, belief, action):
        return torch.where(action > 0.3, torch.inf, belief + action)


def corridor(**settings):
    return make(
        lambda s, a: s + a, initial=[0.0], action_space=spaces.Box(-1, 1, (1,)), success=lambda e: True, horizon=2,
        reward=lambda b, a, c: -((c[..., 0] - 0.6) ** 2), name="corridor", **settings,
    )  # fmt: skip


def gap(before, action, after):
    """Two lawful stretches: the mean of plans that end in either is in neither."""
    return (0.5 - action[..., 0].abs()).clamp(min=0)


@pytest.mark.parametrize("planner", PLANNERS)
def test_what_a_shield_lets_through_obeys_the_law(planner):
    world = corridor(laws=[Law("no small pushes", gap)])
    target = plan(Adding(), world, torch.zeros(40, 1) + torch.linspace(0.2, 1.0, 40)[:, None], planner=planner,
                  mode="shield", samples=32, iterations=2)  # fmt: skip
    assert bool((target.actions[:, 0, 0].abs() >= 0.5).all())
    assert bool(torch.isfinite(target.value).all())


@pytest.mark.parametrize("planner", [*PLANNERS])
def test_a_candidate_on_which_the_model_breaks_down_is_left_out_and_the_others_count(planner):
    found = plan(Brittle(), corridor(), torch.zeros(1), planner=planner, samples=64, iterations=6)
    assert 0.1 < found.actions[0, 0].item() <= 0.3
    assert bool(torch.isfinite(found.value).all())


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_candidate_without_a_lawful_particle_is_left_out_under_reject(planner):
    world = corridor(laws=[Law("left of .2", lambda b, a, c: (c[..., 0] - 0.2).clamp(min=0))])
    found = plan(Adding(), world, torch.zeros(1), planner=planner, mode="reject", samples=64, iterations=6, horizon=1)
    assert 0.0 < found.actions[0, 0].item() <= 0.2


def test_where_nothing_is_left_the_reason_is_named():
    with pytest.raises(DivergedError, match="Brittle"):
        plan(Brittle(), make(lambda s, a: s, initial=[0.0], action_space=spaces.Box(0.5, 1, (1,)), name="right",
                             success=lambda e: True, reward=lambda b, a, c: c[..., 0]), torch.zeros(1))  # fmt: skip
    never = Law("never", lambda b, a, c: torch.ones(c.shape[:-1]))
    for mode in ("shield", "reject"):
        with pytest.raises(InfeasibleLaw, match="never"):
            plan(Adding(), corridor(laws=[never]), torch.zeros(1), mode=mode)


def test_reject_keeps_a_particles_reward_and_end_with_its_state():
    class Pair:
        particles = 2

        def step(self, belief, action):
            return belief

        def step_particles(self, belief, action, *, generator=None, common=False):
            value = torch.tensor([[1.0], [-1.0]]).expand(2, belief.shape[1])
            return Transition(value.unsqueeze(-1), value * 10, value < 0)

    right = Law("right", lambda b, a, c: (-c[..., 0]).clamp(min=0))
    made = rollout(Pair(), torch.zeros(3, 1), torch.zeros(3, 2, 1), laws=[right], mode="reject")
    assert made.rewards.unique().tolist() == [10.0]
    assert bool(made.alive.all())


@pytest.mark.parametrize(
    ("reward", "word"),
    [(lambda b, a, c: torch.zeros(()), r"\(\)"), (lambda b, a, c: 1.0, "float"), (lambda b, a, c: c, "rows")],
)
def test_a_known_reward_gives_one_value_per_row(reward, word):
    with pytest.raises(ConfigError, match=word):
        rollout(Adding(), torch.zeros(3, 2), torch.zeros(3, 4, 2), reward=reward)


class TestBeliefsThatAreDecoded:
    """A model in a space of its own: beliefs (B, 2) of observations (B, 1)."""

    class Latent:
        def infer(self, observation):
            return torch.cat([observation * 2, torch.ones_like(observation)], -1)

        def step(self, belief, action):
            return torch.cat([belief[..., :1] + 2 * action, belief[..., 1:]], -1)

        def decode(self, belief):
            return belief[..., :1] / 2

    def test_reward_laws_and_projection_speak_of_what_is_decoded(self):
        wall = Law("wall", lambda b, a, c: (c[..., 0] - 0.4).clamp(min=0), projection=lambda b, a, c: c.clamp(max=0.4))
        model, actions = self.Latent(), torch.full((1, 3, 1), 0.3)
        plain = rollout(Adding(), torch.zeros(1, 1), actions, reward=lambda b, a, c: c[..., 0], laws=[wall])
        made = rollout(model, model.infer(torch.zeros(1, 1)), actions, reward=lambda b, a, c: c[..., 0], laws=[wall])
        torch.testing.assert_close(made.observed, plain.beliefs)
        torch.testing.assert_close(made.rewards, plain.rewards)
        torch.testing.assert_close(made.excess["wall"], plain.excess["wall"])
        assert made.beliefs.shape[-1] == 2
        put = rollout(model, model.infer(torch.zeros(1, 1)), actions, laws=[wall], mode="project")
        assert float(put.observed.max()) == pytest.approx(0.4)
        assert float(put.excess["wall"].max()) > 0

    def test_projection_needs_a_way_back(self):
        class Blind:
            step, decode = self.Latent.step, self.Latent.decode

        with pytest.raises(ConfigError, match="infer"):
            rollout(Blind(), torch.zeros(1, 2), torch.zeros(1, 1, 1), laws=[Law("l", gap)], mode="project")
