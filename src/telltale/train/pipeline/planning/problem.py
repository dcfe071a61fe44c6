"""What the partitioner is asked: a chain, machines, a cost model and constraints; and the stages that it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from telltale.train.pipeline.planning.cost_models import CostModel
from telltale.train.pipeline.planning.memory import MemoryModel
from telltale.train.pipeline.profiling.profile import Profile
from telltale.train.pipeline.profiling.topology import Level


@dataclass(frozen=True)
class Part:
    """A stage of a partition: layers start..stop-1 on ``replicas`` workers in all."""

    start: int
    stop: int
    replicas: int


@dataclass(frozen=True)
class Problem:
    """A chain, its machines and its constraints."""

    profile: Profile
    levels: tuple[Level, ...]
    cost_model: CostModel
    directions: int = 2
    memory: MemoryModel | None = None
    memory_limit: float = math.inf
    """Bytes of one worker; read only with ``memory``."""
    max_replicas: int | None = None
    """Replicas of a stage at each level; 1 asks for a straight pipeline."""
    max_stages: int | None = None
    """Stages at the outermost level."""
    use_all_workers: bool = True
    microbatches: int | None = None
    """One update per that many minibatches: gradients are averaged once per batch. None: once per round of r."""

    @property
    def workers(self) -> int:
        """Product of the counts of all levels."""
        return math.prod(level.count for level in self.levels)
