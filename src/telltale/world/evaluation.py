"""``evaluate``: a planner in a model decides on the real engine, on paired starts; the share that succeeds is the ASR.

ASR = (1/N) sum_i 1[task i succeeds in the real environment under the policy derived from the model] (arXiv 2604.22748).
Starts are seeds, the same for every model, so that arms are paired. Episodes run in batches, which changes the cost of
a decision and not the decision. What was predicted, what happened, the laws' verdicts and the engine's receipts of every
step are kept, so that a bundle can be replayed and a failure attributed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_integer, check_seed
from telltale.errors import ConfigError
from telltale.world.laws.law import Enforcement, Law, enforcement
from telltale.world.metrics import Interval, bootstrap, iqm, worst_rate
from telltale.world.mrep import identity_of, write_bundle
from telltale.world.planners.planning import planner_for, problem_of
from telltale.world.planners.problem import Problem
from telltale.world.plugs import called
from telltale.world.protocol import Adapted, adapt
from telltale.world.records import Batch, KeptBatches, Record
from telltale.world.rollouts import rollout
from telltale.world.worlds.base import Episode, World, check_outcome

FIRST_SEED = 9000
"""Seed of the first evaluation episode; the others count up from it."""


@dataclass
class Evaluation:
    """What one model with one planner did. ``cpu_seconds`` is process time of planning and stepping, all episodes together."""

    world: World
    model: str
    planner: dict[str, Any]
    records: list[Record]
    reward: str
    law_mode: str
    seed: int
    cpu_seconds: float
    model_steps: int
    description: dict[str, Any] = field(default_factory=dict)
    laws: tuple[Law, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Seeds of the starts."""
        return [record.episode.seed for record in self.records]

    @property
    def successes(self) -> list[bool]:
        """Success by start."""
        return [record.success for record in self.records]

    @property
    def asr(self) -> float:
        """Share of starts that succeeded."""
        return sum(self.successes) / len(self.records)

    @property
    def returns(self) -> list[float]:
        """Total reward by start."""
        return [record.episode.total for record in self.records]

    @property
    def env_steps(self) -> int:
        """Engine steps taken."""
        return sum(len(record.episode) for record in self.records)

    def interval(self) -> Interval:
        """IQM of the returns with a bootstrap interval."""
        return bootstrap(self.returns)

    def violation_rate(self) -> float:
        """Share of (step, particle) predictions that break the hard law which is broken most at that step."""
        rates = [worst_rate(step, self.hard()) for record in self.records for step in record.broken]
        return sum(rates) / len(rates) if rates else 0.0

    def hard(self) -> list[str]:
        """Names of the hard laws."""
        return [law.name for law in self.laws if law.hard]

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON values."""
        spread = self.interval()
        return {
            "world": self.world.id, "model": self.model, "planner": self.planner, "episodes": len(self.records),
            "asr": self.asr, "return_iqm": iqm(self.returns), "return_interval": [spread.low, spread.high],
            "raw_violation_rate": self.violation_rate(), "reward": self.reward, "laws": self.law_mode,
            "env_steps": self.env_steps, "model_steps": self.model_steps, "cpu_seconds": round(self.cpu_seconds, 3),
        }  # fmt: skip

    def save(self, path: str | Path, **extra: Any) -> Path:
        """Write the reproducible bundle: see :func:`telltale.world.mrep.write_bundle`."""
        return write_bundle(self, path, **extra)


def evaluate(
    model: Any,
    world: World,
    *,
    planner: Any = None,
    episodes: int = 30,
    seeds: Sequence[int] | None = None,
    horizon: int | None = None,
    laws: Sequence[Law] | None = None,
    mode: str | Enforcement = "report",
    reward: str = "known",
    batch: int = 16,
    max_steps: int | None = None,
    seed: int = 0,
    kept: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Let ``planner`` act through ``model`` in ``world`` from ``episodes`` starts (or the ``seeds`` given).

    ``mode`` says what laws do inside the imagined rollouts; their raw violations are recorded in every mode. ``reward``:
    see :func:`~telltale.world.planners.planning.problem_of`. ``batch`` episodes run side by side. ``progress(done, total)``
    is told in episodes. ``kept`` is a folder for finished batches: after an interruption the same call goes on from there, to
    the same end, and what another call left in it is removed. ``settings`` are fields of the planner.

    Raises :class:`~telltale.errors.ConfigError` for a planner that does not fit the world or an argument out of range.
    """
    check_integer("episodes", episodes, low=1)
    check_integer("batch", batch, low=1)
    check_seed(seed)
    if max_steps is not None:
        check_integer("max_steps", max_steps, low=1)
    adapted = adapt(model)
    chosen = planner_for(world, planner, **settings)
    problem = problem_of(adapted, world, chosen, laws=laws, mode=mode, horizon=horizon, reward=reward)
    starts = list(seeds) if seeds is not None else list(range(FIRST_SEED, FIRST_SEED + episodes))
    if not starts:
        raise ConfigError("seeds are empty; give at least one start.")
    for start in starts:
        check_seed(start)
    world.check_task()
    runner = _Runner(world, adapted, chosen, problem, seed, max_steps)
    described = {"name": chosen.name, **asdict(chosen), "horizon": problem.horizon}
    description = adapted.model.describe() if callable(getattr(adapted.model, "describe", None)) else {}
    store = None
    if kept is not None:
        laws_now = [(law.name, law.tolerance, law.hard) for law in problem.laws]
        names = [world.task_hash(), identity_of(adapted.model), described, laws_now, asdict(problem.enforced), reward]
        store = KeptBatches(kept, {"what": names, "starts": starts, "run": [batch, runner.max_steps, seed]})
    done: list[Batch] = []
    with torch.no_grad():
        for first in range(0, len(starts), batch):
            found = store.load(first) if store is not None else None
            if found is None:
                found = runner.run(starts[first : first + batch])
                if store is not None:
                    store.save(first, found)
            done.append(found)
            if progress is not None:
                progress(min(first + batch, len(starts)), len(starts))
    # a search needs a goal and no reward; elsewhere the world's function, or what the model learned
    rewarded = "goal" if problem.kind == "plain" else reward if world.reward is not None else "learned"
    return Evaluation(
        world,
        adapted.name,
        described,
        [record for found in done for record in found.records],
        rewarded,
        enforcement(mode).mode,
        seed,
        sum(found.cpu_seconds for found in done),
        sum(found.model_steps for found in done),
        description,
        tuple(problem.laws),
    )


