"""The budget, on a clock that the test turns."""

from __future__ import annotations

import pytest

from telltale.errors import ConfigError
from telltale.train.sharpness.pacing import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, *, steps: int, step: float, cost: float) -> list[int]:
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


def test_the_share_is_never_above_the_budget_and_nearly_used_up() -> None:
    clock = Clock()
    pace = Pace(0.05, "auto", clock=clock)
    pace.expect("edge", 0.3)
    looks = run(pace, clock, steps=2300, step=0.01, cost=0.3)
    assert looks == [570, 1140, 1710, 2280]
    assert pace.share == pytest.approx(0.05, abs=0.002)
    assert pace.interval == pytest.approx(570, abs=2)


def test_a_first_look_that_costs_more_than_expected_is_waited_off() -> None:
    clock = Clock()
    pace = Pace(0.1, "auto", clock=clock)
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
    assert waited == 80


def test_every_so_many_steps_while_the_budget_allows() -> None:
    clock = Clock()
    assert run(Pace(0.5, 10, clock=clock), clock, steps=45, step=1.0, cost=2.0) == [10, 20, 30, 40]
    clock = Clock()
    assert run(Pace(1.0, 3, clock=clock), clock, steps=10, step=0.0, cost=7.0) == [3, 6, 9]
    clock = Clock()
    pace = Pace(0.05, 10, clock=clock)
    pace.expect("edge", 5.0)
    assert run(pace, clock, steps=200, step=1.0, cost=5.0) == [95, 190]


def test_kinds_of_looks_share_one_budget_but_not_one_cost() -> None:
    clock = Clock()
    pace = Pace(0.1, "auto", clock=clock)
    pace.expect("dimension", 50.0)
    clock.now += 100.0
    pace.tick()
    assert pace.due("edge")
    assert not pace.due("dimension")
    assert not pace.due("edge", every=5)


@pytest.mark.parametrize(("budget", "every"), [(0.0, 1), (1.5, 1), (-1, "auto"), (0.1, 0), (0.1, "often"), ("5%", 1)])
def test_bad_input(budget: float, every: int | str) -> None:
    with pytest.raises(ConfigError):
        Pace(budget, every)
