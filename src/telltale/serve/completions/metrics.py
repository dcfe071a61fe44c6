"""Counters, gauges and histograms in Prometheus' text format (version 0.0.4). Any thread may write; labels are never user text."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets."""

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only rises, one for each combination of labels."""

    kind = "counter"

    def __init__(self, name: str, help_text: str) -> None:
        self.name, self.help_text = name, help_text
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Raise it."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        """Where it stands; 0 before the first :meth:`add`."""
        return self._values.get(tuple(sorted(labels.items())), 0)

    def lines(self) -> list[str]:
        """Samples in text form."""
        with self._lock:
            values = dict(self._values)
        return [f"{self.name}{_labels(key)} {_number(value)}" for key, value in sorted(values.items())]


class Histogram:
    """How often a number of seconds fell below each of ``bounds``."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.help_text, self.bounds = name, help_text, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def observe(self, seconds: float) -> None:
        """Take one in."""
        with self._lock:
            self._counts[bisect_left(self.bounds, seconds)] += 1
            self._sum += seconds

    def lines(self) -> list[str]:
        """Samples in text form."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, below = [], 0
        for bound, count in zip([*map(_number, self.bounds), "+Inf"], counts, strict=True):
            below += count
            found.append(f'{self.name}_bucket{{le="{bound}"}} {below}')
        return [*found, f"{self.name}_sum {_number(total)}", f"{self.name}_count {below}"]


class Gauges:
    """Numbers that are looked up when somebody asks: ``read`` gives the value of each (name, label value)."""

    kind = "gauge"

    def __init__(self, name: str, help_text: str, read: Callable[[], Mapping[str, float]], label: str = "") -> None:
        self.name, self.help_text, self.read, self.label = name, help_text, read, label

    def lines(self) -> list[str]:
        """Samples in text form."""
        return [
            f"{self.name}{_labels(((self.label, key),) if self.label else ())} {_number(value)}"
            for key, value in self.read().items()
        ]


class Metrics:
    """Everything that the server counts."""

    def __init__(self) -> None:
        self.requests = Counter(
            "telltale_requests_total", "Requests by endpoint and HTTP status; 499 means that the client went away."
        )
        self.prompt_tokens = Counter("telltale_prompt_tokens_total", "Tokens of prompts that were admitted.")
        self.tokens = Counter(
            "telltale_tokens_total", "Tokens of outputs by the model that wrote them; speculated ones were confirmed."
        )
        self.unused_tokens = Counter(
            "telltale_unused_tokens_total", "Tokens that were drafted and did not become output."
        )
        self.steps = Counter("telltale_steps_total", "Drafted steps, accepted or rejected.")
        self.outputs = Counter("telltale_outputs_total", "Outputs by the reason for which they ended.")
        self.failures = Counter("telltale_engine_failures_total", "Turns that failed and ended every row.")
        self.turns = Counter("telltale_turns_total", "Turns of the decoding thread.")
        for plain in (self.prompt_tokens, self.failures, self.turns):
            # A counter that first shows up at 1 has never risen, as Prometheus sees it: no alert would fire.
            plain.add(0)
        self.first_step = Histogram(
            "telltale_time_to_first_step_seconds", "From a request's arrival to the first step, or token, of a row."
        )
        self.step = Histogram(
            "telltale_step_seconds", "From a row's committed step, or token, to its next; the first one excluded."
        )
        self.waiting = Histogram("telltale_queue_seconds", "From a request's arrival to the admission of a row.")
        self.request = Histogram("telltale_request_seconds", "From a request's arrival to the end of its last row.")
        self.gauges: list[Gauges] = []

    def text(self) -> str:
        """All of it, as a scraper reads it."""
        found: list[str] = []
        own = [value for value in vars(self).values() if isinstance(value, (Counter, Histogram))]
        for metric in [*own, *self.gauges]:
            found += [
                f"# HELP {metric.name} {metric.help_text}",
                f"# TYPE {metric.name} {metric.kind}",
                *metric.lines(),
            ]
        return "\n".join(found) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
