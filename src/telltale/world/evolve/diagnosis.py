"""Diagnosis: which operator of the model is wrong? Residuals of each, and what swapping each in for another one restores.

One failed prediction implicates perception, dynamics and reward together (Duhem and Quine). So every operator gets a residual of
its own, and then a counterfactual: were this one operator another (the engine's oracle, an older version, or one that is corrected
on the first half of the evidence), would what alarms be quiet on the second half? The component is named only where
exactly one swap explains it, and no second one what is left of it; otherwise the answer is that one cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_choice
from telltale.errors import ConfigError, TelltaleError
from telltale.world.evolve.monitor import residuals
from telltale.world.protocol import adapt
from telltale.world.transitions import Transitions

COMPONENTS = ("dynamics", "observation", "reward", "termination")
CANNOT_TELL = "cannot tell"
ALL = 0.95
"""A swap that explains less than this leaves something; if another component explains that, one cannot tell."""
QUIET = 0.5
"""Evidence whose residuals grew by less than this is of the law that the model knows."""


@dataclass(frozen=True)
class Operators:
    """The operators of a stack. ``dynamics``: a model with ``step``; ``observation``: what a reading (rows) says of the state;
    ``reward(before, action, after)`` and ``termination(after)``, or None where nothing is claimed."""

    dynamics: Any
    observation: Callable[[Any], Any] | None = None
    reward: Callable[[Any, Any, Any], Tensor] | None = None
    termination: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Diagnosis:
    """``component`` is one of :data:`COMPONENTS` or :data:`CANNOT_TELL`. ``excess``: by residual, how much it grew over its
    reference, in units of the reference's upper range; ``explained``: by swap, the share of every alarmed excess that it
    takes away (the least of them). ``quiet``: no residual grew by more than :data:`QUIET`."""

    component: str
    reason: str
    excess: dict[str, float] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    quiet: bool = False

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self)}


def diagnose(
    operators: Operators,
    reference: Transitions,
    evidence: Transitions,
    *,
    swaps: Mapping[str, Any] | None = None,
    refit: Callable[[Transitions], list[Any]] | None = None,
    alarmed_at: float = 3.0,
    explains: float = 0.8,
) -> Diagnosis:
    """Compare ``evidence`` with ``reference``, on which the operators were right.

    ``swaps``: other operators by component, such as the world's oracle or an older version's; ``refit(transitions)`` makes
    other dynamics from the first half of the evidence. A correction of the observation (one factor and one shift of one
    column), and scaled or shifted rewards, are tried without being asked for. A residual alarms where its mean exceeds
    ``alarmed_at`` times its reference; a swap explains it where it takes away at least ``explains`` of the excess.

    Raises :class:`~telltale.errors.ConfigError` for a swap of another component, or one that cannot take this evidence.
    """
    for name in swaps or {}:
        check_choice("swap", name, COMPONENTS)
    halves = _halves(evidence)
    if halves is None or not len(reference):
        return Diagnosis(CANNOT_TELL, "there is too little evidence to fit on one half and judge on the other")
    first, second = halves
    base, now = _residuals(operators, reference), _residuals(operators, second)
    scale = {name: _floor(name, base[name]) for name in base}
    excess = {name: max(0.0, now[name] - base[name]) / scale[name] for name in now}
    alarmed = [name for name, value in excess.items() if value > alarmed_at]
    if not alarmed:
        return Diagnosis(
            CANNOT_TELL, "no operator's residual left its range", excess, quiet=max(excess.values()) <= QUIET
        )
    tried = _Trial(first, second, base, dict(swaps or {}), refit)
    explained, best = tried.explained(operators, now, alarmed)
    able = sorted((name for name, share in explained.items() if share >= explains), key=lambda n: -explained[n])
    words = f"{', '.join(alarmed)} left {'their' if len(alarmed) > 1 else 'its'} range"
    if len(able) == 1 and explained[able[0]] < ALL:
        # what is left may be another fault, which the first one hides as long as it is there
        corrected = _swapped(operators, able[0], best[able[0]])
        still = _residuals(corrected, second)
        left = [name for name in alarmed if (still[name] - base[name]) / scale[name] > alarmed_at]
        rest = tried.explained(corrected, still, left, without=able[0])[0] if left else {}
        others = [name for name, share in rest.items() if share >= explains]
        if others:
            also = f"{able[0]} explains {explained[able[0]]:.0%}, and {others[0]} what it leaves; both may be at fault"
            return Diagnosis(CANNOT_TELL, f"{words}; {also}", excess, explained)
    if len(able) == 1:
        return Diagnosis(
            able[0], f"{words}; another {able[0]} alone explains {explained[able[0]]:.0%}", excess, explained
        )
    if not able:
        return Diagnosis(CANNOT_TELL, f"{words}; no single component explains it", excess, explained)
    return Diagnosis(CANNOT_TELL, f"{words}; {' and '.join(able)} would each explain it", excess, explained)


@dataclass(frozen=True)
class _Trial:
    """Swaps tried on two halves of the evidence: made of the first, judged on the second against the reference ``base``."""

    first: Transitions
    second: Transitions
    base: dict[str, float]
    swaps: dict[str, Any]
    refit: Callable[[Transitions], list[Any]] | None

    def explained(
        self, operators: Operators, now: dict[str, float], alarmed: list[str], *, without: str = ""
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """By component, but for ``without``: the largest share of every alarmed excess that a swap takes away, and which did."""
        shares: dict[str, float] = {}
        best: dict[str, Any] = {}
        for component, candidates in _candidates(operators, self.first, self.swaps, self.refit).items():
            for other in candidates if component != without else []:
                try:
                    after = _residuals(_swapped(operators, component, other), self.second)
                except (TelltaleError, RuntimeError, ValueError, TypeError, IndexError) as error:
                    said = f"the {component} that was given to swap in does not fit this evidence: {error}"
                    raise ConfigError(said) from error
                share = min(1 - max(0.0, after[n] - self.base[n]) / (now[n] - self.base[n]) for n in alarmed)
                if share > shares.get(component, -math.inf):
                    shares[component], best[component] = max(share, -1.0), other
        return shares, best


def _halves(evidence: Transitions) -> tuple[Transitions, Transitions] | None:
    """Alternate blocks of ten rows, so that both halves saw the same phases of the same episodes."""
    if len(evidence) < 20:
        return None
    side = (torch.arange(len(evidence)) // 10) % 2 == 0
    return evidence.select(side.nonzero().flatten()), evidence.select((~side).nonzero().flatten())


def _residuals(operators: Operators, evidence: Transitions) -> dict[str, float]:
    """Mean residual by operator that makes a claim; the observation shows in the others and has none of its own."""
    seen = _seen(operators, evidence)
    adapted = adapt(operators.dynamics)
    off = residuals(adapted, seen)
    if seen.plain:
        found = {"dynamics": float(off.mean())}
    else:
        change = (seen.after - seen.before).pow(2).mean(0).sqrt().clamp(min=1e-6)
        found = {"dynamics": float((off.abs() / change).clamp(max=100.0).mean())}
    if operators.reward is not None:
        said = operators.reward(seen.before, seen.actions, seen.after)
        found["reward"] = float((said - seen.rewards).abs().nan_to_num(nan=1e3).clamp(max=1e3).mean())
    if operators.termination is not None:
        found["termination"] = float((operators.termination(seen.after).bool() != seen.terminated).float().mean())
    return found


def _floor(name: str, value: float) -> float:
    """What an excess is measured in: the reference, and no less than what nobody would act on."""
    return max(value, {"dynamics": 2e-3, "reward": 2e-3, "termination": 1e-3}[name])


def _seen(operators: Operators, evidence: Transitions) -> Transitions:
    if operators.observation is None or evidence.plain:
        return evidence
    sides = {name: operators.observation(getattr(evidence, name)) for name in ("before", "after")}
    return replace(evidence, **sides)


def _swapped(operators: Operators, component: str, other: Any) -> Operators:
    return replace(operators, **{component: other})


def _candidates(
    operators: Operators, first: Transitions, swaps: Mapping[str, Any], refit: Callable[[Transitions], list[Any]] | None
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [swap] for name, swap in swaps.items()}
    if refit is not None:
        found.setdefault("dynamics", []).extend(refit(_seen(operators, first)))
    if not first.plain:
        corrected = _corrections(operators, first)
        if corrected:
            found.setdefault("observation", []).extend(corrected)
    if operators.reward is not None:
        found.setdefault("reward", []).extend(_rewards(operators, first))
    if operators.termination is not None:
        found.setdefault("termination", []).extend(_terminations(operators, first))
    return found


def _corrections(operators: Operators, first: Transitions) -> list[Any]:
    """For every column the factor and shift that make the old dynamics (and reward) fit best, by a coarse and a fine search."""
    base = operators.observation
    best: list[tuple[float, Any]] = []
    spread = first.before.std(0).clamp(min=1e-6)
    for column in range(first.before.shape[1]):
        tried = [(1.0, 0.0)]
        for step in (1.0, 0.2, 0.04, 0.008):
            center = min(tried, key=lambda pair: _misfit(operators, first, column, pair[0], pair[1], base))
            factors = [center[0] * f for f in (1 - 0.5 * step, 1 - 0.25 * step, 1, 1 + 0.3 * step, 1 + step)]
            factors += [-1.0] if step == 1.0 else []
            shifts = [center[1] + s * step * float(spread[column]) for s in (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)]
            tried = [center, *((f, s) for f in factors for s in ([0.0, *shifts] if step == 1.0 else shifts))]
        factor, shift = min(tried, key=lambda pair: _misfit(operators, first, column, pair[0], pair[1], base))
        best.append((_misfit(operators, first, column, factor, shift, base), _corrected(column, factor, shift, base)))
    best.sort(key=lambda pair: pair[0])
    return [correction for _, correction in best[:2]]


def _misfit(operators: Operators, first: Transitions, column: int, factor: float, shift: float, base: Any) -> float:
    tried = _residuals(replace(operators, observation=_corrected(column, factor, shift, base), termination=None), first)
    return tried["dynamics"] + tried.get("reward", 0.0)


def _corrected(column: int, factor: float, shift: float, base: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    def observe(rows: Tensor) -> Tensor:
        seen = rows if base is None else base(rows)
        out = seen.clone()
        out[..., column] = (seen[..., column] - shift) / (factor if abs(factor) > 1e-6 else 1e-6)
        return out

    return observe


def _rewards(operators: Operators, first: Transitions) -> list[Any]:
    """The old reward, scaled and shifted as the first half of the evidence has it."""
    seen = _seen(operators, first)
    old = operators.reward
    assert old is not None
    said = old(seen.before, seen.actions, seen.after).double()
    if not bool(said.isfinite().all()):
        return []
    table = torch.stack([said, torch.ones_like(said)], 1)
    factor, shift = (
        torch.linalg.lstsq(table, seen.rewards.double().unsqueeze(1), driver="gelsd").solution[:, 0].tolist()
    )
    return [lambda before, action, after: factor * old(before, action, after) + shift]


def _terminations(operators: Operators, first: Transitions) -> list[Any]:
    """One limit on the size of one column, each column, the one that splits the ends of the first half from the rest best."""
    seen = _seen(operators, first)
    if seen.plain or not bool(seen.terminated.any()):
        return [lambda after: torch.zeros(len(after), dtype=torch.bool)]
    old, found = operators.termination, []
    assert old is not None
    for column in range(seen.after.shape[1]):
        sizes = seen.after[:, column].abs()
        limits = torch.cat([sizes[seen.terminated], sizes[seen.terminated] * 0.999])
        wrong = torch.stack([((sizes >= limit) != seen.terminated).float().mean() for limit in limits])
        limit = float(limits[int(wrong.argmin())])
        found.append(lambda after, column=column, limit=limit: after[..., column].abs() >= limit)
    return found
