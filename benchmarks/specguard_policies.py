"""Every policy of step-verified decoding on the task chains: accuracy, target tokens, realised risk, and what the signals say.

Two pairs of models trained from scratch (the draft's training lacks 30% of the arithmetic) x sampling seeds x test problems; what
is chosen (thresholds, scales) is chosen on calibration problems. Runs are kept under ``--runs``: the benchmark can be made in
slices (``--model-seed 0 --groups ends,scores``), one after the other, and resumed; the JSON is written by the whole command,
which then finds everything there. Intervals are 95% bootstraps that resample problems within a model seed, sampling seeds averaged.

What stands in for models that nobody trained here: "RSD" has a reward made of the exact checker and Gaussian noise; "judge" the
checker's verdict turned round for 15% of the steps; "judge, target rewrites" accepts what the target would write itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from measurement import write_result
from specguard_figures import RANDOM_RATES, combined, risks, verdicts
from specguard_pairs import BASE, GREEDY, LABELER, SAMPLED, Pair, open_pair
from telltale.decode.calibration.calibrate import calibrate, rejudged, thresholds_at_acceptance, with_normaliser
from telltale.decode.calibration.calibration import Calibration
from telltale.decode.calibration.calibration_report import PolicyRuns
from telltale.decode.calibration.risk import Judged, conformal_threshold, realised_risk
from telltale.decode.calibration.signal_quality import increment, signal_reports, step_table
from telltale.decode.calibration.trials import Trial
from telltale.runs.files import strict_json

GROUPS = ("ends", "scores", "calibrated", "sweeps", "signals", "layerskip")
ACCEPTANCE = 0.75
"""Share of recorded steps that uncalibrated scores are set to accept, so that they are compared at like cost."""
BETAS = (0.0, 0.3, 0.5, 0.7, 1.0)
TARGET_SCORED, DRAFT_SCORED, PAPER = "target log-probability", "draft log-probability", "draft ensemble 0.3"
MAIN: dict[str, dict[str, Any]] = {
    TARGET_SCORED: {"score": "log-probability", "signal_model": "target"},
    DRAFT_SCORED: {"score": "log-probability", "signal_model": "draft"},
    PAPER: {"score": "ensemble", "signal_model": "draft", "beta": 0.3},
}
ALPHA, OTHER_ALPHAS = 0.05, (0.02, 0.1)
EXIT_LAYER = 2


class Slice:
    """All runs of one model seed, by group and name. Thresholds come from the calibration problems alone."""

    def __init__(self, pair: Pair, seeds: Sequence[int], few: Sequence[int]) -> None:
        self.pair, self.seeds, self.few = pair, seeds, few
        self.found: dict[str, dict[str, PolicyRuns]] = {}
        self.calibrations: dict[str, dict[str, Any]] = {}
        self.signals: dict[str, Any] = {}
        self._recorded: list[Trial] | None = None

    @property
    def recorded(self) -> list[Trial]:
        """Calibration problems, half of the steps accepted at random, every signal read."""
        if self._recorded is None:
            runs = self.pair.runs(
                "record",
                self.seeds[:1],
                problems=self.pair.calibration,
                policy="random",
                accept_rate=0.5,
                record_signals=True,
            )
            self._recorded = runs.runs[0].trials
        return self._recorded

    def make(self, group: str) -> None:
        """Run one group."""
        self.found[group] = {}
        getattr(self, f"_{group}")()

    def _keep(self, group: str, name: str, seeds: Sequence[int], **options: Any) -> None:
        self.found[group][name] = self.pair.runs(name, seeds, **options)

    def _ends(self, group: str = "ends", seeds: Sequence[int] | None = None) -> None:
        seeds = seeds or self.seeds
        self._keep(group, "target alone", seeds, policy="target")
        self._keep(group, "draft alone", seeds, policy="draft")
        for rate in RANDOM_RATES:
            self._keep(group, f"random {rate:g}", seeds, policy="random", accept_rate=rate)
        self._keep(group, "oracle", seeds, policy="verifier", threshold=0.5, verifier=self.pair.oracle())
        if group != "ends":
            return
        self._keep(group, "token-level speculative", seeds, policy="speculative")
        judged = {"policy": "verifier", "threshold": 0.7}
        self._keep(group, "RSD, checker + noise", seeds, verifier=self.pair.noisy_reward(), **judged)
        self._keep(group, "judge, checker + noise", seeds, verifier=self.pair.noisy_judge(), **judged)
        rewrites = self.pair.regenerating_judge()
        self._keep(group, "judge, target rewrites", self.few, verifier=rewrites, **judged)
        for name, policy in (("target alone, greedy", "target"), ("draft alone, greedy", "draft")):
            self._keep(group, name, (0,), sampling=GREEDY, policy=policy, candidates=1)
        self._keep(group, "token-level speculative, greedy", (0,), sampling=GREEDY, policy="speculative")

    def _scores(self) -> None:
        for name, changes in MAIN.items():
            self._keep("scores", name, self.seeds, **self._set(changes, ACCEPTANCE))
        for model in ("draft", "target"):
            for beta in BETAS:
                name = f"{model} ensemble {beta:g}"
                if name != PAPER:
                    changes = {"score": "ensemble", "signal_model": model, "beta": beta}
                    self._keep("scores", name, self.few, **self._set(changes, ACCEPTANCE))
        for name in ("agreement", "likelihood-ratio"):
            self._keep("scores", name, self.few, **self._set({"score": name}, ACCEPTANCE))
        greedy = self._set(MAIN[TARGET_SCORED], ACCEPTANCE) | {"candidates": 1}
        self._keep("scores", f"{TARGET_SCORED}, greedy", (0,), sampling=GREEDY, **greedy)

    def _calibrated(self) -> None:
        for name, changes in MAIN.items():
            for alpha in (ALPHA, *(OTHER_ALPHAS if name == TARGET_SCORED else ())):
                seeds = self.seeds if alpha == ALPHA else self.few
                self._deploy(f"{name}, on-policy {alpha:g}", alpha, self._calibration(changes, alpha), seeds)
                if alpha == ALPHA:
                    self._deploy(f"{name}, draft successes {alpha:g}", alpha, self._off_policy(changes, alpha), seeds)

    def _deploy(self, name: str, alpha: float, config: dict[str, Any], seeds: Sequence[int]) -> None:
        self._keep("calibrated", name, seeds, **config)
        runs = self.found["calibrated"][name]
        self.calibrations[name] = {
            "alpha": alpha,
            "threshold": config["threshold"] if math.isfinite(config["threshold"]) else str(config["threshold"]),
            "realised": [realised_risk(one.judged(), config["threshold"], seed=0).to_dict() for one in runs.runs],
        }

    def _calibration(self, changes: dict[str, Any], alpha: float) -> dict[str, Any]:
        guard = self.pair.guard
        guard.config = replace(guard.config, **changes)
        try:
            found: Calibration = calibrate(
                guard,
                self.pair.calibration,
                LABELER,
                alpha=alpha,
                sampling=SAMPLED,
                split=(0.3, 0.7, 0.0),
                rounds=2,
                batch=self.pair.batch,
                store=self.pair.store,
            )
        finally:
            guard.config = replace(guard.config, score="ensemble", signal_model="draft", beta=0.3)
        return vars(found.config)

    def _off_policy(self, changes: dict[str, Any], alpha: float) -> dict[str, Any]:
        """What is often done: steps of the draft alone as long as all went well, taken for independent, and one threshold."""
        alone = self.pair.runs(
            "record, draft alone",
            self.seeds[:1],
            problems=self.pair.calibration,
            policy="draft",
            record_signals=True,
        )
        trials = [_until_wrong(trial) for trial in alone.runs[0].trials]
        config = self._fitted(changes, trials)
        steps = [
            Judged((float(score),), (wrong,))
            for one in rejudged(trials, config)
            for score, wrong in zip(one.scores, one.wrong, strict=True)
        ]
        return vars(replace(config, threshold=conformal_threshold(steps, alpha=alpha).threshold))

    def _sweeps(self) -> None:
        scored = MAIN[TARGET_SCORED]
        for acceptance in (0.9, 0.6, 0.4):
            self._keep("sweeps", f"accepting {acceptance:g}", self.few, **self._set(scored, acceptance))
        chosen = self._set(scored, ACCEPTANCE)
        for count in (1, 4, 16):
            self._keep("sweeps", f"candidates {count}", self.few, **(chosen | {"candidates": count}))
            self._keep("sweeps", f"draft alone, candidates {count}", self.few, policy="draft", candidates=count)
        for selector in ("majority", "log-probability", "first"):
            self._keep("sweeps", f"selector {selector}", self.few, **(chosen | {"selector": selector}))
        for fallback in ("k-sample", "spec"):
            self._keep("sweeps", f"fallback {fallback}", self.few, **(chosen | {"fallback": fallback}))
        ensemble = {"score": "ensemble", "signal_model": "target", "beta": 0.3}
        for name, change in self._groundings().items():
            self._keep(
                "sweeps", f"target ensemble 0.3, {name}", self.few, **self._set(ensemble | change, ACCEPTANCE, change)
            )

    def _groundings(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {
            "residual 0.5": {"residual": 0.5},
            "all layers": {"grounding_layers": None},
            "row predictor": {"row": "predictor"},
            "sparsify 0.01": {"sparsify": 0.01},
            "sinks excluded": {"exclude_sinks": 1},
        }
        return found

    def _signals(self) -> None:
        self.signals = signal_section(self.recorded, self.pair)
        for name, change in self._groundings().items():
            self.signals |= {
                f"grounding, {name}": {
                    one["name"]: one
                    for one in signal_section(self._record_with(name, change), self.pair)["signals"]
                    if one["name"].endswith("grounding")
                }
            }

    def _layerskip(self) -> None:
        self._ends("layerskip", self.few)
        self._keep("layerskip", TARGET_SCORED, self.few, **self._set(MAIN[TARGET_SCORED], ACCEPTANCE))

    def _record_with(self, name: str, change: dict[str, Any]) -> list[Trial]:
        options = {"policy": "random", "accept_rate": 0.5, "record_signals": True} | change
        runs = self.pair.runs(f"record, {name}", self.seeds[:1], problems=self.pair.calibration, **options)
        return runs.runs[0].trials

    def _fitted(self, changes: dict[str, Any], trials: Sequence[Trial]) -> Any:
        config = replace(self.pair.guard.config, **changes)
        if config.score != "ensemble":
            return config
        return with_normaliser([step for trial in trials for step in trial.steps if step.score is not None], config)

    def _set(
        self, changes: dict[str, Any], acceptance: float, recorded_with: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """``changes`` with scales and a threshold that accepts this share of the recorded steps."""
        trials = self.recorded if not recorded_with else self._record_with("groundings", recorded_with)
        config = self._fitted(changes, trials)
        return vars(replace(config, threshold=thresholds_at_acceptance(rejudged(trials, config), [acceptance])[0]))


def _until_wrong(trial: Trial) -> Trial:
    """The steps up to and with the first wrong one. Their scores are filled in by whoever scores them."""
    kept = []
    for step in trial.steps:
        kept.append(replace(step, score=0.0))
        if step.right is False:
            break
    return replace(trial, steps=tuple(kept))


def signal_section(trials: Sequence[Trial], pair: Pair) -> dict[str, Any]:
    table = step_table(trials, pair.guard.config)
    pairs = (
        ("draft log-probability", "draft grounding"),
        ("target log-probability", "target grounding"),
        ("draft log-probability", "target log-probability"),
    )
    return {
        "steps": len(table),
        "right": float(table.right.mean()),
        "signals": strict_json(signal_reports(table)),
        "increments": strict_json([one for names in pairs if (one := increment(table, *names)) is not None]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmarks/specguard_models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks/specguard_policies"))
    parser.add_argument("--model-seed", type=int, action="append", help="a slice: repeatable; default 0 and 1")
    parser.add_argument("--groups", default=",".join(GROUPS), help="a slice: comma-separated")
    parser.add_argument("--problems", type=int, default=250)
    parser.add_argument("--calibration-problems", type=int, default=200)
    parser.add_argument("--sampling-seeds", type=int, default=5)
    parser.add_argument("--few", type=int, default=1, help="sampling seeds of sweeps")
    parser.add_argument("--name", default="specguard_policies")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups = arguments.groups.split(",")
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise SystemExit(f"unknown group {unknown[0]!r}; expected some of {', '.join(GROUPS)}")
    seeds, few = range(arguments.sampling_seeds), range(arguments.few)
    size = {"test": arguments.problems, "calibration": arguments.calibration_problems, "store": arguments.runs}
    slices, exits = [], []
    for model_seed in arguments.model_seed or (0, 1):
        one = Slice(open_pair(arguments.models, model_seed, **size), seeds, few)
        for group in groups:
            if group != "layerskip":
                one.make(group)
        slices.append(one)
        if "layerskip" in groups and (arguments.models / f"seed{model_seed}" / "layerskip").is_dir():
            pair = open_pair(arguments.models, model_seed, **size, exit_layer=EXIT_LAYER)
            exits.append(Slice(pair, seeds, few))
            exits[-1].make("layerskip")
    spent = sum(sum(one.pair.clock.values()) for one in [*slices, *exits])
    print(f"{spent / 60:.1f} CPU minutes in all runs, whenever they were made")
    if arguments.model_seed or set(groups) != set(GROUPS):
        print("a slice; the whole command writes the JSON")
        return
    policies = {group: combined(slices, group) for group in ("ends", "scores", "calibrated", "sweeps")}
    if exits:
        policies["layerskip"] = combined(exits, "layerskip", ends="layerskip")
    risk = risks(slices)
    write_result(
        arguments.name,
        protocol={
            "task": "chains, ordered",
            "model_seeds": [one.pair.model_seed for one in slices],
            "sampling_seeds": {"main": len(seeds), "sweeps": len(few)},
            "test_problems": arguments.problems,
            "calibration_problems": arguments.calibration_problems,
            "base": BASE,
            "sampling": vars(SAMPLED),
            "cpu_minutes": spent / 60,
        },
        verdicts=verdicts(
            risk,
            {
                "calibrated": policies["calibrated"][f"{TARGET_SCORED}, on-policy {ALPHA:g}"],
                "fixed acceptance": policies["scores"][TARGET_SCORED],
            },
        ),
        policies=policies,
        realised_risk=risk,
        signals=[one.signals for one in slices],
    )


if __name__ == "__main__":
    main()