class _Runner:
    """Plays batches of episodes."""

    def __init__(
        self, world: World, model: Adapted, planner: Any, problem: Problem, seed: int, max_steps: int | None
    ) -> None:
        self.world, self.model, self.planner, self.problem = world, model, planner, problem
        self.seed, self.max_steps = seed, max_steps or world.max_steps
        self.model_steps = 0

    def run(self, seeds: Sequence[int]) -> Batch:
        began, before = time.process_time(), self.model_steps
        records = self._played(seeds)
        return Batch(records, self.model_steps - before, time.process_time() - began)

    def _played(self, seeds: Sequence[int]) -> list[Record]:
        engines: list[World] = []
        try:
            engines += (self.world.spawn() for _ in seeds)
            records = [
                Record(Episode(seed, [engine.reset(seed)], source=self.planner.name))
                for seed, engine in zip(seeds, engines, strict=True)
            ]
            if hasattr(self.planner, "policy"):
                self._play_policy(engines, records)
            elif self.world.plain:
                self._play_plans(engines, records)
            else:
                self._play_steps(engines, records)
            for record, engine in zip(records, engines, strict=True):
                record.success = bool(called(f"the success of {engine.id}", engine.success, record.episode))
            return records
        finally:
            for engine in engines:
                engine.close()

    def _play_steps(self, engines: list[World], records: list[Record]) -> None:
        """Replan at every step, all running episodes in one batch."""
        running = list(range(len(engines)))
        warm: Tensor | None = None
        for t in range(self.max_steps):
            seen = torch.stack([self.world.belief(records[i].episode.observations[-1]) for i in running])
            belief = self.model.infer(seen)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + t)
            plan = self.planner.plan(self.problem, belief, generator=generator, warm=warm)
            self.model_steps += plan.steps * len(running) * self.model.particles
            first = plan.first()
            self._note(records, running, belief, first, generator, plan.value)
            for row, i in enumerate(running):
                action = int(first[row]) if self.world.discrete else first[row].numpy()
                self._act(engines[i], records[i].episode, action)
            alive = [
                row
                for row, i in enumerate(running)
                if not records[i].episode.terminated and not records[i].episode.truncated
            ]
            warm = plan.warm[alive] if plan.warm is not None else None
            running = [running[row] for row in alive]
            if not running:
                return

    def _note(
        self,
        records: list[Record],
        running: list[int],
        belief: Tensor,
        action: Tensor,
        generator: torch.Generator,
        value: Tensor,
    ) -> None:
        step = rollout(
            self.model, belief, action.unsqueeze(1), reward=_no_reward, laws=self.problem.laws, generator=generator
        )
        mean = step.observed[:, :, 1].mean(0)
        share = {name: (excess[..., 0] > 0).float().mean(0) for name, excess in step.excess.items()}
        for row, i in enumerate(running):
            records[i].predicted.append(mean[row])
            records[i].broken.append({name: float(rate[row]) for name, rate in share.items()})
            records[i].plan_value.append(float(value[row]))

    def _play_plans(self, engines: list[World], records: list[Record]) -> None:
        """Search once from the first state and execute the plan as it is: what a model has to be good enough for."""
        for engine, record in zip(engines, records, strict=True):
            state = self.model.infer(self.world.belief(record.episode.observations[0]))
            plan = self.planner.plan(self.problem, [state], generator=torch.Generator().manual_seed(self.seed))
            self.model_steps += plan.steps
            noise = torch.Generator().manual_seed(self.seed)
            for action in plan.actions[0][: self.max_steps]:
                before = self.world.belief(record.episode.observations[-1])
                after = self.model.observed(self.model.step(self.model.infer(before), action, generator=noise).belief)
                record.predicted.append(after)
                record.broken.append(
                    {law.name: float(law.excess(before, action, after) > 0) for law in self.problem.laws}
                )
                record.plan_value.append(float(plan.value[0]))
                self._act(engine, record.episode, action)
                if record.episode.terminated or record.episode.truncated:
                    break

    def _play_policy(self, engines: list[World], records: list[Record]) -> None:
        policy = self.planner.policy(self.model.model, self.world)
        for engine, record in zip(engines, records, strict=True):
            for _ in range(self.max_steps):
                self._act(engine, record.episode, policy.action(record.episode.observations[-1]))
                record.plan_value.append(float(policy.value))
                if record.episode.terminated or record.episode.truncated:
                    break

    @staticmethod
    def _act(engine: World, episode: Episode, action: Any) -> None:
        outcome = engine.step(action)
        check_outcome(engine, outcome)
        episode.add(action if isinstance(action, int) else [float(a) for a in action], outcome)


def _no_reward(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    return torch.zeros(after.shape[:-1])
