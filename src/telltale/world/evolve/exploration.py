"""A budget of probing steps, spent in batches: draw hypotheses, probe what they disagree about, measure, draw them again.

About half of the steps are directed and half are chance, because hypotheses that are all wrong disagree about the wrong things.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from telltale.config import check_integer, check_range, check_seed
from telltale.world.evolve.probes import Prober
from telltale.world.evolve.revision import rivals
from telltale.world.laws.law import Law
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import Episode, World, check_outcome


@dataclass(frozen=True)
class Exploration:
    """Probes that were made: ``episodes``, all of them as ``data``, how many steps were ``directed``, and how many imagined first
    steps a law ruled out (``shielded``)."""

    episodes: list[Episode]
    data: Transitions
    directed: int
    shielded: int


Reading = Callable[[World, Sequence[Episode]], Transitions]


def explore(
    model: Any,
    world: World,
    known: Transitions | None,
    *,
    budget: int,
    share: float = 0.5,
    batches: int = 8,
    depth: int = 8,
    length: int = 25,
    laws: Sequence[Law] | None = None,
    options: dict[str, Any] | None = None,
    read: Reading = Transitions.from_episodes,
    seed: int = 0,
) -> Exploration:
    """Exactly ``budget`` steps of probing in ``world``, in ``batches``; about a ``share`` of them directed, the others chance.

    ``model``: the one that acts; hypotheses are its :func:`~telltale.world.evolve.revision.rivals` by the evidence ``known``
    since the change and all that was probed so far. ``length`` bounds an episode; a :class:`Prober` begins a new one where that is
    expected to teach more. ``read(world, episodes)`` measures. ``options``: of the model kind's fit.
    """
    check_integer("budget", budget, low=1)
    check_range("share", share, low=0.0, high=1.0)
    check_integer("batches", batches, low=1)
    draw = torch.Generator().manual_seed(check_seed(seed))
    data, starts = known, [] if known is None else _starts(known)
    walk = _Walk(world, seed + 500, length, starts)
    found: list[Episode] = []
    directed, shielded = 0, 0
    try:
        for number in range(batches):
            steps = budget * (number + 1) // batches - sum(len(e) for e in found)
            others = (
                [] if data is None or not steps else rivals(model, world, data, seed=seed + number, options=options)
            )
            act: Any = None
            if len(others) > 1:
                act = Prober(
                    others, world, evidence=data, starts=starts, depth=depth, laws=laws, share=share, seed=seed + number
                )
            played = walk.on(act or (lambda _: world.sample_action(draw)), steps) if steps else []
            if act is not None:
                directed, shielded = directed + act.directed, shielded + act.shielded
            if played:
                more = read(world, played)
                data = more if data is None else data.joined(more)
                found += played
    finally:
        walk.engine.close()
    assert data is not None
    return Exploration(found, data.select(torch.arange(len(data) - budget, len(data))), directed, shielded)


class _Walk:
    """Episodes of at most ``length`` steps on an engine of its own; ``starts`` gets the state in which each begins."""

    def __init__(self, world: World, seed: int, length: int, starts: list[Any]) -> None:
        self.engine, self.seed, self.starts = world.spawn(), seed, starts
        self.length = min(length, self.engine.max_steps)
        self.left, self.observation = 0, None

    def on(self, act: Any, steps: int) -> list[Episode]:
        """``steps`` more, in pieces of episodes; the one that is open goes on at the next call."""
        found: list[Episode] = []
        while steps > 0:
            if self.left == 0:
                self.observation, self.left = self.engine.reset(self.seed), self.length
                self.starts.append(self.engine.belief(self.observation))
                self.seed += 1
                if hasattr(act, "begin"):
                    act.begin()
            piece = Episode(self.seed - 1, [self.observation], source="probe")
            while steps > 0 and self.left > 0:
                action = act(piece.observations[-1])
                if action is None:
                    self.left = 0
                    break
                action = self.engine.checked_action(action)
                outcome = self.engine.step(action)
                check_outcome(self.engine, outcome)
                piece.add(action, outcome)
                steps -= 1
                self.left = 0 if outcome.terminated or outcome.truncated else self.left - 1
            self.observation = piece.observations[-1]
            if len(piece):
                found.append(piece)
        return found


def _starts(evidence: Transitions) -> list[Any]:
    """States in which the episodes of the evidence began."""
    episodes = evidence.episodes.tolist()
    return [evidence.before[n] for n in range(len(episodes)) if n == 0 or episodes[n] != episodes[n - 1]]
