"""Structural revision: parameters of equations identified anew, terms added to them, and rules of a program repaired.

The hypothesis class is explicit, so a handful of transitions decides: that is the point of a symbolic substrate (arXiv
2604.22748), and its limit where the truth lies outside of the class.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from telltale.errors import DataError
from telltale.world.models.motion import Motion, monomials
from telltale.world.models.program import Program, fit_program
from telltale.world.models.sindy import Equations
from telltale.world.transitions import Transitions

SLIGHT = 0.05
"""A term whose removal changes the error by less than this share is left out."""


def identify(model: Equations, evidence: Transitions, *, support: Tensor | None = None) -> Equations:
    """The same equations with other coefficients: least squares on one-step predictions over the terms in use.

    ``support`` (D, terms): which coefficients are free, default those that are not 0. Raises
    :class:`~telltale.errors.DataError` for less evidence than a coefficient each needs.
    """
    free = model.coefficients != 0 if support is None else support
    count = int(free.sum())
    rows = len(evidence) * evidence.before.shape[1]
    if count == 0 or rows < count:
        raise DataError(f"{len(evidence)} transitions do not determine {count} coefficients; collect more.")
    scale = (evidence.after - evidence.before).double().pow(2).mean(0).sqrt().clamp(min=1e-6)
    before, actions, after = evidence.before.double(), evidence.actions.double(), evidence.after.double()

    def off(values: Any) -> Any:
        stepped = _with(model, free, values).step(before, actions).belief
        return ((stepped - after) / scale).nan_to_num(nan=1e3, posinf=1e3, neginf=-1e3).flatten().numpy()

    start = model.coefficients[free].numpy()
    found = least_squares(off, start, x_scale=np.maximum(np.abs(start), 0.1), xtol=1e-12, ftol=1e-12, max_nfev=60)
    fitted = _with(model, free, found.x)
    residual = after - fitted.step(before, actions).belief
    fitted.deviation = residual.pow(2).mean(0).sqrt().clamp(min=1e-9)
    return fitted


def grow(
    model: Equations, evidence: Transitions, *, degree: int = 2, most: int = 4, least_gain: float = 0.1
) -> Equations:
    """Equations with other terms: one at a time the monomial up to ``degree`` is added that explains most of what is left, all
    coefficients are identified anew, and terms that do nothing any more are dropped.

    Stops after ``most`` terms, or where a term lowers the error by less than ``least_gain`` of it, or by no more than the best of
    as many useless terms would (extended BIC; Chen and Chen, Biometrika 2008, over the transitions that coefficients leave free).
    """
    width = model.exponents.shape[1]
    merged = on_library(model, torch.unique(torch.cat([model.exponents, monomials(width, degree)]), dim=0))
    current = _tried(merged, evidence, merged.coefficients != 0)
    acting = [model.angle[2]] if hasattr(model, "angle") else range(merged.coefficients.shape[0])
    allowed = torch.zeros_like(merged.coefficients, dtype=torch.bool)
    allowed[list(acting)] = True
    for _ in range(most):
        place = _most_telling(current, evidence, allowed)
        if place is None:
            break
        support = current.coefficients != 0
        support[place] = True
        grown = _tried(current, evidence, support)
        errors = [max(error_of(m, evidence), 1e-9) for m in (current, grown)]
        free = max(1, len(evidence) - 1 - int((grown.coefficients != 0).sum(1).max()))
        chance = (math.log(len(evidence)) + 2 * math.log(int(allowed.sum()))) / (2 * free)
        if math.log(errors[0] / errors[1]) < max(chance, -math.log(1 - least_gain)):
            break
        current = grown
    return _pruned(current, evidence)


def repair(model: Program, evidence: Transitions) -> Program:
    """The program with new rules for the actions whose rule the evidence contradicts; the other rules stay, word for word.

    An action that the evidence shows only refused keeps its rule: why it was refused cannot be seen from refusals alone.
    """
    wrong = {
        int(action)
        for before, action, after in zip(evidence.before, evidence.actions.tolist(), evidence.after, strict=True)
        if model.step(before, int(action)).belief != after
    }
    fresh = fit_program(evidence)
    rules = {**model.rules, **{action: rule for action, rule in fresh.rules.items() if action in wrong}}
    return Program(dict(sorted(rules.items())), model.width, model.columns, model.actions)


def regression(model: Equations, evidence: Transitions) -> tuple[Any, Any, Any]:
    """Terms (N, terms) and slopes (N, D) of every transition, and a typical size of each term.

    A motion's slopes are those at the state before, exactly; other equations' are taken at the middle of the step, right to
    second order. Speeds at their limit say nothing.
    """
    before, after = evidence.before.double(), evidence.after.double()
    at = before if isinstance(model, Motion) else (before + after) / 2
    inputs = torch.cat([at, evidence.actions.double()], 1)
    terms = (inputs.unsqueeze(1) ** model.exponents).prod(-1).numpy()
    slopes = ((after - before) / model.dt).numpy()
    scale = inputs.pow(2).mean(0).sqrt().clamp(min=1e-3)
    sizes = (scale.unsqueeze(0) ** model.exponents).prod(-1).numpy()
    if isinstance(model, Motion):
        inside = (after[:, model.angle[2]].abs() < model.top_speed - 1e-6).numpy()
        if inside.any():
            return terms[inside], slopes[inside], sizes
    return terms, slopes, sizes


def error_of(model: Any, evidence: Transitions) -> float:
    """Root mean square of the one-step residual, in units of the spread of the changes."""
    change = evidence.after - evidence.before
    scale = change.pow(2).mean(0).sqrt().clamp(min=1e-6)
    off = (model.step(evidence.before, evidence.actions).belief - evidence.after) / scale
    return float(off.nan_to_num(nan=1e3).double().pow(2).mean().sqrt())


def _with(model: Equations, free: Tensor, values: Any) -> Equations:
    found = copy.copy(model)
    coefficients = torch.where(free, torch.zeros_like(model.coefficients), model.coefficients).double()
    coefficients[free] = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    return rebuilt(found, model.exponents, coefficients)


def rebuilt(model: Equations, exponents: Tensor, coefficients: Tensor) -> Equations:
    """The same kind of equations with other terms; the base's constructor sorts out which of them act."""
    Equations.__init__(model, exponents, coefficients, model.dt, model.columns, model.deviation)
    return model


