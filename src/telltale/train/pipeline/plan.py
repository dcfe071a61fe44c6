"""A pipeline plan as data: which layers form a stage, on how many replicas, under which weight policy.

Plans come from :func:`telltale.train.pipeline.plan` or are written by hand with :meth:`Plan.manual`; the simulator, the
trainer and the one-process reference all read the same object.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from telltale.errors import PlanError
from telltale.runs.files import write_atomically

POLICIES = ("stash", "vertical", "2bw", "flush", "gpipe", "none", "interleaved")
"""Weight policies (PipeDream, section 3.3; PipeDream-2BW, arXiv 2006.09503; GPipe). "none" is the ablation that mixes versions."""

FORMAT = "telltale-pipeline-plan-1"


@dataclass(frozen=True)
class PlannedStage:
    """Consecutive layers that run on the same workers. Times are seconds per minibatch on one replica, sizes bytes."""

    layers: tuple[int, ...]
    """Indices of the profile's layers, ascending."""
    replicas: int
    """Workers that share this stage's minibatches, round-robin."""
    names: tuple[str, ...] = ()
    compute: float = 0.0
    """Forward and backward of one minibatch on one replica."""
    synchronisation: float = 0.0
    """Averaging the gradients of one round over the replicas."""
    cut_bytes: float = 0.0
    """What the last layer sends on to the next stage; 0 for the last stage."""
    memory: float | None = None
    """Predicted peak of one worker; None if the profile does not say."""

    def __post_init__(self) -> None:
        for name in ("compute", "synchronisation", "cut_bytes", "memory"):
            value = getattr(self, name)
            if not (_is_amount(value) or (name == "memory" and value is None)):
                raise PlanError(f"a stage has {name}={value!r}; expected a finite number >= 0.")


