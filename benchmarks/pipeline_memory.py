"""A model larger than one rank's memory, trained from its checkpoint on disk: peak memory per rank.

A Llama with random weights is written to disk in shards. Ranks of a straight pipeline under flush with AdamW then train it with
a limit on their data (``RLIMIT_DATA``), each reading its own stage alone; a process that loads the whole model under that limit is
the control, and so are ranks that load all of it and then train their stage.

    python benchmarks/pipeline_memory.py [--hidden 512] [--layers 12] [--ranks 4] [--steps 2]
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from measurement import write_result
from pipeline_worlds import spawn
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.split import split
from telltale.train.pipeline.stage_weights import without_weights
from telltale.train.pipeline.trainer import PipelineTrainer

MICROBATCHES, ROWS, LENGTH = 4, 1, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=16000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = spawn(_write, 1, folder, vars(options))
        weights = 4 * parameters
        state = 4 * weights  # weights, gradients and AdamW's two moments
        base = _base(options.ranks, vars(options))
        limit = base + state * 2 // 3  # the whole model's training state does not fit
        rows = {
            "own stage": spawn(_train, options.ranks, folder, vars(options), limit, True),
            "whole model, one process": spawn(_load_whole, 1, folder, limit),
            "whole model on every rank, no limit": spawn(_train, options.ranks, folder, vars(options), None, False),
        }
    losses = [rows[name]["losses"] for name in rows if "losses" in rows[name]]
    write_result(
        "pipeline_memory",
        parameters=parameters,
        weight_bytes=weights,
        training_state_bytes=state,
        bytes_of_a_rank_anyway=base,
        limit_bytes=limit,
        ranks=options.ranks,
        runs=rows,
        losses_are_equal=losses[0] == losses[1],
    )
    print(json.dumps(rows, indent=1))


def _write(rank: int, world: int, folder: str, options: dict[str, Any]) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options["hidden"],
        intermediate_size=3 * options["hidden"],
        num_hidden_layers=options["layers"],
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=options["vocabulary"],
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(Path(folder) / "model", max_shard_size="100MB")
    return sum(parameter.numel() for parameter in model.parameters())


def _data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA counts."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _base(ranks: int, options: dict[str, Any]) -> int:
    """What a rank has anyway, libraries and the stacks of its threads: that of one which trains next to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        small = options | {"hidden": 64, "vocabulary": 1000}
        spawn(_write, 1, folder, small)
        return max(one["data_bytes"] for one in spawn(_train, ranks, folder, small, None, True)["ranks"])


def _batch(minibatch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(minibatch)
    return {"input_ids": torch.randint(1000, (ROWS, LENGTH), generator=generator)}


def _train(
    rank: int, world: int, folder: str, options: dict[str, Any], limit: int | None, own_stage: bool
) -> dict[str, Any]:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    path = Path(folder) / "model"
    before = _resident_peak()
    model = without_weights(path) if own_stage else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    layered = split(model)
    plan = Plan.even(len(layered.layers), world, policy="flush", microbatches=MICROBATCHES)
    trainer = PipelineTrainer(
        layered,
        plan,
        optimizer=lambda named: torch.optim.AdamW(named, lr=1e-4, foreach=False),
        weights=path if own_stage else None,
    )
    losses = trainer.train(_batch, stop=MICROBATCHES * options["steps"])
    gc.collect()
    held = sum(parameter.nbytes for parameter in trainer.stage.parameters())
    found: list[Any] = [None] * world
    peaks = {"peak_bytes": _resident_peak(), "peak_bytes_before": before}
    mine = {"stage_weight_bytes": held, "data_bytes": _data_bytes()} | peaks
    dist.all_gather_object(found, mine)
    return {"losses": losses, "ranks": found}


def _load_whole(rank: int, world: int, folder: str, limit: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        model(**_batch(0), labels=_batch(0)["input_ids"]).loss.backward()
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        return {"refused": str(error).splitlines()[0][:200]}
    return {"refused": None, "peak_bytes": _resident_peak()}


if __name__ == "__main__":
    main()
