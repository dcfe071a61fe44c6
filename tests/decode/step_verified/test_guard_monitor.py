"""Evidence that may be looked at at any time: its laws against slow references, its alarms, and what follows from them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import beta as beta_function

from telltale.decode.calibration.monitor import LEVEL, MULTIPLES, STALLED, DriftTest, GuardMonitor, rate_interval
from telltale.decode.results import StepRecord
from telltale.errors import ConfigError


def slow_wealth(losses, limit):
    """The sum over all beginnings and rates, as it is defined."""
    kept = [1 / (1 + math.log1p(n)) for n in range(len(losses) + 1)]
    found = kept[-1]
    for start, multiple in itertools.product(range(len(losses)), MULTIPLES):
        rate = multiple * limit
        factors = [rate / limit if loss else (1 - rate) / (1 - limit) for loss in losses[start:]]
        found += (kept[start] - kept[start + 1]) / len(MULTIPLES) * math.prod(factors)
    return found


def test_wealth_is_the_mixture_over_beginnings_and_rates():
    chance = np.random.default_rng(0)
    losses = chance.random((3, 40)) < 0.2
    test = DriftTest(0.06, streams=3)
    for place in range(40):
        wealth = test.update(losses[:, place].astype(float))
    assert wealth == pytest.approx([slow_wealth(row, 0.06) for row in losses], rel=1e-9)


def test_wealth_is_fair_at_the_limit_and_falls_below_it():
    """The exact expectation over all outcomes of seven losses."""
    for rate, fair in ((0.1, True), (0.04, False)):
        total = 0.0
        for losses in itertools.product((0.0, 1.0), repeat=7):
            test = DriftTest(0.1)
            for loss in losses:
                test.update(loss)
            total += math.prod(rate if loss else 1 - rate for loss in losses) * float(test.wealth[0])
        assert total == pytest.approx(1.0) if fair else total < 0.99


def test_false_alarms_are_rarer_than_the_level_and_drift_is_found():
    chance = np.random.default_rng(1)
    null, drift = DriftTest(0.05, streams=2000), DriftTest(0.05, streams=500)
    alarmed = np.zeros(2000, dtype=bool)
    for _ in range(1000):
        alarmed |= null.update((chance.random(2000) < 0.05).astype(float)) >= 1 / LEVEL
    assert alarmed.mean() <= LEVEL
    for place in range(900):
        found = drift.update((chance.random(500) < (0.03 if place < 300 else 0.1)).astype(float)) >= 1 / LEVEL
    assert found.mean() > 0.5


@pytest.mark.parametrize(("events", "count"), [(0, 1), (0, 50), (3, 40), (40, 40), (250, 1000), (1.5, 9)])
def test_the_interval_holds_the_rates_that_the_bettor_has_not_refuted(events, count):
    low, high = rate_interval(events, count)
    assert 0 <= low <= events / count <= high <= 1

    def wealth(rate):
        own = beta_function(events + 0.5, count - events + 0.5) / beta_function(0.5, 0.5)
        return own / (rate**events * (1 - rate) ** (count - events))

    if low > 0:
        assert wealth(low) == pytest.approx(1 / LEVEL, rel=1e-3)
    if high < 1:
        assert wealth(high) == pytest.approx(1 / LEVEL, rel=1e-3)
    assert rate_interval(events, count, level=0.5)[1] <= high
    assert rate_interval(0, 0) == (0.0, 1.0)


def steps(*sources):
    """Steps by who wrote them: "d" accepted, "r" rejected and redone, "t" the target's own."""
    rejected = StepRecord((1,), "a", "draft", "delimiter", reason="score")
    return [
        StepRecord(
            (1,), "a", "draft" if one == "d" else "target", "delimiter", rejected=rejected if one == "r" else None
        )
        for one in sources
    ]


def test_one_drafted_step_of_a_sampled_output_is_drawn_and_a_rejected_one_costs_no_audit():
    monitor = GuardMonitor(share=0.5, kind="wrong", limit=0.1, seed=3)
    found = [monitor.draw(steps("t", "d", "r", "t", "d")) for _ in range(4000)]
    drawn = [None if draw is None else draw.place for draw in found]
    places = {place: drawn.count(place) for place in set(drawn)}
    assert set(places) == {None, 1, 4}
    for place in (1, 4):
        assert places[place] == pytest.approx(4000 / 6, rel=0.15)
    assert monitor.counts["rejected"] == pytest.approx(4000 / 6, rel=0.15)
    assert monitor.draw(steps("t", "t")) is None
    before = dict(monitor.counts)
    assert [GuardMonitor(share=1.0, kind="wrong", limit=None).draw(steps("t")) for _ in range(5)] == [None] * 5
    assert monitor.counts == before


def feed(monitor, rate, count, seed=0):
    chance = np.random.default_rng(seed)
    for _ in range(count):
        monitor.record(bool(chance.random() < rate), threshold=monitor.threshold)


