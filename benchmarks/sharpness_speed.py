"""One stochastic Lanczos run at equal steps on the same minibatch: CPU time of telltale against its two peers.

telltale and hessian-eigenthings reorthogonalise fully and start from one vector; curvlinops' Lanczos has no
reorthogonalisation and no seed, which makes it cheaper for the same steps. Every run builds its operator: telltale's
forward pass and gradient are inside its time. Attention is written out, so that all three differentiate the same graph.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from curvlinops import HessianLinearOperator
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal
from hessian_eigenthings.operators.hessian import HessianOperator as EigenthingsHessian
from torch import Tensor, nn
from torch.nn import functional

from measurement import Timing, interleave, quartiles, write_result
from sharpness_models import gpt
from telltale.signals.hessian import HessianOperator
from telltale.signals.lanczos import lanczos

TARGETS = {"hessian-eigenthings": 0.65, "curvlinops-for-pytorch": 0.5}


def mlp() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The paper's 278,800-parameter MLP and a minibatch of 1000."""
    sizes = (784, 200, 200, 200, 200, 10)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), (torch.randn(1000, 784), torch.randint(0, 10, (1000,)))


def contestants(
    model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, found: dict[str, Any]
) -> dict[str, Callable[[], int]]:
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    start = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).float()

    def loss(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(module(data[0]), data[1])

    def ours() -> int:
        run = lanczos(HessianOperator(lambda: loss(model, batch), parameters), start, steps)
        found["telltale"] = (run.nodes, run.weights)
        return run.matvecs

    def eigenthings() -> int:
        run = lanczos_tridiagonal(EigenthingsHessian(model, [batch], loss), start, steps, reorthogonalize=True)
        tridiagonal = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
        nodes, vectors = torch.linalg.eigh(tridiagonal.double())
        found["hessian-eigenthings"] = (nodes, vectors[0] ** 2)
        return run.iterations

    def curvlinops() -> int:
        torch.manual_seed(0)
        operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False)
        nodes, vectors = fast_lanczos(operator, steps)
        found["curvlinops-for-pytorch"] = (nodes.double(), vectors[0].double() ** 2)
        return steps

    return {"telltale": ours, "hessian-eigenthings": eigenthings, "curvlinops-for-pytorch": curvlinops}


def compared(timings: dict[str, Timing], name: str) -> dict[str, float]:
    """CPU time of telltale over that of ``name``: least of all rounds, and median of the rounds' ratios."""
    ours, other = timings["telltale"].cpu, timings[name].cpu
    low, middle, high = quartiles([mine / theirs for mine, theirs in zip(ours, other, strict=True)])
    return {"of_minima": min(ours) / min(other), "median": middle, "q1": low, "q3": high, "target": TARGETS[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = {}
    for name, build, steps in (("mlp", mlp, 50), ("gpt", gpt, 30)):
        torch.manual_seed(0)
        model, batch = build()
        found: dict[str, Any] = {}
        timings = interleave(contestants(model, batch, steps, found), rounds=arguments.rounds)
        size = sum(parameter.numel() for parameter in model.parameters())
        results[name] = {
            "parameters": size,
            "steps": steps,
            "cpu_seconds": {contestant: timing.cpu for contestant, timing in timings.items()},
            "ratios": {peer: compared(timings, peer) for peer in TARGETS},
            "trace": {contestant: size * float(nodes.double() @ w) for contestant, (nodes, w) in found.items()},
            "extremes": {c: [float(nodes.min()), float(nodes.max())] for c, (nodes, _) in found.items()},
        }
        for peer, figures in results[name]["ratios"].items():
            print(f"{name} {size} m={steps}: {figures['of_minima']:.3f}x of {peer} (target {figures['target']}x)")
        print(results[name]["trace"], results[name]["extremes"])
    versions = {peer: version(peer) for peer in TARGETS}
    write_result("sharpness_speed", versions=versions, rounds=arguments.rounds, models=results)


if __name__ == "__main__":
    main()
