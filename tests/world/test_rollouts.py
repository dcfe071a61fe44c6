"""Rollouts: equal to steps, equal in parts and in batches, common noise, and laws that act per particle."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import ConfigError, DataError
from telltale.world.laws import library
from telltale.world.laws.law import InfeasibleLaw, Law
from telltale.world.models.ensemble import Ensemble, EnsembleConfig
from telltale.world.protocol import DivergedError
from telltale.world.rollouts import rollout
from world.small_models import Linear, Noisy, Seeded

GENERATOR = torch.Generator().manual_seed(0)
BELIEF = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
ACTIONS = torch.randn(6, 5, 2, generator=GENERATOR, dtype=torch.float64)


def noise():
    return torch.Generator().manual_seed(4)


def small_ensemble(**settings):
    torch.manual_seed(0)
    return Ensemble(EnsembleConfig(3, 2, **settings)).eval().requires_grad_(False)


def test_a_rollout_is_its_steps():
    made = rollout(Seeded(), BELIEF, ACTIONS, generator=noise())
    state, generator = BELIEF, noise()
    for t in range(5):
        state = Seeded().step(state, ACTIONS[:, t], generator=generator)
    # the adapter draws a seed for the module's own randomness before each step, so equality is with the adapter
    from telltale.world.protocol import adapt

    state, generator = BELIEF, noise()
    for t in range(5):
        state = adapt(Seeded()).step(state, ACTIONS[:, t], generator=generator).belief
    assert torch.equal(made.beliefs[0, :, -1], state)


def test_two_parts_are_the_whole():
    whole = rollout(Linear(), BELIEF, ACTIONS).beliefs[0]
    first = rollout(Linear(), BELIEF, ACTIONS[:, :2]).beliefs[0]
    second = rollout(Linear(), first[:, -1], ACTIONS[:, 2:]).beliefs[0]
    assert torch.equal(whole, torch.cat([first, second[:, 1:]], 1))


def test_two_parts_are_the_whole_with_noise_that_goes_on():
    whole = rollout(Seeded(), BELIEF, ACTIONS, generator=noise()).beliefs[0]
    going = noise()
    first = rollout(Seeded(), BELIEF, ACTIONS[:, :2], generator=going).beliefs[0]
    second = rollout(Seeded(), first[:, -1], ACTIONS[:, 2:], generator=going).beliefs[0]
    assert torch.equal(whole, torch.cat([first, second[:, 1:]], 1))


@pytest.mark.parametrize("model", [Linear(), small_ensemble()])
def test_a_row_does_not_depend_on_its_neighbours(model):
    belief, actions = BELIEF.to(next(model.parameters()).dtype), ACTIONS.to(next(model.parameters()).dtype)
    whole = rollout(model, belief, actions, generator=noise(), common=True).beliefs
    for i in (0, 3):
        alone = rollout(model, belief[i : i + 1], actions[i : i + 1], generator=noise(), common=True).beliefs
        torch.testing.assert_close(whole[:, i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [Noisy(), Seeded()])
def test_common_noise_reaches_every_row_also_of_a_users_module(model):
    rows, actions = BELIEF[:1].repeat(4, 1), ACTIONS[:1].repeat(4, 1, 1)
    made = rollout(model, rows, actions, generator=noise(), common=True).beliefs[0]
    assert all(torch.equal(made[0], made[i]) for i in range(4))
    own = rollout(model, rows, actions, generator=noise()).beliefs[0]
    assert not torch.equal(own[0], own[1])


def test_particles_of_an_ensemble_are_its_members():
    model = small_ensemble(noise=False)
    made = rollout(model, BELIEF.float(), ACTIONS.float())
    assert made.beliefs.shape == (4, 6, 6, 3)
    torch.testing.assert_close(made.beliefs[:, :, 1].mean(0), model.step(BELIEF.float(), ACTIONS[:, 0].float()).belief)


def test_reward_and_ending_known_or_predicted():
    made = rollout(
        Linear(),
        BELIEF,
        ACTIONS,
        reward=lambda b, a, c: torch.ones(c.shape[:-1]),
        terminated=lambda c: torch.ones(c.shape[:-1], dtype=torch.bool),
    )
    assert made.returns().tolist() == [1.0] * 6  # the first step counts, what follows the end does not
    with pytest.raises(ConfigError, match="reward"):
        rollout(Linear(), BELIEF, ACTIONS).returns()


class Outward:
    """Moves every particle away from the unit circle by its row's action."""

    particles = 3
    stochastic = False

    def step(self, belief, action):
        return belief * (1 + action[..., :1])

    def step_particles(self, belief, action, *, generator=None, common=False):
        from telltale.world.protocol import Transition

        angles = torch.tensor([0.0, 0.5, -0.5]).reshape(3, 1)
        length = belief.norm(dim=-1) * (1 + action[..., 0])
        return Transition(torch.stack([length * torch.cos(angles), length * torch.sin(angles)], -1))


