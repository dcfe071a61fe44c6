"""Experience: episodes of a random or a given policy, and learning by interaction, where the model being learned acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from telltale.config import check_integer, check_seed
from telltale.world.evaluation import evaluate
from telltale.world.models.kinds import fit
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import Episode, World, run_episode

Policy = Callable[[Any], Any]


def collect(
    world: World,
    *,
    steps: int = 1000,
    policy: Policy | None = None,
    hold: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Transitions:
    """Exactly ``steps`` transitions of ``policy(observation) -> action``; None draws uniform random actions.

    ``hold`` repeats a random action that many steps. Episode i starts from seed ``seed * 100_003 + i``; the last one is cut
    where the steps are reached. Raises :class:`~telltale.errors.ConfigError` for steps below 1.
    """
    return Transitions.from_episodes(
        world, episodes(world, steps=steps, policy=policy, hold=hold, seed=seed, progress=progress)
    )


def episodes(
    world: World,
    *,
    steps: int,
    policy: Policy | None = None,
    hold: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Episode]:
    """The episodes behind :func:`collect`."""
    check_integer("steps", steps, low=1)
    check_integer("hold", hold, low=1)
    check_seed(seed)
    engine = world.spawn()
    generator = torch.Generator().manual_seed(seed)
    act = policy or _Random(engine, generator, hold)
    found: list[Episode] = []
    done = 0
    try:
        while done < steps:
            episode = run_episode(
                engine, seed * 100_003 + len(found), act, source="random" if policy is None else "policy",
                max_steps=min(engine.max_steps, steps - done),
            )  # fmt: skip
            found.append(episode)
            done += len(episode)
            if progress is not None:
                progress(done, steps)
    finally:
        engine.close()
    return found


class _Random:
    def __init__(self, world: World, generator: torch.Generator, hold: int) -> None:
        self.world, self.generator, self.hold = world, generator, hold
        self.left, self.action = 0, None

    def __call__(self, observation: Any) -> Any:
        if self.left == 0:
            self.action, self.left = self.world.sample_action(self.generator), self.hold
        self.left -= 1
        return self.action


def learn(
    world: World,
    kind: str = "ensemble",
    *,
    steps: int = 1200,
    first_steps: int | None = None,
    planner: Any = None,
    mode: str = "project",
    seed: int = 0,
    done: Transitions | None = None,
    progress: Callable[[int, int], None] | None = None,
    each_round: Callable[[Any, Transitions], None] | None = None,
    **options: Any,
) -> tuple[Any, Transitions]:
    """Learn by interaction: random steps first, then rounds in which the model that was just fitted plans one episode.

    Where the model offers no plan at all, the episode is a random one. Returns the model fitted on all ``steps`` transitions, and
    the transitions. ``first_steps`` defaults to a sixth of the
    steps, at least 100 and at most one episode. ``each_round(model, transitions)`` is called after every episode. ``done``:
    what such a call was given in an earlier run with the same settings; learning goes on from there to the same end.
    ``options`` go to :func:`~telltale.world.models.kinds.fit`.
    """
    check_integer("steps", steps, low=20)
    opening = min(steps, first_steps or min(world.max_steps, max(100, steps // 6)))
    data = done if done is not None else collect(world, steps=opening, seed=seed)
    first_planned = int(data.episodes[opening - 1]) + 1
    model = fit(kind, data, world=world, seed=seed, **options)
    while len(data) < steps:
        number = int(data.episodes[-1]) + 1 - first_planned
        played = evaluate(
            model, world, planner=planner, mode=mode, seeds=[seed * 100_003 + 50_000 + number],
            max_steps=min(world.max_steps, steps - len(data)), seed=seed,
        ).records[0].episode  # fmt: skip
        if not len(played):  # a search found no plan in the model: look around instead
            played = episodes(world, steps=min(world.max_steps, steps - len(data)), seed=seed + 1 + number)[0]
        data = data.joined(Transitions.from_episodes(world, [played]))
        model = fit(kind, data, world=world, seed=seed, **options)
        if each_round is not None:
            each_round(model, data)
        if progress is not None:
            progress(len(data), steps)
    return model, data
