"""Bytes that one request may take, and the frame that fills them and never exceeds them.

A budget is a number of bytes on the socket: index set, header, payload and WebSocket header. It is fixed, or follows the measured
uplink and the deadline. The packer searches and verifies: sizes of WebP and JPEG depend on content and are not monotone.
NumPy and Pillow only; no PyTorch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from telltale.config import check_integer, check_range
from telltale.edge.codecs import QUALITIES, codec_named
from telltale.edge.wire import OVERHEAD, Frame, websocket_header
from telltale.errors import BudgetError, ConfigError

DEFAULT_QUALITY = 50
TLS_RECORD = 22
"""Bytes that TLS 1.3 adds to each record of at most 16 KiB."""


class BudgetTooSmall(BudgetError):
    """Not even one patch, or the coarsest whole image, fits."""


@dataclass(frozen=True)
class Space:
    """What the packer has to know of the receiver: grid, patch side in pixels, number of the model."""

    rows: int
    columns: int
    patch: int
    model: int = 0


def pack(
    image: np.ndarray,
    choose: Callable[[int], Sequence[int]],
    *,
    space: Space,
    codec: str,
    limit: int,
    count: int | None = None,
    setting: int | None = None,
    request: int = 0,
    deadline: int = 0,
    tls: bool = False,
    until: float | None = None,
) -> Frame:
    """The best frame of at most ``limit`` bytes on the socket.

    image: (height, width, 3) uint8. choose: the selection of a given number of patches, in any order; -1 is left out.
    count: patches to send, at the best setting that fits (fewer patches if none does). None: as many as fit at ``setting``, by
    default quality 50; the next coarser one if it holds no patch, a better one if it holds all. Codecs of whole images take the
    best setting that fits.

    until: the time (``time.monotonic()``) at which the search ends with the best frame that it has; it begins with small ones.

    Raises :class:`BudgetTooSmall` if nothing fits, or nothing was found in time.
    """
    kind = codec_named(codec)
    height, width = space.rows * space.patch, space.columns * space.patch
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ConfigError(
            f"the image has shape {image.shape} and type {image.dtype}; expected uint8 ({height}, {width}, 3)."
        )
    check_integer("limit", limit, low=0)

    longest = 0.0

    def attempt(number: int, chosen_setting: int) -> Frame | None:
        nonlocal longest
        began = time.monotonic()
        if until is not None and began + 1.5 * longest > until:
            return None
        indices = sorted(int(index) for index in choose(number) if index >= 0) if number else []
        payload = kind.encode(image, indices, space.patch, chosen_setting)
        frame = Frame(
            *(request, space.model, codec, chosen_setting, limit, min(max(deadline, 0), 65_535)),
            *(space.rows, space.columns, space.patch, tuple(indices), payload),
        )
        size = on_socket(len(frame.encode()), tls=tls)
        longest = max(longest, time.monotonic() - began)
        return frame if size <= limit else None

    if OVERHEAD + websocket_header(OVERHEAD) >= limit:
        raise _too_small(limit, codec)
    if not kind.uses_patches:
        settings = range(kind.settings) if setting is None else [setting]
        found = _finest(attempt, 0, settings)
    elif count is not None:
        check_integer("count", count, low=1, high=space.rows * space.columns)
        settings = range(kind.settings) if setting is None else [setting]
        found = _finest(attempt, count, settings)
        found = found or _most(attempt, count, settings[-1])
    else:
        start = _default_setting(kind.settings) if setting is None else setting
        coarser: Sequence[int] = range(start, kind.settings) if setting is None else [setting]
        every = space.rows * space.columns
        found = next((frame for each in coarser if (frame := _most(attempt, every, each))), None)
        if found is not None and len(found.indices) == every and setting is None:
            found = _finest(attempt, every, range(start)) or found
    if found is None:
        if until is not None and time.monotonic() + 1.5 * longest > until:
            raise BudgetTooSmall(f"no {codec} frame of {limit} bytes was found before the deadline; give more time.")
        raise _too_small(limit, codec)
    return found


def on_socket(length: int, *, tls: bool = False) -> int:
    """Bytes from client to server of a message of ``length`` bytes: WebSocket header, mask and, if on, TLS records."""
    framed = length + websocket_header(length)
    return framed + (TLS_RECORD * -(-framed // 16_384) if tls else 0)


class ByteBudget:
    """How many bytes the next request may take.

    fixed: that many, always; or, if None, what the uplink carries before the deadline: with the harmonic mean R of the last
    ``window`` measured uplinks, R (deadline - edge - server - round trip - guard), at least ``floor`` or nothing, at most
    ``ceiling``. Where that is nothing, a request of ``floor`` bytes still probes the uplink every ``retry`` seconds: a link that
    was slow once would never be measured again. Both may be given: then ``fixed`` is the cap. Rates in bytes per second, times in
    seconds.
    """

    def __init__(
        self,
        fixed: int | None = None,
        *,
        adaptive: bool | None = None,
        floor: int = 128,
        ceiling: int = 1 << 18,
        guard: float = 0.02,
        window: int = 5,
        first_rate: float = 8_000.0,
        retry: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if fixed is not None:
            check_integer("bytes", fixed, low=1)
        check_integer("floor", floor, low=1)
        check_integer("window", window, low=1)
        check_range("guard", guard, low=0.0)
        check_range("first_rate", first_rate, low=1.0)
        check_range("retry", retry, low=0.0)
        self.fixed = fixed
        self.adaptive = fixed is None if adaptive is None else adaptive
        self.floor, self.guard, self.first_rate = floor, guard, first_rate
        self.ceiling = ceiling if fixed is None else fixed
        self._rates: deque[float] = deque(maxlen=window)
        self._round_trip: deque[float] = deque(maxlen=window)
        self._server: deque[float] = deque(maxlen=window)
        self._retry, self._clock = retry, clock
        self._measured = clock()

    def observe(self, sent: int, seconds: float, *, server: float = 0.0) -> None:
        """A request of ``sent`` bytes was answered after ``seconds``; the server says that its model took ``server`` of them.

        No server takes longer than the answer, whatever it says; no round trip does either.
        """
        server = min(max(server, 0.0), seconds)
        if seconds - server < self.round_trip:
            self._round_trip.append(seconds - server)
        moving = max(seconds - server - self.round_trip, 1e-6)
        self._rates.append(sent / moving)
        self._measured = self._clock()
        self._server.append(server)

    def observe_round_trip(self, seconds: float) -> None:
        """A message without weight came back after ``seconds``."""
        self._round_trip.append(seconds)

    def observe_failure(self, sent: int, seconds: float) -> None:
        """No answer to ``sent`` bytes within ``seconds``: the uplink is at most so fast."""
        self._measured = self._clock()
        self._rates.append(max(1.0, min(self.rate, sent / max(seconds, 1e-6)) / 2))

    @property
    def rate(self) -> float:
        """Bytes per second: the harmonic mean of the last uplinks, ``first_rate`` before the first."""
        rates = tuple(self._rates)  # another thread may add to them meanwhile
        return len(rates) / sum(1 / rate for rate in rates) if rates else self.first_rate

    @property
    def round_trip(self) -> float:
        """Seconds: the smallest of the last round trips."""
        return min(self._round_trip, default=0.0)

    @property
    def stale(self) -> bool:
        """Whether the uplink was last measured ``retry`` seconds ago or longer: a request may go to measure it again."""
        return self._clock() - self._measured >= self._retry

    def bytes(self, remaining: float | None = None) -> int:
        """Bytes for a request that must be answered in ``remaining`` seconds; 0: do not send."""
        if not self.adaptive or remaining is None:
            return self.ceiling
        server = sum(self._server) / len(self._server) if self._server else 0.0
        fits = self.rate * (remaining - server - self.round_trip - self.guard)
        if fits >= self.floor:
            return min(int(fits), self.ceiling)
        return min(self.floor, self.ceiling) if self.stale else 0


def _most(attempt: Callable[[int, int], Frame | None], largest: int, setting: int) -> Frame | None:
    """The frame with the most patches that fits: doubling, then bisection, which verify each size that they keep."""
    best: Frame | None = None
    low, high = 0, 1
    while (frame := attempt(high, setting)) is not None:
        if high == largest:
            return frame
        low, best, high = high, frame, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        frame = attempt(middle, setting)
        if frame is None:
            high = middle
        else:
            low, best = middle, frame
    return best


def _finest(attempt: Callable[[int, int], Frame | None], number: int, settings: Sequence[int]) -> Frame | None:
    """The frame of ``number`` patches at the first of ``settings`` (best first) that fits, by bisection."""
    best: Frame | None = None
    low, high = -1, len(settings)
    while high - low > 1:
        middle = (low + high) // 2
        frame = attempt(number, settings[middle])
        if frame is None:
            low = middle
        else:
            high, best = middle, frame
    return best


def _default_setting(settings: int) -> int:
    return QUALITIES.index(DEFAULT_QUALITY) if settings == len(QUALITIES) else 0


def _too_small(limit: int, codec: str) -> BudgetTooSmall:
    return BudgetTooSmall(
        f"a budget of {limit} bytes holds no {codec} frame (its header alone takes {OVERHEAD + websocket_header(OVERHEAD)}); "
        "give more bytes or another codec."
    )