def test_the_promise_stands_until_the_rate_is_above_the_limit():
    monitor = GuardMonitor(share=1, kind="disagreement", limit=0.05)
    feed(monitor, 0.02, 1000)
    low, seen, high = monitor.interval()
    assert monitor.kept
    assert low < 0.02 < high < 0.05
    assert low < seen < high
    assert monitor.describe()["promise"] == "kept"
    feed(monitor, 0.3, 200, seed=1)
    assert not monitor.kept
    assert (monitor.alarms, monitor.threshold) == (1, None)
    assert monitor.evidence >= 1 / LEVEL
    assert monitor.describe()["promise"] == "withdrawn"
    assert monitor.counts["disagreement"] > 50
    feed(monitor, 0.0, 500)
    assert not monitor.kept


def test_thresholds_rise_one_by_one_and_old_audits_do_not_count_against_the_new_one():
    monitor = GuardMonitor(share=1, kind="wrong", limit=0.05, thresholds=(0.9, 0.7), on_drift="raise")
    seen = []
    for _ in range(3):
        old = monitor.threshold
        while monitor.threshold == old:
            monitor.record(True, threshold=old)
        seen.append(monitor.threshold)
        count = monitor.counts["wrong"]
        monitor.record(True, threshold=old)
        assert monitor.counts["wrong"] == count + 1
        assert math.isnan(monitor.interval()[1])
    assert seen == [0.7, 0.9, math.inf]
    assert not monitor.kept


def test_steps_that_cannot_be_judged_are_left_out_or_count_as_asked():
    for unknown, wanted in (("skip", math.nan), ("wrong", 1.0), ("right", 0.0)):
        monitor = GuardMonitor(share=1, kind="wrong", limit=0.05, unknown=unknown)
        monitor.record(None)
        assert monitor.interval()[1] == pytest.approx(wanted, nan_ok=True)
        assert monitor.counts["unknown"] == 1


def test_rejected_steps_count_behind_the_audits_before_them_and_not_while_audits_hang_or_fail():
    """A checker that always fails, or never answers, once looked like one that never finds anything wrong."""
    monitor = GuardMonitor(share=1, kind="wrong", limit=0.05)
    first = monitor.draw(steps("d"))
    for _ in range(STALLED + 5):
        assert monitor.draw(steps("r")) is None
    assert not monitor.watching
    assert math.isnan(monitor.interval()[1])  # the audit hangs
    monitor.record(False, of=first)
    assert monitor.watching
    assert monitor.interval()[1] == 0.0
    high = monitor.interval()[2]

    for _ in range(50):  # every audit fails
        monitor.skip(monitor.draw(steps("d")))
        for _ in range(10):
            monitor.draw(steps("r"))
    assert not monitor.watching
    assert monitor.describe()["watching"] is False
    assert monitor.interval()[2] == high
    monitor.record(True, of=monitor.draw(steps("d")))  # the audits go on: the first one only says so
    assert monitor.watching
    assert monitor.interval()[2] == high
    monitor.record(True, of=monitor.draw(steps("d")))
    assert monitor.interval()[1] > 0


def test_a_step_without_an_end_is_left_out_and_no_failure():
    monitor = GuardMonitor(share=1, kind="disagreement", limit=0.05)
    monitor.skip(monitor.draw(steps("d")), failed=False)
    assert monitor.watching
    monitor.draw(steps("r"))
    assert monitor.interval()[1] == 0.0


def test_what_a_hanging_audit_holds_back_is_bounded_and_not_lost_silently():
    monitor = GuardMonitor(share=1, kind="wrong", limit=0.05)
    first = monitor.draw(steps("d"))
    for _ in range(5 * STALLED):
        monitor.draw(steps("r"))
    assert len(monitor._order) <= 2 * STALLED + 1
    monitor.record(False, of=first)
    assert not monitor.watching


@pytest.mark.parametrize("share_of_failures", [0.3, 0.9])
def test_failing_audits_do_not_make_false_alarms(share_of_failures):
    """At the limit exactly, a tenth of the drawn steps accepted: half of those wrong."""
    chance, alarms = np.random.default_rng(1), 0
    for _ in range(40):
        monitor = GuardMonitor(share=1, kind="wrong", limit=0.05)
        for _ in range(400):
            draw = monitor.draw(steps("d" if chance.random() < 0.1 else "r"))
            if draw is not None and chance.random() < share_of_failures:
                monitor.skip(draw)
            elif draw is not None:
                monitor.record(bool(chance.random() < 0.5), of=draw)
        alarms += not monitor.kept
    assert alarms <= 5  # 2 expected at most; 6 or more have a probability below 2%


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"share": 0}, "share=0"),
        ({"kind": "bad"}, "kind='bad'"),
        ({"limit": 1.0}, "limit=1.0"),
        ({"on_drift": "hope"}, "on_drift='hope'"),
        ({"on_drift": "raise", "limit": None}, "needs a limit"),
        ({"level": 0}, "level=0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        GuardMonitor(**({"share": 0.1, "kind": "wrong", "limit": 0.05} | wrong))
