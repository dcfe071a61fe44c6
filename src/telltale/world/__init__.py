"""World models: predict, simulate, obey laws, and earn a level by a certificate that others can replay.

After "Agentic World Modeling" (arXiv 2604.22748): level 1 predicts one step, level 2 simulates trajectories that a planner can
use, level 3 revises itself on evidence (:class:`Evolver`). :func:`make` a world, :func:`collect` experience, :func:`fit` a
model (or bring your own with a ``step``), :func:`plan`, :func:`evaluate`, :func:`certify`, and :func:`verify` the bundle. Engines
are imported when a world needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telltale.world.certificate import THRESHOLDS, Certificate, certify
    from telltale.world.collection import collect, learn
    from telltale.world.counterfactuals import counterfactual_divergence
    from telltale.world.evaluation import Evaluation, evaluate
    from telltale.world.evolve.evidence import Evidence
    from telltale.world.evolve.evolver import Evolver
    from telltale.world.evolve.level_three import certify_life
    from telltale.world.evolve.version_registry import Registry
    from telltale.world.laws.law import Law
    from telltale.world.laws.reading import read_laws
    from telltale.world.metrics import bootstrap, iqm, planning_gap
    from telltale.world.models.kinds import fit, register_model
    from telltale.world.models.saving import load_model, save_model
    from telltale.world.planners.planning import plan, register_planner
    from telltale.world.protocol import Transition, WorldModel
    from telltale.world.rollouts import rollout
    from telltale.world.transitions import Transitions
    from telltale.world.verification import Verification, verify
    from telltale.world.worlds.base import World
    from telltale.world.worlds.registry import make, names, register_world

_HOME = {
    "THRESHOLDS": "certificate", "Certificate": "certificate", "certify": "certificate",
    "collect": "collection", "learn": "collection",
    "counterfactual_divergence": "counterfactuals",
    "Evaluation": "evaluation", "evaluate": "evaluation",
    "Evidence": "evolve.evidence", "Evolver": "evolve.evolver", "certify_life": "evolve.level_three",
    "Registry": "evolve.version_registry",
    "Law": "laws.law", "read_laws": "laws.reading",
    "bootstrap": "metrics", "iqm": "metrics", "planning_gap": "metrics",
    "fit": "models.kinds", "register_model": "models.kinds",
    "load_model": "models.saving", "save_model": "models.saving",
    "plan": "planners.planning", "register_planner": "planners.planning",
    "Transition": "protocol", "WorldModel": "protocol",
    "rollout": "rollouts", "Transitions": "transitions",
    "Verification": "verification", "verify": "verification",
    "World": "worlds.base", "make": "worlds.registry", "names": "worlds.registry", "register_world": "worlds.registry",
}  # fmt: skip

__all__ = [
    "THRESHOLDS", "Certificate", "Evaluation", "Evidence", "Evolver", "Law", "Registry", "Transition", "Transitions",
    "Verification", "World", "WorldModel", "bootstrap", "certify", "certify_life", "collect",
    "counterfactual_divergence", "evaluate", "fit", "iqm", "learn", "load_model", "make", "names", "plan",
    "planning_gap", "read_laws", "register_model", "register_planner", "register_world", "rollout", "save_model",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'telltale.world' has no attribute {name!r}")
    return getattr(importlib.import_module(f"telltale.world.{home}"), name)
