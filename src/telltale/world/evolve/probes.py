"""Probes: actions chosen to tell hypotheses apart, lawful under the model that acts, within a budget of steps.

An outcome is worth what it is expected to say about outcomes elsewhere (expected predictive information gain; Bickford Smith et
al., arXiv 2304.08151): its mutual information with predictions at target states, on average. Information about the hypotheses
themselves (Lindley, 1956; BALD, arXiv 1112.5745) counts a tenth: by itself it chases odd hypotheses that rarely matter.

For plain states the hypotheses are few and deterministic, and the information is that of a table. Numeric ones are draws from a
posterior, so that a weighted sum of them is one, too: predictions are jointly Gaussian in those weights, and the variance shrinks
with every probe. Where all hypotheses may be wrong, a Gaussian process stands for what none of them holds, as large as the best
one's residual: it is most uncertain where nothing was measured yet. Hypotheses are drawn anew after every batch of probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.config import check_integer, check_range, check_seed
from telltale.errors import ConfigError
from telltale.world.evolve.monitor import residuals
from telltale.world.laws.law import Law
from telltale.world.models.program import Program
from telltale.world.protocol import Adapted, adapt
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World, bounds

STARTS = 3
"""States in which episodes began that going on is compared with."""
KNOWN = 300
"""Transitions that novelty is measured from, the last ones."""
TARGETS = 32
"""States for which an outcome is to say what happens there."""
AHEAD = 40
"""Steps of an imagined episode."""
HERE = 0.1
"""Weight of an outcome for its own sake."""
PLACES = 100
"""Plain states that one search looks at."""


def entropy(outcomes: Sequence[Any], weights: Sequence[float]) -> float:
    """Entropy in nats of plain outcomes, one a hypothesis, each as likely as its weight; 0 where all weights are."""
    total = sum(weights)
    shares: dict[Any, float] = {}
    for outcome, weight in zip(outcomes, weights, strict=True):
        shares[outcome] = shares.get(outcome, 0.0) + weight
    return -sum(s / total * math.log(s / total) for s in shares.values() if s > 0) if total > 0 else 0.0


def mutual_information(one: Any, others: Any, weights: Any) -> float:
    """Mutual information in nats between the binary ``one`` (K,) and each row of ``others`` (T, K), mean over rows; case k has
    probability ``weights`` (K,)."""
    if not len(others):
        return 0.0
    p, q, both = float(weights @ one), others @ weights, others @ (weights * one)
    joint = np.stack([both, p - both, q - both, 1 - p - q + both]).clip(0, 1)
    apart = np.stack([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)])
    terms = joint * np.log(np.maximum(joint, 1e-12) / np.maximum(apart, 1e-12))
    return float(terms.sum(0).mean())


class Prober:
    """A policy that probes. ``hypotheses``: models that explain what is known so far, two or more, the first of them the best.

    It looks ``depth`` steps ahead: among random sequences of actions under the first hypothesis, or in a search over plain
    states, for the first action of what is expected to teach most. A ``share`` of the actions is chosen so, the others are random.
    Actions that break a hard law under the first hypothesis are left out, unless all do. ``evidence`` gives the noise of
    measurements and what is new. ``starts``: states that episodes begin in; where those are expected to teach more than going on,
    the answer is None (only after the first step of an episode; :meth:`begin` begins one).
    """

    def __init__(
        self,
        hypotheses: Sequence[Any],
        world: World,
        *,
        evidence: Transitions | None = None,
        starts: Sequence[Any] = (),
        share: float = 1.0,
        depth: int = 8,
        candidates: int = 48,
        laws: Sequence[Law] | None = None,
        seed: int = 0,
    ) -> None:
        if len(hypotheses) < 2:
            raise ConfigError(f"{len(hypotheses)} hypotheses have nothing to disagree about; give at least two.")
        self.hypotheses = [adapt(h) for h in hypotheses]
        self.world, self.depth = world, check_integer("depth", depth, low=1)
        self.candidates = check_integer("candidates", candidates, low=2)
        self.laws = [law for law in (world.laws if laws is None else laws) if law.hard]
        self.generator = torch.Generator().manual_seed(check_seed(seed))
        self.shielded = 0
        self.starts, self.share, self.directed = (
            list(starts)[-STARTS:],
            check_range("share", share, low=0.0, high=1.0),
            0,
        )
        self._ask: Any = _PlainSearch(self, evidence) if world.plain else _Shooting(self, evidence)
        self.begin()

    def begin(self) -> None:
        """An episode begins."""
        self._last: tuple[Any, Any] | None = None

    def __call__(self, observation: Any) -> Any:
        """The action to take now; None to begin a new episode instead."""
        state = self.world.belief(observation)
        if self._last is not None:
            self._ask.learn(*self._last, state)
        if float(torch.rand((), generator=self.generator)) < self.share:
            action = self._ask.action(state, may_stop=self._last is not None)
            self.directed += action is not None
        else:
            action = self.chance(state)
        self._last = None if action is None else (state, action)
        return action

    def chance(self, state: Any) -> Any:
        """A random action, drawn again where it breaks a law under the first hypothesis, up to twenty times."""
        for _ in range(20):
            action = self.world.sample_action(self.generator)
            if self._may(state, action):
                break
            self.shielded += 1
        return action

    def _may(self, state: Any, action: Any) -> bool:
        if not self.laws:
            return True
        if self.world.plain:
            return bool(self.lawful(state, action, observed_next(self.hypotheses[0], state, action)))
        row, taken = state.unsqueeze(0), self.world.batch_actions([action])
        return bool(self.lawful(row, taken, observed_next(self.hypotheses[0], row, taken))[0])

    def lawful(self, before: Any, action: Any, after: Any) -> Any:
        """Which of the imagined steps break no hard law: (B,), or a bool for plain states."""
        if self.world.plain:
            return all(bool(law.holds(before, action, after)) for law in self.laws)
        allowed = torch.ones(len(before), dtype=torch.bool)
        for law in self.laws:
            allowed &= law.holds(before, action, after).bool()
        return allowed


class _Shooting:
    """Random shooting: sequences of actions are imagined under the first hypothesis, and every state on the way is worth what
    measuring there is expected to say about the weights of the hypotheses, and about what none of them holds."""

    def __init__(self, prober: Prober, evidence: Transitions | None) -> None:
        self.prober, self.world = prober, prober.world
        self.precision = len(prober.hypotheses) * torch.eye(len(prober.hypotheses), dtype=torch.float64)
        self.noise, self.novel, self.scale = 1e-3, 0.0, torch.ones(1)
        self.points: Tensor | None = None
        self.targets: Tensor | None = None
        if evidence is not None:
            change = (evidence.after - evidence.before).double().pow(2).mean(0)
            off = residuals(prober.hypotheses[0], evidence).double().pow(2).mean(0)
            self.noise = (off + 1e-4 * change).sqrt().clamp(min=1e-9)
            self.novel = float((off / self.noise**2).mean())
            points = self._inputs(evidence.before, evidence.actions)
            self.scale = points.pow(2).mean(0).sqrt().clamp(min=1e-3)
            self.points = (points / self.scale)[-KNOWN:]
            self._aim(evidence)
        self._refactor()

    def learn(self, before: Tensor, action: Any, after: Tensor) -> None:
        """A measurement was made there, whatever it said: it is not worth as much again."""
        row = self.world.batch_actions([action])
        spread = self._spread(before.unsqueeze(0), row)[0]
        self.precision = self.precision + spread.T @ spread
        if self.points is not None:
            self.points = torch.cat([self.points, self._inputs(before.unsqueeze(0), row) / self.scale])[-KNOWN:]
        self._refactor()

    def action(self, state: Tensor, *, may_stop: bool) -> Any:
        """The first action of the best sequence from here; None where one of the starts is expected to have a better one."""
        count, depth = self.prober.candidates, self.prober.depth
        starts = self.prober.starts if may_stop else []
        actions = self._sequences(count, depth)
        beliefs = torch.stack([state, *starts]).repeat_interleave(count, 0)
        actions_of = actions.repeat(1 + len(starts), *[1] * (actions.ndim - 1))
        gain = torch.zeros(len(beliefs), dtype=torch.float64)
        first = self.prober.hypotheses[0]
        for t in range(depth):
            gain += 0.9**t * self._gain(beliefs, actions_of[:, t])
            after = observed_next(first, beliefs, actions_of[:, t])
            if t == 0:
                allowed = self.prober.lawful(beliefs[:count], actions[:, 0], after[:count])
            beliefs = after
        here = gain[:count]
        if bool(allowed.any()):
            self.prober.shielded += int((~allowed).sum())
            here = here.masked_fill(~allowed, -1.0)
        if starts and float(gain[count:].reshape(len(starts), count).max(1).values.mean()) > float(here.max()):
            return None
        chosen = actions[int(here.argmax()), 0]
        return int(chosen) if self.world.discrete else chosen.double().numpy().astype(self.world.action_space.dtype)

    def _sequences(self, count: int, depth: int) -> Tensor:
        """(count, depth) actions, or (count, depth, A): half of the sequences hold one action, and half of the actions lie in a
        corner of the space, which tells most about linear effects and is rarely drawn."""
        draw = self.prober.generator
        if self.world.discrete:
            found = torch.randint(self.world.action_width, (count, depth), generator=draw)
        else:
            low, high = (torch.as_tensor(b, dtype=torch.float32).reshape(-1) for b in bounds(self.world.action_space))
            share = torch.rand(count, depth, len(low), generator=draw)
            corner = torch.rand(count, depth, 1, generator=draw) < 0.5
            found = low + (high - low) * torch.where(corner, share.round(), share)
        held = torch.arange(count) % 2 == 0
        found[held] = found[held][:, :1].expand_as(found[held])
        return found

    def _gain(self, states: Tensor, actions: Tensor) -> Tensor:
        """Expected information in nats, (B,): what a measurement there says about measurements at the targets, on average."""
        spread, half = self._spread(states, actions), self._half(states, actions)
        known = torch.linalg.solve(self.precision, spread.transpose(1, 2))
        own = 1 + (spread.transpose(1, 2) * known).sum(1).clamp(min=0) + self._novelty(half).unsqueeze(1)
        if self.targets is None:
            return 0.5 * own.log().sum(1)
        shared = torch.einsum("bkd,mdk->bmd", known, self.targets) + self._shared(states, actions, half).unsqueeze(2)
        correlation = (shared.pow(2) / (own.unsqueeze(1) * self.target_variance)).clamp(max=1 - 1e-9)
        return -0.5 * torch.log1p(-correlation).mean(1).sum(1) + HERE * 0.5 * own.log().sum(1)

    def _spread(self, states: Tensor, actions: Tensor) -> Tensor:
        """(B, D, K): what each hypothesis predicts, off their mean, in units of the noise."""
        ahead = torch.stack([observed_next(h, states, actions) for h in self.prober.hypotheses], -1).double()
        off = (ahead - ahead.mean(-1, keepdim=True)) / torch.as_tensor(self.noise).double().reshape(-1, 1)
        return off.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4)

    def _half(self, states: Tensor, actions: Tensor) -> Tensor | None:
        """(N, B): the kernel to where was measured, whitened."""
        if self.points is None or self.novel == 0.0:
            return None
        near = _kernel(self._inputs(states, actions) / self.scale, self.points)
        return torch.linalg.solve_triangular(self.factor, near.T, upper=False)

    def _novelty(self, half: Tensor | None) -> Tensor:
        """(B,): variance over the noise's of what no hypothesis holds, given where was measured."""
        return (
            torch.zeros(1, dtype=torch.float64) if half is None else self.novel * (1 - half.pow(2).sum(0)).clamp(min=0)
        )

    def _shared(self, states: Tensor, actions: Tensor, half: Tensor | None) -> Tensor:
        """(B, M): its covariance with that at the targets."""
        if half is None or self.target_half is None:
            return torch.zeros(1, 1, dtype=torch.float64)
        near = _kernel(self._inputs(states, actions) / self.scale, self.target_inputs)
        return self.novel * (near - half.T @ self.target_half)

    def _aim(self, evidence: Transitions) -> None:
        """Targets: states that episodes may reach, imagined under the first hypothesis, each with the action taken there."""
        starts = self.prober.starts or [evidence.before[0]]
        actions = self._sequences(4 * len(starts), AHEAD)
        state = torch.stack(list(starts)).repeat_interleave(4, 0)
        states = []
        for t in range(AHEAD):
            states.append(state)
            state = observed_next(self.prober.hypotheses[0], state, actions[:, t])
        rows, taken = torch.cat(states), actions.transpose(0, 1).flatten(0, 1)
        chosen = torch.randperm(len(rows), generator=self.prober.generator)[:TARGETS]
        self.target_states, self.target_actions = rows[chosen], taken[chosen]
        self.target_inputs = self._inputs(self.target_states, self.target_actions) / self.scale
        self.targets = self._spread(self.target_states, self.target_actions)

    def _refactor(self) -> None:
        """What follows from where was measured so far."""
        if self.points is not None and self.novel > 0.0:
            noise = torch.eye(len(self.points), dtype=torch.float64) / self.novel
            self.factor = torch.linalg.cholesky(_kernel(self.points, self.points) + noise)
        if self.targets is not None:
            self.target_half = self._half(self.target_states, self.target_actions)
            known = torch.linalg.solve(self.precision, self.targets.transpose(1, 2))
            self.target_variance = (
                1 + (self.targets.transpose(1, 2) * known).sum(1) + self._novelty(self.target_half).unsqueeze(1)
            )

    def _inputs(self, states: Tensor, actions: Tensor) -> Tensor:
        if self.world.discrete:
            actions = torch.nn.functional.one_hot(actions, self.world.action_width)
        return torch.cat([states.double(), actions.double().reshape(len(states), -1)], 1)