def on_library(model: Equations, exponents: Tensor) -> Equations:
    """The same equations with coefficients, most of them 0, for all ``exponents`` (terms, D + A)."""
    coefficients = torch.zeros(model.coefficients.shape[0], len(exponents), dtype=torch.float64)
    rows = exponents.tolist()
    for column, powers in enumerate(model.exponents.tolist()):
        coefficients[:, rows.index(powers)] = model.coefficients[:, column].double()
    return rebuilt(copy.copy(model), exponents, coefficients)


def _tried(model: Equations, evidence: Transitions, support: Tensor) -> Equations:
    if int(support.sum()) == 0 or len(evidence) * evidence.before.shape[1] < int(support.sum()):
        return model
    return identify(model, evidence, support=support)


def _most_telling(model: Equations, evidence: Transitions, allowed: Tensor) -> tuple[int, int] | None:
    """Row and term that lower a row's squared residual by the largest factor, all coefficients of the row fitted anew (orthogonal
    least squares): the term most correlated with what is left over is often another one."""
    terms, slopes, _ = regression(model, evidence)
    best: tuple[float, tuple[int, int] | None] = (1e-9, None)
    for row in range(slopes.shape[1]):
        present = np.flatnonzero(model.coefficients[row].numpy())
        left = _left(terms[:, present], slopes[:, row])
        for term in np.flatnonzero((allowed[row] & (model.coefficients[row] == 0)).numpy()):
            if len(present) + 1 < len(slopes):
                gain = left - _left(terms[:, [*present, term]], slopes[:, row])
                best = max(best, (gain, (row, int(term))), key=lambda pair: pair[0])
    return best[1]


def _left(terms: Any, slopes: Any) -> float:
    """Log of the mean squared residual of a least squares fit."""
    fitted = terms @ np.linalg.lstsq(terms, slopes, rcond=None)[0] if terms.shape[1] else 0.0
    return math.log(float(((slopes - fitted) ** 2).mean()) + 1e-18)


def _pruned(model: Equations, evidence: Transitions) -> Equations:
    for place in (model.coefficients != 0).nonzero().tolist():
        support = model.coefficients != 0
        support[tuple(place)] = False
        if int(support.sum()) == 0:
            break
        coefficients = torch.where(support, model.coefficients, torch.zeros_like(model.coefficients))
        without = _tried(rebuilt(copy.copy(model), model.exponents, coefficients), evidence, support)
        if error_of(without, evidence) <= (1 + SLIGHT) * error_of(model, evidence) + 1e-7:
            model = without
    return model
