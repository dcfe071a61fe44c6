"""GRPO, its rivals and OGER on multi-route arithmetic, each through ``OGERTrainer``: the table of the documentation.

    python benchmarks/oger_arms.py --work RUN_FOLDER [--arms a,b] [--seeds 0,1,2] [--collect]

Every (arm, seed) leaves a file in RUN_FOLDER; a second call runs what is missing. ``--collect`` writes the result of what is there.
Three comparisons: "arms" (the nine arms), "further" (arms that were tried to beat hybrid groups on diversity) and "hacking" (the
verifier reads the last number only, at a learning rate of 3e-4 for 100 steps).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from measurement import write_result
from telltale.align.oger.comparison import ARMS, Setting, base_policy, compare, evaluate, interval, summarise
from telltale.tasks import routes

FURTHER = {
    "group_max": {"oger_reference": "group", "oger_similarity": "max"},
    "group_2": {"oger_reference": "group", "oger_coef": 2.0},
    "group_sft": {"oger_reference": "group", "oger_offline_loss": "sft", "oger_replaced": "random"},
    "group_sft_std": {
        "oger_reference": "group",
        "oger_offline_loss": "sft",
        "oger_replaced": "random",
        "scale_rewards": "group",
        "oger_std_floor": 0.3,
    },
}
HACKING = Setting(steps=100, learning_rate=3e-4, verifier="answer", evaluate_at=(20, 50, 100))
COMPARISONS = {
    "arms": (Setting(), list(ARMS)),
    "further": (Setting(), ["hybrid", "group", "grpo_and_sft", *FURTHER]),
    "hacking": (HACKING, ["grpo", "hybrid", "paper", "default", "group"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--comparison", choices=list(COMPARISONS), default="arms")
    parser.add_argument("--arms")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting, arms = COMPARISONS[options.comparison]
    arms = options.arms.split(",") if options.arms else arms
    seeds = [int(seed) for seed in options.seeds.split(",")]
    folder = options.work / ("hacking" if options.comparison == "hacking" else "routes")
    shared = options.work / "routes" / "base"
    if folder.name == "hacking" and shared.exists() and not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "base").symlink_to(shared.resolve())
    if not options.collect:
        for seed, arm in product(seeds, arms):
            if not (folder / "results" / f"{arm}-{seed}.json").exists():
                began, cpu = time.perf_counter(), time.process_time()
                compare(folder, arms=[arm], seeds=[seed], setting=setting, overrides=FURTHER)
                print(
                    arm, seed, f"{time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} CPU s", flush=True
                )
        return
    collect(options.comparison, folder, setting, arms, seeds)


def collect(name: str, folder: Path, setting: Setting, arms: list[str], seeds: list[int]) -> None:
    """Write what there is; arms without a finished seed are named."""
    files = {(arm, seed): folder / "results" / f"{arm}-{seed}.json" for arm in arms for seed in seeds}
    records = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    missing = [f"{arm}, seed {seed}" for (arm, seed), file in files.items() if not file.exists()]
    rows = summarise(records)
    base = base_policy(folder / "base", setting.base)
    write_result(
        {"arms": "oger_arms", "further": "oger_further", "hacking": "oger_hacking"}[name],
        setting=asdict(setting),
        fields={arm: (ARMS | FURTHER)[arm] for arm in arms},
        base=_base_evaluation(base, setting),
        arms=rows,
        evaluations=[
            {key: record[key] for key in ("arm", "seed", "evaluations", "teacher_encodes")} for record in records
        ],
        against_hybrid=_against(records, "hybrid"),
        missing=missing,
    )


def _base_evaluation(folder: Path, setting: Setting) -> dict[str, object]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    problems = routes.split()[1][: setting.evaluated_problems]
    return asdict(evaluate(model, routes.build_tokenizer(), problems, samples=setting.samples, seed=0, step=0))


def _against(records: list[dict], reference: str) -> dict[str, dict[str, object]]:
    """Differences to the arm ``reference`` with the same seeds, and their 95% t intervals."""
    last = {(record["arm"], record["seed"]): record["evaluations"][-1] for record in records}
    found: dict[str, dict[str, object]] = {}
    for arm in dict.fromkeys(record["arm"] for record in records):
        shared = [seed for name, seed in last if name == arm and (reference, seed) in last]
        if arm == reference or not shared:
            continue
        found[arm] = {"seeds": shared}
        for name in ("hard", "easy", "hard_pass_at_n", "routes", "entropy"):
            differences = [last[arm, seed][name] - last[reference, seed][name] for seed in shared]
            found[arm][name] = {"mean": sum(differences) / len(differences), "interval": interval(differences)}
    return found


if __name__ == "__main__":
    main()
