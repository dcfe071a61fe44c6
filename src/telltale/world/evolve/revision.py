"""Revision operators: candidates made from evidence. A candidate is a new model; the one that acts is never touched.

Refitting and parameter identification move the protective belt; a structural edit moves the hard core (Lakatos, as the paper
has it). Doing nothing is a candidate of every revision and needs no operator: it is what is left when no gate passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from telltale.errors import TelltaleError
from telltale.world.evolve import hypotheses
from telltale.world.evolve.monitor import residuals
from telltale.world.evolve.structure import grow, identify, repair
from telltale.world.models.kinds import fit
from telltale.world.models.program import Program
from telltale.world.models.sindy import Equations
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World


@dataclass(frozen=True)
class Candidate:
    """A model, the operator that made it, and the ids of the transitions that it was fitted on."""

    operator: str
    model: Any
    evidence: list[str]


def refit(
    model: Any, world: World, older: Transitions | None, newer: Transitions, seed: int, options: dict[str, Any]
) -> Any:
    """The same kind fitted from scratch on all evidence."""
    data = newer if older is None else older.joined(newer)
    return fit(model.describe()["kind"], data, world=world, seed=seed, **options)


def refit_forgetting(
    model: Any, world: World, older: Transitions | None, newer: Transitions, seed: int, options: dict[str, Any]
) -> Any:
    """The same kind fitted from scratch on what came after the change alone."""
    return fit(model.describe()["kind"], newer, world=world, seed=seed, **options)


def parameters(
    model: Any, world: World, older: Transitions | None, newer: Transitions, seed: int, options: dict[str, Any]
) -> Any:
    """The coefficients of the terms in use, identified on what came after the change."""
    return identify(model, newer)


def structure(
    model: Any, world: World, older: Transitions | None, newer: Transitions, seed: int, options: dict[str, Any]
) -> Any:
    """Terms added to equations, rules of a program repaired, on what came after the change."""
    return repair(model, newer) if isinstance(model, Program) else grow(model, newer)


Operator = Callable[[Any, World, "Transitions | None", Transitions, int, dict[str, Any]], Any]

_SYMBOLIC: dict[str, Operator] = {"parameters": parameters, "structure": structure}
_PROGRAM: dict[str, Operator] = {"structure": structure, "refit, forgetting": refit_forgetting, "refit": refit}
_OTHERS: dict[str, Operator] = {"refit, forgetting": refit_forgetting, "refit": refit}


def operators_for(model: Any) -> dict[str, Operator]:
    """The operators that apply to a model, cheapest hypothesis first."""
    if isinstance(model, Equations):
        return dict(_SYMBOLIC)
    return dict(_PROGRAM if isinstance(model, Program) else _OTHERS)


def candidates(
    model: Any,
    world: World,
    newer: Transitions,
    *,
    older: Transitions | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    only: list[str] | None = None,
) -> tuple[list[Candidate], list[str]]:
    """Every candidate that the evidence allows, and why the others are missing.

    ``newer``: evidence since the change. ``older``: evidence from before it, for the operators that remember. ``options``: of
    the kind's fit. ``only``: names of operators.
    """
    found: list[Candidate] = []
    missing: list[str] = []
    for name, operator in operators_for(model).items():
        if only is not None and name not in only:
            continue
        if not len(newer):
            missing.append(f"{name}: there is no evidence since the change")
            continue
        used = newer if older is None or name != "refit" else older.joined(newer)
        try:
            made = operator(model, world, older, newer, seed, options or {})
        except (TelltaleError, ArithmeticError, ValueError, RuntimeError) as error:  # a failed fit is no candidate
            missing.append(f"{name}: {error}")
            continue
        found.append(Candidate(name, made, used.ids()))
    return found, missing


def rivals(
    model: Any,
    world: World,
    newer: Transitions,
    *,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    count: int = 16,
) -> list[Any]:
    """Hypotheses by the evidence since the change, the best first: what they disagree about is what to probe.

    Equations and programs: ``count`` draws about as often as they are credible (:mod:`~telltale.world.evolve.hypotheses`). Other
    kinds: of the model itself and candidates of all evidence and of each half, those that explain it about as well as the best.
    """
    if isinstance(model, Equations):
        return list(hypotheses.equations(model, newer, count=count, seed=seed))
    if isinstance(model, Program):
        return list(hypotheses.programs(model, newer, count=count, seed=seed))
    found = [model, *(c.model for c in candidates(model, world, newer, seed=seed, options=options)[0])]
    half = torch.arange(len(newer)) < len(newer) // 2
    for side in (half, ~half):
        part = newer.select(side.nonzero().flatten())
        found += [c.model for c in candidates(model, world, part, seed=seed, options=options)[0]]
    scale = 1.0 if newer.plain else float((newer.after - newer.before).pow(2).mean().sqrt().clamp(min=1e-6))
    ranked = sorted(((float(residuals(m, newer).abs().mean()) / scale, i) for i, m in enumerate(found)))
    return [found[i] for error, i in ranked if error <= 3 * ranked[0][0] + 0.02][:4]
