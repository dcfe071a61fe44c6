"""SpecGuard on a real model: SmolLM2-135M as the target, a truncated copy of it as the draft, chains in words.

    python benchmarks/specguard_language_model.py --checkpoint SMOLLM2_135M_INSTRUCT --work RUN_FOLDER

1. Pilot: the checkpoint as it is, greedy, in its own chat template with the task explained and two worked examples.
2. If it solves less than 20% (guessing one of seven digits gives 14%), it is fine-tuned briefly on generated solutions. The draft
   has the target's embeddings and first layers, the same vocabulary, and fewer steps of the same training.
3. Policies side by side on held-out problems; scales and thresholds from others, which nothing was trained on.

Every stage is kept in the run folder, so a run that was stopped goes on. ``--small`` goes through all of it with tiny settings and
writes no result.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import telltale
from measurement import write_result
from specguard_figures import RANDOM_RATES, combined, risks
from specguard_pairs import GREEDY, LABELER, Pair
from specguard_policies import DRAFT_SCORED, MAIN, PAPER, TARGET_SCORED, Slice, signal_section
from telltale.decode.calibration.prompts import Prompts
from telltale.decode.calibration.trials import TrialStore, run
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.runs.files import atomic_directory
from telltale.tasks import chains

STEPS = (2, 4)
"""Computed values of a problem: shorter chains than those of the models that were trained from scratch."""
TEST_SEED, CALIBRATION_SEED, TRAINING_SEED, SHOTS_SEED = 920_001, 920_002, 920_003, 920_004
ENOUGH = 0.2
ALPHA = 0.1
TOLD = (
    "All numbers are modulo 7. Compute one value in a line, as in: Hal has Fay minus 2 = 0 minus 2 = 5. Put a blank line "
    "between steps. End with: answer, and the digit."
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pilot: int = 12
    target_steps: int = 110
    draft_steps: int = 70
    draft_layers: int = 8
    batch: int = 16
    learning_rate: float = 3e-4
    test: int = 40
    calibration: int = 50
    candidates: int = 4


SMALL = Size(2, 2, 2, 4, 2, 3e-4, 4, 8, 2)


def pilot(checkpoint: Path, count: int) -> dict[str, Any]:
    """The checkpoint as it is: share of answers and of steps that are right, and what is wrong with the others."""
    model, tokenizer = telltale.load(checkpoint, dtype="float32")
    shots = tuple(chains.generate(2, seed=SHOTS_SEED, steps=STEPS))
    encode = Prompts(form="chat", examples=shots, instruction=TOLD)
    config = StepVerifiedConfig(
        policy="draft", candidates=1, threshold=0.0, score="log-probability", max_step_tokens=32
    )
    guard = opened(model, model, tokenizer, config)
    trials = run(guard, problems(count, TEST_SEED), LABELER, sampling=GREEDY, batch=count, encode=encode)
    steps = trials.steps
    errors = {kind: sum(step.error == kind for step in steps) / len(steps) for kind in LABELER.errors}
    right = sum(step.right is True for step in steps) / len(steps)
    return {"problems": count, "worked examples": 2, "answers": trials.accuracy, "steps right": right, "errors": errors}


def problems(count: int, seed: int) -> list[chains.Problem]:
    """Generated problems of this benchmark's length."""
    return chains.generate(count, seed=seed, steps=STEPS)


def opened(target: Any, draft: Any, tokenizer: Any, config: StepVerifiedConfig) -> StepVerified:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* layers to read attention from")
        return StepVerified(target, draft, tokenizer, config)


def truncated(model: Any, layers: int) -> Any:
    """A copy with the first ``layers`` alone, same embeddings, norm and head."""
    smaller = copy.deepcopy(model)
    smaller.model.layers = smaller.model.layers[:layers]
    smaller.config.num_hidden_layers = layers
    if getattr(smaller.config, "layer_types", None):
        smaller.config.layer_types = smaller.config.layer_types[:layers]
    return smaller


