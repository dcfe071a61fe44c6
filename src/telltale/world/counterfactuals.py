"""Counterfactual outcome divergence: what changes at the end when one action changes, with the same random numbers.

COD(k) = E[d(z_H^(1), z_H^(2))] (arXiv 2604.22748, section on decision-centric evaluation): the same first belief and
actions, except at step k. A model with COD 0 is deaf to its actions and useless to a planner. The paper leaves the
distance and the handling of noise open; here the distance is Euclidean unless given, and both branches replay one
generator state, so that the null intervention has COD exactly 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.world.plugs import UserCodeError
from telltale.world.protocol import Adapted, adapt, check_finite, check_predicted
from telltale.world.randomness import copy_of, replayed_own_randomness, seeded

Distance = Callable[[Any, Any], Any]
SMALLEST_CHANGE = 1e-9
"""Changes of the real outcome below this have no direction."""


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
    states where both moved; ``null`` the largest COD under a' = a, which must be 0. ``nulls`` are all of these, and ``steps``
    the step k of each probe.
    """

    divergence: list[float]
    oracle: list[float]
    direction: list[float]
    null: float
    nulls: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Sum of the model's divergences over the sum of the oracle's."""
        total = sum(self.oracle)
        return sum(self.divergence) / total if total > 0 else float("nan")

    @property
    def responding(self) -> float:
        """Share of the interventions that change the model's end state at all: the action sensitivity ratio."""
        return sum(value > 0 for value in self.divergence) / max(1, len(self.divergence))

    def extended(self, mine: Tensor, real: Tensor, null: float, k: int) -> Sensitivity:
        """With one more probe: how the end state changed in the model and in the engine, (D,) each."""
        size, true_size = float(mine.norm()), float(real.norm())
        cosine = [float(mine @ real / (size * true_size)) if size > 0 else 0.0] if true_size > SMALLEST_CHANGE else []
        return Sensitivity(
            [*self.divergence, size], [*self.oracle, true_size], [*self.direction, *cosine], max(self.null, null),
            [*self.nulls, null], [*self.steps, k],
        )  # fmt: skip

    def by_step(self) -> dict[int, tuple[float, float]]:
        """Mean divergence of the model and of the oracle for each k."""
        probes: dict[int, list[tuple[float, float]]] = {}
        for k, mine, real in zip(self.steps, self.divergence, self.oracle, strict=True):
            probes.setdefault(k, []).append((mine, real))
        return {
            k: (sum(m for m, _ in found) / len(found), sum(r for _, r in found) / len(found))
            for k, found in sorted(probes.items())
        }


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

    ``beliefs`` are observed states, from which each contender infers its own. Every probe is one start, one action sequence and
    one alternative action per k; model and oracle get the same.
    """
    found = Sensitivity([], [], [], 0.0)
    for index, (belief, sequence, k) in enumerate(
        (b, a, k) for (b, a), k in itertools.product(zip(beliefs, actions, strict=True), steps)
    ):
        probe = torch.Generator().manual_seed(seed + index)
        alternative = alternatives[index % len(alternatives)]
        mine, null = response(model, belief, sequence, k, alternative, embed=embed, generator=probe)
        real, _ = response(oracle, belief, sequence, k, alternative, embed=embed, generator=probe, null=False)
        found = found.extended(mine, real, null, k)
    return found


def response(
    model: Any, belief: Any, actions: Any, k: int, alternative: Any, *, embed: Callable[[Any], Tensor],
    generator: torch.Generator, at: int | None = None, null: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """How the observed state after ``at`` steps (None: the last) changes with the ``k``-th action, (D,), and the size of its change
    under the null intervention. ``belief`` is an observed state: (D,), or a plain one.
    """
    adapted = adapt(model)
    if not isinstance(belief, Tensor):
        start = adapted.infer(belief)
    else:
        start = adapted.infer(belief.unsqueeze(0)) if callable(getattr(model, "infer", None)) else belief
    index = len(actions) if at is None else at

    def changed(other: Any) -> Tensor:
        pair = branches(adapted, start, actions, k, other, generator=generator)
        first, second = (embed(adapted.observed(states[index])).double().reshape(-1) for states in pair)
        return second - first

    return changed(alternative), float(changed(actions[k - 1]).norm()) if null else 0.0
