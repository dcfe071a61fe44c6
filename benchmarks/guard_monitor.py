"""A guard under watch: how often a kept promise is called broken, and how many audits it takes to find a broken one.

Losses are drawn, not decoded: a stream is a deployed guard of which one step after the other is audited. Null streams have a
rate at the limit (the hardest), below it, or wandering below it; each is watched for 5,000 audits, and one alarm at any time
counts. Streams that drift have 3% for a while and 10% from then on. The confidence sequence is checked at 40 moments together.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from measurement import write_result
from telltale.decode.calibration.monitor import LEVEL, MULTIPLES, DriftTest, rate_interval
from telltale.decode.calibration.risk import clopper_pearson

LENGTH = 5_000
LIMIT = 0.05
GOOD, BAD = 0.03, 0.10
BEFORE = (0, 200, 1_000, 3_000)
"""Audits at the good rate before the drift."""


def first_alarms(rates: np.ndarray, streams: int, limit: float, seed: int) -> np.ndarray:
    """For each stream the number of the audit that alarms, 0 for none; ``rates`` (length,) of a wrong step at each audit."""
    chance = np.random.default_rng(seed)
    test = DriftTest(limit, streams=streams)
    found = np.zeros(streams, dtype=np.int64)
    for place, rate in enumerate(rates, start=1):
        wealth = test.update((chance.random(streams) < rate).astype(np.float64))
        found[(found == 0) & (wealth >= 1 / LEVEL)] = place
    return found


def null(name: str, rates: np.ndarray, streams: int, limit: float, seed: int) -> dict[str, Any]:
    alarms = int((first_alarms(rates, streams, limit, seed) > 0).sum())
    low, high = clopper_pearson(alarms, streams)
    return {"streams": name, "limit": limit, "alarms": alarms / streams, "low": low, "high": high}


def drift(before: int, streams: int, limit: float, seed: int) -> dict[str, Any]:
    rates = np.concatenate([np.full(before, GOOD), np.full(LENGTH, BAD)])
    alarms = first_alarms(rates, streams, limit, seed)
    early = (alarms > 0) & (alarms <= before)
    delays = np.where(alarms > 0, alarms - before, np.inf)[~early]
    quartiles = [float(np.quantile(delays, share, method="higher")) for share in (0.25, 0.5, 0.75, 0.9)]
    return {
        "limit": limit,
        "before": before,
        "false": float(early.mean()),
        "median": quartiles[1],
        "quartiles": [quartiles[0], quartiles[2]],
        "ninety_percent": quartiles[3],
        "found": float(np.isfinite(delays).mean()),
    }


def coverage(rate: float, streams: int, seed: int) -> dict[str, Any]:
    """How often the confidence sequence leaves the true rate out at any of 40 moments, and how wide it is at some."""
    chance = np.random.default_rng(seed)
    moments = np.unique(np.geomspace(5, LENGTH, 40).round().astype(int))
    counts = np.cumsum(chance.random((streams, LENGTH)) < rate, axis=1)[:, moments - 1]
    known: dict[tuple[int, int], tuple[float, float]] = {}
    missed = np.zeros(streams, dtype=bool)
    for place, moment in enumerate(moments.tolist()):
        for events in np.unique(counts[:, place]).tolist():
            low, high = known.setdefault((events, moment), rate_interval(events, moment))
            if not low <= rate <= high:
                missed |= counts[:, place] == events
    widths = {str(n): float(np.subtract(*rate_interval(round(rate * n), n)[::-1])) for n in (100, 1_000, 5_000)}
    return {"rate": rate, "missed": float(missed.mean()), "widths": widths}


def main() -> None:
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    streams = parser.parse_args().streams
    steady, wave = np.full(LENGTH, LIMIT), LIMIT * (0.5 + 0.5 * np.sin(np.arange(LENGTH) / 100))
    found = {
        "level": LEVEL,
        "length": LENGTH,
        "streams": streams,
        "multiples": list(MULTIPLES),
        "null": [
            null("at the limit", steady, streams, LIMIT, 1),
            null("at a limit of 3%", np.full(LENGTH, GOOD), streams, GOOD, 2),
            null("3% below a limit of 5%", np.full(LENGTH, GOOD), streams, LIMIT, 3),
            null("wandering up to the limit", wave, streams, LIMIT, 4),
        ],
        "good": GOOD,
        "bad": BAD,
        "drift": [
            drift(before, streams // 5, limit, 10 + place)
            for place, (limit, before) in enumerate((limit, before) for limit in (LIMIT, GOOD) for before in BEFORE)
        ],
        "sequence": [coverage(rate, streams // 5, 30) for rate in (GOOD, BAD)],
    }
    write_result("guard_monitor", **found)


if __name__ == "__main__":
    main()
