"""Anything with a step: what is accepted, what is refused, and that randomness is replayed wherever it comes from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from telltale.errors import UnsupportedModelError
from telltale.world.protocol import Transition, adapt
from telltale.world.randomness import drawn_seed, replayed_own_randomness
from world.small_models import Linear, Noisy, Seeded


class Returning:
    def __init__(self, value):
        self.value = value

    def step(self, belief, action):
        return self.value


class TestWhatAStepMayReturn:
    def test_tensor_transition_or_any_object_with_a_belief(self):
        after = torch.ones(4, 3)

        class Other:
            belief = after
            reward = torch.zeros(4)

        for value in (after, Transition(after), Other()):
            made = adapt(Returning(value)).step(torch.zeros(4, 3), torch.zeros(4, 1))
            assert torch.equal(made.belief, after)

    def test_plain_states(self):
        assert adapt(Returning((1, 2))).step((0, 0), 1).belief == (1, 2)

    @pytest.mark.parametrize("value", [torch.ones(3, 3), torch.ones(4, 2), torch.ones(3)])
    def test_a_wrong_batch_or_width_is_refused_with_both_shapes(self, value):
        with pytest.raises(UnsupportedModelError, match=r"\(4, 3\)"):
            adapt(Returning(value)).step(torch.zeros(4, 3), torch.zeros(4, 1))

    def test_a_reward_of_the_wrong_shape_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="reward"):
            adapt(Returning(Transition(torch.ones(4, 3), torch.zeros(4, 1)))).step(torch.zeros(4, 3), torch.zeros(4, 1))

    @pytest.mark.parametrize("value", [None, "text"])
    def test_no_tensor_for_a_tensor(self, value):
        with pytest.raises(UnsupportedModelError, match="next belief"):
            adapt(Returning(value)).step(torch.zeros(4, 3), torch.zeros(4, 1))

    def test_without_a_step_it_is_no_model(self):
        with pytest.raises(UnsupportedModelError, match="step"):
            adapt(nn.Linear(3, 3))


class TestReplayedRandomness:
    def test_global_generators_are_replayed_and_left_alone(self):
        model = Noisy()
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        draws = []
        for _ in range(2):
            with replayed_own_randomness(model, 5):
                draws.append((torch.rand(3).tolist(), np.random.rand(), random.random()))
        assert draws[0] == draws[1]
        assert torch.equal(states[0], torch.get_rng_state())
        assert (states[1] == np.random.get_state()[1]).all()
        assert states[2] == random.getstate()

    def test_generators_that_a_module_holds_are_replayed_too(self):
        class Holding(nn.Module):
            def __init__(self):
                super().__init__()
                self.own, self.rng, self.python = torch.Generator(), np.random.default_rng(3), random.Random(4)

            def step(self, belief, action):
                return belief + torch.rand((), generator=self.own) + self.rng.random() + self.python.random()

        adapted = adapt(Holding())
        first, second = (
            adapted.step(torch.zeros(1, 2), torch.zeros(1, 1), generator=torch.Generator().manual_seed(1)).belief
            for _ in range(2)
        )
        other = adapted.step(torch.zeros(1, 2), torch.zeros(1, 1), generator=torch.Generator().manual_seed(2)).belief
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize(("model", "expected"), [(Linear(), False), (Noisy(), True), (Seeded(), True)])
    def test_whether_a_model_is_stochastic_is_found_out(self, model, expected):
        belief, action = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
        assert adapt(model).stochastic(belief, action) is expected

    def test_seeds_are_drawn_from_the_generator(self):
        assert drawn_seed(torch.Generator().manual_seed(1)) == drawn_seed(torch.Generator().manual_seed(1))
