"""What the server counts, for Prometheus. Any thread may write; labels are never user text.

Every application has a registry of its own, so that two in one process do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from telltale.errors import MissingExtraError
from telltale.serve.http_errors import MISSING_EXTRA

try:
    import prometheus_client
    from prometheus_client import CollectorRegistry, Histogram, generate_latest
    from prometheus_client.core import GaugeMetricFamily, Metric
except ImportError as error:
    raise MissingExtraError(MISSING_EXTRA) from error

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets."""


class Counter(prometheus_client.Counter):
    """A number that only rises, one for each combination of labels."""

    def add(self, amount: float = 1, **labels: str) -> None:
        """Raise it."""
        (self.labels(**labels) if labels else self).inc(amount)


@dataclass(frozen=True)
class Gauges:
    """Numbers that are read when the metrics are scraped: ``read`` gives the value of each value of ``label``; "" without one."""

    name: str
    help_text: str
    read: Callable[[], Mapping[str, float]]
    label: str = ""

    def family(self) -> Metric:
        """The samples of this moment."""
        found = GaugeMetricFamily(self.name, self.help_text, labels=[self.label] if self.label else [])
        for key, value in self.read().items():
            found.add_metric([key] if self.label else [], value)
        return found


class Metrics:
    """Everything that the server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gauges: list[Gauges] = []

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, labels, registry=self.registry)

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(name, help_text, buckets=SECONDS, registry=self.registry)

        self.requests = counter(
            "telltale_requests_total",
            "Requests by endpoint and HTTP status; 499 means that the client went away.",
            "endpoint",
            "status",
        )
        self.prompt_tokens = counter("telltale_prompt_tokens_total", "Tokens of prompts that were admitted.")
        self.reused_tokens = counter(
            "telltale_prompt_tokens_reused_total",
            "Of these, tokens that were not read: another choice of the request or an earlier one had read them.",
        )
        self.cached_tokens = counter(
            "telltale_prompt_tokens_cached_total",
            "Of the tokens that were not read, those that the cache of prefixes had.",
        )
        self.tokens = counter(
            "telltale_tokens_total",
            "Tokens of outputs by the model that wrote them; speculated ones were confirmed.",
            "source",
        )
        self.unused_tokens = counter(
            "telltale_unused_tokens_total", "Tokens that were drafted and did not become output.", "why"
        )
        self.steps = counter("telltale_steps_total", "Drafted steps, accepted or rejected.", "outcome")
        self.outputs = counter("telltale_outputs_total", "Outputs by the reason for which they ended.", "reason")
        self.failures = counter("telltale_engine_failures_total", "Turns that failed and ended every row.")
        self.turns = counter("telltale_turns_total", "Turns of the decoding thread.")
        self.first_step = histogram(
            "telltale_time_to_first_step_seconds", "From a request's arrival to the first step, or token, of a row."
        )
        self.step = histogram(
            "telltale_step_seconds", "From a row's committed step, or token, to its next; the first one excluded."
        )
        self.waiting = histogram("telltale_queue_seconds", "From a request's arrival to the admission of a row.")
        self.request = histogram("telltale_request_seconds", "From a request's arrival to the end of its last row.")

    def value(self, name: str, **labels: str) -> float:
        """A sample's value; 0 for a combination of labels that was never counted."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def text(self) -> str:
        """All of it, as a scraper reads it."""
        return generate_latest(_Collected(self)).decode()


class _Collected:
    """What is written out: no time of creation beside every counter, and the gauges of this moment."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Any]:
        families: Iterable[Metric] = self.metrics.registry.collect()
        for family in families:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
        for gauges in self.metrics.gauges:
            yield gauges.family()
