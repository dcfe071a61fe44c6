"""Networks for numeric worlds behind :func:`telltale.world.fit`: the ensemble, and the single network ``mlp``."""

from __future__ import annotations

import dataclasses
from typing import Any

from telltale.config import from_mapping, unknown_key
from telltale.errors import ConfigError, DataError
from telltale.world.models.ensemble import Ensemble, EnsembleConfig, FitConfig
from telltale.world.models.ensemble_fitting import fit_ensemble
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World

_SHAPE = ("members", "hidden", "hears_actions", "noise", "learn_reward", "learn_termination")


def fit_numeric_ensemble(
    transitions: Transitions,
    *,
    world: World | None = None,
    seed: int = 0,
    start: Ensemble | None = None,
    **options: Any,
) -> Ensemble:
    """An ensemble. Options: fields of EnsembleConfig and FitConfig. Reward and ending are learned unless the world knows them."""
    if transitions.plain:
        raise DataError("an ensemble needs numeric states; for plain states use kind mlp, program or tabular.")
    known = [field.name for field in dataclasses.fields(FitConfig)]
    for key in options:
        if key not in (*_SHAPE, *known):
            raise ConfigError(unknown_key(key, [*_SHAPE, *known]))
    shape = {key: value for key, value in options.items() if key in _SHAPE}
    shape.setdefault("learn_reward", world is None or world.reward is None)
    ends = bool(transitions.terminated.any())
    shape.setdefault("learn_termination", ends and (world is None or world.terminated is None))
    discrete = transitions.actions.ndim == 1
    count = (
        (world.action_width if world is not None else int(transitions.actions.max()) + 1)
        if discrete
        else transitions.actions.shape[1]
    )
    config = EnsembleConfig(width=transitions.before.shape[1], actions=count, discrete=discrete, **shape)
    return fit_ensemble(
        transitions.before,
        transitions.actions,
        transitions.rewards,
        transitions.after,
        transitions.terminated,
        config=config,
        fitting=from_mapping(FitConfig, {key: value for key, value in options.items() if key in known}),
        seed=seed,
        start=start,
    )


def fit_mlp(transitions: Transitions, *, world: World | None = None, seed: int = 0, **options: Any) -> Any:
    """One network: deterministic on numbers, a classifier per field on plain states."""
    if transitions.plain:
        from telltale.world.models.classifier import fit_classifier

        return fit_classifier(transitions, world=world, seed=seed, **options)
    return fit_numeric_ensemble(transitions, world=world, seed=seed, **{"members": 1, "noise": False, **options})
