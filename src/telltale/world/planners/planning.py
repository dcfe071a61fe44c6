"""The planners by name, which of them fit a world, and the problem that a model and a world pose to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from telltale.config import check_integer, from_mapping
from telltale.errors import ConfigError
from telltale.world.laws.law import Enforcement, Law, checked_laws, enforcement
from telltale.world.planners.best_response import BestResponse
from telltale.world.planners.categorical import CategoricalCEM
from telltale.world.planners.problem import Plan, Problem, check_fits
from telltale.world.planners.sampling import CEM, ICEM, MPPI
from telltale.world.planners.search import BreadthFirst
from telltale.world.protocol import adapt
from telltale.world.randomness import seeded
from telltale.world.worlds.base import World, bounds

PLANNERS: dict[str, Any] = {
    planner.name: planner for planner in (CEM, ICEM, MPPI, CategoricalCEM, BreadthFirst, BestResponse)
}


def register_planner(planner: Any) -> Any:
    """Class decorator: makes a user's planner (``name``, ``kinds``, ``horizon``, ``plan``) known by its name."""
    if planner.name in PLANNERS:
        raise ConfigError(f"a planner is named {planner.name!r} already; choose another name.")
    PLANNERS[planner.name] = planner
    return planner


def planner_for(world: World, planner: Any = None, **settings: Any) -> Any:
    """The planner of that name with ``settings``, the world's default for None, or the planner object given.

    Raises :class:`~telltale.errors.ConfigError` for an unknown name, and with the names that fit for one that plans
    another kind of action.
    """
    if planner is None:
        planner = world.planner
    if isinstance(planner, str):
        if planner not in PLANNERS:
            raise ConfigError(f"planner {planner!r} is unknown; expected one of {', '.join(PLANNERS)}.")
        planner = from_mapping(PLANNERS[planner], settings)
    elif settings:
        planner = dataclasses.replace(planner, **settings)
    kind = kind_of(world)
    if kind not in planner.kinds:
        fitting = [name for name, candidate in PLANNERS.items() if kind in candidate.kinds]
        raise ConfigError(
            f"planner {planner.name} plans {' and '.join(planner.kinds)} actions, but those of {world.id} are {kind}; use one "
            f"of: {', '.join(fitting)}."
        )
    return planner


def kind_of(world: World) -> str:
    """continuous, discrete, plain (search in Python states) or policy (a game)."""
    if world.regime == "social" and world.plain:
        return "policy"
    if world.plain:
        return "plain"
    return "discrete" if world.discrete else "continuous"


def problem_of(
    model: Any,
    world: World,
    planner: Any,
    *,
    laws: Sequence[Law] | None = None,
    mode: str | Enforcement = "report",
    horizon: int | None = None,
    reward: str = "known",
) -> Problem:
    """What ``planner`` is given. ``laws`` None takes the world's; ``reward`` is ``known`` (the world's functions where it has
    them) or ``learned`` (what the model predicts).

    Raises :class:`~telltale.errors.ConfigError` for a horizon below 1 or a model without a reward where it has to have one.
    """
    length = next(steps for steps in (horizon, planner.horizon, world.horizon) if steps is not None)
    check_integer("horizon", length, low=1)
    if reward not in ("known", "learned"):
        raise ConfigError(f"reward={reward!r} is unknown; expected known or learned.")
    known = reward == "known"
    kind = kind_of(world)
    low = high = None
    if kind == "continuous":
        low, high = (torch.as_tensor(bound, dtype=torch.float32).reshape(-1) for bound in bounds(world.action_space))
    problem = Problem(
        adapt(model),
        length,
        low,
        high,
        world.action_width if kind != "continuous" else None,
        world.reward if known else None,
        world.terminated if known else None,
        checked_laws(world.laws if laws is None else laws, plain=world.plain),
        enforcement(mode),
        getattr(world, "goal", None) if kind == "plain" else None,
    )
    fitting = [name for name, candidate in PLANNERS.items() if problem.kind in candidate.kinds]
    if kind != "policy":
        check_fits(planner, problem, fitting)
    return problem


def plan(
    model: Any,
    world: World,
    belief: Any,
    *,
    planner: Any = None,
    horizon: int | None = None,
    laws: Sequence[Law] | None = None,
    mode: str | Enforcement = "report",
    reward: str = "known",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Plan:
    """Plan from ``belief``: (D,) or (B, D) for numeric worlds, one state or a list of states for plain ones.

    ``planner`` is a name, a planner, or None for the world's default; ``settings`` are its fields. The plan's actions keep
    the batch dimension. Raises :class:`~telltale.errors.ConfigError` as :func:`planner_for` and :func:`problem_of` do.
    """
    chosen = planner_for(world, planner, **settings)
    problem = problem_of(model, world, chosen, laws=laws, mode=mode, horizon=horizon, reward=reward)
    noise = seeded(seed, generator)
    if problem.kind == "plain":
        return chosen.plan(problem, belief if isinstance(belief, list) else [belief], generator=noise)
    rows = torch.as_tensor(belief, dtype=torch.float32)
    return chosen.plan(problem, rows.unsqueeze(0) if rows.ndim == 1 else rows, generator=noise)
