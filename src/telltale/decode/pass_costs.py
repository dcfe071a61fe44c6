"""What passes of one decoder cost in seconds, measured at a few widths and composed by LayerSkip's cost model.

A round that drafts k tokens at exit E costs ``draft(E, k) + verify(E, k + 1)``, with ``draft = call + (k + 1) E c + k h(E)``
and ``verify(E, n) = call + (L - E) layer(n) + head(n)``: k draft steps of E layers and a head each, the early pass of the last
drafted token, and the other layers once on all of them. The planner corrects these numbers by the rounds that it runs.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from telltale.models.decoder import Decoder

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17)
_FEW_WIDTHS = (1, 2, 4, 8, 17)
"""Widths of an expensive model; between them costs are interpolated."""
_CONTEXT = 64
_SECONDS_PER_PASS = 2e-3
"""Measuring a pass goes on for about this long, twice at least: short passes are the noisy ones."""

_KNOWN: WeakKeyDictionary[Decoder, dict[tuple[int, bool], PassCosts]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PassCosts:
    """Pass costs in seconds of one decoder at one batch size; plain numbers, so that they can be kept in a file."""

    layers: int
    head: float
    """What the LM head costs, in layers."""
    plain: float
    """A plain decoding step."""
    call: float
    """What a pass costs beside its layers and head."""
    draft_call: float
    """The same of a whole draft."""
    step: float
    """A layer in a single-token step."""
    widths: tuple[int, ...]
    by_width: tuple[float, ...]
    """A layer on each of ``widths`` tokens."""
    draft_heads: tuple[tuple[int, float], ...] = ()
    """Exits with a way of their own to the draft, and what it costs in layers."""

    def draft_step(self, exit_layer: int) -> float:
        """One draft step: E layers and the head that reads their state."""
        return (exit_layer + self.draft_head(exit_layer)) * self.step

    def draft_head(self, exit_layer: int) -> float:
        """What leads from an exit's state to a draft, in layers: a way of its own, else the LM head."""
        return dict(self.draft_heads).get(exit_layer, self.head)

    def draft(self, exit_layer: int, length: int) -> float:
        """``length`` draft steps at ``exit_layer`` and the early pass of the last drafted token."""
        return self.draft_call + length * self.draft_step(exit_layer) + exit_layer * self.step

    def verify(self, exit_layer: int, width: int) -> float:
        """Layers E..L-1 and the head on ``width`` tokens."""
        return self.call + (self.layers - exit_layer + self.head) * self._at(width)

    def round(self, exit_layer: int, length: int) -> float:
        """One self-speculation round: ``length`` drafts at exit E and their verification."""
        return self.draft(exit_layer, length) + self.verify(exit_layer, length + 1)

    def score(self, width: int) -> float:
        """All layers and the head on ``width`` tokens."""
        return self.verify(0, width)

    def speedup(self, exit_layer: int, length: int, acceptance_rate: float) -> float:
        """Tokens per second over plain decoding if this part of the drafted tokens is accepted: (1 + r d) tokens a round."""
        return (1.0 + acceptance_rate * length) * self.plain / self.round(exit_layer, length)

    def relative(self, width: int) -> float:
        """V(n): what a layer costs for ``width`` tokens, over what it costs for one."""
        return self._at(width) / max(self._at(1), 1e-12)

    def _at(self, width: int) -> float:
        """One layer on ``width`` tokens."""
        place = bisect_left(self.widths, width)
        if place == len(self.widths):
            return self.by_width[-1] * width / self.widths[-1]
        if place == 0 or self.widths[place] == width:
            return self.by_width[place]
        low, high = self.widths[place - 1], self.widths[place]
        share = (width - low) / (high - low)
        return self.by_width[place - 1] * (1 - share) + self.by_width[place] * share


def measure_passes(decoder: Decoder, batch: int) -> PassCosts:
    """Time passes of ``batch`` rows: about thirty plain steps of an expensive model, a few milliseconds a width of a small one."""
    layers, clock = decoder.layers, clock_of(decoder)
    context = max(0, min(_CONTEXT, decoder.max_positions - 2 * WIDTHS[-1]))
    widths = [width for width in WIDTHS if context + width < decoder.max_positions] or [1]
    cache = decoder.new_cache(batch, context + 2 * widths[-1])
    at, tokens = [context] * batch, [0] * batch

    def verified(width: int) -> float:
        states = torch.zeros(batch, width, decoder.hidden_size, dtype=decoder.dtype, device=decoder.device)
        return _shortest(lambda: decoder.verify_greedy(states, at, exit_layer=0, cache=cache), clock)

    # Layers and head are weighed by their parameters, not timed apart: a layer that runs alone stays in the processor's
    # cache and looks several times cheaper than it is among the others.
    layer_size = sum(parameter.numel() for parameter in decoder.parts.layers[0].parameters())
    weighed = {layer: decoder.draft_head_weight(layer) / max(layer_size, 1) for layer in range(layers + 1)}
    head = weighed[0]
    plain = single = verified(1)
    if batch == 1 and context + 8 < decoder.max_positions:
        plain = min(_shortest(lambda: decoder.decode_greedy(0, context, count=4, cache=cache), clock) / 4, single)
    call = single - plain
    if single > 4 * _SECONDS_PER_PASS:
        widths = [width for width in widths if width in _FEW_WIDTHS]
    passes = [single, *(verified(width) for width in widths[1:])]
    # Other work on the machine only ever adds time, and no pass costs more than a wider one.
    passes = [min(passes[index:]) for index in range(len(passes))]
    step = plain / (layers + head)
    draft_call = call
    if context + 2 < decoder.max_positions:
        middle = max(1, layers // 2)
        steps = (2 * middle + weighed[middle]) * step
        drafting = _shortest(lambda: decoder.draft_greedy(tokens, at, exit_layer=middle, length=1, cache=cache), clock)
        draft_call = min(max(drafting - steps, 0.0), 0.5 * steps)
    by_width = tuple((seconds - call) / (layers + head) for seconds in passes)
    own = tuple((layer, weighed[layer]) for layer in (decoder.draft_heads.exits if decoder.draft_heads else ()))
    return PassCosts(layers, head, plain, call, draft_call, step, tuple(widths), by_width, own)


def costs_of(decoder: Decoder, batch: int) -> PassCosts:
    """Measured once per decoder, without and with draft exits, and batch size (rounded up to a power of two), on first use."""
    size, known = 1 << (batch - 1).bit_length(), _KNOWN.setdefault(decoder, {})
    kind = (size, decoder.draft_heads is not None)
    if kind not in known:
        known[kind] = measure_passes(decoder, size)
    return known[kind]


def clock_of(decoder: Decoder) -> Callable[[], float]:
    """The clock for a pass: the thread's CPU time where one thread does all the work, so that other processes do not count."""
    alone = decoder.device.type == "cpu" and (decoder.threads or torch.get_num_threads()) == 1
    return time.thread_time if alone else time.perf_counter


def _shortest(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The shortest of several runs, two at least: the first one warms up."""
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 2 or (spent < _SECONDS_PER_PASS and repeats < 20):
        start = clock()
        work()
        taken = clock() - start
        best, spent, repeats = min(best, taken), spent + taken, repeats + 1
    return best
