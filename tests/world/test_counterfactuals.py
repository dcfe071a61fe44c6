"""Counterfactual divergence: the closed form, the null control, and models that are deaf to actions."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import ConfigError, DataError
from telltale.world import counterfactual_divergence
from telltale.world.counterfactuals import branches, sensitivity
from world.small_models import Deaf, Linear, Noisy, Seeded

BELIEF = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
ACTIONS = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OTHER = torch.tensor([2.0, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_closed_form_of_a_linear_model(k):
    model = Linear()
    power = torch.linalg.matrix_power(model.a, len(ACTIONS) - k)
    expected = float((power @ model.b @ (OTHER - ACTIONS[k - 1])).norm())
    assert counterfactual_divergence(model, BELIEF, ACTIONS, k, OTHER) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("model", [Linear(), Noisy(), Seeded(), Deaf()])
@pytest.mark.parametrize("k", [1, 7])
def test_the_null_intervention_changes_nothing_bit_for_bit(model, k):
    assert counterfactual_divergence(model, BELIEF, ACTIONS, k, ACTIONS[k - 1]) == 0.0


def test_a_deaf_model_is_found_deaf_though_it_draws_noise_of_its_own():
    for k in range(1, 8):
        assert counterfactual_divergence(Deaf(), BELIEF, ACTIONS, k, OTHER) == 0.0
    assert counterfactual_divergence(Noisy(), BELIEF, ACTIONS, 1, OTHER) > 0


def test_states_before_the_change_are_equal_bit_for_bit():
    first, second = branches(Noisy(), BELIEF, ACTIONS, 4, OTHER)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    assert not torch.equal(first[4], second[4])


def test_the_generator_decides_and_does_not_move():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state().clone()
    one = branches(Seeded(), BELIEF, ACTIONS, 2, OTHER, generator=generator)[0][-1]
    two = branches(Seeded(), BELIEF, ACTIONS, 2, OTHER, generator=torch.Generator().manual_seed(3))[0][-1]
    assert torch.equal(one, two)
    assert torch.equal(state, generator.get_state())


def test_rows_are_averaged_and_a_distance_may_be_given():
    rows = BELIEF.repeat(4, 1)
    assert counterfactual_divergence(Linear(), rows, ACTIONS, 1, OTHER) == pytest.approx(
        counterfactual_divergence(Linear(), BELIEF, ACTIONS, 1, OTHER)
    )
    assert counterfactual_divergence(Linear(), BELIEF, ACTIONS, 1, OTHER, distance=lambda a, b: 7.0) == 7.0


def test_a_model_that_insists_on_a_batch_gets_one():
    class Batched(Linear):
        def step(self, belief, action):
            joined = torch.cat([belief, action], dim=1)
            return joined[:, :3] @ self.a.T + joined[:, 3:] @ self.b.T

    assert counterfactual_divergence(Batched(), BELIEF, ACTIONS, 2, OTHER) == pytest.approx(
        counterfactual_divergence(Linear(), BELIEF, ACTIONS, 2, OTHER)
    )


def test_plain_states_and_numbers():
    class Counter:
        def step(self, belief, action):
            return belief + action

    assert counterfactual_divergence(Counter(), 0, [1, 1, 1], 2, 5) == 4.0


def test_sensitivity_against_an_oracle():
    same = sensitivity(Linear(), Linear(), [BELIEF], [ACTIONS], [OTHER], embed=lambda z: z, steps=[1, 4])
    assert same.ratio == pytest.approx(1)
    assert same.direction == pytest.approx([1, 1])
    assert same.null == 0.0
    deaf = sensitivity(Deaf(), Linear(), [BELIEF], [ACTIONS], [OTHER], embed=lambda z: z, steps=[1, 4])
    assert deaf.ratio == 0.0
    assert deaf.responding == 0.0
    assert deaf.direction == [0.0, 0.0]


@pytest.mark.parametrize("k", [0, 8, -1])
def test_k_counts_from_one_to_h(k):
    with pytest.raises(ConfigError, match="k="):
        counterfactual_divergence(Linear(), BELIEF, ACTIONS, k, OTHER)


def test_nan_and_misshapen_inputs_are_named():
    broken = ACTIONS.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"actions\[2, 1\]"):
        counterfactual_divergence(Linear(), BELIEF, broken, 1, OTHER)
    with pytest.raises(DataError, match=r"belief\[1\]"):
        counterfactual_divergence(Linear(), torch.tensor([0.0, float("inf"), 0.0]), ACTIONS, 1, OTHER)
    with pytest.raises(ConfigError, match="alternative"):
        counterfactual_divergence(Linear(), BELIEF, ACTIONS, 1, torch.ones(3))
    with pytest.raises(ConfigError, match="empty"):
        counterfactual_divergence(Linear(), BELIEF, [], 1, OTHER)


def test_a_prediction_that_is_not_finite_is_never_passed_on():
    class Broken:
        def step(self, belief, action):
            return belief / 0.0

    with pytest.raises(ValueError, match="not finite"):
        counterfactual_divergence(Broken(), BELIEF, ACTIONS, 1, OTHER)
