"""What OGER costs: its step beside TRL's GRPO step (CPU time, one thread, interleaved), and the reward equations alone.

    python benchmarks/oger_cost.py rewards
    python benchmarks/oger_cost.py routes --checkpoint ROUTES_BASE
    python benchmarks/oger_cost.py smollm2 --checkpoint FOLDER --files FOLDER_OF_THE_TWO_FILES

All trainers start from the same policy with a learning rate of 0 and the same seed, so that every step of theirs samples from the
same policy. "oger" has the default preset: hidden-state encoder and mean entropy. Its traces may be shorter than the rollouts they
replace, which makes its step the shorter one; "oger_bonus" is the same without them (``oger_hybrid=0``), on GRPO's own rollouts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from measurement import quartiles, write_result
from telltale.align.oger import OGERConfig, OGERTrainer, TeacherStore, divergence, exploration_reward
from telltale.align.oger.comparison import Setting, task_store
from telltale.tasks import routes
from telltale.tasks.verifiers import verify_gsm8k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rewards", "routes", "smollm2"])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "rewards":
        return rewards()
    if options.what == "routes":
        store, verifier = task_store(routes.split()[0][:256], Setting()), routes.verify
        fields = {"per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": routes.LONGEST}
    else:
        verifier = verify_gsm8k
        store = TeacherStore.from_jsonl(
            options.files / "prompts.jsonl", options.files / "teachers.jsonl", verifier=verifier
        )
        fields = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 48}
    return steps(options, store, verifier, fields)


def rewards() -> None:
    generator = torch.Generator().manual_seed(0)
    online = torch.randn(1024, 8, 384, generator=generator)
    teachers = torch.randn(1024, 3, 384, generator=generator)
    mask = torch.rand(1024, 3, generator=generator) > 0.1
    entropy, verdict = (
        torch.rand(1024, 8, generator=generator),
        (torch.rand(1024, 8, generator=generator) > 0.5).float(),
    )

    def once() -> float:
        began = time.process_time()
        exploration_reward(divergence(online, teachers, mask=mask), entropy, verdict)
        return 1000 * (time.process_time() - began)

    once()
    taken = [once() for _ in range(50)]
    write_result(
        "oger_rewards", embeddings=[1024, 8, 3, 384], cpu_ms_quartiles=quartiles(taken), cpu_ms_min=min(taken), runs=50
    )


class Clock(TrainerCallback):
    """CPU seconds of every optimizer step, sampling and rewards included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def steps(options: Any, store: TeacherStore, verifier: Any, fields: dict[str, Any]) -> None:
    """Each round trains each from the start for ``steps`` steps, in turn; the first step of each is left out as warm-up."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, local_files_only=True)
    names = ["grpo", "oger", "oger_bonus"]
    measured: dict[str, list[list[float]]] = {name: [] for name in names}
    encodes = []
    with tempfile.TemporaryDirectory() as scratch:
        shared = {
            "output_dir": scratch,
            "max_steps": options.steps,
            "learning_rate": 0.0,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "scale_rewards": "none",
            **fields,
        }
        for turn in range(options.rounds):
            for name in names[turn % 3 :] + names[: turn % 3]:
                clock = Clock()
                model = AutoModelForCausalLM.from_pretrained(
                    options.checkpoint, local_files_only=True, dtype=torch.float32
                )
                given = {"processing_class": tokenizer, "callbacks": [clock]}
                if name == "grpo":
                    data = store.dataset()
                    trainer = GRPOTrainer(model, verifier, GRPOConfig(**shared), train_dataset=data, **given)
                else:
                    own = {} if name == "oger" else {"oger_hybrid": 0}
                    trainer = OGERTrainer(model, OGERConfig(**shared, **own), teachers=store, **given)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                measured[name].append(clock.seconds[1:])
                if name == "oger":
                    encodes.append(trainer.teacher_encodes)
    ratios = {
        name: [sum(ours) / sum(theirs) for ours, theirs in zip(measured[name], measured["grpo"], strict=True)]
        for name in names[1:]
    }
    all_steps = {name: [second for seconds in rounds for second in seconds] for name, rounds in measured.items()}
    write_result(
        f"oger_cost_{options.what}",
        fields=fields,
        rounds=options.rounds,
        ratio_of_round_sums_quartiles={name: quartiles(values) for name, values in ratios.items()},
        ratio_of_least_steps={name: min(all_steps[name]) / min(all_steps["grpo"]) for name in names[1:]},
        cpu_seconds_quartiles={name: quartiles(values) for name, values in all_steps.items()},
        cpu_seconds_least={name: min(values) for name, values in all_steps.items()},
        teacher_encodes=encodes,
        cpu_seconds=measured,
    )


if __name__ == "__main__":
    main()
