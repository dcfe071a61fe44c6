"""Which draft to try next: exit layer, draft length, n-grams or none, from running acceptance and measured pass costs.

Expected tokens of a round that drafts k are ``1 + sum_j prod_{i<=j} alpha_i`` with the acceptance alpha_i of position i (for
equal alphas the (1 - alpha^(k+1)) / (1 - alpha) of DEL); the planner takes the choice with the most tokens per second and
decodes plainly unless that beats plain decoding by ``MARGIN``. Acceptance of exits that are not in use comes from
observations: hidden states that pass by are read by the head, on the prompt once and later, in turn with short trials of the
most promising choice, within ``EXPLORATION`` of the time. Statistics live as long as the object. Plans depend on
timing: greedy output does not depend on the plan, and neither does the distribution of sampled output, but the draws do.

A round that drafts k tokens at exit E costs ``draft(E, k) + verify(E, k + 1)`` (LayerSkip's cost model with measured
widths): ``draft = overhead + (k+1) E c + k h`` and ``verify(E, n) = base(n) + (L - E) layer(n)``.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from telltale.models.decoder import Decoder

DRAFTERS = ("exit", "ngram", "both")
"""Who may draft for a model without a second one: its early layers, the n-grams of the text, or whichever pays."""
SIZES = (4, 3, 2)
"""Lengths of the suffix looked up, the longest first: a longer match is the more reliable one."""
MARGIN = 1.03
"""How much faster than plain decoding a draft must promise to be."""
EXPLORATION = 0.02
"""Share of the decoding time that observing exits may cost."""
LONGEST = 12
"""Longest draft considered by an early exit; n-grams cost nothing to draft and may be longer."""
LONGEST_NGRAM = 16
_ROUNDS_PER_PLAN = 8
_ROUNDS_PER_STABLE_PLAN = 64
"""Plans that come out the same are made less and less often: on a small model a plan costs as much as a few tokens."""
_PLANS_PER_PLAIN = 12
"""Every so many plans (five times as many if drafting wins clearly) a plain block is timed, so that the pace to beat is
one of the same minutes."""
_WINDOW = 0.995
"""What an observation is worth one observation later."""
_SMOOTHING = 4.0
_EXPECTED_WEIGHT = 0.04
"""How fast the tokens that rounds really gave correct those that were expected. Expectation is biased: exits are judged on
all text but used where no n-gram matches, and the most promising of many estimates is the one that errs highest."""
_OPTIMISM = 1.5
"""Standard errors of acceptance that a choice is given for a trial."""
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17)
_CONTEXT = 64
_SECONDS_PER_PASS = 2e-3
"""Measuring a pass goes on for about this long, twice at least: short passes are the noisy ones."""

_KNOWN: WeakKeyDictionary[Decoder, dict[int, PassCosts]] = WeakKeyDictionary()


class NgramIndex:
    """Where every n-gram of a growing text occurred last. ``match`` is the size of the current match, 0 for none."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.match = 0
        self._distance = 0
        self._last: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` and look up the new suffix: O(len(tokens))."""
        text = self.tokens
        last = self._last
        self.match = 0
        end = len(text) + len(tokens)
        for token in tokens:
            text.append(token)
            here = len(text)
            for size in SIZES:
                if here < size:
                    continue
                key = tuple(text[-size:])
                if here == end and not self.match:
                    seen = last.get(key)
                    if seen is not None:
                        self.match = size
                        self._distance = here - seen
                last[key] = here

    def draft(self, length: int) -> list[int]:
        """The ``length`` tokens that followed the last match; a match that overlaps the end goes on periodically."""
        if not self.match:
            return []
        text = self.tokens
        start = len(text) - self._distance
        found = text[start : start + length]
        while len(found) < length:
            found.append(found[len(found) - self._distance])
        return found


class PassCosts:
    """Pass costs in seconds for ``batch`` rows of one decoder."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        layers = decoder.layers
        clock = clock_of(decoder)
        self.layers = layers
        context = max(0, min(_CONTEXT, decoder.max_positions - 2 * WIDTHS[-1]))
        widths = [width for width in WIDTHS if context + width < decoder.max_positions] or [1]
        cache = decoder.new_cache(batch, context + 2 * widths[-1])
        at = [context] * batch
        tokens = [0] * batch

        def verify(first: int, width: int) -> float:
            states = torch.zeros(batch, width, decoder.hidden_size, dtype=decoder.dtype, device=decoder.device)
            return _shortest(lambda: decoder.verify_greedy(states, at, exit_layer=first, cache=cache), clock)

        def draft(exit_layer: int, length: int) -> float:
            return _shortest(
                lambda: decoder.draft_greedy(tokens, at, exit_layer=exit_layer, length=length, cache=cache), clock
            )

        # Layers and head are weighed by their parameters, not timed apart: a layer that runs alone stays in the processor's
        # cache and looks several times cheaper than it is among the others.
        layer_size = sum(parameter.numel() for parameter in decoder.parts.layers[0].parameters())
        self._head = decoder.vocabulary_size * decoder.hidden_size / max(layer_size, 1)
        whole = layers + self._head
        single = verify(0, 1)
        if batch == 1 and context + 8 < decoder.max_positions:
            self.plain = min(
                _shortest(lambda: decoder.decode_greedy(0, context, count=4, cache=cache), clock) / 4, single
            )
        else:
            self.plain = single
        self._call = single - self.plain
        # An expensive model is measured at few widths; between them costs are interpolated.
        if single > 4 * _SECONDS_PER_PASS:
            widths = [width for width in widths if width in (1, 2, 4, 8, 17)]
        self._widths = widths
        passes = [min(pair) for pair in zip(*[[verify(0, width) for width in widths] for _ in range(2)], strict=True)]
        # Other work on the machine only ever adds time, and no pass costs more than a wider one.
        passes = [min(passes[index:]) for index in range(len(passes))]
        self._layer = [(seconds - self._call) / whole for seconds in passes]
        self.step_layer = self.plain / whole
        middle = max(1, layers // 2)
        steps = (2 * middle + self._head) * self.step_layer
        self._draft_call = self._call
        if context + 2 < decoder.max_positions:
            drafting = min(draft(middle, 1), draft(middle, 1))
            self._draft_call = min(max(drafting - steps, 0.0), 0.5 * steps)

    def draft(self, exit_layer: int, length: int) -> float:
        """``length`` draft steps at ``exit_layer`` and the early pass of the last drafted token."""
        return self._draft_call + ((length + 1) * exit_layer + length * self._head) * self.step_layer

    def verify(self, exit_layer: int, width: int) -> float:
        """Layers E..L-1 and the head on ``width`` tokens."""
        return self._call + (self.layers - exit_layer + self._head) * self._at(width)

    def round(self, exit_layer: int, length: int) -> float:
        """One self-speculation round: ``length`` drafts at exit E and their verification."""
        return self.draft(exit_layer, length) + self.verify(exit_layer, length + 1)

    def speedup(self, exit_layer: int, length: int, acceptance_rate: float) -> float:
        """Tokens per second over plain decoding if this part of the drafted tokens is accepted: (1 + r d) tokens a round."""
        return (1.0 + acceptance_rate * length) * self.plain / self.round(exit_layer, length)

    def relative(self, width: int) -> float:
        """V(n): what a layer costs for ``width`` tokens, over what it costs for one."""
        return self._at(width) / max(self._at(1), 1e-12)

    def score(self, width: int) -> float:
        """All layers and the head on ``width`` tokens."""
        return self.verify(0, width)

    def _at(self, width: int) -> float:
        """One layer on ``width`` tokens."""
        place = bisect_left(self._widths, width)
        if place == len(self._widths):
            return self._layer[-1] * width / self._widths[-1]
        if place == 0 or self._widths[place] == width:
            return self._layer[place]
        low, high = self._widths[place - 1], self._widths[place]
        share = (width - low) / (high - low)
        return self._layer[place - 1] * (1 - share) + self._layer[place] * share


def costs_of(decoder: Decoder, batch: int) -> PassCosts:
    """Measured once per decoder and batch size (rounded up to a power of two), on first use."""
    size = 1 << (batch - 1).bit_length()
    known = _KNOWN.setdefault(decoder, {})
    if size not in known:
        known[size] = PassCosts(decoder, size)
    return known[size]


def clock_of(decoder: Decoder) -> Callable[[], float]:
    """The clock for a pass: the thread's CPU time where one thread does all the work, so that other processes do not count."""
    alone = decoder.device.type == "cpu" and (decoder.threads or torch.get_num_threads()) == 1
    return time.thread_time if alone else time.perf_counter


def _shortest(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The shortest of several runs, after one that warms up."""
    work()
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 2 or (spent < _SECONDS_PER_PASS and repeats < 20):
        start = clock()
        work()
        taken = clock() - start
        best, spent, repeats = min(best, taken), spent + taken, repeats + 1
    return best


class Choice(NamedTuple):
    """What to do in a round: ``source`` is "exit", "ngram", "model" (a second model drafts),
    "plain" or "observe" (a plain step that reads every exit)."""

    source: str
    exit_layer: int
    length: int


PLAIN = Choice("plain", 0, 0)
OBSERVE = Choice("observe", 0, 0)


class Acceptance:
    """Running acceptance of one drafter by draft position, each given that all positions before it were accepted."""

    def __init__(self, prior: float = 0.5) -> None:
        self.prior = prior
        self._tried = [0.0] * (LONGEST_NGRAM + 1)
        self._stood = [0.0] * (LONGEST_NGRAM + 1)

    def record(self, drafted: int, accepted: int, *, weight: float = 1.0) -> None:
        """One round: the first ``accepted`` of ``drafted`` tokens were accepted, the next was rejected, the rest not checked."""
        for position in range(min(accepted + 1, drafted, LONGEST_NGRAM)):
            self._tried[position] = self._tried[position] * _WINDOW + weight
            self._stood[position] = self._stood[position] * _WINDOW + (weight if position < accepted else 0.0)

    @property
    def first(self) -> float:
        """Acceptance of the first drafted token."""
        return self.expected(1)[0]

    def expected(self, longest: int, *, optimism: float = 0.0) -> list[float]:
        """Entry k-1: expected number of accepted tokens of a draft of length k, for k = 1..longest.

        ``optimism`` adds so many standard errors to every rate: what the little that was seen does not rule out.
        """
        rate, standing, total, totals = self.prior, 1.0, 0.0, []
        for position in range(longest):
            place = min(position, LONGEST_NGRAM)
            rate = (self._stood[place] + _SMOOTHING * rate) / (self._tried[place] + _SMOOTHING)
            hoped = optimism * (rate * (1.0 - rate) / (self._tried[place] + _SMOOTHING)) ** 0.5
            standing *= min(rate + hoped, 1.0)
            total += standing
            totals.append(total)
        return totals


class Plan:
    """Chooses what to do in a round, and learns from its outcome. ``confidence``: an exit stops drafting before a token whose
    probability is below it."""

    drafter = "exit"
    """Who may draft: "exit", "ngram", "both" or "model"."""
    confidence: float | None = None

    @property
    def wants_prompt(self) -> bool:
        """Whether the exits should be read on the prompt."""
        return False

    def at(self, rows: int) -> Plan:
        """The plan for rounds of so many rows."""
        return self

    def next(self, match: int) -> Choice:
        """What to do, given the size of the current n-gram match (0 for none)."""
        raise NotImplementedError

    def learn(self, choice: Choice, match: int, drafted: int, accepted: int, seconds: float) -> None:
        """Learn from the outcome of one row's round and how long it took (for "plain": seconds per token)."""

    def observe_exits(self, agreement: Sequence[Sequence[bool]], seconds: float) -> None:
        """``agreement[E-1][i]``: exit E predicts at position i what the last layer does; reading it cost ``seconds`` more."""

    def describe(self) -> str:
        """The planner's state, in words."""
        return "fixed"


class FixedPlan(Plan):
    """Exit layer and draft length as given; no clock. With both drafters, n-grams go first while they are accepted as well."""

    def __init__(self, exit_layer: int, draft_length: int, drafter: str, confidence: float | None = None) -> None:
        self.drafter = drafter
        self.confidence = confidence
        self._exit = Choice("model" if drafter == "model" else "exit", exit_layer, draft_length)
        self._ngram = Choice("ngram", 0, draft_length)
        self._exits = Acceptance()
        self._ngrams = {size: Acceptance() for size in SIZES}

    def next(self, match: int) -> Choice:
        """See :meth:`Plan.next`."""
        if self._exit.length == 0:
            return PLAIN
        if self.drafter in ("exit", "model"):
            return self._exit
        if self.drafter == "ngram":
            return self._ngram if match else PLAIN
        # An n-gram draft saves all draft passes, so it may be accepted somewhat less often and still be the better one.
        good = match and self._ngrams[match].first >= 0.7 * self._exits.first
        return self._ngram if good else self._exit

    def learn(self, choice: Choice, match: int, drafted: int, accepted: int, seconds: float) -> None:
        """See :meth:`Plan.learn`."""
        if drafted and self.drafter == "both":
            (self._ngrams[match] if choice.source == "ngram" else self._exits).record(drafted, accepted)


class OnlinePlan(Plan):
    """Chooses among ``exits`` and ``lengths`` (n-grams have lengths of their own), re-planned every few rounds."""

    def __init__(
        self,
        costs: PassCosts,
        *,
        exits: Sequence[int],
        lengths: Sequence[int],
        ngrams: bool,
        confidence: float | None = None,
    ) -> None:
        self.costs = costs
        self.drafter = "exit" if not ngrams else "both" if exits else "ngram"
        self.confidence = confidence
        self._exits = {exit_layer: Acceptance() for exit_layer in exits}
        self._lengths = list(lengths)
        self._ngrams = {size: Acceptance() for size in SIZES} if ngrams else {}
        self._slowdowns: dict[Choice | str, SlowdownEstimate] = {}
        self._tokens_per_expected = {"exit": 1.0, "ngram": 1.0}
        self._best = PLAIN
        self._by_match: dict[int, Choice] = {}
        self._rounds_left = 0
        self._patience = _ROUNDS_PER_PLAN // 2
        self._known_seconds: dict[Choice, float] = {}
        self._plans = 0
        self._seconds = 0.0
        self._observing_seconds = 0.0
        self._gain = 1.0
        self._has_read_prompt = False
        self._trial = self._trying = PLAIN
        self._explorations = 0
        self._best_rate = 1.0 / costs.plain

    @property
    def wants_prompt(self) -> bool:
        """Whether no exit has been observed yet, so that reading the exits on the prompt is worth its cost."""
        return bool(self._exits) and not self._has_read_prompt

    def next(self, match: int) -> Choice:
        """See :meth:`Plan.next`."""
        if self._rounds_left <= 0:
            before = self._best
            self._plan()
            stable = self._best == before and self._trial is PLAIN
            self._patience = min(2 * self._patience, _ROUNDS_PER_STABLE_PLAN) if stable else _ROUNDS_PER_PLAN
            self._rounds_left = self._patience
            self._plans += 1
            if self._plans in (2, 4) or self._plans % (_PLANS_PER_PLAIN * (1 if self._gain < 1.4 else 5)) == 0:
                return PLAIN
            self._trying = PLAIN
            if len(self._exits) and self._observing_seconds < EXPLORATION * self._seconds:
                self._explorations += 1
                if self._trial is PLAIN or self._explorations % 2:
                    return OBSERVE
                self._trying = self._trial
        self._rounds_left -= 1
        if self._trying is not PLAIN:
            return self._trying
        return self._by_match.get(match, self._best) if match else self._best

    def learn(self, choice: Choice, match: int, drafted: int, accepted: int, seconds: float) -> None:
        """See :meth:`Plan.learn`."""
        self._seconds += seconds
        if choice is self._trying and choice is not PLAIN:
            self._observing_seconds += max(seconds - (1 + accepted) / self._best_rate, 0.0)
        expected = self._predicted(choice)
        if expected > 0 and (choice.source == "plain" or drafted == choice.length):
            factor = min(max(seconds / expected, 0.25), 4.0)
            for key in (choice, choice.source):
                self._slowdowns.setdefault(key, SlowdownEstimate()).record(factor)
        if drafted:
            acceptance = self._ngrams[match] if choice.source == "ngram" else self._exits[choice.exit_layer]
            if drafted == choice.length:
                hoped = 1.0 + acceptance.expected(drafted)[-1]
                self._tokens_per_expected[choice.source] += _EXPECTED_WEIGHT * (
                    (1 + accepted) / hoped - self._tokens_per_expected[choice.source]
                )
            acceptance.record(drafted, accepted)

    def observe_exits(self, agreement: Sequence[Sequence[bool]], seconds: float) -> None:
        """See :meth:`Plan.observe_exits`."""
        # Observing also costs the draft that was not tried meanwhile.
        self._observing_seconds += seconds + self.costs.plain * (1.0 - 1.0 / self._gain)
        self._has_read_prompt |= len(agreement[0]) > 1
        for exit_layer, acceptance in self._exits.items():
            agreed = agreement[exit_layer - 1]
            for start in range(len(agreed)):
                run = 0
                while start + run < len(agreed) and agreed[start + run] and run < LONGEST:
                    run += 1
                # A run cut off by the window gives no evidence about the token after it.
                fell = start + run < len(agreed) and run < LONGEST
                acceptance.record(run + fell, run, weight=0.5 if len(agreed) > 1 else 1.0)

    def describe(self) -> str:
        """See :meth:`Plan.describe`."""
        best = "plain decoding" if self._best.source == "plain" else f"exit {self._best[1]}, draft {self._best[2]}"
        rates = ", ".join(f"{exit_layer}: {rate.first:.2f}" for exit_layer, rate in self._exits.items())
        return f"{best}, {self._gain:.2f}x plain expected; acceptance by exit {{{rates}}}"

    def _predicted(self, choice: Choice) -> float:
        """Seconds of a round by the measured pass costs alone."""
        if choice not in self._known_seconds:
            self._known_seconds[choice] = self._cost(choice)
        return self._known_seconds[choice]

    def _cost(self, choice: Choice) -> float:
        if choice.source == "exit":
            return self.costs.draft(choice.exit_layer, choice.length) + self.costs.verify(
                choice.exit_layer, choice.length + 1
            )
        return self.costs.score(choice.length + 1) if choice.source == "ngram" else self.costs.plain

    def _rate(self, choice: Choice, accepted: float) -> float:
        """Expected tokens per second of a choice that is expected to have ``accepted`` drafts confirmed."""
        tokens = (1.0 + accepted) * self._tokens_per_expected.get(choice.source, 1.0)
        return tokens / (self._predicted(choice) * self._slower(choice))

    def _slower(self, choice: Choice) -> float:
        """How much longer than predicted the choice takes; an untried one like its kind, an untried kind like plain steps."""
        for key in (choice, choice.source, "plain"):
            if key in self._slowdowns:
                return self._slowdowns[key].value
        return 1.0

    def _plan(self) -> None:
        plain = self._rate(PLAIN, 0.0)
        best, best_rate = PLAIN, plain * MARGIN
        trial, trial_rate = PLAIN, 0.0
        for exit_layer, acceptance in self._exits.items():
            expected = acceptance.expected(self._lengths[-1])
            hoped = acceptance.expected(self._lengths[-1], optimism=_OPTIMISM)
            for length in self._lengths:
                choice = Choice("exit", exit_layer, length)
                rate = self._rate(choice, expected[length - 1])
                if choice == self._best:
                    rate *= 1.02
                if rate > best_rate:
                    best, best_rate = choice, rate
                promise = rate * (1.0 + hoped[length - 1]) / (1.0 + expected[length - 1])
                if promise > trial_rate:
                    trial, trial_rate = choice, promise
        self._best = best
        self._gain = best_rate / plain if best is not PLAIN else 1.0
        self._best_rate = best_rate if best is not PLAIN else plain
        # Text that the model writes is easier to draft than the prompt, and only a trial shows how much.
        self._trial = trial if trial != best and trial_rate > best_rate else PLAIN
        lengths = range(1, LONGEST_NGRAM + 1) if len(self._lengths) > 1 else self._lengths
        self._by_match = {}
        for size, acceptance in self._ngrams.items():
            expected = acceptance.expected(lengths[-1])
            options = [Choice("ngram", 0, length) for length in lengths]
            rates = [self._rate(option, expected[option.length - 1]) for option in options]
            top = max(range(len(rates)), key=rates.__getitem__)
            if rates[top] > best_rate:
                self._by_match[size] = options[top]


class SlowdownEstimate:
    """A running low value: other work on the machine only ever adds time, so single slow rounds count for little."""

    def __init__(self) -> None:
        self.value = 1.0
        self._count = 0

    def record(self, seen: float) -> None:
        self._count += 1
        weight = 0.25 if seen < self.value else 0.04
        self.value += max(weight, 1.0 / self._count) * (seen - self.value)


class PlanBySize(Plan):
    """Online plans of one kind for a few numbers of rows, so that nothing has to be measured while rows come and go."""

    def __init__(self, plans: Mapping[int, OnlinePlan]) -> None:
        self.plans = dict(sorted(plans.items()))
        self.drafter = next(iter(self.plans.values())).drafter

    def at(self, rows: int) -> Plan:
        """The plan of the largest size that is not above ``rows``, or of the smallest one."""
        sizes = [size for size in self.plans if size <= rows]
        return self.plans[sizes[-1] if sizes else next(iter(self.plans))]

    def describe(self) -> str:
        """See :meth:`Plan.describe`."""
        return "; ".join(f"{size} rows: {plan.describe()}" for size, plan in self.plans.items())


class Plans:
    """The plans of one decoder, kept for its life. ``exit_layer`` and ``draft_length``: numbers, or "auto"; ``drafter``: "exit",
    "ngram" or "both"."""

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int | str = "auto",
        draft_length: int | str = "auto",
        drafter: str = "exit",
        confidence: float | None = None,
    ) -> None:
        self.decoder = decoder
        self.exit_layer = exit_layer
        self.draft_length = draft_length
        self.drafter = drafter
        self.confidence = confidence
        self.known: dict[Any, Plan] = {}

    @property
    def fixed(self) -> bool:
        """Whether nothing is left to choose, so that the same seed gives the same draws."""
        return isinstance(self.draft_length, int) and (isinstance(self.exit_layer, int) or self.drafter == "ngram")

    def plan(self, rows: int, *kind: Any) -> Plan:
        """The plan for ``rows`` rows of one ``kind``: what a round costs depends on both."""
        if self.fixed and isinstance(self.draft_length, int):
            exit_layer = self.exit_layer if isinstance(self.exit_layer, int) else 1
            key: Any = (exit_layer, self.draft_length)
            if key not in self.known:
                self.known[key] = FixedPlan(exit_layer, self.draft_length, self.drafter, self.confidence)
            return self.known[key]
        batch = 1 << (rows - 1).bit_length()
        if (batch, *kind) not in self.known:
            self.known[batch, *kind] = self._online(batch)
        return self.known[batch, *kind]

    def by_size(self, sizes: Sequence[int]) -> PlanBySize:
        """One plan over any number of rows, with the costs of ``sizes`` measured now."""
        return PlanBySize({size: self._online(size) for size in sizes})

    def _online(self, batch: int) -> OnlinePlan:
        exits = [self.exit_layer] if isinstance(self.exit_layer, int) else list(range(1, self.decoder.layers))
        return OnlinePlan(
            costs_of(self.decoder, batch),
            exits=exits if self.drafter != "ngram" else [],
            lengths=[self.draft_length] if isinstance(self.draft_length, int) else range(1, LONGEST + 1),
            ngrams=self.drafter != "exit",
            confidence=self.confidence,
        )
