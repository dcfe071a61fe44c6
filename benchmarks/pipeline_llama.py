"""A 44M-parameter Llama over two ranks on Python's standard library: loss curves beside one process. Real compute.

The same minibatches, optimizer and seeds everywhere; the head is untied, which stashing needs. Cuts come from a profile of the
model and the planner.

    python benchmarks/pipeline_llama.py [--minibatches 120] [--preset small]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from measurement import write_result
from pipeline_worlds import load_average, spawn
from telltale.models.presets import PRESETS, build
from telltale.tasks.code import CodeCorpus
from telltale.train.loop import batch_at
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.planning.planner import plan as make_plan
from telltale.train.pipeline.profiler import profile
from telltale.train.pipeline.runtime.collectives import untie
from telltale.train.pipeline.split import split
from telltale.train.pipeline.topology import Topology
from telltale.train.pipeline.trainer import PipelineTrainer
from telltale.train.run_config import TrainConfig

ROWS, LENGTH, RATE = 4, 128, 6e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minibatches", type=int, default=120)
    parser.add_argument("--preset", default="small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = CodeCorpus.from_standard_library(vocabulary_size=PRESETS[options.preset].vocabulary_size)
    tokens = corpus.train
    config = TrainConfig(batch_size=ROWS, sequence_length=LENGTH)
    model, _ = _model(options.preset, len(corpus.tokenizer))
    measured = profile(split(model), {"input_ids": batch_at(tokens, config, 0)[:, :LENGTH]}, repeats=3)
    topology = Topology.flat(2, bandwidth=1e9)
    chosen = make_plan(measured, topology, policy="stash")
    if len(chosen.stages) == 1:
        chosen = Plan.even(len(measured.layers), 2)
    runs = {"one process": (1, Plan.even(len(measured.layers), 1, policy="flush"))}
    cuts = [stage.layers for stage in chosen.stages]
    runs["stash, two ranks"] = (2, Plan.manual(cuts, policy="stash"))
    runs["2bw (m=2), two ranks"] = (2, Plan.manual(cuts, policy="2bw", microbatches=2))
    curves = {}
    for name, (world, plan) in runs.items():
        curves[name] = spawn(_train, world, options.preset, len(corpus.tokenizer), plan, tokens, options.minibatches)
        print(name, curves[name]["seconds"], _smooth(curves[name]["losses"])[-3:])
    base = curves["one process"]["seconds"]
    write_result(
        "pipeline_llama",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_per_minibatch=ROWS * LENGTH,
        load_average=load_average(),
        cut_after_layers=[cut[-1] for cut in cuts[:-1]],
        profile_residual=measured.residual,
        curves={
            name: {
                "seconds": curve["seconds"],
                "speed_up": base / curve["seconds"],
                "mean_loss_per_tenth": _smooth(curve["losses"]),
            }
            for name, curve in curves.items()
        },
    )


def _model(preset: str, vocabulary: int) -> tuple[Any, Any]:
    model = build(preset, vocabulary_size=vocabulary, seed=0, attn_implementation="sdpa")
    untie(model)
    return model, model.config


def _train(
    rank: int, world: int, preset: str, vocabulary: int, plan: Plan, tokens: torch.Tensor, minibatches: int
) -> dict[str, Any]:
    model, _ = _model(preset, vocabulary)
    config = TrainConfig(batch_size=ROWS, sequence_length=LENGTH)
    trainer = PipelineTrainer(
        split(model),
        plan,
        optimizer=lambda named: torch.optim.AdamW(named, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=lambda minibatch: min(1.0, (minibatch + 1) / 20),
        grad_clip=1.0,
    )

    def batch(minibatch: int) -> dict[str, torch.Tensor]:
        return {"input_ids": batch_at(tokens, config, minibatch)[:, :LENGTH]}

    trainer.train(batch, stop=2)
    began = time.perf_counter()
    losses = trainer.train(batch, stop=minibatches)
    return {"losses": losses, "seconds": time.perf_counter() - began}


def _smooth(losses: list[float]) -> list[float]:
    width = max(1, len(losses) // 10)
    return [round(statistics.fmean(losses[i : i + width]), 4) for i in range(0, len(losses) - width + 1, width)]


if __name__ == "__main__":
    main()
