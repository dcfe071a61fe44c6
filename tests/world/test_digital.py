"""The order system and the file tree: real errors, nothing half done, laws without false alarms, programs read off traces."""

from __future__ import annotations

import pytest

from telltale.errors import ConfigError, DataError
from telltale.world import collect, evaluate, fit, load_model, make, plan, save_model
from telltale.world.laws.contracts import invariant
from telltale.world.models.text import TextModel, corpus

ORDERS = make("digital/orders")


def violations(world, before, action, after):
    return [law.name for law in world.laws if not bool(law.holds(before, action, after))]


@pytest.fixture(scope="module")
def trace():
    return collect(ORDERS, steps=4000, seed=0)


def test_the_laws_accept_every_real_transition(trace):
    for before, action, after in zip(trace.before, trace.actions.tolist(), trace.after, strict=True):
        assert violations(ORDERS, before, action, after) == []


@pytest.mark.parametrize(
    "after",
    [
        (2, 2, 20, 1, 0, 3, 0, 0),  # an item appears
        (2, 2, 25, 0, 0, 0, 0, 0),  # money appears
        (2, 2, 20, 0, 0, 0, 0, 2),  # a stage is skipped
        (2, 2, 20, 0, 0, 5, 0, 0),  # the total is not the lines'
        (-1, 2, 20, 3, 0, 9, 0, 0),  # below zero
        (2, 2, 20, 0, 0, 0, 0, 7),  # no such stage
        (2, 2, 20, 0, 0, 0, 0),  # a field is missing
    ],
)
def test_the_laws_reject_what_the_database_would_never_do(after):
    assert violations(ORDERS, (2, 2, 20, 0, 0, 0, 0, 0), 0, after)


def test_a_refused_action_leaves_the_database_as_it_was_and_the_receipt_says_why(trace):
    refused = [
        (before, after, receipt["error"])
        for before, after, receipt in zip(trace.before, trace.after, trace.receipts, strict=True)
        if "error" in receipt
    ]
    assert len(refused) > 500
    assert all(before == after for before, after, _ in refused)
    kinds = {error.split(":")[0] for _, _, error in refused}
    assert {"SQLITE_CONSTRAINT_TRIGGER", "SQLITE_CONSTRAINT_CHECK"} <= kinds


def test_payment_beyond_the_wallet_is_undone_whole():
    world = make("digital/orders")
    world.reset(0)
    state = (2, 2, 4, 1, 0, 3, 0, 1)
    poor = (2, 2, 2, 1, 0, 3, 0, 1)
    world.database.set(state)
    assert world.step(5).observation == (2, 2, 1, 1, 0, 3, 3, 2)
    world.database.set(poor)
    outcome = world.step(5)
    assert outcome.observation == poor
    assert "CHECK" in outcome.receipt["error"]


class TestProgram:
    def test_three_hundred_transitions_are_enough_to_plan_in(self, trace):
        for seed in (1, 2):
            model = fit("program", collect(ORDERS, steps=300, seed=seed), world=ORDERS)
            assert evaluate(model, ORDERS, episodes=25).asr >= 0.95
        exact = [
            model.step(b, a).belief == c
            for b, a, c in zip(trace.before, trace.actions.tolist(), trace.after, strict=True)
        ]
        assert sum(exact) / len(exact) > 0.98

    def test_it_reads_like_the_rules_of_the_shop_and_survives_saving(self, tmp_path, trace):
        model = fit("program", trace, world=ORDERS)
        text = model.explain()
        assert "wallet >= total" in text
        assert "paid grows by total" in text
        save_model(model, tmp_path / "program")
        again = load_model(tmp_path / "program")
        assert again.source == model.source
        assert again.explain() == text

    def test_numeric_states_are_refused(self):
        with pytest.raises(DataError, match="integers"):
            fit("program", collect(make("physical/Pendulum-v1"), steps=20))


@pytest.mark.long
def test_a_network_that_is_right_for_most_single_steps_plans_worse_than_the_program():
    data = collect(ORDERS, steps=600, seed=3)
    model = fit("mlp", data, world=ORDERS, epochs=60)
    test = collect(ORDERS, steps=500, seed=9)
    exact = [
        model.step(b, a).belief == c for b, a, c in zip(test.before, test.actions.tolist(), test.after, strict=True)
    ]
    assert sum(exact) / len(exact) > 0.6
    assert evaluate(model, ORDERS, episodes=4, nodes=250).asr < 0.8


