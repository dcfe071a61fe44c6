"""The order in which each worker runs forwards, backwards and updates: 1F1B, 1F1B-RR and GPipe (PipeDream, section 3.2).

The same lists drive the trainer and the simulator, so a timeline that was predicted and one that was recorded can be laid
over each other operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from telltale.errors import PlanError
from telltale.train.pipeline.policies import Policy

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

    Versions are absolute: a run cut at a round boundary reads the versions that an uncut one would have. Every replica of a
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