CIRCLE = library.unit_circle(0, 1, tolerance=0.05)
START = torch.tensor([[1.0, 0.0]])


def test_laws_are_checked_per_particle_because_a_mean_of_lawful_particles_may_break_them():
    made = rollout(Outward(), START, torch.zeros(1, 2, 1), laws=[CIRCLE])
    assert made.violation_rate() == 0.0
    mean = made.beliefs.mean(0)[:, 1]
    assert float(CIRCLE.excess(None, None, mean)) > 0


class TestModes:
    OUT = torch.full((1, 2, 1), 0.5)

    def test_report_changes_nothing(self):
        free = rollout(Outward(), START, self.OUT)
        seen = rollout(Outward(), START, self.OUT, laws=[CIRCLE])
        assert torch.equal(free.beliefs, seen.beliefs)
        assert seen.violation_rate() == 1.0

    def test_project_puts_every_particle_back_and_still_reports_what_was_predicted(self):
        made = rollout(Outward(), START, self.OUT, laws=[CIRCLE], mode="project")
        assert bool(CIRCLE.holds(None, None, made.beliefs[:, :, 1:]).all())
        assert made.violation_rate() == 1.0

    def test_penalise_takes_from_the_return(self):
        from telltale.world.laws.law import Enforcement

        reward = lambda b, a, c: torch.zeros(c.shape[:-1])  # noqa: E731
        made = rollout(
            Outward(), START, self.OUT[:, :1], reward=reward, laws=[CIRCLE], mode=Enforcement("penalise", 2.0)
        )
        assert made.returns().item() == pytest.approx(-2 * 0.45, abs=1e-5)

    def test_shield_forbids_a_first_step_that_breaks_a_hard_law(self):
        reward = lambda b, a, c: torch.zeros(c.shape[:-1])  # noqa: E731
        assert rollout(
            Outward(), START, self.OUT, reward=reward, laws=[CIRCLE], mode="shield"
        ).returns().item() == -float("inf")

    def test_reject_gives_up_on_an_impossible_law(self):
        impossible = Law("never", lambda b, a, c: torch.ones(c.shape[:-1]))
        with pytest.raises(InfeasibleLaw, match="never"):
            rollout(Outward(), START, self.OUT, laws=[impossible], mode="reject")

    def test_reject_replaces_unlawful_particles_by_lawful_ones_of_the_same_row(self):
        right = Law("right half", lambda b, a, c: (-c[..., 1]).clamp(min=0), tolerance=0.01)
        made = rollout(Outward(), START, torch.zeros(1, 2, 1), laws=[right], mode="reject")
        assert bool((made.beliefs[:, :, 1, 1] >= -0.01).all())

    def test_no_laws_is_the_plain_product_and_order_does_not_matter_to_reports(self):
        other = library.limits(0, -1.2, 1.2)
        one, two = (rollout(Outward(), START, self.OUT, laws=laws) for laws in ([CIRCLE, other], [other, CIRCLE]))
        assert torch.equal(rollout(Outward(), START, self.OUT).beliefs, one.beliefs)
        assert all(torch.equal(one.excess[name], two.excess[name]) for name in one.excess)


class TestBadInputs:
    @pytest.mark.parametrize("shape", [(6, 0, 2), (5, 3, 2), (6,)])
    def test_shapes(self, shape):
        with pytest.raises(ConfigError, match="H >= 1"):
            rollout(Linear(), BELIEF, torch.zeros(shape, dtype=torch.float64))

    def test_nan(self):
        broken = BELIEF.clone()
        broken[4, 2] = float("nan")
        with pytest.raises(DataError, match=r"belief\[4, 2\]"):
            rollout(Linear(), broken, ACTIONS)

    def test_a_model_that_diverges_is_told_so(self):
        class Exploding:
            def step(self, belief, action):
                return belief * 1e300

        with pytest.raises(DivergedError, match="Exploding"):
            rollout(Exploding(), BELIEF, ACTIONS)

    def test_an_unknown_mode(self):
        with pytest.raises(ConfigError, match="project"):
            rollout(Linear(), BELIEF, ACTIONS, mode="prject")
