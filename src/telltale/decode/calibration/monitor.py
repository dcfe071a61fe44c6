"""Is a calibration's promise still kept? Audits of what a deployed guard does, and evidence that one may look at at any time.

Of a sampled share of outputs one drafted step is drawn at random; its loss is 1 if it was accepted and the audit finds it wrong (or
finds that the target disagrees). So the mean loss is the risk that was calibrated: the mean over problems of the share of drafted
steps that were accepted and wrong. A rejected step costs no audit. Losses count in the order in which steps were drawn: were
rejected ones counted while audits hang or fail, a stream without any audit would look like one without any wrong step.

Two betting arguments (Waudby-Smith and Ramdas, arXiv 2010.09686), valid at every moment together by Ville's inequality:

* :class:`DriftTest` bets against "the mean loss is at most the limit". Its wealth is a supermartingale as long as that holds,
  so it reaches 1/level with probability at most ``level``, ever. Part of the money is kept for bets that begin later, so that a
  rate that rises after a long good time is found.
* :func:`rate_interval` is the confidence sequence of the Krichevsky-Trofimov bettor: all rates that have not lost 1/level.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln

from telltale.config import check_choice, check_range, check_seed
from telltale.decode.results import StepRecord
from telltale.errors import ConfigError

Floats = NDArray[np.float64]
MULTIPLES = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Rates, in multiples of the limit, that are bet on with equal shares."""
KINDS = ("wrong", "disagreement")
"""What an audit finds: a checker that a step is wrong, or the target that it would not have written it."""
ACTIONS = ("withdraw", "raise")
LEVEL = 0.05
STALLED = 256
"""Draws that may wait for an audit to end; with more, the audits have stalled."""


@dataclass(eq=False)
class Draw:
    """A step that was drawn: of an accepted one ``loss`` is None until its audit has ended."""

    place: int
    """Among the steps of its output."""
    threshold: float | None
    """That of its time."""
    audited: bool
    loss: float | None = None
    settled: bool = False
    failed: bool = False
    """Whether its audit could not be made."""


class DriftTest:
    """Evidence that a mean loss is above ``limit``, for ``streams`` of losses at a time.

    After each loss ``wealth`` (streams,) is what a unit has become; "at most ``limit``" is refuted at level 1/wealth.
    """

    def __init__(self, limit: float, *, streams: int = 1) -> None:
        self.limit = check_range("limit", limit, above=0.0, below=1.0)
        rates = np.array([rate for rate in (factor * limit for factor in MULTIPLES) if rate < 1] or [(1 + limit) / 2])
        self._bets: Floats = (rates - limit) / (limit * (1 - limit))
        self._wealth: Floats = np.zeros((streams, len(rates)))
        self.count = 0
        """Losses of each stream so far."""

    @property
    def wealth(self) -> Floats:
        """What is in the bets, and what is kept for later ones; (streams,)."""
        kept: Floats = self._wealth.mean(1) + _kept(self.count)
        return kept

    def update(self, losses: Floats | float) -> Floats:
        """Take one loss in [0, 1] of each stream, (streams,); returns the wealth."""
        # Every loss may be the first of the time after the change: a bet begins with each.
        self._wealth += _kept(self.count) - _kept(self.count + 1)
        self._wealth *= 1 + self._bets * (np.reshape(losses, (-1, 1)) - self.limit)
        self.count += 1
        return self.wealth


def _kept(count: int) -> float:
    """The share of the money that is not in a bet after so many losses: it falls slowly, so that late bets have some."""
    return 1 / (1 + math.log1p(count))


def rate_interval(events: float, count: float, *, level: float = LEVEL) -> tuple[float, float]:
    """A confidence sequence of a constant rate, of which ``events`` happened in ``count`` trials.

    It holds at all times together with probability 1 - ``level``.
    """
    if count <= 0:
        return 0.0, 1.0
    known = betaln(events + 0.5, count - events + 0.5) - betaln(0.5, 0.5)

    def excluded(rate: float) -> bool:
        against = (events * math.log(rate) if events else 0.0) + (
            (count - events) * math.log1p(-rate) if count > events else 0.0
        )
        return bool(known - against >= math.log(1 / level))

    found = []
    middle = min(max(events / count, 1e-12), 1 - 1e-12)
    for edge in (0.0, 1.0):
        out, inside = edge, middle
        # The wealth against a rate rises on both sides of the share that was seen.
        for _ in range(60):
            half = (out + inside) / 2
            out, inside = (half, inside) if half in (0.0, 1.0) or excluded(half) else (out, half)
        found.append(edge if (edge == 0.0 and not events) or (edge == 1.0 and events == count) else out)
    return found[0], found[1]


