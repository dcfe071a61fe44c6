"""Do a judge's probability and its "don't know" keep their promises? Draws from a truth that is known.

Margins are standard normal, and the first response is better with probability sigma(slope * margin). A thousand draws of each
setting: how often more than alpha of the answers to fresh pairs would be wrong (promised: at most delta of the draws), how many
pairs are answered, the calibration error before and after the noise of its bins is taken off, and how often its interval covers
the truth. ``pairs`` of one prompt share a part of their margin's sign, so that they are not independent.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from scipy import integrate, special, stats

from measurement import write_result
from telltale.align.judge.calibration import ALPHA, DELTA, abstention, calibration_error
from telltale.signals.statistics import proportion

SETTINGS = (
    {"prompts": 300, "pairs": 1, "slope": 0.0},
    {"prompts": 300, "pairs": 1, "slope": 2.0},
    {"prompts": 300, "pairs": 1, "slope": 4.0},
    {"prompts": 1000, "pairs": 1, "slope": 2.0},
    {"prompts": 300, "pairs": 5, "slope": 2.0},
)
SHARED = 0.5
"""Part of a pair's luck that all pairs of its prompt have."""
OVERCONFIDENT = 2.0
"""The probability that is tested for an error is of a slope so many times too steep."""


def drawn(prompts: int, pairs: int, slope: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Margins, whether the first is better, and prompts, (n,) each; pairs of one prompt have luck in common."""
    owner = np.repeat(np.arange(prompts), pairs)
    margins = rng.normal(size=len(owner))
    luck = math.sqrt(SHARED) * rng.normal(size=prompts)[owner] + math.sqrt(1 - SHARED) * rng.normal(size=len(owner))
    return margins, stats.norm.cdf(luck) < special.expit(slope * margins), owner


def wrong_beyond(threshold: float, slope: float) -> float:
    """The share of wrong answers among |margin| >= threshold."""
    density = stats.norm.pdf
    reach = max(10.0, threshold + 1)
    errors = integrate.quad(lambda m: density(m) * special.expit(-slope * m), threshold, reach)[0]
    return float(errors / integrate.quad(density, threshold, reach)[0])


def true_error(slope: float, told: float) -> float:
    """Root mean squared difference of sigma(told |m|) and the frequency, over margins."""
    found = integrate.quad(
        lambda m: 2 * stats.norm.pdf(m) * (special.expit(told * m) - special.expit(slope * m)) ** 2, 0, 10
    )
    return math.sqrt(found[0])


def one_setting(prompts: int, pairs: int, slope: float, draws: int) -> dict[str, Any]:
    """All draws of one setting."""
    rows = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        margins, first, owner = drawn(prompts, pairs, slope, rng)
        right = ((margins > 0) == first).astype(float)
        chosen = abstention(np.abs(margins), right, owner, seed=seed)
        row = {"answered": chosen.answered.value, "wrong": None}
        if chosen.threshold is not None:
            row["wrong"] = wrong_beyond(chosen.threshold, slope)
        for name, told in (("calibrated", slope), ("overconfident", OVERCONFIDENT * slope)):
            found = calibration_error(special.expit(told * np.abs(margins)), right, owner, seed=seed)
            truth = true_error(slope, told)
            row[name] = found.value**2
            row[f"{name} covered"] = found.low <= truth <= found.high
        rows.append(row)
    broken = [float(row["wrong"] is not None and row["wrong"] > ALPHA) for row in rows]
    told = proportion(broken)
    return {
        "prompts": prompts,
        "pairs_of_a_prompt": pairs,
        "slope": slope,
        "draws": draws,
        "promise_broken": {"share": told.value, "low": told.low, "high": told.high},
        "answers_anything": float(np.mean([row["wrong"] is not None for row in rows])),
        "answered": float(np.mean([row["answered"] for row in rows])),
        "errors": {
            name: {
                "truth": true_error(slope, factor * slope),
                "root_of_the_mean_square": math.sqrt(float(np.mean([row[name] for row in rows]))),
                "covered": float(np.mean([row[f"{name} covered"] for row in rows])),
            }
            for name, factor in (("calibrated", 1.0), ("overconfident", OVERCONFIDENT))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    found = []
    for setting in SETTINGS:
        found.append(one_setting(**setting, draws=arguments.draws))
        print(found[-1], flush=True)
    if not arguments.trial:
        write_result("judge_calibration", alpha=ALPHA, delta=DELTA, settings=found)


if __name__ == "__main__":
    main()
