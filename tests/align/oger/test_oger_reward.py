"""The equations against values worked out by hand: properties 2 to 4 and 6 to 11, and what they refuse."""

import math

import pytest
import torch

from telltale.align.oger import (
    divergence,
    entropy_weight,
    exploration_reward,
    group_advantages,
    offline_token_weight,
    sequence_entropy,
    token_entropies,
)
from telltale.errors import ConfigError, DataError

A, B = [1.0, 0.0], [0.0, 1.0]


def test_divergence_of_hand_made_vectors():
    online, teachers = torch.tensor([A]), torch.tensor([A, B])
    values = {name: divergence(online, teachers, reduce=name).item() for name in ("mean", "max", "min", "centroid")}
    assert values["mean"] == pytest.approx(0.5)
    assert values["max"] == pytest.approx(0.0, abs=1e-7)
    assert values["min"] == pytest.approx(1.0)
    assert values["centroid"] == pytest.approx(1 - 2**-0.5)
    assert divergence(online, torch.tensor([B])).item() == pytest.approx(1.0)
    opposite = torch.tensor([[-1.0, 0.0]])
    assert divergence(online, opposite, clip=False).item() == pytest.approx(2.0)
    assert divergence(online, opposite).item() == 1.0
    assert abs(divergence(online, online).item()) < 1e-6


def test_divergence_does_not_depend_on_lengths_or_order():
    generator = torch.Generator().manual_seed(0)
    online, teachers = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)
    scales = torch.rand(3, 4, 1, generator=generator) + 0.1
    for reduce in ("mean", "max", "min", "centroid"):
        plain = divergence(online, teachers, reduce=reduce, clip=False)
        torch.testing.assert_close(divergence(3 * online, scales * teachers, reduce=reduce, clip=False), plain)
        torch.testing.assert_close(divergence(online, teachers[:, [2, 0, 3, 1]], reduce=reduce, clip=False), plain)


def test_a_doubled_teacher_moves_the_mean_and_not_the_nearest():
    online, teachers = torch.tensor([A]), torch.tensor([A, B])
    doubled = torch.tensor([A, B, B])
    assert divergence(online, doubled).item() == pytest.approx(2 / 3)
    assert divergence(online, doubled, reduce="max").item() == divergence(online, teachers, reduce="max").item()


def test_ragged_teachers_equal_those_of_each_prompt_alone():
    generator = torch.Generator().manual_seed(1)
    online = torch.randn(3, 4, 6, generator=generator)
    teachers = torch.randn(3, 3, 6, generator=generator)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    for reduce in ("mean", "max", "min", "centroid"):
        together = divergence(online, teachers, mask=mask, reduce=reduce)
        for prompt in range(2):
            alone = divergence(online[prompt], teachers[prompt][mask[prompt]], reduce=reduce)
            torch.testing.assert_close(together[prompt], alone)
        assert together[2].tolist() == [0.0] * 4
    assert divergence(online, teachers[:, :0]).tolist() == [[0.0] * 4] * 3


def test_references_of_each_rollout_alone():
    online = torch.tensor([A, B, A])
    mask = torch.tensor([[False, True, False], [True, False, True], [True, True, False]])
    assert divergence(online, online, mask=mask).tolist() == pytest.approx([1.0, 1.0, 0.5])


def test_an_empty_completion_has_no_divergence_and_bad_vectors_are_named():
    assert divergence(torch.zeros(1, 2), torch.tensor([A])).item() == 0.0
    with pytest.raises(DataError, match=r"online embedding \(1,\)"):
        divergence(torch.tensor([A, [math.nan, 0.0]]), torch.tensor([A]))
    with pytest.raises(DataError, match=r"offline embedding \(1,\)"):
        divergence(torch.tensor([A]), torch.tensor([A, [0.0, 0.0]]))
    with pytest.raises(DataError, match="3 dimensions and offline ones 2"):
        divergence(torch.ones(1, 3), torch.tensor([A]))