@dataclass(frozen=True)
class Plan:
    """Stages in order, and how weights are versioned. ``microbatches`` is m of 2bw, flush, gpipe and interleaved."""

    stages: tuple[PlannedStage, ...]
    policy: str = "stash"
    microbatches: int = 1
    bottleneck: float = 0.0
    """Seconds per minibatch of the slowest stage or cut in steady state, under ``cost_model``."""
    cost_model: str = "ring"
    recompute: bool = False
    """Whether a stage keeps only its inputs and recomputes its activations in the backward."""
    chunks: int = 1
    """Model chunks per worker; more than one only under the interleaved policy."""
    fingerprint: str | None = None
    """Hash of parameter names and shapes of the model that the plan was made for."""
    reasons: tuple[str, ...] = field(default=())
    """Why these cuts and this policy, in plain sentences."""
    placement: tuple[int, ...] | None = None
    """Global rank of every worker, replicas of the first stage first; None: their own order. On machines in levels it keeps
    what exchanges most on one machine."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PlanError(f"policy={self.policy!r} is unknown; expected one of {', '.join(POLICIES)}.")
        if not self.stages:
            raise PlanError("the plan has no stages; expected at least one.")
        expected = 0
        for number, stage in enumerate(self.stages):
            if not stage.layers:
                raise PlanError(f"stage {number} is empty; expected at least one layer per stage.")
            consecutive = stage.layers == tuple(range(expected, expected + len(stage.layers)))
            if not consecutive or not all(isinstance(layer, int) for layer in stage.layers):
                raise PlanError(
                    f"stage {number} holds layers {list(stage.layers)}; expected consecutive ones from {expected} on."
                )
            if isinstance(stage.replicas, bool) or not isinstance(stage.replicas, int) or stage.replicas < 1:
                raise PlanError(f"stage {number} has replicas={stage.replicas!r}; expected an integer >= 1.")
            expected += len(stage.layers)
        for name in ("microbatches", "chunks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r} is not allowed; expected an integer >= 1.")
        if not isinstance(self.recompute, bool):
            raise PlanError(f"recompute={self.recompute!r} is not allowed; expected true or false.")
        if not _is_amount(self.bottleneck):
            raise PlanError(f"bottleneck={self.bottleneck!r} is not allowed; expected seconds >= 0.")
        if not isinstance(self.cost_model, str):
            raise PlanError(f"cost_model={self.cost_model!r} is not allowed; expected its name.")
        if isinstance(self.reasons, str) or not all(isinstance(reason, str) for reason in self.reasons):
            raise PlanError(f"reasons={self.reasons!r} are not allowed; expected a list of sentences.")
        if self.fingerprint is not None and not isinstance(self.fingerprint, str):
            raise PlanError(f"fingerprint={self.fingerprint!r} is not allowed; expected text or none.")
        if self.placement is not None and not _is_order(self.placement, self.workers):
            raise PlanError(f"placement={self.placement!r} is not allowed; expected the ranks 0 to {self.workers - 1}.")
        if self.chunks > 1 and self.policy != "interleaved":
            raise PlanError(f"chunks={self.chunks} needs policy='interleaved', not {self.policy!r}.")

    @classmethod
    def manual(
        cls,
        stages: Sequence[Sequence[int]],
        *,
        replicas: Sequence[int] | None = None,
        policy: str = "stash",
        microbatches: int = 1,
        **fields: Any,
    ) -> Plan:
        """A plan with the given layer indices per stage and one replica each unless ``replicas`` says otherwise.

        Raises :class:`~telltale.errors.PlanError` if layers are missing, repeated or out of order.
        """
        counts = list(replicas) if replicas is not None else [1] * len(stages)
        if len(counts) != len(stages):
            raise PlanError(f"replicas={counts} names {len(counts)} stages; expected {len(stages)}.")
        planned = tuple(PlannedStage(tuple(layers), count) for layers, count in zip(stages, counts, strict=True))
        return cls(planned, policy=policy, microbatches=microbatches, **fields)

    @classmethod
    def even(cls, n_layers: int, n_stages: int, **fields: Any) -> Plan:
        """``n_layers`` in ``n_stages`` runs of as equal a length as possible, one replica each."""
        if not 1 <= n_stages <= n_layers:
            raise PlanError(f"{n_stages} stages for {n_layers} layers; expected 1 to {n_layers} stages.")
        bounds = [n_layers * index // n_stages for index in range(n_stages + 1)]
        return cls.manual([range(low, high) for low, high in pairwise(bounds)], **fields)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Replicas per stage."""
        return tuple(stage.replicas for stage in self.stages)

    @property
    def workers(self) -> int:
        """Workers in use: the sum of the replicas."""
        return sum(self.replicas)

    @property
    def processes(self) -> int:
        """Processes that run the plan: its workers, or for an interleaved one, whose workers have several stages, fewer."""
        return self.workers // self.chunks

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return sum(len(stage.layers) for stage in self.stages)

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, replica) of global rank ``rank``."""
        if not 0 <= rank < self.workers:
            raise PlanError(f"the plan has {self.workers} workers; rank {rank} has no place in it.")
        worker = rank if self.placement is None else self.placement.index(rank)
        for number, count in enumerate(self.replicas):
            if worker < count:
                return number, worker
            worker -= count
        raise AssertionError("unreachable: the workers are the sum of the replicas")

    def rank(self, stage: int, replica: int) -> int:
        """Global rank of replica ``replica`` of stage ``stage``."""
        worker = sum(self.replicas[:stage]) + replica
        return worker if self.placement is None else self.placement[worker]

    def describe(self) -> str:
        """Replicas per stage joined by dashes, as the papers write configurations: "15-1"."""
        return "-".join(str(count) for count in self.replicas)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, aside and then renamed."""
        write_atomically(Path(path), json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`. Raises :class:`~telltale.errors.PlanError` naming what is wrong with it."""
        try:
            document = json.loads(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"plan {path} is not JSON: {error}.") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise PlanError(f"{path} is not a pipeline plan; expected a JSON file with format {FORMAT!r}.")
        try:
            stages = tuple(
                PlannedStage(**{**stage, "layers": tuple(stage["layers"]), "names": tuple(stage.get("names", ()))})
                for stage in document.pop("stages")
            )
            reasons = document.pop("reasons", ())
            placement = document.pop("placement", None)
            document["placement"] = tuple(placement) if isinstance(placement, list) else placement
            return cls(stages, **document, reasons=tuple(reasons) if isinstance(reasons, list) else reasons)
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"plan {path} has a missing or unknown field: {error}.") from error


def _is_amount(value: Any) -> bool:
    """Whether ``value`` is a number of seconds or bytes that is finite and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is_order(value: Any, count: int) -> bool:
    """Whether ``value`` holds the integers below ``count`` in some order."""
    return isinstance(value, tuple) and all(type(item) is int for item in value) and sorted(value) == list(range(count))
