"""What keeping GELU's second derivative saves: CPU time of a Hessian-vector product with it over that with PyTorch's own.

The rule is that a closed form stays where a product costs 10% less with it. Linear layers, ReLU, SiLU, layer norm and softmax
had one, too, and did not keep to it; the figures of their last measurement are in docs/log.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from measurement import Timing, interleave, quartiles, write_result
from sharpness_models import gpt
from telltale.signals.hessian import HessianOperator
from telltale.signals.quiet import Quiet

TARGET, PRODUCTS = 0.9, 3


def mlp() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """784-200-200-200-200-10 with GELU, a minibatch of 1000."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((784, 200, 200, 200, 200, 10)):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1]), (torch.randn(1000, 784), torch.randint(10, (1000,)))


def products(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], int]]:
    """A few products with one vector on graphs of the same loss, built beforehand."""
    parameters = list(model.parameters())
    contestants = {}
    for name, keep in (("kept", True), ("pytorch", False)):
        with Quiet(torch.float32, keep=keep):
            loss = functional.cross_entropy(model(batch[0]), batch[1])
        operator = HessianOperator(loss, parameters, check=False)
        vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))

        def run(operator: HessianOperator = operator, vector: Tensor = vector) -> int:
            for _ in range(PRODUCTS):
                operator.matvec(vector)
            return PRODUCTS

        contestants[name] = run
    return contestants


def compared(timings: dict[str, Timing]) -> dict[str, Any]:
    kept, own = timings["kept"].cpu, timings["pytorch"].cpu
    low, middle, high = quartiles([one / other for one, other in zip(kept, own, strict=True)])
    return {"of_minima": min(kept) / min(own), "median": middle, "q1": low, "q3": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, build in (("mlp", mlp), ("gpt", gpt)):
        torch.manual_seed(0)
        found[name] = compared(interleave(products(*build()), rounds=arguments.rounds))
        print(name, found[name], flush=True)
    if not arguments.trial:
        write_result("sharpness_closed_forms", rounds=arguments.rounds, models=found, target=TARGET)


if __name__ == "__main__":
    main()
