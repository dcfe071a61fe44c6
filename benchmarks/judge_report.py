"""Can one sign a fit's report? Seeds of pure noise, and seeds with a planted gain of known size.

Noise: ratings and preferences say nothing, so every model's true accuracy is one half and no gate is better than another. Counted
are the intervals that cover the truth, and the gates that ship. Planted: the prompt decides which of two objectives a preference
goes by, and a share of the preferences is turned around; the true gain of each fitted gate over its fixed weights is measured on
fresh pairs. Features are synthetic, so that a fit takes a fraction of a second; everything else is the fit that users run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from measurement import write_result
from telltale.align.judge.baselines import FIXED
from telltale.align.judge.feature_store import Features
from telltale.align.judge.fitting import SplitFit, Stages, gate_accuracy
from telltale.align.judge.gate_fit import PairFeatures
from telltale.align.judge.head import GateConfig
from telltale.align.judge.ridge import ALPHAS
from telltale.signals.statistics import proportion

GATE = GateConfig(
    hidden=16, layers=1, temperature=1.0, learning_rate=2e-2, steps=90, batch_size=1024, evaluate_every=15, patience=1
)
SIZE, PROMPT_SIZE = 12, 6
NAMES = ("first", "second", "third")
FRESH = 4000
"""Pairs on which the true gain of a planted gate is measured."""
Drawn = tuple[Tensor, Tensor, Tensor, PairFeatures]


@dataclass(frozen=True)
class Setting:
    """``prompts`` with ``pairs`` pairs each; ``turned``: the share of preferences against the truth (None: pure noise)."""

    prompts: int
    pairs: int
    turned: float | None


SETTINGS = (
    Setting(150, 2, None),
    Setting(400, 1, None),
    Setting(1000, 1, 0.12),
)


def drawn(setting: Setting, seed: int) -> Drawn:
    """Responses (2n, d), their labels (2n, K) and prompt ids, and the n pairs."""
    generator = torch.Generator().manual_seed(seed)
    count = setting.prompts * setting.pairs
    responses = torch.randn(2 * count, SIZE, generator=generator)
    responses[:, -1] = 1.0
    states = torch.randn(setting.prompts, PROMPT_SIZE, generator=generator)
    owner = torch.arange(setting.prompts).repeat_interleave(setting.pairs)
    if setting.turned is None:
        labels = torch.rand(2 * count, len(NAMES), generator=generator, dtype=torch.float64)
        first = torch.rand(count, generator=generator) < 0.5
    else:
        truth = responses[:, : len(NAMES)].double()
        labels = 0.5 + 0.15 * (truth + torch.randn(truth.shape, generator=generator, dtype=torch.float64))
        wanted = (states[owner, 0] > 0).long()
        margin = (truth[0::2] - truth[1::2]).gather(1, wanted[:, None])[:, 0]
        turned = torch.rand(count, generator=generator) < setting.turned
        first = (margin > 0) != turned
    a, b = responses[0::2], responses[1::2]
    pairs = PairFeatures(
        torch.where(first[:, None], a, b), torch.where(first[:, None], b, a), states[owner], owner.clone()
    )
    return responses, labels, owner.repeat_interleave(2), pairs


def fitted(setting: Setting, seed: int) -> SplitFit:
    """The fit of one seed on the split."""
    responses, labels, groups, pairs = drawn(setting, seed)
    features = Features.of(responses, pairs.prompts.repeat_interleave(2, 0), groups)
    return Stages(
        features,
        labels,
        NAMES,
        pairs,
        reference=None,
        nuisances=(),
        scope="within-prompt",
        method="spearman",
        how="sequential",
        alphas=ALPHAS,
        intercept=True,
        gate=GATE,
        folds=5,
        seed=seed,
    ).on_the_split()


def one_seed(setting: Setting, seed: int) -> dict[str, Any]:
    """What one seed's report says, and what is true."""
    found = fitted(setting, seed)
    report = found.report
    gap = report.differences[FIXED]
    row: dict[str, Any] = {
        "ships": report.ships,
        "gap": gap.value,
        "width": {name: report.interval(name).high - report.interval(name).low for name in ("gate", FIXED)},
        "gap_width": gap.high - gap.low,
        "prompts": report.compared_prompts,
    }
    if setting.turned is None:
        row["covers"] = {name: report.interval(name).covers(0.5) for name in report.accuracies}
        row["gaps_cover"] = {name: one.covers(0.0) for name, one in report.differences.items()}
        row["r2_below_0"] = [quality.r2.value < 0 for quality in report.quality.values()]
    else:
        fresh = drawn(Setting(FRESH, 1, 0.0), 10**6 + seed)[3]
        # Against labels of which a share is turned, an accuracy a reads (1 - 2 turned) a + turned.
        gain = gate_accuracy(found.head, fresh) - found.baselines.accuracies(found.head, fresh)[FIXED]
        row["true_gain"] = (1 - 2 * setting.turned) * gain
        row["covers_gain"] = gap.covers(row["true_gain"])
    return row


def rate(values: list[bool]) -> dict[str, float]:
    """A share with Wilson's 95% interval."""
    found = proportion([float(value) for value in values])
    return {"share": found.value, "low": found.low, "high": found.high}


def summary(setting: Setting, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All seeds of one setting."""

    def mean(read: Callable[[dict[str, Any]], float]) -> float:
        return statistics.fmean(read(row) for row in rows)

    found: dict[str, Any] = {
        "prompts": setting.prompts,
        "pairs_of_a_prompt": setting.pairs,
        "turned": setting.turned,
        "seeds": len(rows),
        "compared_prompts": rows[0]["prompts"],
        "ships": rate([row["ships"] for row in rows]),
        "mean_width_of_accuracy": mean(lambda row: row["width"]["gate"]),
        "mean_width_of_gap": mean(lambda row: row["gap_width"]),
        "mean_gap": mean(lambda row: row["gap"]),
    }
    if setting.turned is None:
        models, baselines = list(rows[0]["covers"]), list(rows[0]["gaps_cover"])
        found["covers_half"] = {name: rate([row["covers"][name] for row in rows]) for name in models}
        found["gap_covers_0"] = {name: rate([row["gaps_cover"][name] for row in rows]) for name in baselines}
        found["objectives_warned_of"] = rate([flag for row in rows for flag in row["r2_below_0"]])
    else:
        found["true_gain"] = mean(lambda row: row["true_gain"])
        found["gap_covers_true_gain"] = rate([row["covers_gain"] for row in rows])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, found = time.process_time(), []
    for setting in SETTINGS:
        rows = [one_seed(setting, seed) for seed in range(arguments.seeds)]
        found.append(summary(setting, rows))
        print(found[-1], round(time.process_time() - began), flush=True)
    if not arguments.trial:
        write_result("judge_report", settings=found, cpu_seconds=time.process_time() - began)


if __name__ == "__main__":
    main()