def fine_tuned(name: str, model: Any, tokenizer: Any, steps: int, size: Size, seed: int) -> dict[str, Any]:
    """Train all weights on solutions (the loss on the solution's tokens alone; AdamW, bfloat16 products). Changes ``model``."""
    rows = [encoded(tokenizer, problem) for problem in problems(steps * size.batch, TRAINING_SEED + seed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train().requires_grad_(True)
    began, losses = time.process_time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = loss_of(model, rows[step * size.batch : (step + 1) * size.batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            print(f"{name}: step {step + 1} loss {losses[-1]:.4f} {time.process_time() - began:.0f} CPU s", flush=True)
    model.eval()
    last = sum(losses[-10:]) / len(losses[-10:])
    return {"steps": steps, "batch": size.batch, "loss": last, "cpu_seconds": time.process_time() - began}


def encoded(tokenizer: Any, problem: chains.Problem) -> tuple[list[int], int]:
    """Token ids of prompt and solution in the chat template, and how many of them are the prompt's."""
    turns = [{"role": "user", "content": problem.prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Each step by itself, blank line included: a guard goes on from there, so these are the ids that it will see.
    solution = [
        i
        for step in problem.steps[:-1]
        for i in tokenizer(step + chains.DELIMITER, add_special_tokens=False)["input_ids"]
    ]
    solution += tokenizer(problem.steps[-1], add_special_tokens=False)["input_ids"]
    return [*prompt, *solution, tokenizer.eos_token_id], len(prompt)


def loss_of(model: Any, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Mean cross-entropy of the solutions' tokens; only their rows go through the head."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, (row, prompt) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
        wanted[place, prompt : len(row)] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(states[:, :-1][wanted[:, 1:]])
    return functional.cross_entropy(logits.float(), ids[:, 1:][wanted[:, 1:]])


def made(role: str, work: Path, checkpoint: Path, size: Size) -> dict[str, Any]:
    """The model of ``role`` in the run folder, trained if it is not there; what was done, and what it can do."""
    folder = work / role
    if not folder.is_dir():
        source = checkpoint if role == "target" else work / "target"
        model, tokenizer = telltale.load(source, dtype="float32")
        steps = size.target_steps if role == "target" else size.draft_steps
        if role == "draft":
            model = truncated(model, size.draft_layers)
        torch.manual_seed(0)
        told = fine_tuned(role, model, tokenizer, steps, size, seed=0 if role == "target" else 10)
        with atomic_directory(folder) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            (aside / "trained.json").write_text(json.dumps(told))
    told = json.loads((folder / "trained.json").read_text())
    model, _ = telltale.load(folder, dtype="float32")
    told["layers"] = model.config.num_hidden_layers
    told["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return told


class Policies(Slice):
    """The runs of this pair, under the names of the other policy benchmark."""

    def make_all(self) -> None:
        """Everything, cheapest first."""
        self._main()
        self.found["scores"], self.found["calibrated"] = {}, {}
        for name in (TARGET_SCORED, DRAFT_SCORED, PAPER):
            self._keep("scores", name, self.seeds, **self._set(MAIN[name], 0.75))
        name = f"{TARGET_SCORED}, on-policy {ALPHA:g}"
        self._deploy(name, ALPHA, self._calibration(MAIN[TARGET_SCORED], ALPHA), self.seeds)
        self.signals = signal_section(self.recorded, self.pair)

    def _main(self) -> None:
        self.found["ends"] = {}
        for name, policy in (("target alone", "target"), ("draft alone", "draft")):
            self._keep("ends", name, self.seeds, policy=policy)
        for rate in RANDOM_RATES:
            self._keep("ends", f"random {rate:g}", self.seeds, policy="random", accept_rate=rate)
        self._keep("ends", "oracle", self.seeds, policy="verifier", threshold=0.5, verifier=self.pair.oracle())
        self._keep("ends", "token-level speculative", self.seeds, policy="speculative")


def pair_of(work: Path, size: Size, seeds: Sequence[int]) -> Policies:
    """The pair opened, and its problems."""
    target, tokenizer = telltale.load(work / "target", dtype="float32")
    draft = telltale.load(work / "draft", dtype="float32")[0]
    config = StepVerifiedConfig(candidates=size.candidates, fallback="plain", max_step_tokens=32)
    guard = opened(target, draft, tokenizer, config)
    pair = Pair(
        0,
        guard,
        problems(size.test, TEST_SEED + 10),
        problems(size.calibration, CALIBRATION_SEED),
        TrialStore(work / "trials"),
        batch=40,
    )
    return Policies(pair, seeds, seeds[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="SmolLM2-135M-Instruct, a folder or a GGUF file")
    parser.add_argument("--work", type=Path, required=True, help="the run folder")
    parser.add_argument("--sampling-seeds", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = SMALL if arguments.small else Size()
    arguments.work.mkdir(parents=True, exist_ok=True)
    piloted = arguments.work / "pilot.json"
    if not piloted.exists():
        piloted.write_text(json.dumps(pilot(arguments.checkpoint, size.pilot)))
    first = json.loads(piloted.read_text())
    print("pilot", first, flush=True)
    if first["answers"] is not None and first["answers"] >= ENOUGH and not arguments.small:
        raise SystemExit(f"the checkpoint answers {first['answers']:.0%} right; this benchmark fine-tunes below 20%.")
    trained = {role: made(role, arguments.work, arguments.checkpoint, size) for role in ("target", "draft")}
    print(trained, flush=True)
    policies = pair_of(arguments.work, size, range(arguments.sampling_seeds))
    policies.make_all()
    spent = sum(policies.pair.clock.values())
    print(f"{spent:.0f} CPU s in the runs of policies")
    if arguments.small:
        return
    write_result(
        "specguard_language_model",
        protocol={"task": "chains, ordered", "steps": STEPS, "size": asdict(size), "alpha": ALPHA},
        pilot=first,
        trained=trained,
        policies={group: combined([policies], group) for group in ("ends", "scores", "calibrated")},
        realised_risk=risks([policies]),
        signals=policies.signals,
        cpu_seconds=spent,
    )


if __name__ == "__main__":
    main()