class GuardMonitor:
    """What audits of a deployed guard have shown. Any thread may call it.

    ``share``: of outputs that are looked at. ``kind``: what an audit finds. ``limit``: the risk that was promised; None only
    counts. ``thresholds``: higher ones that were tried, for ``on_drift`` "raise"; it goes through them, rising, then nothing is
    accepted. The promise is withdrawn at the first alarm in either case: the problems are no longer like those it was made on. All
    alarms together are false with probability at most ``level``. ``unknown``: how a step that an audit cannot judge is counted:
    "skip", "wrong" or "right".
    """

    def __init__(
        self,
        *,
        share: float,
        kind: str,
        limit: float | None,
        thresholds: Sequence[float] = (),
        on_drift: str = "withdraw",
        level: float = LEVEL,
        unknown: str = "skip",
        seed: int = 0,
    ) -> None:
        self.share = check_range("share", share, above=0.0, high=1.0)
        check_choice("kind", kind, KINDS)
        check_choice("on_drift", on_drift, ACTIONS)
        check_choice("unknown", unknown, ("skip", "wrong", "right"))
        check_range("level", level, above=0.0, below=1.0)
        check_seed(seed)
        if on_drift == "raise" and limit is None:
            raise ConfigError("on_drift='raise' needs a limit that the risk may exceed; give one, or 'withdraw'.")
        self.kind, self.limit, self.on_drift, self.level, self.unknown = kind, limit, on_drift, level, unknown
        self.threshold: float | None = None
        """What steps must reach since the last alarm; None as long as that is the guard's own threshold."""
        self.alarms = 0
        self.counts = {"right": 0, kind: 0, "unknown": 0, "rejected": 0, "skipped": 0}
        """Steps that were drawn, by what became of them; those of earlier thresholds included."""
        self._order: deque[Draw] = deque()
        self._failing = False
        self._higher = sorted(set(thresholds)) if on_drift == "raise" else []
        self._chance = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._begin()

    @property
    def kept(self) -> bool:
        """Whether nothing speaks against the promise."""
        return self.alarms == 0

    @property
    def watching(self) -> bool:
        """Whether audits come to an end. While they hang or fail nothing is counted, and the promise is not watched."""
        return not self._failing and len(self._order) < STALLED

    @property
    def evidence(self) -> float:
        """Wealth of the bet against the promise, at most; 1/level, or more after an alarm, withdraws it."""
        return self._highest

    def draw(self, steps: Sequence[StepRecord]) -> Draw | None:
        """The step of a finished output that is to be audited; None if the output, or the step, needs no audit."""
        places = [place for place, step in enumerate(steps) if step.source == "draft" or step.rejected is not None]
        with self._lock:
            if not places or self._chance.random() >= self.share:
                return None
            place = places[int(self._chance.integers(len(places)))]
            accepted = steps[place].source == "draft"
            if not accepted:
                self.counts["rejected"] += 1
            found = self._drawn(Draw(place, self.threshold, accepted, None if accepted else 0.0, settled=not accepted))
            return found if accepted else None

    def record(self, bad: bool | None, *, of: Draw | None = None, threshold: float | None = None) -> None:
        """What the audit ``of`` an accepted step found. One that was accepted at an older threshold than today's only counts.

        Without ``of`` the step was drawn elsewhere, and accepted at ``threshold``.
        """
        name = "unknown" if bad is None else self.kind if bad else "right"
        with self._lock:
            self.counts[name] += 1
            draw = of or self._drawn(Draw(0, threshold, True))
            if bad is not None or self.unknown != "skip":
                draw.loss = float(self.unknown == "wrong" if bad is None else bad)
            self._settle(draw)

    def skip(self, of: Draw | None = None, *, failed: bool = True) -> None:
        """The step ``of`` could not be audited: the audit failed, the server was busy, or (not ``failed``) the step has no end."""
        with self._lock:
            self.counts["skipped"] += 1
            draw = of or self._drawn(Draw(0, self.threshold, True))
            draw.failed = failed
            self._settle(draw)

    def interval(self) -> tuple[float, float, float]:
        """Lower bound, estimate and upper bound of the rate at the threshold of today; NaN without a step drawn."""
        with self._lock:
            events, count = self._events, self._count
        low, high = rate_interval(events, count)
        return low, events / count if count else math.nan, high

    def describe(self) -> Mapping[str, Any]:
        """As servers list it."""
        return {
            "share": self.share,
            "finds": self.kind,
            "limit": self.limit,
            "level": self.level,
            "on_drift": self.on_drift,
            "promise": "kept" if self.kept else "withdrawn",
            "watching": self.watching,
            "alarms": self.alarms,
            "threshold": None if self.threshold is None else str(self.threshold),
        }

    def _drawn(self, draw: Draw) -> Draw:
        if len(self._order) >= 2 * STALLED and not draw.audited:
            # Nothing counts behind the audit that hangs, so what is left out here is told by a failure in its place.
            if not self._order[-1].failed:
                self._order.append(Draw(draw.place, draw.threshold, True, settled=True, failed=True))
            return draw
        self._order.append(draw)
        self._settle(draw, settled=draw.settled)
        return draw

    def _settle(self, draw: Draw, *, settled: bool = True) -> None:
        """Count what is known, in the order of the draws. After a failed audit nothing counts until one has ended, that one
        included: so losses are never higher on average than those of all steps that were drawn."""
        draw.settled = settled
        while self._order and self._order[0].settled:
            first = self._order.popleft()
            if first.failed:
                self._failing = True
            elif self._failing:
                self._failing = not first.audited
            elif first.loss is not None and first.threshold == self.threshold:
                self._take(first.loss)

    def _begin(self) -> None:
        self._events, self._count, self._highest = 0.0, 0, 1.0
        self._test = None if self.limit is None else DriftTest(self.limit)

    def _take(self, loss: float) -> None:
        self._events += loss
        self._count += 1
        if self._test is None:
            return
        self._highest = max(self._highest, float(self._test.update(loss)[0]))
        # The k-th threshold has 2^-k of the level: all of them together have no more than it.
        if self._highest < 2 ** (self.alarms + (self.on_drift == "raise")) / self.level:
            return
        if self.on_drift == "withdraw":
            self.alarms = 1
            return
        self.alarms += 1
        today = -math.inf if self.threshold is None else self.threshold
        self.threshold = next((one for one in self._higher if one > today), math.inf)
        self._begin()
