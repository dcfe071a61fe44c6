"""The gate and the head on the points where the released script fails: the axis, the gradient, a matrix that is not symmetric."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from telltale.align.judge.head import Gate, GateConfig, Head, normalised_entropy
from telltale.errors import ConfigError, DataError

NAMES = ("helpful", "safe", "correct", "verbosity")
SMALL = GateConfig(hidden=16, layers=2)


def head(**options: object) -> Head:
    """Random weights and a transform that is not symmetric."""
    torch.manual_seed(0)
    found = Head(NAMES, 8, prompt_size=5, gate=SMALL, nuisances=("verbosity",), **options)  # type: ignore[arg-type]
    found.set_regression(torch.randn(4, 8))
    transform = torch.eye(4)
    transform[3] -= torch.tensor([0.5, -0.2, 0.1, 1.0])
    found.set_transform(transform)
    with torch.no_grad():
        found.gating.logit_scale.fill_(3.0)
    return found


def official_axis(gate: Gate, prompts: Tensor) -> Tensor:
    """What the released script computes on pairs (B, 2, size): a softmax over the pair."""
    hidden = prompts
    for layer in gate.layers[:-1]:
        hidden = functional.relu(layer(hidden))
    return (gate.layers[-1](hidden) / gate.config.temperature).softmax(1)


def test_weights_are_positive_and_sum_to_the_scale_over_objectives() -> None:
    gate = head().gating
    for shape in ((7, 5), (7, 2, 5), (5,)):
        found = gate(torch.randn(shape))
        assert found.shape == (*shape[:-1], 4)
        assert torch.allclose(found.sum(-1), torch.full(shape[:-1], 3.0), atol=1e-6)
        assert bool((found >= 0).all())
        assert not bool(found[..., 3].any())


def test_pairs_and_single_rows_get_the_same_weights() -> None:
    gate = head().gating
    pairs = torch.randn(6, 2, 5)
    assert torch.equal(gate(pairs).reshape(12, 4), gate(pairs.reshape(12, 5)))


def test_the_mlp_gets_a_gradient_where_the_released_script_has_none() -> None:
    prompts = torch.randn(32, 1, 5).expand(32, 2, 5)
    rewards = torch.randn(32, 2, 4)

    def gradient(weights: Tensor, gate: Gate) -> float:
        score = (weights * rewards).sum(-1)
        gate.zero_grad()
        functional.softplus(score[:, 1] - score[:, 0]).mean().backward()
        return math.sqrt(sum(float(p.grad.square().sum()) for p in gate.layers.parameters() if p.grad is not None))

    torch.manual_seed(1)
    gate = Gate(5, 4, SMALL)
    wrong = official_axis(gate, prompts)
    assert torch.allclose(wrong, torch.full_like(wrong, 0.5))
    assert gradient(wrong, gate) < 1e-7
    assert gradient(gate(prompts), gate) > 1e-4


def test_permuting_objectives_permutes_weights_and_leaves_the_score() -> None:
    original, permuted = head(), head()
    order = [2, 0, 1, 3]
    with torch.no_grad():
        last = permuted.gating.layers[-1]
        last.weight.copy_(original.gating.layers[-1].weight[order])
        last.bias.copy_(original.gating.layers[-1].bias[order])
    permuted.set_regression(original.regression_layer.weight[order])
    permuted.set_transform(original.reward_transform_matrix[order][:, order])
    hidden, prompts = torch.randn(9, 8), torch.randn(9, 5)
    one, other = original(hidden, prompts), permuted(hidden, prompts)
    assert torch.allclose(other.weights, one.weights[:, order], atol=1e-6)
    assert torch.allclose(other.score, one.score, atol=1e-6)


def test_one_prompt_has_one_set_of_weights() -> None:
    found = head()(torch.randn(6, 8), torch.randn(1, 5).expand(6, -1))
    assert torch.equal(found.weights, found.weights[:1].expand(6, -1))


def test_the_score_is_the_gated_sum_of_transformed_rewards() -> None:
    model = head()
    hidden, prompts = torch.randn(9, 8), torch.randn(9, 5)
    with torch.no_grad():
        found = model(hidden, prompts)
    transform = model.reward_transform_matrix
    assert not torch.equal(transform, transform.T)
    turned = found.rewards @ transform
    assert torch.allclose(turned, found.rewards - torch.tensor([0.5, -0.2, 0.1, 1.0]) * found.rewards[:, 3:], atol=1e-6)
    assert not bool(turned[:, 3].any())
    assert torch.allclose(found.score, (found.weights * turned).sum(-1).double(), atol=1e-5)
    assert float((found.score - (found.weights * (found.rewards @ transform.T)).sum(-1)).abs().max()) > 1e-2
    assert torch.allclose(found.coefficients[:, :3], found.weights[:, :3], atol=1e-6)
    assert torch.allclose(
        found.coefficients[:, 3], -(found.weights[:, :3] * torch.tensor([0.5, -0.2, 0.1])).sum(1), atol=1e-6
    )


def test_coefficients_are_the_derivatives_of_the_score() -> None:
    model = head()
    rewards = torch.randn(3, 4, requires_grad=True)
    weights = model.weights(torch.randn(3, 5)).detach()
    (weights * model.transformed(rewards)).sum().backward()
    assert torch.allclose(rewards.grad, weights @ model.reward_transform_matrix.T, atol=1e-6)


def test_scaling_rewards_scales_the_score() -> None:
    model = head()
    hidden, prompts = torch.randn(4, 8), torch.randn(4, 5)
    before = model(hidden, prompts).score
    model.set_regression(2.5 * model.regression_layer.weight)
    assert torch.allclose(model(hidden, prompts).score, 2.5 * before, rtol=1e-5)


def test_half_precision_states_are_judged_in_single_precision() -> None:
    model = head()
    hidden, prompts = torch.randn(4, 8).bfloat16(), torch.randn(4, 5).bfloat16()
    found = model(hidden, prompts)
    assert found.rewards.dtype == torch.float32
    assert torch.equal(found.score, model(hidden.float(), prompts.float()).score)


def test_standardisation_is_absorbed_exactly() -> None:
    gate = head().gating
    prompts, mean, deviation = torch.randn(20, 5) * 3 + 1, torch.randn(5), torch.rand(5) + 0.5
    wanted = gate((prompts - mean) / deviation)
    gate.absorb_standardisation(mean, deviation)
    assert torch.allclose(gate(prompts), wanted, atol=1e-5)


def test_parameters_have_the_official_names() -> None:
    names = {name: tuple(value.shape) for name, value in Head(NAMES, 8, prompt_size=8).state_dict().items()}
    assert names == {
        "regression_layer.weight": (4, 8),
        "reward_transform_matrix": (4, 4),
        "gating.logit_scale": (1,),
        **{
            f"gating.layers.{n}.weight": shape
            for n, shape in enumerate([(1024, 8), (1024, 1024), (1024, 1024), (4, 1024)])
        },
        **{f"gating.layers.{n}.bias": (size,) for n, size in enumerate([1024, 1024, 1024, 4])},
    }


def test_entropy_is_relative_to_what_is_not_masked() -> None:
    even = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]])
    assert normalised_entropy(even) == pytest.approx(1.0)
    assert normalised_entropy(torch.tensor([[1.0, 0.0, 0.0, 0.0]])) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Head((), 4), "at least one, each once"),
        (lambda: Head(("a", "a"), 4), "each once"),
        (lambda: Head(("a", "b"), 4, nuisances=("c",)), "nuisance 'c' is no objective"),
        (lambda: Head(("a",), 4, nuisances=("a",)), "masked out of the gate"),
        (lambda: GateConfig(temperature=0.0), "temperature=0.0"),
        (lambda: GateConfig(layers=0), "layers=0"),
        (lambda: GateConfig.from_dict({"widht": 3}), "unknown config field 'widht'"),
    ],
)
def test_bad_settings(build, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_one_prompt_state_for_each_response() -> None:
    with pytest.raises(DataError, match="one prompt state for each response"):
        head()(torch.randn(4, 8), torch.randn(3, 5))
