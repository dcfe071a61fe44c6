"""Profiles for the planner's tests: random chains, and a small one shaped like VGG-16."""

from __future__ import annotations

import random

from telltale.train.pipeline.profile import LayerProfile, Profile


def chain(
    compute: list[float], activations: list[float], weights: list[float], saved: list[float] | None = None
) -> Profile:
    """A chain of layers with a third of the compute in the forward."""
    saved = saved or [0.0] * len(compute)
    return Profile(
        tuple(
            LayerProfile(f"layer{index}", t / 3, 2 * t / 3, a, w, s)
            for index, (t, a, w, s) in enumerate(zip(compute, activations, weights, saved, strict=True))
        )
    )


def random_chain(generator: random.Random, n_layers: int, *, whole: bool = False) -> Profile:
    """Compute in 0.1 to 4 s, sizes around what a bandwidth of 1 moves in that time; whole numbers make many ties."""

    def draw(high: float) -> list[float]:
        if whole:
            return [float(generator.randint(0, int(high))) for _ in range(n_layers)]
        return [generator.uniform(0.0, high) * generator.choice((1.0, 1.0, 0.1)) for _ in range(n_layers)]

    compute = [value + (1.0 if whole else 0.1) for value in draw(3.0)]
    return chain(compute, draw(2.0), draw(3.0), draw(5.0))


def vgg_like() -> Profile:
    """Ten convolutions with large outputs and few parameters, then three layers with nearly all the parameters.

    60 s of compute, 60 parameter bytes and outputs from 400 down to 20 bytes; then 4 s, 500 bytes and small outputs.
    """
    compute = [6.0] * 10 + [2.5, 1.0, 0.5]
    outputs = [400.0, 400.0, 200.0, 200.0, 100.0, 100.0, 50.0, 50.0, 40.0, 20.0, 4.0, 4.0, 1.0]
    weights = [6.0] * 10 + [400.0, 80.0, 20.0]
    return chain(compute, outputs, weights, outputs)
