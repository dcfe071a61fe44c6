"""Hypotheses that explain what is known, drawn about as often as they are credible: what probes are to tell apart.

Equations: the coefficients of each row are a Bayesian linear regression of the slopes on monomials, averaged over which
monomials act at all (Raftery, Madigan and Hoeting, JASA 1997): the present terms, with up to two added or dropped. Programs: rules
drawn from the version space (Mitchell, 1982), which is every conjunction of comparisons that the done examples meet and the refused
ones break, from the most general to nearly the most specific. Old coefficients and old rules are hypotheses among the others.
"""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import torch

from telltale.world.evolve.structure import on_library, rebuilt, regression, repair
from telltale.world.models.motion import Motion, monomials
from telltale.world.models.program import (
    Atom,
    Program,
    Rule,
    State,
    applied,
    atoms_met,
    consistent_effects,
    meets,
    resources,
)
from telltale.world.models.sindy import Equations
from telltale.world.transitions import Transitions

NOISE = 0.02
"""What a measurement's noise is taken for before there is evidence of it, as a share of the slopes."""
TRIES = 8
"""Draws of a rule that was refused wherever it was tried, with another value of one field, before other comparisons are drawn."""
WIDE = 3.0
"""Prior standard deviation of what one term contributes, in root mean square slopes."""


def equations(model: Equations, evidence: Transitions, *, count: int, seed: int) -> list[Equations]:
    """``count`` draws from the posterior over terms and coefficients, after the most credible terms with their means."""
    rng = np.random.default_rng(seed)
    width = model.exponents.shape[1]
    merged = on_library(model, torch.unique(torch.cat([model.exponents, monomials(width, 2)]), dim=0))
    exponents = merged.exponents
    terms, slopes, sizes = regression(merged, evidence)
    tables = [merged.coefficients.double().numpy().copy() for _ in range(count + 1)]
    for row in [model.angle[2]] if isinstance(model, Motion) else range(merged.coefficients.shape[0]):
        posterior = _Posterior(terms, slopes[:, row], sizes, np.flatnonzero(tables[0][row]))
        for number, table in enumerate(tables):
            table[row] = posterior.mean() if number == 0 else posterior.draw(rng)
    return [rebuilt(copy.copy(merged), exponents, torch.as_tensor(table)) for table in tables]


class _Posterior:
    """One row's regression, for every set of terms within two of ``present``: normal-inverse-gamma, in closed form."""

    def __init__(self, terms: Any, slopes: Any, sizes: Any, present: Any) -> None:
        self.count, self.width = len(slopes), terms.shape[1]
        size = max(float(np.sqrt((slopes**2).mean())), 1e-9)
        self.shape, self.rate = 1.5, 1.5 * (NOISE * size) ** 2
        self.precision = (NOISE * sizes / WIDE) ** 2
        self.gram, self.moments, self.power = terms.T @ terms, terms.T @ slopes, float(slopes @ slopes)
        self.sets = self._supports(present)
        found = [self._fit(np.array(s, dtype=int)) for s in self.sets]
        credits = np.array([evidence for evidence, *_ in found])
        away = np.array([len(set(s) ^ set(present.tolist())) for s in self.sets])
        credits -= away * np.log(self.width)
        self.share = np.exp(credits - credits.max())
        self.share /= self.share.sum()
        self.fits = found

    def _supports(self, present: Any) -> list[tuple[int, ...]]:
        flips = [f for n in range(3) for f in itertools.combinations(range(self.width), n)]
        found = [tuple(sorted(set(present.tolist()) ^ set(f))) for f in flips]
        return [s for s in found if s]

    def _fit(self, support: Any) -> tuple[float, Any, Any, float]:
        """Log marginal likelihood up to a constant, mean, Cholesky factor of the precision, rate of the noise's variance."""
        prior = self.precision[support]
        factor = np.linalg.cholesky(self.gram[np.ix_(support, support)] + np.diag(prior))
        half = np.linalg.solve(factor, self.moments[support])
        mean = np.linalg.solve(factor.T, half)
        rate = self.rate + 0.5 * max(0.0, self.power - float(half @ half))
        evidence = 0.5 * float(np.log(prior).sum()) - float(np.log(np.diag(factor)).sum())
        return evidence - (self.shape + self.count / 2) * np.log(rate), mean, factor, rate

    def mean(self) -> Any:
        """Coefficients (terms,) of the most credible set."""
        return self._spread(int(self.share.argmax()))

    def draw(self, rng: Any) -> Any:
        """Coefficients (terms,) of a set, a noise and values drawn from the posterior."""
        chosen = int(rng.choice(len(self.share), p=self.share))
        _, mean, factor, rate = self.fits[chosen]
        noise = np.sqrt(rate / rng.gamma(self.shape + self.count / 2))
        return self._spread(chosen, noise * np.linalg.solve(factor.T, rng.standard_normal(len(mean))))

    def _spread(self, chosen: int, off: Any = 0.0) -> Any:
        found = np.zeros(self.width)
        found[list(self.sets[chosen])] = self.fits[chosen][1] + off
        return found


