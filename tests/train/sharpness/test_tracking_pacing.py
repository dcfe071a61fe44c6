"""The budget, on a clock that the test turns."""

from __future__ import annotations

import pytest

from telltale.errors import ConfigError
from telltale.train.sharpness.tracking import CpuBudget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(pace: CpuBudget, clock: Clock, *, steps: int, step: float, cost: float) -> list[int]:
    """Steps at which it looked."""
    looks = []
    for index in range(1, steps + 1):
        clock.now += step
        pace.tick()
        if pace.due():
            with pace.look():
                clock.now += cost
            looks.append(index)
        assert pace.share <= pace.budget + 1e-9
    return looks


def test_looks_take_their_part_of_training_and_no_more() -> None:
    clock = Clock()
    pace = CpuBudget(1 / 16, "auto", clock=clock)
    pace.expect("edge", 0.25)
    looks = run(pace, clock, steps=1600, step=1 / 128, cost=0.25)
    assert looks == [512, 1024, 1536]
    assert pace.spent / pace.trained == pytest.approx(1 / 16, rel=0.05)
    assert pace.share < pace.spent / pace.trained


def test_the_interval_after_a_look_is_when_the_next_one_comes() -> None:
    clock = Clock()
    pace = CpuBudget(1 / 16, "auto", clock=clock)
    assert pace.interval == 1, "no step was timed yet"
    looks, announced = [], []
    for index in range(1, 5000):
        clock.now += 1 / 128
        pace.tick()
        if pace.due():
            with pace.look():
                clock.now += 0.5
            looks.append(index)
            announced.append(index + pace.interval)
    assert looks == [1, 2048, 3072, 4096]
    assert looks[1:] == announced[:-1]


def test_a_first_look_that_costs_more_than_expected_is_waited_off() -> None:
    clock = Clock()
    pace = CpuBudget(0.1, "auto", clock=clock)
    for _ in range(10):
        clock.now += 1.0
        pace.tick()
    assert pace.due()
    with pace.look():
        clock.now += 5.0
    assert pace.share > 0.1
    waited = 0
    while not pace.due():
        clock.now += 1.0
        pace.tick()
        waited += 1
    assert waited == 90


def test_every_so_many_steps_while_the_budget_allows() -> None:
    clock = Clock()
    assert run(CpuBudget(0.5, 10, clock=clock), clock, steps=45, step=1.0, cost=2.0) == [10, 20, 30, 40]
    clock = Clock()
    assert run(CpuBudget(1.0, 3, clock=clock), clock, steps=10, step=0.0, cost=7.0) == [3, 6, 9]
    clock = Clock()
    pace = CpuBudget(0.05, 10, clock=clock)
    pace.expect("edge", 5.0)
    assert run(pace, clock, steps=200, step=1.0, cost=5.0) == [100, 200]


def test_kinds_of_looks_share_one_budget_but_not_one_cost() -> None:
    clock = Clock()
    pace = CpuBudget(0.1, "auto", clock=clock)
    pace.expect("dimension", 50.0)
    clock.now += 100.0
    pace.tick()
    assert pace.due("edge")
    assert not pace.due("dimension")
    assert not pace.due("edge", every=5)


def turns(*, limited: bool) -> tuple[int, int, float]:
    """Cheap looks, dear looks and looks over training, where a dear look costs thirty cheap ones."""
    clock = Clock()
    pace = CpuBudget(0.05, "auto", clock=clock)
    pace.expect("edge", 0.1)
    pace.expect("dimension", 3.0)
    if limited:
        pace.limit("edge", 0.5)
    found = {"edge": 0, "dimension": 0}
    for _ in range(60_000):
        clock.now += 0.01
        pace.tick()
        for kind, cost, every in (("edge", 0.1, "auto"), ("dimension", 3.0, 500)):
            if pace.due(kind, every=every):
                with pace.look(kind):
                    clock.now += cost
                found[kind] += 1
    return found["edge"], found["dimension"], pace.spent / pace.trained


def test_a_dear_look_gets_its_turn_only_if_cheap_ones_leave_room() -> None:
    edge, dimension, part = turns(limited=False)
    assert (edge > 290, dimension) == (True, 0)
    edge, dimension, part = turns(limited=True)
    assert edge == pytest.approx(150, abs=2)
    assert dimension in (4, 5)
    assert part <= 0.05


def test_a_look_that_failed_is_charged_but_says_nothing_about_the_next() -> None:
    clock = Clock()
    pace = CpuBudget(0.1, "auto", clock=clock)
    pace.expect("edge", 1.0)

    def fail() -> None:
        with pace.look():
            clock.now += 0.001
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert pace.spent == pytest.approx(0.001)
    clock.now += 9.0
    pace.tick()
    assert not pace.due(), "a whole look has to fit, not the part that failed"
    clock.now += 1.1
    assert pace.due()


@pytest.mark.parametrize(("budget", "every"), [(0.0, 1), (1.5, 1), (-1, "auto"), (0.1, 0), (0.1, "often"), ("5%", 1)])
def test_bad_input(budget: float, every: int | str) -> None:
    with pytest.raises(ConfigError):
        CpuBudget(budget, every)
