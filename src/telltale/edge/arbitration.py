"""Whose answer counts: the edge's, the server's, or both; and when to stop asking a server that fails. NumPy only.

A server that sees few patches can be worse than the edge that sees all (the published system is, below 52 of 196 patches). The
fused answer is argmax_c log p_edge + w log p_server with one weight per budget, fitted on held-out data; w = 0 is the edge alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError

Array = np.ndarray
POLICIES = {
    "fused": "log p_edge + w log p_server, w fitted per budget",
    "edge": "the edge always",
    "server": "the server always",
    "max_confidence": "the one with the larger top probability",
}
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Weights that a fit chooses from."""


@dataclass(frozen=True)
class Arbiter:
    """Combines log-probabilities of edge and server. ``weights``: server weight by budget (patches or bytes, as it was fitted).

    Between fitted budgets the largest one that is not above counts; below the smallest the weight is 0: the edge alone.
    """

    policy: str = "fused"
    weights: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES)
        for budget, weight in self.weights.items():
            check_integer("budget", budget, low=0)
            check_range(f"weights[{budget}]", weight, low=0.0)

    def weight(self, budget: int) -> float:
        """The server's weight at ``budget``."""
        known = [fitted for fitted in self.weights if fitted <= budget]
        return self.weights[max(known)] if known else 0.0

    def heeds(self, budget: int | None = None) -> bool:
        """Whether the server's answer can count at ``budget`` (None: at any): one that cannot is not worth its bytes."""
        if self.policy != "fused":
            return self.policy != "edge"
        return any(self.weights.values()) if budget is None else self.weight(budget) > 0.0

    def decide(self, edge: Array, server: Array, budget: int) -> tuple[Array, str]:
        """Log-probabilities (..., classes), normalised, and whose they are: ``edge``, ``server`` or ``fused``."""
        if edge.shape != server.shape:
            raise DataError(f"edge and server gave {edge.shape} and {server.shape}; expected the same classes.")
        if self.policy == "edge":
            return edge, "edge"
        if self.policy == "server":
            return server, "server"
        if self.policy == "max_confidence":
            surer = server.max(axis=-1, keepdims=True) > edge.max(axis=-1, keepdims=True)
            source = ("server" if surer.all() else "edge") if edge.ndim == 1 else "fused"
            return np.where(surer, server, edge), source
        weight = self.weight(budget)
        if weight == 0.0:
            return edge, "edge"
        mixed = np.maximum(edge, -80.0) + weight * np.maximum(server, -80.0)
        return mixed - _log_sum_exp(mixed), "fused"


def fit_weight(edge: Array, server: Array, labels: Array) -> float:
    """The weight of :data:`WEIGHTS` with most right answers on held-out images; the smallest of equals.

    edge, server: log-probabilities (images, classes). labels: (images,). A weight has to win by more than one standard error of
    the paired difference from the edge alone: otherwise 0.
    """
    if not len(labels):
        raise DataError("no held-out images were given; a fusion weight needs some that the gate offloads.")
    alone = edge.argmax(axis=-1) == labels
    best, best_right = 0.0, alone
    for weight in WEIGHTS[1:]:
        right = (np.maximum(edge, -80.0) + weight * np.maximum(server, -80.0)).argmax(axis=-1) == labels
        if right.sum() > best_right.sum():
            best, best_right = weight, right
    difference = best_right.astype(float) - alone
    error = difference.std() / np.sqrt(len(labels))
    return best if difference.mean() > error else 0.0


def fit_arbiter(edge: Array, server: Mapping[int, Array], labels: Array) -> Arbiter:
    """An :class:`Arbiter` with a weight fitted for each budget of ``server``: log-probabilities (images, classes) by budget."""
    if not server:
        raise ConfigError("no budgets were given; expected log-probabilities of the server for at least one.")
    return Arbiter("fused", {budget: fit_weight(edge, values, labels) for budget, values in server.items()})


class CircuitBreaker:
    """Stops requests to a server that fails: after ``failures`` in a row for ``pause`` seconds, then one probe at a time.

    A probe that succeeds closes the circuit; one that fails doubles the pause, up to ``longest`` seconds.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        pause: float = 1.0,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_integer("failures", failures, low=1)
        check_range("pause", pause, low=0.0)
        check_range("longest", longest, low=pause)
        self.failures, self.first_pause, self.longest = failures, pause, longest
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._pause = pause
        self._open_until: float | None = None
        self._probing = False

    @property
    def state(self) -> str:
        """``closed`` (requests pass), ``open`` (none pass) or ``half-open`` (one probe passes)."""
        with self._lock:
            return self._state()

    def allow(self) -> bool:
        """Whether a request may go now; in half-open state only the first that asks. Follow it with success or failure."""
        with self._lock:
            state = self._state()
            if state == "half-open" and not self._probing:
                self._probing = True
                return True
            return state == "closed"

    def success(self) -> None:
        """A request was answered."""
        with self._lock:
            self._in_a_row, self._pause, self._open_until, self._probing = 0, self.first_pause, None, False

    def failure(self) -> None:
        """A request failed."""
        with self._lock:
            self._in_a_row += 1
            if self._probing:
                self._pause = min(2 * self._pause, self.longest)
            if self._probing or (self._in_a_row >= self.failures and self._open_until is None):
                self._open_until = self._clock() + self._pause
            self._probing = False

    def release(self) -> None:
        """A request that :meth:`allow` let pass was not sent after all."""
        with self._lock:
            self._probing = False

    def _state(self) -> str:
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half-open"


def _log_sum_exp(values: Array) -> Array:
    top = values.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
