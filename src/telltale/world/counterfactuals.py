"""Counterfactual outcome divergence: what changes at the end when one action changes, with the same random numbers.

COD(k) = E[d(z_H^(1), z_H^(2))] (arXiv 2604.22748, section on decision-centric evaluation): the same first belief and
actions, except at step k. A model with COD 0 is deaf to its actions and useless to a planner. The paper leaves the
distance and the handling of noise open; here the distance is Euclidean unless given, and both branches replay one
generator state, so that the null intervention has COD exactly 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.world.plugs import UserCodeError
from telltale.world.protocol import Adapted, adapt, check_finite, check_predicted
from telltale.world.randomness import copy_of, replayed_own_randomness, seeded

Distance = Callable[[Any, Any], Any]


def counterfactual_divergence(
    model: Any,
    belief: Any,
    actions: Any,
    k: int,
    alternative: Any,
    *,
    generator: torch.Generator | None = None,
    distance: Distance | None = None,
) -> float:
    """Distance of the last beliefs of two branches whose actions are equal but for the ``k``-th; k counts from 1.

    ``belief`` (D,), or (B, D) for the mean over rows, or a plain state. ``actions`` (H, A), (H,) for discrete ones, or a
    list of plain actions; ``alternative`` is one of them. ``generator`` is not advanced: both branches replay its state
    (None: that of seed 0).

    Raises :class:`~telltale.errors.ConfigError` if k is not in 1..H or shapes differ, and
    :class:`~telltale.errors.DataError` for NaN.
    """
    first, second = branches(model, belief, actions, k, alternative, generator=generator)
    measured = (distance or _euclidean)(first[-1], second[-1])
    return float(torch.as_tensor(measured, dtype=torch.float64).mean())


def branches(
    model: Any,
    belief: Any,
    actions: Any,
    k: int,
    alternative: Any,
    *,
    generator: torch.Generator | None = None,
) -> tuple[list[Any], list[Any]]:
    """Both branches as lists of H + 1 beliefs. Before step k they are equal bit for bit."""
    adapted = adapt(model)
    horizon = len(actions)
    if horizon < 1:
        raise ConfigError("actions are empty; expected at least one.")
    check_integer("k", k, low=1, high=horizon)
    changed: Any
    if isinstance(actions, Tensor):
        other = torch.as_tensor(alternative, dtype=actions.dtype)
        if other.numel() != actions[0].numel():
            raise ConfigError(
                f"alternative has shape {tuple(other.shape)}, but one action has shape {tuple(actions[0].shape)}; give one action."
            )
        changed = actions.clone()
        changed[k - 1] = other.reshape(actions[0].shape)
        check_finite(actions, "actions")
        check_finite(changed, "alternative, placed in actions")
    else:
        changed = list(actions)
        changed[k - 1] = alternative
    if isinstance(belief, Tensor):
        check_finite(belief, "belief")
        belief, actions, changed = _laid_out(adapted, belief, actions, changed)
    start = seeded(generator=generator)
    return tuple(_branch(adapted, belief, sequence, copy_of(start)) for sequence in (actions, changed))  # type: ignore[return-value]


def _laid_out(adapted: Adapted, belief: Tensor, actions: Any, changed: Any) -> tuple[Tensor, Any, Any]:
    """Rows for a batched belief; a single belief is given as it is to a model that takes one row, else as a batch of one."""
    actions, changed = torch.as_tensor(actions), torch.as_tensor(changed)
    if belief.ndim == 1:
        try:
            with replayed_own_randomness(adapted.model, 0):
                adapted.step(belief, actions[0], generator=torch.Generator().manual_seed(0))
            return belief, actions, changed
        except (UserCodeError, UnsupportedModelError):  # a model that insists on a batch fails in its own way
            belief = belief.unsqueeze(0)
    rows = len(belief)
    return belief, *(
        sequence.unsqueeze(1).expand(len(sequence), rows, *sequence.shape[1:]) for sequence in (actions, changed)
    )


def _branch(adapted: Adapted, belief: Any, actions: Any, generator: torch.Generator) -> list[Any]:
    states = [belief]
    with torch.no_grad():
        for action in actions:
            states.append(adapted.step(states[-1], action, generator=generator, common=True).belief)
    if isinstance(states[-1], Tensor):
        for t, state in enumerate(states):
            check_predicted(state, adapted.name, f"belief at step {t}")
    return states


def _euclidean(first: Any, second: Any) -> Any:
    if not isinstance(first, Tensor):
        try:
            first, second = (torch.as_tensor(side, dtype=torch.float64) for side in (first, second))
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"states of type {type(first).__name__} have no Euclidean distance; pass distance=function(first, second)."
            ) from None
    return (first - second).double().norm(dim=-1) if first.ndim else (first - second).abs()


@dataclass(frozen=True)
class Sensitivity:
    """How a model answers to interventions, beside the oracle's answer from the same starts.

    ``divergence`` and ``oracle`` are the COD of each probe; ``direction`` the cosine between the two differences of end
    states where both moved; ``null`` the largest COD under a' = a, which must be 0.
    """

    divergence: list[float]
    oracle: list[float]
    direction: list[float]
    null: float

    @property
    def ratio(self) -> float:
        """Sum of the model's divergences over the sum of the oracle's."""
        total = sum(self.oracle)
        return sum(self.divergence) / total if total > 0 else float("nan")

    @property
    def responding(self) -> float:
        """Share of the interventions that change the model's end state at all: the action sensitivity ratio."""
        return sum(value > 0 for value in self.divergence) / max(1, len(self.divergence))


def sensitivity(
    model: Any,
    oracle: Any,
    beliefs: Sequence[Any],
    actions: Sequence[Any],
    alternatives: Sequence[Any],
    *,
    embed: Callable[[Any], Tensor],
    steps: Sequence[int],
    seed: int = 0,
) -> Sensitivity:
    """Probe each start with each ``k`` of ``steps``; ``embed`` turns an end state into a vector (D,) to measure in.

    Every probe is one start, one action sequence and one alternative action per k; model and oracle get the same.
    """
    found, truth, cosines, null = [], [], [], 0.0
    for index, (belief, sequence, k) in enumerate(
        (b, a, k) for (b, a), k in itertools.product(zip(beliefs, actions, strict=True), steps)
    ):
        probe = torch.Generator().manual_seed(seed + index)
        alternative = alternatives[index % len(alternatives)]
        ends = []
        for contender in (model, oracle):
            pair = branches(contender, belief, sequence, k, alternative, generator=probe)
            first, second = (embed(states[-1]).double().reshape(-1) for states in pair)
            ends.append(second - first)
        mine, real = ends
        found.append(float(mine.norm()))
        truth.append(float(real.norm()))
        if truth[-1] > 0:
            cosines.append(float(mine @ real / (mine.norm() * real.norm())) if found[-1] > 0 else 0.0)
        same = branches(model, belief, sequence, k, sequence[k - 1], generator=probe)
        null = max(null, float((embed(same[0][-1]).double() - embed(same[1][-1]).double()).abs().max()))
    return Sensitivity(found, truth, cosines, null)
