"""How far a model can be trusted ahead: its error by horizon against the real engine, and what laws it breaks on the way.

E(h) = mean |z^_h - z_h| / RMS spread of z, over segments of real episodes whose actions the model replays. For worlds with
noise the oracle's own E(h) is the floor, and what counts is the part above it. H* is the last h up to which every E is at
most the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from telltale.world.laws.law import Enforcement, Law, any_hard_violation, enforcement, violations
from telltale.world.protocol import adapt
from telltale.world.rollouts import rollout
from telltale.world.worlds.base import Episode, World


@dataclass(frozen=True)
class Segment:
    """A stretch of a real episode: the belief it starts from, the actions taken, and the beliefs that followed."""

    episode: Episode
    start: int
    belief: Any
    actions: list[Any]
    after: list[Any]


def segments(world: World, episodes: Sequence[Episode], length: int, count: int, *, seed: int = 0) -> list[Segment]:
    """``count`` segments of ``length`` steps, drawn over the episodes; shorter ones where an episode is shorter."""
    generator = torch.Generator().manual_seed(seed)
    usable = [episode for episode in episodes if len(episode) >= 1]
    found = []
    for i in range(count if usable else 0):
        episode = usable[i % len(usable)]
        steps = min(length, len(episode))
        start = int(torch.randint(len(episode) - steps + 1, (), generator=generator))
        beliefs = [world.belief(o) for o in episode.observations[start : start + steps + 1]]
        found.append(Segment(episode, start, beliefs[0], episode.actions[start : start + steps], beliefs[1:]))
    return found


@dataclass(frozen=True)
class Coherence:
    """``errors[h - 1]`` is E(h), ``floor`` the oracle's (empty without one); the rates are shares of (particle, step).

    ``raw``: predictions that break a hard law before enforcement; ``enforced``: what still breaks one after it;
    ``free``: the same trajectories with no enforcement at all. ``by_law``: the raw rate of each law.
    """

    errors: list[float]
    floor: list[float]
    raw: float
    enforced: float
    free: float
    by_law: dict[str, float] = field(default_factory=dict)

    def excess(self) -> list[float]:
        """Error above the floor."""
        if not self.floor:
            return self.errors
        return [math.sqrt(max(0.0, e * e - f * f)) for e, f in zip(self.errors, self.floor, strict=True)]

    def reach(self, threshold: float, *, above_floor: bool) -> int:
        """H*: the last horizon up to which every error is at most ``threshold``."""
        for h, error in enumerate(self.excess() if above_floor else self.errors):
            if not error <= threshold:
                return h
        return len(self.errors)


def coherence(
    model: Any,
    world: World,
    episodes: Sequence[Episode],
    *,
    length: int,
    count: int = 64,
    laws: Sequence[Law] | None = None,
    mode: str | Enforcement = "project",
    oracle: Any | None = None,
    seed: int = 0,
) -> Coherence:
    """Measure on ``count`` segments of ``length`` steps. ``mode`` is how laws act inside the model's trajectories."""
    chosen = world.laws if laws is None else tuple(laws)
    parts = segments(world, episodes, length, count, seed=seed)
    truth = torch.stack([world.embed(b).reshape(-1) for part in parts for b in part.after])
    spread = float((truth - truth.mean(0)).pow(2).sum(-1).mean().sqrt()) or 1.0
    measure = _plain if world.plain else _numeric
    errors, raw, enforced, by_law = measure(model, world, parts, chosen, enforcement(mode), spread, seed)
    _, free, _, _ = measure(model, world, parts, chosen, enforcement("report"), spread, seed)
    floor = measure(oracle, world, parts, (), enforcement("report"), spread, seed)[0] if oracle is not None else []
    return Coherence(errors, floor, raw, enforced, free, by_law)


def objections(world: World, episodes: Sequence[Episode], laws: Sequence[Law]) -> dict[str, float]:
    """By law, the share of the engine's own transitions that break it: what a calibrated law never does."""
    counts, steps = dict.fromkeys((law.name for law in laws), 0), 0
    for episode in episodes:
        if not len(episode):
            continue
        states = [world.belief(o) for o in episode.observations]
        steps += len(episode)
        for law in laws:
            if world.plain:
                triples = zip(states, episode.actions, states[1:], strict=False)
                counts[law.name] += sum(not bool(law.holds(*triple)) for triple in triples)
            else:
                rows = torch.stack(states)
                held = law.holds(rows[:-1], world.batch_actions(episode.actions), rows[1:])
                counts[law.name] += int((~held).sum())
    return {name: count / max(1, steps) for name, count in counts.items()}