def test_entropies_in_nats():
    vocabulary = 7
    uniform = token_entropies(torch.zeros(vocabulary))
    assert uniform.item() == pytest.approx(math.log(vocabulary))
    assert entropy_weight(uniform).item() == pytest.approx(1 / vocabulary)
    sure = torch.full((vocabulary,), -torch.inf)
    sure[2] = 0.0
    assert token_entropies(sure).item() == 0.0
    assert entropy_weight(token_entropies(sure)).item() == 1.0
    logits = torch.randn(100, vocabulary, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 3] = -torch.inf
    found = token_entropies(logits)
    assert torch.isfinite(found).all()
    assert (found <= math.log(vocabulary)).all()
    p = torch.softmax(logits / 0.7, -1)
    expected = -(p * p.clamp(min=1e-38).log()).sum(-1)
    torch.testing.assert_close(token_entropies(logits, temperature=0.7), expected)


def test_sequence_entropy_takes_only_the_rollouts_own_tokens():
    tokens = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert sequence_entropy(tokens, mask, reduce="last").tolist() == [3.0, 4.0]
    assert sequence_entropy(tokens, mask).tolist() == [2.0, 4.0]
    assert sequence_entropy(tokens, mask, reduce="top20").tolist() == [3.0, 4.0]
    assert sequence_entropy(tokens, mask, reduce="none").tolist() == [0.0, 0.0]
    six = torch.tensor([1.0, 6.0, 2.0, 5.0, 3.0, 4.0])
    assert sequence_entropy(six, torch.ones(6), reduce="top20").item() == 5.5
    assert sequence_entropy(tokens, torch.zeros_like(mask), reduce="last").tolist() == [0.0, 0.0]


def test_the_bonus_is_gated():
    half, two = torch.tensor(0.5), torch.tensor(math.log(2))
    assert exploration_reward(half, two, torch.tensor(1.0)).item() == pytest.approx(1.25)
    generator = torch.Generator().manual_seed(0)
    apart, entropy = torch.rand(1000, generator=generator), 3 * torch.rand(1000, generator=generator)
    assert exploration_reward(apart, entropy, torch.zeros(1000), coef=7.0).eq(0).all()
    paid = exploration_reward(apart, entropy, torch.ones(1000), coef=0.3)
    assert ((paid >= 1) & (paid <= 1.3)).all()
    offline = torch.ones(1000, dtype=torch.bool)
    assert exploration_reward(apart, entropy, torch.ones(1000), offline=offline).eq(1).all()


def test_rewards_that_are_not_zero_or_one():
    half, zero = torch.tensor(0.5), torch.tensor(0.0)
    assert exploration_reward(half, zero, torch.tensor(0.3)).item() == pytest.approx(0.45)
    assert exploration_reward(half, zero, torch.tensor(-1.0)).item() == -1.0
    assert math.isnan(exploration_reward(half, zero, torch.tensor(math.nan)).item())


VECTORS = [
    ([0] * 7 + [1], [-0.3535] * 7 + [2.4742]),
    ([1.25] + [0] * 6 + [1], [1.8447] + [-0.5356] * 6 + [1.3687]),
    (
        [1.25, 1.1, 1.05, 1.3, 1.2, 1.15, 1.02, 1],
        [1.0553, -0.3064, -0.7603, 1.5092, 0.6014, 0.1475, -1.0326, -1.2142],
    ),
    ([1.0001] * 7 + [1], [0.0925] * 7 + [-0.6464]),
]


@pytest.mark.parametrize(("rewards", "expected"), VECTORS)
def test_advantages_of_the_specifications_groups(rewards, expected):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert found.mean().abs() < 1e-6


def test_advantages_equal_trls_own_arithmetic():
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards), centred / (rewards.std(1, keepdim=True) + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), centred / (rewards.std() + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centred)
    rewards[0, 3] = math.nan
    known = group_advantages(rewards)[0, [0, 1, 2, 4, 5, 6, 7]]
    torch.testing.assert_close(known, group_advantages(rewards[0, [0, 1, 2, 4, 5, 6, 7]]))
    assert group_advantages(rewards)[0, 3] == 0


