"""Probes: actions chosen to tell hypotheses apart, lawful under the model that acts, within a budget of steps.

The expected information gain of an experiment is how much its outcome is expected to say about which hypothesis is true (Lindley,
1956). For plain states and deterministic hypotheses that is the entropy of the predicted outcomes; for numeric ones with noise
it is bounded by half the log of one plus the hypotheses' disagreement over the noise's variance, summed over columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, check_seed
from telltale.errors import ConfigError
from telltale.world.laws.law import Law
from telltale.world.protocol import Adapted, adapt
from telltale.world.worlds.base import Episode, World, run_episode


def information(predicted: Sequence[Any], *, noise: Any = 1.0) -> Any:
    """Expected information gain in nats. ``predicted``: one plain state per hypothesis (a float comes back), or one tensor
    (B, D) per hypothesis ((B,) comes back); ``noise``: standard deviation of a measurement, a number or (D,)."""
    if not isinstance(predicted[0], Tensor):
        counts = Counter(predicted).values()
        return -sum(n / len(predicted) * math.log(n / len(predicted)) for n in counts)
    spread = torch.stack(list(predicted)).double().var(0, unbiased=False)
    return 0.5 * torch.log1p(spread / torch.as_tensor(noise, dtype=torch.float64) ** 2).sum(-1)


class Prober:
    """A policy that probes. ``hypotheses``: models that explain what is known so far, two or more.

    At each state ``candidates`` random action sequences of ``depth`` steps are imagined under every hypothesis, and the
    first action of the one with most information is taken. Sequences whose first step breaks a hard law under the first
    hypothesis (the model that acts) are left out, unless all do. Visited states are worth less: information that was had is
    not had again.
    """

    def __init__(
        self,
        hypotheses: Sequence[Any],
        world: World,
        *,
        noise: Any = 1e-3,
        depth: int = 3,
        candidates: int = 64,
        laws: Sequence[Law] | None = None,
        seed: int = 0,
    ) -> None:
        if len(hypotheses) < 2:
            raise ConfigError(f"{len(hypotheses)} hypotheses have nothing to disagree about; give at least two.")
        self.hypotheses = [adapt(h) for h in hypotheses]
        self.world, self.noise = world, noise
        self.depth, self.candidates = (
            check_integer("depth", depth, low=1),
            check_integer("candidates", candidates, low=2),
        )
        self.laws = [law for law in (world.laws if laws is None else laws) if law.hard]
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        # the adapter's checks cost more than a rule of a program; models that decode keep it
        self._steps = [h.step if h.decodes else getattr(h.model, "step", h.step) for h in self.hypotheses]
        self.shielded = 0
        self._had: Counter[Any] = Counter()

    def __call__(self, observation: Any) -> Any:
        """The action to take now."""
        return self._plain(observation) if self.world.plain else self._numeric(observation)

    def _numeric(self, observation: Any) -> Any:
        state = self.world.belief(observation)
        drawn = [[self.world.sample_action(self.generator) for _ in range(self.depth)] for _ in range(self.candidates)]
        if not self.world.discrete:
            # the corners of the action space tell most about linear effects; uniform draws rarely come near them
            space = self.world.action_space
            corners = [space.low.reshape(-1), space.high.reshape(-1)]
            drawn[: len(corners)] = [[corner] * self.depth for corner in corners]
        actions = torch.stack([self.world.batch_actions(row) for row in drawn])
        start = state.expand(self.candidates, -1)
        beliefs = [start for _ in self.hypotheses]
        gain = torch.zeros(self.candidates, dtype=torch.float64)
        for t in range(self.depth):
            beliefs = [h.step(b, actions[:, t]).belief for h, b in zip(self.hypotheses, beliefs, strict=True)]
            gain = gain + information(beliefs, noise=self.noise).nan_to_num(nan=0.0, posinf=0.0) * 0.9**t
            if t == 0:
                allowed = self._lawful(start, actions[:, 0], beliefs[0])
        if bool(allowed.any()):
            self.shielded += int((~allowed).sum())
            gain = gain.masked_fill(~allowed, -1.0)
        return drawn[int(gain.argmax())][0]

    def _lawful(self, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        allowed = torch.ones(len(before), dtype=torch.bool)
        for law in self.laws:
            allowed &= law.holds(before, action, after).bool()
        return allowed

    def _plain(self, state: Any) -> int:
        """A search over the first hypothesis' states for the nearest (state, action) that tells most; random where none does."""
        frontier: list[tuple[Any, int | None]] = [(state, None)]
        seen = {state}
        best: tuple[float, int | None] = (0.0, None)
        for depth in range(self.depth + 1):
            following: list[tuple[Any, int | None]] = []
            for place, first in frontier:
                for action in range(self.world.action_width):
                    after = [h(place, action).belief for h in self._steps]
                    worth = information(after) * 0.8**depth / (1 + 4 * self._had[place, action])
                    taken = action if first is None else first
                    lawful = first is not None or self._allowed(self.hypotheses[0], place, action, after[0])
                    if not lawful:
                        self.shielded += 1
                        continue
                    if worth > best[0] + 1e-12:
                        best = (worth, taken)
                    for nxt in dict.fromkeys(after):
                        if nxt not in seen and len(seen) < 60:
                            seen.add(nxt)
                            following.append((nxt, taken))
            frontier = following
        action = best[1] if best[1] is not None else int(self.world.sample_action(self.generator))
        self._had[state, action] += 1
        return action

    def _allowed(self, model: Adapted, before: Any, action: int, after: Any) -> bool:
        return all(bool(law.holds(before, action, after)) for law in self.laws)


def probe(world: World, prober: Any, *, budget: int, seed: int = 0, length: int | None = None) -> list[Episode]:
    """Exactly ``budget`` steps of ``prober(observation) -> action`` on an engine of its own, in episodes of at most ``length``."""
    check_integer("budget", budget, low=1)
    found: list[Episode] = []
    engine, done = world.spawn(), 0
    try:
        while done < budget:
            limit = min(length or engine.max_steps, engine.max_steps, budget - done)
            found.append(run_episode(engine, seed + len(found), prober, source="probe", max_steps=limit))
            done += len(found[-1])
    finally:
        engine.close()
    return found
