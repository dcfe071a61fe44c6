"""The online plan on made-up costs and acceptances: it finds the best choice, and gives up where none pays."""

from __future__ import annotations

import random

import pytest
from tests.decode.models_that_draft import drafting_model

from telltale.decode import SelfSpeculative
from telltale.decode.drafting import PLAIN, Acceptance, Choice, OnlinePlan, costs_of
from telltale.models import open_decoder


class MadeUpCosts:
    """Eight layers of a millisecond; a pass of n tokens costs 1 + slope (n - 1) single ones; the head is free."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.plain = 8e-3

    def draft(self, exit_layer, length):
        return (length + 1) * exit_layer * 1e-3

    def verify(self, exit_layer, width):
        return (8 - exit_layer) * 1e-3 * (1 + self.slope * (width - 1))

    def score(self, width):
        return self.verify(0, width)


def simulate(costs, alphas, rounds=3000, slowdown=1.0):
    """Drive a plan with drafts accepted with probability ``alphas[E]`` per token: (tokens per second of it, its choices)."""
    draw = random.Random(0)
    plan = OnlinePlan(costs, exits=list(alphas), lengths=range(1, 13), ngrams=False)
    seconds, tokens, choices = 0.0, 0, []
    for _ in range(rounds):
        choice = plan.next(0)
        if choice.source == "observe":
            plan.observe_exits([[draw.random() < alphas.get(exit_layer, 1.0)] for exit_layer in range(1, 9)], 2e-3)
            seconds, tokens = seconds + 10e-3, tokens + 1
            continue
        choices.append(choice)
        if choice is PLAIN:
            plan.learn(choice, 0, 0, 0, costs.plain)
            seconds, tokens = seconds + costs.plain * 8, tokens + 8
            continue
        accepted = 0
        while accepted < choice.length and draw.random() < alphas[choice.exit_layer]:
            accepted += 1
        taken = slowdown * (costs.draft(*choice[1:]) + costs.verify(choice.exit_layer, choice.length + 1))
        plan.learn(choice, 0, choice.length, accepted, taken)
        seconds, tokens = seconds + taken, tokens + accepted + 1
    return tokens / seconds, choices


def best_rate(costs, alphas):
    return max(
        (1 + sum(alpha**place for place in range(1, length + 1)))
        / (costs.draft(exit_layer, length) + costs.verify(exit_layer, length + 1))
        for exit_layer, alpha in alphas.items()
        for length in range(1, 13)
    )


@pytest.mark.parametrize(
    "alphas",
    [{1: 0.3, 2: 0.7, 4: 0.8, 6: 0.95}, {1: 0.85, 2: 0.87, 4: 0.9, 6: 0.95}, {1: 0.1, 2: 0.2, 4: 0.4, 6: 0.99}],
)
def test_within_five_percent_of_the_best_fixed_choice(alphas):
    costs = MadeUpCosts(slope=0.05)
    rate, _ = simulate(costs, alphas)
    assert rate > 0.95 * max(best_rate(costs, alphas), 1 / costs.plain)


def test_never_more_than_five_percent_slower_than_plain_decoding():
    for slope, alphas in ((0.05, {1: 0.02, 2: 0.05, 4: 0.1}), (1.0, {1: 0.5, 2: 0.6, 4: 0.7})):
        rate, choices = simulate(MadeUpCosts(slope), alphas)
        assert rate > 0.95 / 8e-3
        assert choices.count(PLAIN) > 0.9 * len(choices)


def test_rounds_that_take_longer_than_their_passes_are_given_up():
    _, choices = simulate(MadeUpCosts(0.05), {4: 0.8}, slowdown=3.0)
    assert choices.count(PLAIN) > 0.8 * len(choices)


def test_expected_tokens_are_the_geometric_sum_for_equal_acceptance():
    acceptance = Acceptance(prior=0.6)
    assert acceptance.expected(5) == pytest.approx([sum(0.6**j for j in range(1, k + 1)) for k in range(1, 6)])
    for _ in range(50):
        acceptance.record(4, 2)
    expected = acceptance.expected(4)
    assert expected[0] > 0.95
    assert expected[3] - expected[1] < 0.1


def test_a_reliable_ngram_is_used_and_an_unreliable_one_is_not():
    plan = OnlinePlan(MadeUpCosts(0.05), exits=[], lengths=range(1, 13), ngrams=True)
    for _ in range(100):
        plan.learn(Choice("ngram", 0, 4), 3, 4, 4, plan.costs.score(5))
        plan.learn(Choice("ngram", 0, 4), 2, 4, 0, plan.costs.score(5))
    assert plan.next(3).source == "ngram"
    assert plan.next(2) == PLAIN


def test_measured_costs_are_positive_kept_and_grow_with_width():
    decoder = open_decoder(drafting_model())
    costs = costs_of(decoder, 1)
    assert costs_of(decoder, 1) is costs
    assert costs.plain > 0
    assert costs.draft(2, 3) > costs.draft(1, 1) > 0
    assert costs.score(17) > costs.score(1) > 0


def test_statistics_of_a_plan_outlive_the_call():
    method = SelfSpeculative(drafting_model())
    first = method.generate([1, 2, 3, 4, 5, 6], max_new_tokens=40).stats.planner
    assert "acceptance by exit" in first
    (plan,) = method.plans.known.values()
    assert not plan.wants_prompt
