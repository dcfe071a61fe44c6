"""Episodes that a life's active model plays: planned where it can plan, random where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from telltale.world.collection import episodes as play_randomly
from telltale.world.evaluation import evaluate
from telltale.world.laws.law import Law
from telltale.world.protocol import DivergedError
from telltale.world.worlds.base import Episode, World

LOST = 24
"""Steps of a random episode in the place of one for which there was no plan."""


def acted(
    model: Any,
    world: World,
    seeds: Sequence[int],
    *,
    laws: Sequence[Law],
    mode: str,
    seed: int,
    planner: dict[str, Any],
) -> tuple[list[tuple[Episode, bool]], str]:
    """(episode, success) of every start, and why planning broke down where it did.

    A model that offers no plan from a start, or breaks down, lives through a random episode there, which counts as failed.
    """
    broken = ""
    try:
        records = evaluate(model, world, seeds=seeds, mode=mode, seed=seed, laws=laws, **planner).records
        played = [(record.episode, record.success) for record in records]
    except DivergedError as error:
        played, broken = [(Episode(start, []), False) for start in seeds], str(error)
    steps = min(world.max_steps, LOST)
    found = [
        (episode, won) if len(episode) else (play_randomly(world, steps=steps, seed=start)[0], False)
        for start, (episode, won) in zip(seeds, played, strict=True)
    ]
    return found, broken
