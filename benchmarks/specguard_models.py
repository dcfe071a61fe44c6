"""The pairs of chain models that the policy benchmarks measure, trained from scratch here if they are not there yet.

For each model seed: a target; a draft whose training problems never contain 30% of the (operation, value, value) triples, so that
it has a gap in its knowledge and not just less of it; for seed 0 also a LayerSkip model that is both in one: the target, trained on
for a while with the losses of all exits. The gate before any use: greedy step accuracy on held-out problems of at least .90 for a
target and of .65 to .85 for a draft. A target below its gate trains on in further cycles of the same length at half the rate; the
rule looks at step accuracy, never at a policy's result. A model that does not pass is told by the JSON.

Held-out problems here are neither the calibration nor the test problems of the policy benchmark.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import telltale
from measurement import write_result
from telltale.decode.calibration.trials import SamplingSettings, run
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.runs.files import atomic_directory
from telltale.tasks import chains
from telltale.tasks.chain_checker import ChainLabeler
from telltale.train import layerskip

FOLDER = Path("runs/benchmarks/specguard_models")
HELD_OUT_SEED = 910_000
GREEDY = SamplingSettings(max_new_tokens=100, temperature=0.0, top_p=None)
WITHHELD = 0.3


@dataclass(frozen=True)
class Recipe:
    """How the model of one role is made. With ``exits`` it goes on from the target, with the losses of all exits."""

    layers: int
    hidden: int
    heads: int
    steps: int
    """Of one cycle: warm-up, then linear decay."""
    gate: tuple[float, float]
    """Lowest and highest held-out greedy step accuracy."""
    withheld: float = 0.0
    exits: bool = False
    learning_rate: float = 1.5e-3
    batch: int = 32
    problems: int = 30_000
    cycles: int = 4
    """At most. A draft has one: what its data lack, more of them teaches the worse."""


ROLES = {
    "target": Recipe(4, 128, 4, steps=1500, gate=(0.90, 1.0)),
    "draft": Recipe(2, 64, 4, steps=2000, gate=(0.65, 0.85), withheld=WITHHELD, learning_rate=4e-3, cycles=1),
    "layerskip": Recipe(4, 128, 4, steps=500, gate=(0.90, 1.0), exits=True, learning_rate=7.5e-4),
}


def make(role: str, seed: int, folder: Path, held_out: int) -> dict[str, Any]:
    """Train the model of ``role`` unless it is there, and say what it can do."""
    recipe, path = ROLES[role], folder / f"seed{seed}" / role
    if not path.is_dir():
        model = _trained(role, recipe, seed, folder, held_out)
        with atomic_directory(path) as aside:
            model.save_pretrained(aside)
            chains.tokenizer().save_pretrained(aside)
    model = telltale.load(path, dtype="float32")[0]
    found = step_accuracy(model, held_out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recipe.exits:
        found["by_exit"] = {str(depth): step_accuracy(model, held_out, depth) for depth in range(1, recipe.layers)}
    passed = recipe.gate[0] <= found["right"] <= recipe.gate[1]
    return {"role": role, "seed": seed, "parameters": parameters, "passes_gate": passed, **found}


def step_accuracy(model: Any, held_out: int, exit_layer: int | None = None) -> dict[str, Any]:
    """Greedy solutions of held-out problems, judged step by step; of an early exit if one is named."""
    config = StepVerifiedConfig(
        policy="draft", candidates=1, threshold=0.0, score="log-probability", exit_layer=exit_layer
    )
    draft = model if exit_layer is None else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* layers to read attention from")
        guard = StepVerified(model, draft, chains.tokenizer(), config)
    trials = run(guard, chains.generate(held_out, seed=HELD_OUT_SEED), ChainLabeler(), sampling=GREEDY, batch=125)
    steps = trials.steps
    kinds = sorted({step.error for step in steps if step.error})
    return {
        "right": sum(step.right is True for step in steps) / len(steps),
        "answers": trials.accuracy,
        "errors": {kind: sum(step.error == kind for step in steps) / len(steps) for kind in kinds},
    }


def _trained(role: str, recipe: Recipe, seed: int, folder: Path, held_out: int) -> Any:
    tokenizer = chains.tokenizer()
    torch.manual_seed(1000 * seed + list(ROLES).index(role))
    if recipe.exits:
        model = telltale.load(folder / f"seed{seed}" / "target", dtype="float32")[0]
    else:
        model = LlamaForCausalLM(_config(recipe, tokenizer))
    without = chains.withheld(recipe.withheld, seed=seed) if recipe.withheld else None
    # Half of the problems take every second operand from a name: looking it up is what small models learn last.
    rows = [
        _encode(tokenizer, problem)
        for share, part in ((0.5, 0), (1.0, 1))
        for problem in chains.generate(
            recipe.problems // 2, seed=10 * (100 + seed) + part, without=without, variables=share
        )
    ]
    chance = random.Random(seed)
    for cycle in range(recipe.cycles):
        _cycle(f"{role} {seed}", model, recipe, rows, chance, rate=recipe.learning_rate / 2**cycle)
        right = step_accuracy(model.eval(), held_out)["right"]
        print(f"{role} {seed}: {right:.3f} of held-out steps right after {cycle + 1} cycles", flush=True)
        if right >= recipe.gate[0]:
            break
    return model


def _config(recipe: Recipe, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=int(2.75 * recipe.hidden),
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _cycle(
    name: str, model: Any, recipe: Recipe, rows: list[tuple[list[int], int]], chance: random.Random, *, rate: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    config = layerskip.LayerSkipConfig(p_max=0.0, e_scale=1.0 if recipe.exits else 0.0, curriculum="none")
    controller = layerskip.apply(model.train(), config)
    started = time.process_time()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - step / recipe.steps)
        ids, labels = _batch([rows[chance.randrange(len(rows))] for _ in range(recipe.batch)])
        loss, _ = controller.loss(ids, labels=labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        controller.advance()
        if (step + 1) % 100 == 0:
            print(
                f"{name}: step {step + 1} loss {loss.item():.4f} {time.process_time() - started:.0f} CPU s", flush=True
            )
    controller.remove()


def _encode(tokenizer: Any, problem: chains.Problem) -> tuple[list[int], int]:
    """Token ids of prompt and solution, and how many of them are the prompt's."""
    turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.solution}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(asked, add_special_tokens=False)["input_ids"])


def _batch(rows: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded on the right, which a causal model never looks at; labels of the solution alone."""
    length = max(len(ids) for ids, _ in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for place, (row, prompt) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        labels[place, prompt : len(row)] = torch.tensor(row[prompt:])
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, action="append", help="repeatable; default 0 and 1")
    parser.add_argument("--role", action="append", choices=list(ROLES), help="repeatable; default all")
    parser.add_argument("--held-out", type=int, default=250, help="problems of the gate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [
        make(role, seed, arguments.folder, arguments.held_out)
        for seed in arguments.seed or (0, 1)
        for role in arguments.role or ROLES
        if arguments.role or seed == 0 or not ROLES[role].exits
    ]
    for one in found:
        print(one)
    if arguments.seed or arguments.role:
        print("a slice; the whole command writes the JSON")
        return
    write_result(
        "specguard_models",
        protocol={
            "task": "chains, ordered",
            "held_out_problems": arguments.held_out,
            "recipes": {role: asdict(recipe) for role, recipe in ROLES.items()},
        },
        models=found,
    )


if __name__ == "__main__":
    main()
