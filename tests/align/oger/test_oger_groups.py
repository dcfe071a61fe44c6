"""Composition of hybrid groups and draws of teachers: properties 5 and 13."""

import pytest
import torch

from telltale.align.oger.groups import compose_group, draw_generator, draw_teachers, group_references
from telltale.errors import ConfigError


def test_the_most_teacher_like_rollout_leaves_and_ties_go_to_the_first():
    apart = torch.tensor([[0.5, 0.1, 0.9, 0.1], [0.2, 0.2, 0.2, 0.2]])
    reward = torch.ones(2, 4)
    made = compose_group(apart, reward, torch.tensor([[2], [0]]))
    assert made.offline.tolist() == [[False, True, False, False], [True, False, False, False]]
    assert made.teacher.tolist() == [[-1, 2, -1, -1], [0, -1, -1, -1]]


@pytest.mark.parametrize("hybrid", [1, 2, 3])
def test_a_group_gets_exactly_its_traces_if_it_has_a_teacher(hybrid):
    generator = torch.Generator().manual_seed(0)
    apart, reward = torch.rand(50, 4, generator=generator), torch.randint(0, 2, (50, 4), generator=generator).float()
    draws = torch.zeros(50, hybrid, dtype=torch.int64)
    draws[::3] = -1
    for replaced in ("least_divergent", "least_divergent_correct", "random", "lowest_reward"):
        keys = torch.rand(50, 4, generator=generator)
        made = compose_group(apart, reward, draws, hybrid=hybrid, replaced=replaced, random_keys=keys)
        counts = made.offline.sum(1)
        assert counts[::3].eq(0).all()
        assert counts[1::3].eq(hybrid).all()


def test_the_only_correct_rollout_stays_unless_the_paper_is_followed():
    apart, reward = torch.tensor([[0.0, 0.5, 0.9]]), torch.tensor([[1.0, 0.0, 0.0]])
    draws = torch.zeros(1, 1, dtype=torch.int64)
    assert compose_group(apart, reward, draws).offline.tolist() == [[False, True, False]]
    literal = compose_group(apart, reward, draws, keep_only_correct=False)
    assert literal.offline.tolist() == [[True, False, False]]
    assert literal.dropped_correct.tolist() == [[True, False, False]]


def test_two_traces_do_not_drive_out_the_only_two_correct_rollouts():
    apart, reward = torch.tensor([0.1, 0.9, 0.2, 0.8]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    draws = torch.tensor([0, 1])
    kept = compose_group(apart, reward, draws, hybrid=2)
    assert kept.offline.tolist() == [True, False, False, True]
    literal = compose_group(apart, reward, draws, hybrid=2, keep_only_correct=False)
    assert literal.offline.tolist() == [True, False, True, False]
    alike = compose_group(torch.zeros(4), torch.ones(4), draws, hybrid=2)
    assert alike.offline.tolist() == [True, True, False, False]


def test_rules_for_who_leaves():
    apart, reward = torch.tensor([[0.1, 0.4, 0.3, 0.9]]), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    draws = torch.zeros(1, 1, dtype=torch.int64)
    correct = compose_group(apart, reward, draws, replaced="least_divergent_correct")
    assert correct.offline.tolist() == [[False, False, True, False]]
    lowest = compose_group(apart, reward, draws, replaced="lowest_reward")
    assert lowest.offline.tolist() == [[True, False, False, False]]
    keys = torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    drawn = compose_group(apart, reward, draws, replaced="random", random_keys=keys)
    assert drawn.offline.tolist() == [[False, False, False, True]]


def test_teachers_are_drawn_evenly():
    counts = torch.zeros(3)
    for step in range(3000):
        (index,) = draw_teachers([5, 6, 7], 1, rule="uniform", generator=draw_generator(0, step, "a prompt"))
        counts[index] += 1
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_square < 13.8  # 0.1% point of chi-square with 2 degrees of freedom; the draws are seeded


def test_draws_depend_on_seed_generation_and_prompt_alone():
    def drawn(*key):
        return draw_teachers(list(range(1, 9)), 8, rule="uniform", generator=draw_generator(*key))

    torch.manual_seed(0)
    first = drawn(1, 2, "p")
    torch.rand(10)
    assert drawn(1, 2, "p") == first
    assert sorted(first) == list(range(8))
    assert len({tuple(drawn(*key)) for key in ((1, 2, "p"), (2, 2, "p"), (1, 3, "p"), (1, 2, "q"))}) == 4


def test_draws_of_few_or_no_teachers():
    generator = torch.Generator().manual_seed(0)
    assert draw_teachers([], 2, rule="uniform", generator=generator) == [-1, -1]
    assert draw_teachers([4], 2, rule="uniform", generator=generator) == [0, 0]
    assert draw_teachers([9, 3, 5], 2, rule="shortest", generator=generator) == [1, 2]


def test_references_within_a_group_are_the_other_correct_rollouts():
    found = group_references(torch.tensor([1.0, 0.0, 1.0]))
    assert found.tolist() == [[False, False, True], [True, False, True], [True, False, False]]


def test_what_is_refused():
    one = torch.ones(1, 2)
    draws = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="hybrid=2 leaves no rollout in a group of 2"):
        compose_group(one, one, draws, hybrid=2)
    with pytest.raises(ConfigError, match="random_keys"):
        compose_group(one, one, draws, replaced="random")
    with pytest.raises(ConfigError, match="replaced='first'"):
        compose_group(one, one, draws, replaced="first")
