"""Peak bytes of one worker under each weight policy (PipeDream SOSP'19, section 3.3; PipeDream-2BW, sections 3.2, 3.3).

With |W| the stage's parameter bytes, A what autograd keeps of one minibatch, a the bytes of the stage's input, G = |W| the
gradients, O the optimizer state and w the minibatches that are ahead of a backward:

=============  ======================================
stash          (w+1) |W| + (w+1) A + G + O
vertical       (D+1) |W| + (w+1) A + G + O
2bw            2 |W| + (w+1) A + G + O
flush          |W| + min(w+1, m/r) A + G + O
gpipe          |W| + (m/r) A + G + O
none           |W| + (w+1) A + G + O
=============  ======================================

With recomputation k A becomes k a + A: only the inputs of the minibatches in flight, and one minibatch's activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from telltale.errors import PlanError
from telltale.train.pipeline.policies import Policy, warmup
from telltale.train.pipeline.profiling.profile import Profile

MEMORY_POLICIES = ("stash", "vertical", "2bw", "flush", "gpipe", "none")


class PlanInfeasible(PlanError):
    """No plan fits into the memory; the message names the layer or stage and the bytes that are missing."""


@dataclass(frozen=True)
class MemoryModel:
    """The memory of a worker as a weighted sum of three sizes, for one policy and setting."""

    policy: str
    optimizer: float = 2.0
    """Bytes of optimizer state per parameter byte."""
    microbatches: int | None = None
    """m of flush and gpipe; None for flush means enough of them to fill the pipe. gpipe needs it."""
    recompute: bool = False
    delay: int = 1
    """D of vertical sync: at most the number of stages - 1."""

    def __post_init__(self) -> None:
        if self.policy not in MEMORY_POLICIES:
            raise PlanError(
                f"policy={self.policy!r} has no memory model; expected one of {', '.join(MEMORY_POLICIES)}."
            )
        if self.policy == "gpipe" and self.microbatches is None:
            raise PlanError("policy='gpipe' needs microbatches: its memory grows with them.")

    def in_flight(self, ahead: Any, replicas: Any) -> Any:
        """Minibatches whose activations a worker keeps at once; ``ahead`` is w_s, ``replicas`` r_s (arrays or ints)."""
        if self.policy == "gpipe":
            return np.ceil(self.microbatches / np.asarray(replicas))
        if self.policy == "flush" and self.microbatches is not None:
            return np.minimum(np.asarray(ahead) + 1, np.ceil(self.microbatches / np.asarray(replicas)))
        return np.asarray(ahead) + 1

    def versions(self, ahead: Any) -> Any:
        """Copies of the parameters that a worker keeps, the newest included."""
        if self.policy == "stash":
            return np.asarray(ahead) + 1
        constant = {"vertical": self.delay + 1, "2bw": 2}.get(self.policy, 1)
        return np.full(np.shape(ahead), constant)

    def coefficients(self, ahead: Any, replicas: Any) -> tuple[Any, Any, Any]:
        """(per parameter byte, per saved byte, per input byte); the sum of products is the peak."""
        kept = self.in_flight(ahead, replicas)
        per_parameter = self.versions(ahead) + 1.0 + self.optimizer
        if self.recompute:
            return per_parameter, np.ones_like(kept, dtype=float), kept.astype(float)
        return per_parameter, kept.astype(float), np.zeros_like(kept, dtype=float)

    def peak(self, parameter_bytes: float, saved_bytes: float, input_bytes: float, ahead: int, replicas: int) -> float:
        """Bytes of one worker of a stage."""
        per_parameter, per_saved, per_input = self.coefficients(ahead, replicas)
        return float(per_parameter * parameter_bytes + per_saved * saved_bytes + per_input * input_bytes)


def stage_memories(profile: Profile, cuts: list[int], replicas: tuple[int, ...], model: MemoryModel) -> list[float]:
    """Peak bytes of one worker of every stage of a chain; ``cuts`` are the first layers of stages 1, 2, ...

    The delay of vertical sync is that of these replicas; ``model.delay`` is not read.
    """
    if model.policy == "vertical":
        model = MemoryModel(**{**vars(model), "delay": Policy("vertical", replicas).delay})
    bounds = [0, *cuts, len(profile.layers)]
    result = []
    for stage, (low, high) in enumerate(pairwise(bounds)):
        layers = profile.layers[low:high]
        result.append(
            model.peak(
                math.fsum(layer.parameter_bytes for layer in layers),
                math.fsum(layer.saved_bytes for layer in layers),
                profile.layers[low - 1].activation_bytes if low else 0.0,
                warmup(replicas, stage),
                replicas[stage],
            )
        )
    return result
