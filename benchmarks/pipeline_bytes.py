"""Bytes on the wire and time to accuracy, pipeline against DistributedDataParallel, on a bandwidth-limited loopback.

The net has little to send at its cut (512 numbers per sample) and many weights behind it: what PipeDream is for. Both train it
with the same minibatches of 32 and as many updates; every byte is counted by the kernel on the loopback of a network
namespace of its own, limited with ``tc tbf``. Needs root, ``unshare``, ``ip`` and ``tc``; real compute.

    python benchmarks/pipeline_bytes.py [--rate 200mbit] [--seeds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from measurement import write_result
from pipeline_worlds import limited_loopback, load_average, spawn
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.trainer import PipelineTrainer

MINIBATCH, TARGET, EPOCHS = 32, 0.95, 6
_INSIDE = "TELLTALE_BENCHMARK_NAMESPACE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        os.environ[_INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    limited_loopback(options.rate)
    runs = {
        name: [spawn(function, 2, seed) for seed in range(options.seeds)]
        for name, function in (("pipeline", _pipeline), ("ddp", _data_parallel))
    }
    weights = sum(parameter.numel() * 4 for parameter in _net(0).parameters())
    steps = EPOCHS * _steps_per_epoch()
    theory = {"pipeline": 2 * 512 * 4.0, "ddp": 2 * weights / MINIBATCH}
    summary = {}
    for name, results in runs.items():
        per_sample = [run["bytes"] / (steps * MINIBATCH) for run in results]
        summary[name] = {
            "bytes_per_sample": statistics.median(per_sample),
            "theory_bytes_per_sample": theory[name],
            "excess": statistics.median(per_sample) / theory[name] - 1,
            "seconds": [run["seconds"] for run in results],
            "samples_per_second": steps * MINIBATCH / statistics.median(run["seconds"] for run in results),
            "seconds_to_accuracy": [run["to_target"] for run in results],
            "final_accuracy": [run["accuracy"] for run in results],
        }
    write_result(
        "pipeline_bytes",
        rate=options.rate,
        load_average=load_average(),
        weights_bytes=weights,
        minibatch=MINIBATCH,
        target_accuracy=TARGET,
        results=summary,
        bytes_saved=1 - summary["pipeline"]["bytes_per_sample"] / summary["ddp"]["bytes_per_sample"],
        speed_up=summary["pipeline"]["samples_per_second"] / summary["ddp"]["samples_per_second"],
    )
    print(summary)


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    head = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return nn.Sequential(features, pooled, head)


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(digits.target)[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def _steps_per_epoch() -> int:
    return 1437 // MINIBATCH


def _batches(seed: int) -> Any:
    images, labels, _, _ = _data()
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(EPOCHS)]

    def batch(minibatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = divmod(minibatch, _steps_per_epoch())
        rows = orders[epoch][index * MINIBATCH : (index + 1) * MINIBATCH]
        return images[rows], labels[rows]

    return batch


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _pipeline(rank: int, world: int, seed: int) -> dict[str, Any]:
    plan = Plan.manual([[0, 1], [2]], policy="stash")
    trainer = PipelineTrainer(_net(seed), plan, optimizer=_optimizer, loss=nn.functional.cross_entropy)
    _, _, images, labels = _data()
    batch, per_epoch = _batches(seed), _steps_per_epoch()
    whole = trainer.model.root

    def epoch(number: int) -> None:
        trainer.train(batch, stop=(number + 1) * per_epoch)

    def accuracy() -> float:
        for name, parameter in whole.named_parameters():
            dist.broadcast(parameter.data, 0 if name.startswith("0") else 1)
        with torch.no_grad():
            return float((whole.eval()(images).argmax(1) == labels).float().mean())

    return _run(epoch, accuracy)


def _data_parallel(rank: int, world: int, seed: int) -> dict[str, Any]:
    model = DistributedDataParallel(_net(seed))
    optimizer = _optimizer(model.parameters())
    _, _, images, labels = _data()
    batch, per_epoch = _batches(seed), _steps_per_epoch()

    def epoch(number: int) -> None:
        model.train()
        for minibatch in range(number * per_epoch, (number + 1) * per_epoch):
            inputs, targets = (part.chunk(world)[rank] for part in batch(minibatch))
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model.module.eval()(images).argmax(1) == labels).float().mean())

    return _run(epoch, accuracy)


def _run(epoch: Any, accuracy: Any) -> dict[str, Any]:
    """Train all epochs; time and bytes of training alone, evaluation left out."""
    seconds, sent, to_target, reached = 0.0, 0, None, 0.0
    for number in range(EPOCHS):
        dist.barrier()
        before, began = _wire_bytes(), time.perf_counter()
        epoch(number)
        dist.barrier()
        seconds += time.perf_counter() - began
        sent += _wire_bytes() - before
        reached = accuracy()
        dist.barrier()
        if to_target is None and reached >= TARGET:
            to_target = seconds
    return {"seconds": seconds, "bytes": sent, "to_target": to_target, "accuracy": reached}


def _wire_bytes() -> int:
    """Bytes sent on the loopback of this process's network namespace."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