def test_the_coefficient_cancels_in_an_all_correct_group():
    apart, entropy = torch.rand(7, generator=torch.Generator().manual_seed(0)), torch.zeros(7)
    found = []
    for coef in (0.1, 1.0, 10.0):
        rewards = torch.cat([exploration_reward(apart, entropy, torch.ones(7), coef=coef), torch.ones(1)])
        found.append(group_advantages(rewards))
    torch.testing.assert_close(found[0], found[1], atol=1e-2, rtol=0)
    torch.testing.assert_close(found[2], found[1], atol=1e-2, rtol=0)


def test_a_constant_bonus_cancels():
    correct = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
    paid = exploration_reward(torch.full((8,), 0.4), torch.full((8,), 0.1), correct)
    torch.testing.assert_close(group_advantages(paid), group_advantages(correct), atol=1e-3, rtol=0)


def test_the_teacher_of_an_all_correct_group_is_pushed_away_unless_clamped():
    online = exploration_reward(torch.tensor([0.2, 0.5, 0.9]), torch.zeros(3), torch.ones(3))
    rewards = torch.cat([online, torch.ones(1)])
    offline = torch.tensor([False, False, False, True])
    raw = group_advantages(rewards, offline=offline)
    clamped = group_advantages(rewards, offline=offline, teacher="clamp")
    assert raw[3] < 0
    assert clamped[3] == 0
    assert torch.equal(raw[:3], clamped[:3])


def test_a_floor_on_the_deviation_keeps_noise_small():
    rewards = torch.tensor([1.0001] * 7 + [1.0])
    assert group_advantages(rewards, std_floor=0.1).abs().max() < 1e-2
    wide = torch.tensor([0.0] * 4 + [1.0] * 4)
    assert torch.equal(group_advantages(wide, std_floor=0.1), group_advantages(wide))


def test_the_shaped_weight():
    p = torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001])
    expected = [0.082645, 0.138889, 0.25, 0.082645, 0.009803]
    assert offline_token_weight(p.log()).tolist() == pytest.approx(expected, abs=1e-6)
    symmetric = offline_token_weight((0.1**2 / p).log())
    torch.testing.assert_close(symmetric, offline_token_weight(p.log()))


def test_the_shaped_weight_is_the_gradient_of_luffys_branch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens, advantage = torch.arange(6), torch.randn(6, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)[torch.arange(6), tokens]
    p = log_p.exp()
    (luffy,) = torch.autograd.grad((p / (p + 0.1) * advantage).sum(), logits, retain_graph=True)
    (ours,) = torch.autograd.grad((offline_token_weight(log_p) * advantage * log_p).sum(), logits)
    torch.testing.assert_close(ours, luffy, atol=1e-6, rtol=0)


def test_behavior_weights_are_ratios_and_the_others_are_one():
    log_p = torch.tensor([-1.0, -2.0])
    assert offline_token_weight(log_p, mode="behavior", behavior_log_probs=log_p).tolist() == [1.0, 1.0]
    ratio = offline_token_weight(log_p, mode="behavior", behavior_log_probs=log_p - 1)
    torch.testing.assert_close(ratio, torch.full((2,), math.e))
    for mode in ("on_policy", "sft"):
        assert offline_token_weight(log_p, mode=mode).tolist() == [1.0, 1.0]


def test_what_is_refused():
    one = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="reduce='median'"):
        divergence(one, one, reduce="median")
    with pytest.raises(ConfigError, match="reduce='first'"):
        sequence_entropy(one, one, reduce="first")
    with pytest.raises(ConfigError, match="coef=-1"):
        exploration_reward(one, one, one, coef=-1)
    with pytest.raises(ConfigError, match="gamma=0"):
        offline_token_weight(one, gamma=0)
    with pytest.raises(ConfigError, match="behavior_log_probs"):
        offline_token_weight(one, mode="behavior")
    with pytest.raises(ConfigError, match="std_floor"):
        group_advantages(one, std_floor=-0.1)
    with pytest.raises(ConfigError, match="teacher='clamp' needs offline"):
        group_advantages(one, teacher="clamp")
