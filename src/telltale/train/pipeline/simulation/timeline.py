"""When every worker did what: the operations and transfers of one pipeline run, simulated or recorded.

Both kinds of run give the same object, so a prediction and a measurement can be compared operation by operation and
drawn over each other (:mod:`telltale.train.pipeline.simulation.gantt`). Times are seconds from the start of the run, sizes bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from telltale.errors import DataError, PlanError
from telltale.runs.files import write_atomically
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.schedule import policy_of

FORMAT = "telltale-pipeline-timeline-1"


@dataclass(frozen=True)
class StageSizes:
    """Bytes of one stage, for the memory curve."""

    parameter_bytes: float
    saved_bytes: float
    """What autograd keeps of one minibatch."""
    input_bytes: float
    """What the stage receives for one minibatch."""
    optimizer_bytes: float


@dataclass(frozen=True)
class Comparison:
    """One timeline over another: ratios are this one's figure divided by the other's."""

    seconds_ratio: float
    """Seconds per minibatch."""
    makespan_ratio: float
    medians: dict[tuple[int, str], tuple[float, float]]
    """(stage, kind) -> median seconds of one operation in this timeline and in the other; U includes the all-reduce."""


@dataclass(frozen=True)
class Timeline:
    """The events of one run in order of their starts, and the shape of the plan that they belong to."""

    events: tuple[Event, ...]
    replicas: tuple[int, ...]
    policy: str
    microbatches: int = 1
    alignment: int = 1
    """Minibatches after which the pattern of the schedule repeats."""
    chunks: int = 1
    recompute: bool = False
    label: str = "simulated"
    sizes: tuple[StageSizes, ...] | None = None
    """Per stage; None if unknown, and then there is no memory curve."""

    @classmethod
    def from_events(
        cls,
        events: Iterable[Event],
        plan: Plan,
        *,
        label: str = "recorded",
        sizes: Sequence[StageSizes] | None = None,
    ) -> Timeline:
        """The timeline of ``plan`` from the events of all its ranks, whose clocks count from a common start.

        Raises :class:`~telltale.errors.DataError` for an event that ends before it starts or has no place in it.
        """
        if plan.policy == "interleaved":
            alignment = plan.microbatches
        else:
            alignment = policy_of(plan).alignment
        ordered = tuple(sorted(events, key=lambda event: (event.start, event.end, event.rank)))
        workers = plan.workers // plan.chunks
        for event in ordered:
            if not (math.isfinite(event.start) and math.isfinite(event.end)) or event.end < event.start:
                raise DataError(f"{describe(event)} runs from {event.start} to {event.end} s; expected start <= end.")
            if not (0 <= event.rank < workers and 0 <= event.stage < len(plan.stages)):
                raise DataError(
                    f"{describe(event)} is outside the plan {plan.describe()}; expected ranks below {workers} and "
                    f"stages below {len(plan.stages)}."
                )
        return cls(
            ordered,
            plan.replicas,
            plan.policy,
            plan.microbatches,
            alignment,
            plan.chunks,
            plan.recompute,
            label,
            None if sizes is None else tuple(sizes),
        )

    @property
    def ranks(self) -> int:
        """Workers."""
        return sum(self.replicas) // self.chunks

    @property
    def title(self) -> str:
        """What ran, as "stash 2-1, simulated"."""
        shape = "-".join(map(str, self.replicas)) + (f" in {self.chunks} chunks" if self.chunks > 1 else "")
        return f"{self.policy} {shape}, {self.label}"

    @cached_property
    def computing(self) -> tuple[tuple[Event, ...], ...]:
        """F, B and U of each rank, in order."""
        lanes: list[list[Event]] = [[] for _ in range(self.ranks)]
        for event in self.events:
            if event.kind in COMPUTE:
                lanes[event.rank].append(event)
        return tuple(tuple(lane) for lane in lanes)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        if not self.events:
            return 0.0
        return max(event.end for event in self.events) - self.events[0].start

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of F, B and U per rank, and of all-reduces, which are a part of U where a run was recorded."""
        reduced = [0.0] * self.ranks
        for event in self.events:
            if event.kind == ALL_REDUCE:
                reduced[event.rank] += event.seconds
        return tuple(
            math.fsum(event.seconds for event in lane) + waited
            for lane, waited in zip(self.computing, reduced, strict=True)
        )

    @property
    def idle(self) -> tuple[float, ...]:
        """Makespan less busy seconds, per rank."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def utilisation(self) -> float:
        """Share of all workers' time that is spent in F, B, U and all-reduces."""
        return math.fsum(self.busy) / (self.ranks * self.makespan) if self.makespan else 0.0

    @property
    def bubble_fraction(self) -> float:
        """Share of all workers' time that is spent idle."""
        return 1.0 - self.utilisation if self.makespan else 0.0

    @cached_property
    def minibatches(self) -> tuple[int, ...]:
        """Numbers of the minibatches that ran backward through the first stage, ascending."""
        return tuple(sorted(event.minibatch for event in self.events if event.kind == "B" and event.stage == 0))

    @property
    def seconds_per_minibatch(self) -> float:
        """Steady state: the slope of completion times over the middle half of the run, between whole rounds or batches.

        A minibatch is complete when its backward through the first stage ends. Runs of fewer than four rounds have no
        steady middle; they give makespan over minibatches, fill and drain included.
        """
        ends = [(e.minibatch, e.end) for e in self.events if e.kind == "B" and e.stage == 0]
        return steady_seconds(ends, self.alignment, self.makespan)

    def live(self, rank: int) -> list[tuple[float, int]]:
        """(second, minibatches whose activations ``rank`` keeps from then on): from the start of F to the end of B."""
        changes: list[tuple[float, int, float]] = []
        for event in self.computing[rank]:
            if event.kind == "F":
                changes.append((event.start, 1, 1))
            elif event.kind == "B":
                changes.append((event.end, 0, -1))
        return [(when, int(total)) for when, total in _accumulated(changes)]

    def peak_live(self, rank: int) -> int:
        """Most minibatches (chunks of minibatches, if interleaved) whose activations ``rank`` keeps at once."""
        return max((count for _, count in self.live(rank)), default=0)

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """(second, bytes that ``rank`` holds from then on): weight versions, gradients, optimizer state, activations.

        A version lives from the update that makes it until its last use, and at least until the next update. The
        arithmetic is that of :mod:`telltale.train.pipeline.planning.costs`, with actual instead of worst-case counts. Raises
        :class:`~telltale.errors.PlanError` if the timeline has no sizes.
        """
        if self.sizes is None:
            raise PlanError("the timeline has no sizes of its stages; expected sizes=... in from_events, or simulate.")
        origin = self.events[0].start if self.events else 0.0
        changes: list[tuple[float, int, float]] = []
        by_stage: dict[int, list[Event]] = defaultdict(list)
        for event in self.computing[rank]:
            by_stage[event.stage].append(event)
        for stage, lane in by_stage.items():
            size = self.sizes[stage]
            changes.append((origin, 1, size.parameter_bytes + size.optimizer_bytes))
            for begin, end in self._version_lives(lane, origin):
                changes += [(begin, 1, size.parameter_bytes), (end, 0, -size.parameter_bytes)]
            kept = size.input_bytes if self.recompute else size.saved_bytes
            for event in lane:
                if event.kind == "F":
                    changes.append((event.start, 1, kept))
                elif event.kind == "B":
                    changes.append((event.end, 0, -kept))
                    if self.recompute:
                        changes += [(event.start, 1, size.saved_bytes), (event.end, 0, -size.saved_bytes)]
        return _accumulated([change for change in changes if change[0] < math.inf])

    def peak_memory(self, rank: int) -> float:
        """Most bytes that ``rank`` holds at once."""
        return max((size for _, size in self.memory(rank)), default=0.0)

    def _version_lives(self, lane: Sequence[Event], origin: float) -> list[tuple[float, float]]:
        made: dict[int, float] = {}
        last_use: dict[int, float] = {}
        for event in lane:
            assert event.version is not None
            if event.kind == "U":
                made[event.version] = event.end
            else:
                last_use[event.version] = max(last_use.get(event.version, -math.inf), event.end)
        lives = []
        for version in sorted(set(made) | set(last_use)):
            newest_until = made.get(version + 1, math.inf if version >= max(made, default=0) else origin)
            lives.append((made.get(version, origin), max(newest_until, last_use.get(version, -math.inf))))
        return lives

    def compare(self, other: Timeline) -> Comparison:
        """This timeline over ``other``. Raises :class:`~telltale.errors.DataError` if their plans have other shapes."""
        if (self.replicas, self.chunks) != (other.replicas, other.chunks):
            raise DataError(f"{self.title!r} and {other.title!r} have different stages; expected the same ones.")
        if not self.minibatches or not other.minibatches:
            raise DataError(
                "a timeline without backward passes has nothing to compare; expected at least one minibatch."
            )
        mine, theirs = self._medians(), other._medians()
        return Comparison(
            _ratio(self.seconds_per_minibatch, other.seconds_per_minibatch),
            _ratio(self.makespan, other.makespan),
            {key: (mine[key], theirs[key]) for key in sorted(set(mine) & set(theirs))},
        )

    def _medians(self) -> dict[tuple[int, str], float]:
        reduced = {(e.rank, e.stage, e.version): e.seconds for e in self.events if e.kind == ALL_REDUCE}
        seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
        for lane in self.computing:
            for event in lane:
                waited = reduced.get((event.rank, event.stage, event.version), 0.0) if event.kind == "U" else 0.0
                seconds[event.stage, event.kind].append(waited + event.seconds)
        return {key: median(values) for key, values in seconds.items()}

    def save(self, path: str | Path) -> None:
        """Write the timeline as JSON, aside and then renamed."""
        document = {"format": FORMAT, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}
        document["sizes"] = None if self.sizes is None else [dataclasses.asdict(size) for size in self.sizes]
        document["fields"] = [field.name for field in dataclasses.fields(Event)]
        document["events"] = [[getattr(event, name) for name in document["fields"]] for event in self.events]
        write_atomically(Path(path), json.dumps(document) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read a timeline written by :meth:`save`. Raises :class:`~telltale.errors.DataError` naming what is wrong."""
        try:
            document = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"timeline {path} cannot be read: {error}.") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a pipeline timeline; expected a JSON file with format {FORMAT!r}.")
        try:
            names = document.pop("fields")
            events = tuple(Event(**dict(zip(names, row, strict=True))) for row in document.pop("events"))
            sizes = document.pop("sizes")
            stages = None if sizes is None else tuple(StageSizes(**size) for size in sizes)
            return cls(events, tuple(document.pop("replicas")), sizes=stages, **document)
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"timeline {path} has a missing or unknown field: {error}.") from error

    def chrome_trace(self) -> dict[str, Any]:
        """The run in Chrome's trace event format, for chrome://tracing or Perfetto: one process per rank."""
        return chrome_trace(self.events, self.ranks)

    def save_chrome_trace(self, path: str | Path) -> None:
        """Write :meth:`chrome_trace` as JSON, aside and then renamed."""
        write_atomically(Path(path), json.dumps(self.chrome_trace()) + "\n")


def _accumulated(changes: list[tuple[float, int, float]]) -> list[tuple[float, float]]:
    """Running totals of (when, releases first, amount); one entry per instant."""
    totals: list[tuple[float, float]] = []
    total = 0.0
    for when, _, amount in sorted(changes):
        total += amount
        if totals and totals[-1][0] == when:
            totals[-1] = (when, total)
        else:
            totals.append((when, total))
    return totals


def _ratio(first: float, second: float) -> float:
    return first / second if second else math.inf


COMPUTE = ("F", "B", "U")
"""Forward, backward, optimizer step. A recorded U begins when the worker starts to wait for the other replicas."""
ALL_REDUCE = "A"
"""From a worker's arrival at the all-reduce of its stage until the sum is there; simulated runs only."""
TRANSFERS = ("activation", "gradient")
"""A message on a link; the event's rank is the sender, its peer the receiver."""


@dataclass(frozen=True, slots=True)
class Event:
    """One operation or transfer. ``start`` and ``end`` are seconds from the start of the run."""

    rank: int
    stage: int
    replica: int
    kind: str
    minibatch: int
    start: float
    end: float
    version: int | None = None
    """Version of the weights that F and B use and U makes; None for transfers."""
    bytes: float = 0.0
    """What a transfer moves; for A, what each replica sends."""
    peer: int | None = None

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end - self.start


def steady_seconds(ends: Iterable[tuple[int, float]], alignment: int, makespan: float) -> float:
    """:attr:`Timeline.seconds_per_minibatch`, from (minibatch, second at which its backward through the first stage ends)."""
    ordered = sorted(ends)
    count, rounds = len(ordered), len(ordered) // alignment
    if rounds < 4:
        return makespan / count if count else 0.0
    completed = list(accumulate((end for _, end in ordered), max))
    low, high = rounds // 4 * alignment - 1, (rounds - rounds // 4) * alignment - 1
    return (completed[high] - completed[low]) / (high - low)


def chrome_trace(events: Iterable[Event], ranks: int) -> dict[str, Any]:
    """``events`` in Chrome's trace event format, for chrome://tracing or Perfetto: one process per rank."""
    records: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for rank in range(ranks)
    ]
    for number, event in enumerate(events):
        args: dict[str, Any] = {"minibatch": event.minibatch, "stage": event.stage, "replica": event.replica}
        optional = {"version": event.version, "bytes": event.bytes or None, "to rank": event.peer}
        args |= {name: value for name, value in optional.items() if value is not None}
        record = {"name": f"{event.kind} {event.minibatch}", "cat": event.kind, "pid": event.rank, "tid": 0}
        begin, end = 1e6 * event.start, 1e6 * event.end
        if event.kind in TRANSFERS:
            # Transfers of one rank overlap, which only asynchronous events may.
            record["id"] = number
            records.append({**record, "ph": "b", "ts": begin, "args": args})
            records.append({**record, "ph": "e", "ts": end})
        else:
            records.append({**record, "ph": "X", "ts": begin, "dur": end - begin, "args": args})
    return {"traceEvents": records, "displayTimeUnit": "ms"}


def describe(event: Event) -> str:
    """The event in words, for messages."""
    return f"{event.kind}{event.minibatch} of rank {event.rank} (stage {event.stage})"