Measured = tuple[list[float], float, float, dict[str, float]]


def _numeric(
    model: Any, world: World, parts: list[Segment], laws: Sequence[Law], mode: Enforcement, spread: float, seed: int
) -> Measured:
    adapted = adapt(model)
    length = max(len(part.actions) for part in parts)
    sums, counts = torch.zeros(length), torch.zeros(length)
    raw: list[Tensor] = []
    left: list[Tensor] = []
    rates: dict[str, list[Tensor]] = {law.name: [] for law in laws}
    for steps in sorted({len(part.actions) for part in parts}):
        rows = [part for part in parts if len(part.actions) == steps]
        actions = torch.stack([world.batch_actions(part.actions) for part in rows])
        beliefs = torch.stack([part.belief for part in rows])
        noise = torch.Generator().manual_seed(seed)
        chosen: dict[str, Any] = {"reward": _nothing, "laws": laws, "generator": noise, "tolerate": True}
        made = rollout(adapted, adapted.infer(beliefs), actions, mode=mode, **chosen)
        real = torch.stack([torch.stack(part.after) for part in rows])
        distance = (made.observed[:, :, 1:] - real).norm(dim=-1) / spread
        # from the first step at which the model broke down, its error is infinite
        down = made.broke_down()[:, :, 1:]
        distance = distance.masked_fill(down, float("inf"))
        sums[:steps] += distance.mean(0).sum(0)
        counts[:steps] += len(rows)
        hard = [made.excess[law.name] > 0 for law in laws if law.hard]
        if hard:
            raw.append((torch.stack(hard).any(0) | down).flatten())
        for law in laws:
            rates[law.name].append((made.excess[law.name] > 0).flatten())
        before, after = made.observed[:, :, :-1], made.observed[:, :, 1:]
        broken = any_hard_violation(list(laws), before, actions.expand(made.beliefs.shape[0], *actions.shape), after)
        if broken is not None:
            left.append(broken.flatten())
    return (
        (sums / counts.clamp(min=1)).tolist(),
        float(torch.cat(raw).float().mean()) if raw else 0.0,
        float(torch.cat(left).float().mean()) if left else 0.0,
        {name: float(torch.cat(found).float().mean()) for name, found in rates.items() if found},
    )


def _plain(
    model: Any, world: World, parts: list[Segment], laws: Sequence[Law], mode: Enforcement, spread: float, seed: int
) -> Measured:
    """Plain states have no projection: an enforced law refuses the step, and the state stays."""
    adapted = adapt(model)
    length = max(len(part.actions) for part in parts)
    sums, counts = [0.0] * length, [0] * length
    broken_steps, steps, left = 0, 0, 0
    by_law = dict.fromkeys((law.name for law in laws), 0)
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        state = adapted.infer(part.belief)
        for h, (action, real) in enumerate(zip(part.actions, part.after, strict=True)):
            after = adapted.step(state, action, generator=generator).belief
            seen = adapted.observed(state), action, adapted.observed(after)
            found = {law.name: bool(violations([law], *seen)[law.name] > 0) for law in laws}
            hard = any(found[law.name] for law in laws if law.hard)
            for name, bad in found.items():
                by_law[name] += bad
            broken_steps, steps = broken_steps + hard, steps + 1
            if hard and mode.mode == "report":
                left += 1
            state = state if hard and mode.mode != "report" else after
            sums[h] += float((world.embed(adapted.observed(state)) - world.embed(real)).norm()) / spread
            counts[h] += 1
    return (
        [total / max(1, n) for total, n in zip(sums, counts, strict=True)],
        broken_steps / max(1, steps),
        left / max(1, steps),
        {name: count / max(1, steps) for name, count in by_law.items()},
    )


def _nothing(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    return torch.zeros(after.shape[:-1])
