"""Bubbles and overheads: our schedules against ``torch.distributed.pipelining`` on identical stages and minibatches.

Emulated compute (n = 4): every stage sleeps 20 ms forward and 40 ms backward, so four stages run side by side on two cores;
this measures schedules and transport, not arithmetic. Real compute (n = 2): a transformer, one thread per rank. Contestants
are interleaved in the same processes; paired ratios, median and quartiles. ``--rounds`` is for the real case of M = 2, the others
take a half or a third of it.

    python benchmarks/pipeline_bubbles.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from measurement import quartiles, write_result
from pipeline_worlds import load_average, spawn, together
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.trainer import PipelineTrainer

FORWARD, BACKWARD = 0.020, 0.040


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    load = load_average()
    emulated = _summary(spawn(_emulated, 4, 4, max(3, rounds // 3)), "torch 1F1B")
    _against_ideal(emulated, 4)
    real = {"M=2": _summary(spawn(_real, 2, 2, rounds), "torch 1F1B")}
    real["M=4"] = _summary(spawn(_real, 2, 4, max(3, rounds // 2)), "torch 1F1B")
    versioning = _summary(spawn(_versioning, 1, max(3, rounds // 2)), "one process")
    write_result(
        "pipeline_bubbles",
        load_average_at_start=load,
        emulated_compute={"stages": 4, "forward_s": FORWARD, "backward_s": BACKWARD, "cases": {"M=4": emulated}},
        real_compute={"stages": 2, "model": TRANSFORMER, "cases": real},
        versioning=versioning,
    )


BATCHES = 16
"""Batches of M microbatches per measured run."""


class _Sleep(torch.autograd.Function):
    """The identity, 20 ms forward and 40 ms backward, off the processor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(BACKWARD)
        return grads[0]


class _Emulated(nn.Module):
    """A small linear layer whose time is the sleep's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(self.linear(x))


def _mean_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs, targets)


def _emulated(rank: int, world: int, microbatches: int, rounds: int) -> dict[str, Any]:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[_Emulated() for _ in range(world)])

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(minibatch)
        return torch.randn(4, 32, generator=generator), torch.randn(4, 32, generator=generator)

    ours = {"flush": microbatches, "gpipe": microbatches, "2bw": microbatches, "stash": 1}
    contestants = {name: _ours(build(), name, m, batch, microbatches, 1e-4) for name, m in ours.items()}
    contestants |= _torchs(rank, world, build, batch, microbatches, 1e-4)
    return _measure(contestants, rounds)


TRANSFORMER = "8 pre-norm encoder layers, width 128, 4 heads, 64 positions, minibatch 8"


def _real_model() -> nn.Sequential:
    torch.manual_seed(0)
    layer = {"nhead": 4, "dim_feedforward": 512, "dropout": 0.0, "batch_first": True, "norm_first": True}
    return nn.Sequential(*[nn.TransformerEncoderLayer(128, **layer) for _ in range(8)])


def _real_batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(minibatch % 16)
    return torch.randn(8, 64, 128, generator=generator), torch.randn(8, 64, 128, generator=generator)


def _real(rank: int, world: int, microbatches: int, rounds: int) -> dict[str, Any]:
    ours = {"flush": microbatches, "2bw": microbatches, "stash": 1}
    contestants = {name: _ours(_real_model(), name, m, _real_batch, microbatches, 1e-4) for name, m in ours.items()}
    contestants |= _torchs(rank, world, _real_model, _real_batch, microbatches, 1e-4)
    return _measure(contestants, rounds)


def _versioning(rank: int, world: int, rounds: int) -> dict[str, Any]:
    """CPU of the two copies a stage may hold, on one process: 2bw on one stage against the plain loop's own storage."""
    contestants = {
        "one process": _ours(_real_model(), "flush", 1, _real_batch, 4, 1e-4),
        "versioned (2bw, m=1)": _ours(_real_model(), "2bw", 1, _real_batch, 4, 1e-4),
        "plain loop": _plain(_real_model(), 1e-4),
    }
    return _measure(contestants, rounds)


def _plain(model: nn.Sequential, rate: float) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def run() -> None:
        for minibatch in range(4 * BATCHES):
            inputs, targets = _real_batch(minibatch)
            _mean_square(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _ours(model: nn.Sequential, policy: str, m: int, batch: Any, microbatches: int, rate: float) -> Any:
    world = torch.distributed.get_world_size()
    plan = Plan.even(len(model), world, policy=policy, microbatches=m)
    trainer = PipelineTrainer(model, plan, optimizer=lambda named: torch.optim.AdamW(named, lr=rate), loss=_mean_square)

    def run() -> None:
        trainer.train(batch, stop=trainer.minibatch + BATCHES * microbatches)

    return run


def _torchs(rank: int, world: int, build: Any, batch: Any, microbatches: int, rate: float) -> dict[str, Any]:
    return {
        name: _torch(rank, world, build(), batch, microbatches, rate, kind)
        for name, kind in (("torch 1F1B", Schedule1F1B), ("torch GPipe", ScheduleGPipe))
    }


def _torch(rank: int, world: int, model: nn.Sequential, batch: Any, m: int, rate: float, kind: Any) -> Any:
    share = len(model) // world
    module = model[rank * share : (rank + 1) * share]
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = kind(stage, m, loss_fn=_mean_square)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    state = {"next": 0}

    def run() -> None:
        for _ in range(BATCHES):
            parts = [batch(state["next"] + index) for index in range(m)]
            state["next"] += m
            inputs = torch.cat([part[0] for part in parts])
            targets = torch.cat([part[1] for part in parts])
            if rank == 0:
                schedule.step(inputs)
            elif rank == world - 1:
                schedule.step(target=targets, losses=[])
            else:
                schedule.step()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _measure(contestants: dict[str, Any], rounds: int) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    for name in names:
        contestants[name]()
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(together(contestants[name]))
    return times


def _summary(times: dict[str, list[tuple[float, float]]], peer: str) -> dict[str, Any]:
    """Per contestant: wall and CPU seconds, and paired ratios to the peer (below 1: less time than the peer)."""
    result = {}
    for name, pairs in times.items():
        wall = [quartiles([pair[kind] for pair in pairs]) for kind in (0, 1)]
        ratios = [
            quartiles([own[kind] / other[kind] for own, other in zip(pairs, times[peer], strict=True)])
            for kind in (0, 1)
        ]
        result[name] = {
            "wall_s": wall[0],
            "cpu_s_all_ranks": wall[1],
            f"wall_over_{peer}": ratios[0],
            f"cpu_over_{peer}": ratios[1],
        }
        print(name, result[name])
    return result


def _against_ideal(entry: dict[str, Any], microbatches: int) -> None:
    """Ideal wall time of a stage that never waits: its own work for every minibatch, and the pipe filled once."""
    step = FORWARD + BACKWARD
    ideal = {
        "stash": BATCHES * microbatches * step + 3 * step,
        "2bw": BATCHES * microbatches * step + 3 * step,
        "flush": BATCHES * (microbatches + 3) * step,
        "gpipe": BATCHES * (microbatches + 3) * step,
    }
    for name, seconds in ideal.items():
        entry[name]["ideal_s"] = seconds
        entry[name]["fraction_of_ideal"] = seconds / entry[name]["wall_s"][1]


if __name__ == "__main__":
    main()
