"""One operation or transfer of a pipeline run, and a list of them as a Chrome trace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