def _kernel(one: Tensor, two: Tensor) -> Tensor:
    return torch.exp(-0.5 * torch.cdist(one, two) ** 2)


class _PlainSearch:
    """A breadth-first search over the states that any hypothesis predicts, for the nearest (state, action) whose outcome they
    disagree about. A hypothesis that was wrong about an action has no say about that action any more."""

    def __init__(self, prober: Prober, evidence: Transitions | None) -> None:
        self.prober, self.width = prober, prober.world.action_width
        self.steps = [_stepper(h) for h in prober.hypotheses]
        self.weights = [np.ones(len(self.steps)) for _ in range(self.width)]
        before = [] if evidence is None else list(dict.fromkeys(evidence.before))
        self.targets = before[:: max(1, len(before) // TARGETS)]
        self.apart: dict[int, Any] = {}
        self.worths: list[dict[Any, float]] = [{} for _ in range(self.width)]
        self.seen: dict[tuple[Any, int], tuple[list[Any], list[Any]]] = {}
        self.plan: list[tuple[Any, int]] = []
        self.fresh: float | None = None
        self.idle = False

    def learn(self, before: Any, action: int, after: Any) -> None:
        """Who predicted otherwise is out, as far as this action goes."""
        right = np.array([float(said == after) for said in self._ahead(before, action)[0]])
        if (self.weights[action] > right).any():
            self.weights[action] *= right
            self.worths[action] = {}

    def action(self, state: Any, *, may_stop: bool) -> int | None:
        """The next action of the plan; random where nothing is to be learned; None where one of the starts promises more."""
        if self.plan and self.plan[0][0] == state and self._lawful(state, self.plan[0][1]):
            return self.plan.pop(0)[1]
        if self.idle:
            return int(self.prober.chance(state))
        worth, self.plan = self._search(state)
        self.idle = worth == 0.0 and self._fresh() == 0.0
        if may_stop and self._fresh() > worth:
            self.plan = []
            return None
        if self.plan:
            return self.plan.pop(0)[1]
        return int(self.prober.chance(state))

    def _fresh(self) -> float:
        """What an episode begun anew is worth, as the first to ask found it."""
        if self.fresh is None:
            found = [self._search(start)[0] for start in self.prober.starts]
            self.fresh = sum(found) / len(found) if found else 0.0
        return self.fresh

    def _search(self, state: Any) -> tuple[float, list[tuple[Any, int]]]:
        """What the best (state, action) in reach teaches, less by a tenth for each step on the way, and the way to it."""
        frontier: list[tuple[Any, list[tuple[Any, int]]]] = [(state, [])]
        known = {state}
        best: tuple[float, list[tuple[Any, int]]] = (0.0, [])
        for depth in range(self.prober.depth + 1):
            following: list[tuple[Any, list[tuple[Any, int]]]] = []
            for place, way in frontier:
                for action in range(self.width):
                    ahead, distinct = self._ahead(place, action)
                    if not way and not self._lawful(place, action):
                        self.prober.shielded += 1
                        continue
                    if len(distinct) > 1 and place not in self.worths[action]:
                        self.worths[action][place] = self._worth(action, ahead)
                    worth = 0.9**depth * self.worths[action].get(place, 0.0)
                    if worth > best[0] + 1e-12:
                        best = (worth, [*way, (place, action)])
                    for nxt in distinct:
                        if nxt not in known and len(known) < PLACES:
                            known.add(nxt)
                            following.append((nxt, [*way, (place, action)]))
            frontier = following
        return best

    def _worth(self, action: int, ahead: list[Any]) -> float:
        """Expected information about who is right of the first hypothesis and the others: in nats about this outcome, times
        :data:`HERE`, and about the same action's outcome in a state as they occurred, on average."""
        weights = self.weights[action]
        alive = [said for said, weight in zip(ahead, weights, strict=True) if weight]
        if all(said == alive[0] for said in alive):
            return 0.0
        if action not in self.apart:
            rows = [self._ahead(state, action)[0] for state in self.targets]
            self.apart[action] = np.array([[said != row[0] for said in row] for row in rows], dtype=float).reshape(
                -1, len(ahead)
            )
        apart = np.array([said != ahead[0] for said in ahead], dtype=float)
        return HERE * entropy(ahead, weights.tolist()) + mutual_information(
            apart, self.apart[action], weights / weights.sum()
        )

    def _ahead(self, state: Any, action: int) -> tuple[list[Any], list[Any]]:
        """The next state by hypothesis, and the distinct ones."""
        key = state, action
        if key not in self.seen:
            ahead = [step(state, action) for step in self.steps]
            self.seen[key] = ahead, list(dict.fromkeys(ahead))
        return self.seen[key]

    def _lawful(self, state: Any, action: int) -> bool:
        return bool(self.prober.lawful(state, action, self._ahead(state, action)[0][0]))


def observed_next(hypothesis: Adapted, state: Any, action: Any) -> Any:
    """What a hypothesis says will be observed after ``state`` was: a belief of its own is inferred and decoded, because hypotheses
    are compared, and laws hold, in what is observed."""
    return hypothesis.observed(hypothesis.step(hypothesis.infer(state), action).belief)


def _stepper(hypothesis: Adapted) -> Callable[[Any, int], Any]:
    """(state, action) -> next state. The adapter's checks cost more than a rule of a program, so that a program is asked itself."""
    if isinstance(hypothesis.model, Program):
        return hypothesis.model.next_state
    return lambda state, action: observed_next(hypothesis, state, action)
