"""The order in which each worker runs forwards, backwards and updates: 1F1B, 1F1B-RR and GPipe (PipeDream, section 3.2).

The same lists drive the trainer and the simulator, so a timeline that was predicted and one that was recorded can be laid
over each other operation by operation.

Which weight version a minibatch reads at a stage: PipeDream (arXiv 1806.03377, section 3.3; SOSP'19, section 3.3),
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

Interleaved 1F1B has several chunks of the model per worker (Megatron-LM, arXiv 2104.04473, section 2.2): stage k of a plan
with ``chunks`` = v runs on worker k mod W. Only the simulator uses this order; training runs on the schedule of
torch.distributed.pipelining. The bubble of equal stages is (W - 1) / (v m + W - 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from telltale.errors import PlanError
from telltale.train.pipeline.plan import Plan

FORWARD, BACKWARD, UPDATE = "F", "B", "U"


@dataclass(frozen=True)
class Operation:
    """One entry of a worker's schedule.

    F and B carry the weight version they use. U averages the gradients of a round over the stage's replicas and steps the
    optimizer; its minibatch is the last of the round and its version the one it makes.
    """

    kind: str
    minibatch: int
    version: int


def operations(policy: Policy, stage: int, replica: int, start: int, stop: int) -> list[Operation]:
    """What replica ``replica`` of ``stage`` runs for the minibatches [start, stop), drained at the end.

    WeightVersions are absolute: a run cut at a round boundary reads the versions that an uncut one would have. Every replica of a
    stage has the same updates, also in a last round that is too short to give each of them a minibatch. Raises
    :class:`~telltale.errors.PlanError` if ``start`` is not at a round boundary of every stage.
    """
    if start % policy.alignment:
        raise PlanError(f"start={start} is inside a round; expected a multiple of {policy.alignment} minibatches.")
    if stop < start:
        raise PlanError(f"stop={stop} is before start={start}; expected at least start.")
    size = policy.round_size(stage)
    result: list[Operation] = []
    if policy.drains:
        for first in range(start, stop, size):
            result += _span(policy, stage, replica, first, min(first + size, stop), stop)
        return result
    return _span(policy, stage, replica, start, stop, stop)


def _span(policy: Policy, stage: int, replica: int, start: int, stop: int, end: int) -> list[Operation]:
    """One filled and drained pipe over [start, stop)."""
    replicas = policy.replicas[stage]
    own = [t for t in range(start, stop) if t % replicas == replica]
    ahead = len(own) if policy.name == "gpipe" else min(policy.warmup(stage), len(own))
    size = policy.round_size(stage)
    result: list[Operation] = []
    updated = start // size

    def update_through(version: int) -> None:
        nonlocal updated
        while updated < version:
            updated += 1
            result.append(Operation(UPDATE, min(updated * size, end) - 1, updated))

    def forward(t: int) -> None:
        version = policy.version(stage, t, start=start)
        # One stage, fewer minibatches per batch than replicas: this one may have had none in the batches before.
        update_through(version)
        result.append(Operation(FORWARD, t, version))

    for t in own[:ahead]:
        forward(t)
    for index, t in enumerate(own):
        if index + ahead < len(own):
            forward(own[index + ahead])
        update_through(t // size)
        result.append(Operation(BACKWARD, t, policy.backward_version(stage, t)))
        following = own[index + 1] if index + 1 < len(own) else end
        if following // size > t // size or index + 1 == len(own):
            update_through(t // size + 1)
    update_through(-(-stop // size))
    return result


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


def interleaved_operations(
    workers: int, chunks: int, microbatches: int, worker: int, start: int, stop: int
) -> list[tuple[int, Operation]]:
    """(stage, operation) in the order of ``worker``, one drained batch of ``microbatches`` after the other.

    Raises :class:`~telltale.errors.PlanError` unless batches are multiples of the workers and the run is whole batches.
    """
    if microbatches % workers:
        raise PlanError(
            f"microbatches={microbatches} for {workers} workers; interleaved needs a multiple of the workers."
        )
    if start % microbatches or stop % microbatches or stop < start:
        raise PlanError(f"minibatches [{start}, {stop}) are no whole batches; expected multiples of {microbatches}.")
    total = microbatches * chunks
    ahead = min(2 * (workers - 1 - worker) + (chunks - 1) * workers, total)
    result: list[tuple[int, Operation]] = []

    def slot(index: int) -> tuple[int, int]:
        group, inside = divmod(index, workers * chunks)
        return inside // workers, group * workers + inside % workers

    for first in range(start, stop, microbatches):
        version = first // microbatches
        for index in range(total + ahead):
            if index < total:
                chunk, number = slot(index)
                result.append((chunk * workers + worker, Operation(FORWARD, first + number, version)))
            if index >= ahead:
                chunk, number = slot(index - ahead)
                stage = (chunks - 1 - chunk) * workers + worker
                result.append((stage, Operation(BACKWARD, first + number, version)))
        for chunk in range(chunks):
            done = Operation(UPDATE, first + microbatches - 1, version + 1)
            result.append((chunk * workers + worker, done))
    return result