def test_the_successors_of_a_state_are_its_steps_and_a_search_finds_the_same_plan_with_them(trace):
    model = fit("mlp", trace, world=ORDERS, epochs=3, hidden=16)
    for state in trace.before[:40]:
        assert model.successors(state) == [model.step(state, action).belief for action in range(ORDERS.action_width)]

    class OneByOne:
        stochastic = False

        def step(self, belief, action):
            return model.step(belief, action)

    start = ORDERS.belief(ORDERS.reset(9000))
    one, all_at_once = (plan(m, ORDERS, start, nodes=300) for m in (OneByOne(), model))
    assert (one.actions, one.steps) == (all_at_once.actions, all_at_once.steps)


def test_a_table_knows_what_it_saw():
    data = collect(ORDERS, steps=300, seed=3)
    model = fit("tabular", data)
    assert all(
        model.step(b, a).belief == c for b, a, c in zip(data.before, data.actions.tolist(), data.after, strict=True)
    )
    assert not model.knows((9, 9, 9, 9, 9, 9, 9, 9), 0)


class TestSearch:
    START = (3, 3, 20, 0, 0, 0, 0, 0)

    def test_the_shortest_plan_in_the_oracle_works(self):
        found = plan(ORDERS.oracle(), ORDERS, self.START)
        assert len(found.actions[0]) == 6
        assert found.found == [True]
        state = self.START
        for action in found.actions[0]:
            state = ORDERS.oracle().step(state, action).belief
        assert ORDERS.goal(state)

    def test_a_law_that_is_enforced_closes_the_way_and_one_that_is_reported_does_not(self):
        never = invariant(lambda state: state[7] < 4, name="orders are never closed")
        assert plan(ORDERS.oracle(), ORDERS, self.START, laws=[never], mode="report").found == [True]
        for mode in ("shield", "project", "reject"):
            assert plan(ORDERS.oracle(), ORDERS, self.START, laws=[never], mode=mode).found == [False]

    def test_the_horizon_bounds_it(self):
        assert plan(ORDERS.oracle(), ORDERS, self.START, horizon=5).found == [False]

    def test_planners_that_do_not_fit_are_refused_with_those_that_do(self):
        with pytest.raises(ConfigError, match="breadth_first"):
            plan(ORDERS.oracle(), ORDERS, self.START, planner="cem")


def test_a_text_model_takes_any_generator_of_text():
    data = collect(ORDERS, steps=30, seed=3)
    lines = dict(
        line.split(" >  ", 1) if " >  " in line else line.rsplit("> ", 1)
        for line in corpus(data, ORDERS.action_names).splitlines()
    )

    def generate(prompts):
        return [lines.get(p[:-1], "no idea") for p in prompts]

    model = TextModel(generate, columns=ORDERS.columns, actions=ORDERS.action_names)
    assert all(
        model.step(b, a).belief == c for b, a, c in zip(data.before, data.actions.tolist(), data.after, strict=True)
    )
    assert model.unparsed == 0
    assert model.step((9, 9, 9, 9, 9, 9, 9, 9), 0).belief == (9, 9, 9, 9, 9, 9, 9, 9)
    assert model.unparsed == 1


def test_the_file_tree_is_a_real_one():
    world = make("digital/files")
    world.reset(1)
    world.disk.set((0, 0, 0, 3))
    actions = {name: i for i, name in enumerate(world.action_names)}
    refused = world.step(actions["move report archive"])
    assert refused.receipt["error"].startswith("ENOENT")
    assert refused.observation == (0, 0, 0, 3)
    world.step(actions["mkdir archive"])
    moved = world.step(actions["move report archive"])
    assert moved.observation == (0, 1, 2, 3)
    assert (world.disk.root / "archive" / "report").is_file()
    assert world.step(actions["rmdir archive"]).receipt["error"].startswith("ENOTEMPTY")
    root = world.disk.root
    world.close()
    assert not root.exists()
    assert evaluate(make("digital/files").oracle(), make("digital/files"), episodes=3).asr == 1.0
