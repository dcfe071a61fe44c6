"""Breadth-first search over plain states: the shortest action sequence that reaches the goal in the model."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from telltale.config import check_integer
from telltale.world.laws.law import Law
from telltale.world.planners.problem import Plan, Problem
from telltale.world.planners.sampling import check_horizon
from telltale.world.protocol import Adapted


@dataclass(frozen=True)
class BreadthFirst:
    """Expand states in order of depth up to ``horizon`` and ``nodes``. Laws that are enforced close an edge that breaks one.

    ``action_order`` None tries the actions by number. Without a plan the answer is the empty one.
    """

    nodes: int = 20_000
    horizon: int | None = None
    name: ClassVar[str] = "breadth_first"
    kinds: ClassVar[tuple[str, ...]] = ("plain",)

    def __post_init__(self) -> None:
        check_integer("nodes", self.nodes, low=1)
        check_horizon(self.horizon)

    def plan(self, problem: Problem, belief: Any, *, generator: torch.Generator, warm: Any = None) -> Plan:
        """A plan for each state of the list ``belief``."""
        plans, steps = [], 0
        for state in belief:
            plan, taken = self._search(problem, state, generator)
            plans.append(plan)
            steps += taken
        return Plan(
            [plan or [] for plan in plans],
            torch.tensor([-float("inf") if plan is None else -float(len(plan)) for plan in plans]),
            steps,
            found=[plan is not None for plan in plans],
        )

    def _search(self, problem: Problem, start: Any, generator: torch.Generator) -> tuple[list[int] | None, int]:
        assert problem.goal is not None
        assert problem.actions is not None
        model = problem.model
        if problem.goal(model.observed(start)):
            return [], 0
        noisy = model.stochastic(start, 0)
        enforced = problem.enforced.mode != "report"
        hard = [law for law in problem.laws if law.hard] if enforced else []
        parents: dict[Any, tuple[Any, int] | None] = {start: None}
        queue, steps = deque([(start, 0)]), 0
        while queue and len(parents) < self.nodes:
            state, depth = queue.popleft()
            if depth >= problem.horizon:
                continue
            successors = model.successors(state, problem.actions, generator=generator if noisy else None)
            for action, after in enumerate(successors):
                steps += 1
                if after in parents or _forbidden(hard, model, state, action, after):
                    continue
                parents[after] = (state, action)
                if problem.goal(model.observed(after)):
                    return _path(parents, after), steps
                queue.append((after, depth + 1))
        return None, steps


def _forbidden(hard: list[Law], model: Adapted, state: Any, action: int, after: Any) -> bool:
    return any(not bool(law.holds(model.observed(state), action, model.observed(after))) for law in hard)


def _path(parents: dict[Any, tuple[Any, int] | None], state: Any) -> list[int]:
    actions: list[int] = []
    while (link := parents[state]) is not None:
        state, action = link
        actions.append(action)
    return actions[::-1]