def programs(model: Program, evidence: Transitions, *, count: int, seed: int) -> list[Program]:
    """``count`` programs whose rules the evidence does not contradict where any rule can help it, after the repaired one."""
    rng = random.Random(seed)
    best = repair(model, evidence)
    examples: dict[int, list[tuple[State, State]]] = {}
    for before, action, after in zip(evidence.before, evidence.actions.tolist(), evidence.after, strict=True):
        examples.setdefault(int(action), []).append((before, after))
    seen = [sorted({s[i] for s in (*evidence.before, *evidence.after)}) for i in range(model.width)]
    drawn = {
        action: _RuleDraw(examples.get(action, []), model.rules.get(action), seen)
        for action in sorted({*model.rules, *examples})
    }
    found = [best]
    for _ in range(count):
        rules = {action: draw(rng) for action, draw in drawn.items()}
        kept = {action: rule for action, rule in rules.items() if rule is not None}
        found.append(Program(kept, model.width, model.columns, model.actions))
    return found


class _RuleDraw:
    """Draws rules of one action: ``pairs`` are its examples, ``old`` its rule before, ``seen`` each field's values anywhere."""

    def __init__(self, pairs: list[tuple[State, State]], old: Rule | None, seen: list[list[int]]) -> None:
        self.old, self.seen = old, seen
        self.done = list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))
        self.refused = list(dict.fromkeys(before for before, after in pairs if before == after))
        self.old_holds = old is not None and all(_outcome(old, before) == after for before, after in pairs)
        self.effects = consistent_effects(self.done, len(seen)) if self.done else {}
        self.atoms = atoms_met([before for before, _ in self.done], len(seen)) if self.done else self._values()
        self.excluded = [sum(1 << n for n, s in enumerate(self.refused) if not meets(s, a)) for a in self.atoms]

    def __call__(self, rng: random.Random) -> Rule | None:
        """A rule, or None where the action does nothing."""
        if self.old_holds and rng.random() < 0.5:
            return self.old
        if self.done:
            effects = {i: self._effect(i, choices, rng) for i, choices in self.effects.items()}
            known = self.old.conditions if self.old is not None else []
            kept = [*resources(effects), *(a for a in known if rng.random() < 0.7)]
            kept = [a for a in kept if all(meets(before, a) for before, _ in self.done)]
            return Rule(effects, self._covered(effects, kept, rng))
        if self.old is None or rng.random() < 0.1:
            return None
        for _ in range(TRIES):
            conditions = self._revalued(self.old.conditions, rng)
            if not any(all(meets(s, a) for a in conditions) for s in self.refused):
                return Rule(dict(self.old.effects), conditions)
        return None if rng.random() < 0.8 else Rule(dict(self.old.effects), self._covered(self.old.effects, [], rng))

    def _revalued(self, conditions: list[Atom], rng: random.Random) -> list[Atom]:
        """The conditions with another value of one field."""
        place = rng.randrange(len(conditions) + 1)
        if place == len(conditions) or isinstance(conditions[place][2], tuple):
            return conditions
        i, operator, _ = conditions[place]
        value = rng.choice([*self.seen[i], self.seen[i][-1] + 1])
        return [*conditions[:place], (i, operator, value), *conditions[place + 1 :]]

    def _effect(self, i: int, choices: list[tuple[str, int]], rng: random.Random) -> tuple[str, int]:
        """The old template where it explains the examples, mostly; else one that does, the simple before the others."""
        old = None if self.old is None else self.old.effects.get(i)
        if old in choices and rng.random() < 0.7:
            return old
        place = 0
        while place + 1 < len(choices) and rng.random() < 0.4:
            place += 1
        return choices[place]

    def _covered(self, effects: dict[int, tuple[str, int]], kept: list[Atom], rng: random.Random) -> list[Atom]:
        """Conditions that every refused state breaks, as far as comparisons can: those ``kept``, then random ones, the telling
        more often, and now and then one that no example asks for."""
        left = sum(
            1 << n for n, s in enumerate(self.refused) if applied(effects, s) != s and all(meets(s, a) for a in kept)
        )
        chosen = list(kept)
        while left:
            counts = [(mask & left).bit_count() ** 4 for mask in self.excluded]
            if not any(counts):
                break
            pick = rng.choices(range(len(self.atoms)), counts)[0]
            chosen.append(self.atoms[pick])
            left &= ~self.excluded[pick]
        while self.atoms and rng.random() < 0.15:
            weights = [1 if isinstance(atom[2], tuple) else 4 for atom in self.atoms]
            chosen.append(rng.choices(self.atoms, weights)[0])
        return chosen

    def _values(self) -> list[Atom]:
        """Comparisons of one field with a value that occurred, or the next one."""
        found: list[Atom] = []
        for i, values in enumerate(self.seen):
            for value in (*values, values[-1] + 1):
                found += [(i, "==", value), (i, ">=", value), (i, "<=", value)]
        return found


def _outcome(rule: Rule, state: State) -> State:
    return applied(rule.effects, state) if all(meets(state, a) for a in rule.conditions) else state
