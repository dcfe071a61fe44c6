"""Which weight version a minibatch reads at a stage: PipeDream (arXiv 1806.03377, section 3.3; SOSP'19, section 3.3),
PipeDream-2BW and PipeDream-Flush (arXiv 2006.09503) and GPipe, for straight pipelines and replicated stages.

A version is the number of optimizer steps applied at a stage. Stages and minibatches count from 0. With r_s replicas of
stage s and W workers, minibatch t goes to replica t mod r_s, and stage s admits w_s minibatches ahead of a backward:

    w_s = floor((W - 1 - sum_{i<s} r_i) / r_s)            (straight pipeline of n stages: n - 1 - s)

=========  =======================  ===========================  ==================
policy     version read by F(t)     one update of stage s per    versions held
=========  =======================  ===========================  ==================
stash      max(0, t//r_s - w_s)     r_s minibatches              w_s + 1
vertical   max(0, t//m - D)         m = lcm(r) minibatches       D + 1
2bw        max(0, t//m - 1)         m minibatches                2
flush      t//m                     m minibatches, drained       1
gpipe      t//m                     m minibatches, drained       1
none       max(0, t//r_s - w_s)     r_s minibatches              1
=========  =======================  ===========================  ==================

B(t) reads what F(t) read, except under "none", the ablation, where it meets the newest weights, t//r_s. The delay of
vertical sync, D = max_s ceil(r_s w_s / m), is n - 1 for a straight pipeline. The paper asks m >= n of 2bw; in strict 1F1B
order m >= max_s r_s w_s is enough, and less is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan

BY_ROUND = ("stash", "none")
BY_BATCH = ("vertical", "2bw", "flush", "gpipe")


def warmup(replicas: tuple[int, ...], stage: int) -> int:
    """w_s: forwards that a replica of ``stage`` runs before its first backward."""
    return (sum(replicas) - 1 - sum(replicas[:stage])) // replicas[stage]


def noam(replicas: tuple[int, ...]) -> int:
    """NOAM = ceil(W / r_0): minibatches in flight per replica of the input stage (section 3.2)."""
    return math.ceil(sum(replicas) / replicas[0])


@dataclass(frozen=True)
class Policy:
    """One policy on one pipeline: pure arithmetic on minibatch numbers, absolute from the start of training."""

    name: str
    replicas: tuple[int, ...]
    microbatches: int = 1
    """m of 2bw, flush and gpipe; the other policies set their own."""

    def __post_init__(self) -> None:
        if self.name not in BY_ROUND + BY_BATCH:
            raise PlanError(
                f"policy={self.name!r} has no schedule of ours; expected one of {', '.join(BY_ROUND + BY_BATCH)} "
                f"(interleaved runs on torch.distributed.pipelining: see torch_schedules)."
            )
        if self.name == "vertical":
            object.__setattr__(self, "microbatches", math.lcm(*self.replicas))
        elif self.name in BY_ROUND:
            object.__setattr__(self, "microbatches", 1)
        needed = max(count * warmup(self.replicas, stage) for stage, count in enumerate(self.replicas))
        if self.name == "2bw" and self.microbatches < needed:
            raise PlanError(
                f"microbatches={self.microbatches} is too few for 2bw on {'-'.join(map(str, self.replicas))}; "
                f"expected at least {needed}, so that the version before the last is ready when it is read."
            )

    @property
    def n_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.replicas)

    @property
    def drains(self) -> bool:
        """Whether a batch's update comes before the next batch's first forward."""
        return self.name in ("flush", "gpipe")

    @property
    def synchronous(self) -> bool:
        """Whether every stage steps once per batch, so that all of them can agree on a gradient norm or a tied weight."""
        return self.name in BY_BATCH

    @property
    def delay(self) -> int:
        """Batches between the version that a batch reads and the newest one it could, for policies by batch."""
        if self.name == "vertical":
            stages = range(self.n_stages)
            return max(math.ceil(self.replicas[s] * self.warmup(s) / self.microbatches) for s in stages)
        return 1 if self.name == "2bw" else 0

    def warmup(self, stage: int) -> int:
        """w_s."""
        return warmup(self.replicas, stage)

    def round_size(self, stage: int) -> int:
        """Minibatches per optimizer step of ``stage``."""
        return self.replicas[stage] if self.name in BY_ROUND else self.microbatches

    @property
    def alignment(self) -> int:
        """A run may start at a multiple of this many minibatches: a round boundary of every stage."""
        return math.lcm(*(self.round_size(stage) for stage in range(self.n_stages)))

    def version(self, stage: int, minibatch: int, *, start: int = 0) -> int:
        """The version that F(minibatch) reads at ``stage``.

        ``start`` is where the running pipe was filled. It matters to "none" alone, which keeps no old version: after a drain
        its first forwards read the newest weights, so a training that is cut is another one.
        """
        behind = self.warmup(stage) if self.name in BY_ROUND else self.delay
        oldest = start // self.round_size(stage) if self.name == "none" else 0
        return max(oldest, minibatch // self.round_size(stage) - behind)

    def backward_version(self, stage: int, minibatch: int) -> int:
        """The version that B(minibatch) meets at ``stage``: F's, or the newest under "none"."""
        if self.name == "none":
            return minibatch // self.round_size(stage)
        return self.version(stage, minibatch)

    def update_after(self, stage: int, minibatch: int) -> int:
        """The version made by the optimizer step that the gradient of ``minibatch`` goes into."""
        return minibatch // self.round_size(stage) + 1

    def versions_held(self, stage: int) -> int:
        """Most versions of ``stage``'s weights that are alive at once."""
        if self.name == "stash":
            return self.warmup(stage) + 1
        return 1 if self.name == "none" else self.delay + 1


def policy_of(plan: Plan) -> Policy:
    """The policy of a plan. Raises :class:`~telltale.errors.PlanError` for one that our runtime has no schedule for."""
    return Policy(plan.policy, plan.replicas, plan.microbatches)
