"""Which draft to try next: exit layer, draft length, n-grams or none, from measured pass costs and windowed acceptance.

The planner keeps a table. A line of it is a drafter (an exit, or n-grams of one size) at its best draft length: tokens
expected of a round and their standard error, seconds of a round, and so tokens per second. Seconds are those of ``pass_costs``
corrected by the rounds that were timed. Plain decoding is a line like the others. Every :data:`STRETCH` tokens it decides:

1. *Best* is plain decoding or an exit that has been tried, whichever is expected to be the fastest. N-grams are used where they
   match and are expected to be faster still.
2. What is promising but not used is tried for the stretch: n-grams, and the one exit that promises most. Promising is a rate,
   :data:`PROMISE` standard errors added, above the best's. A trial costs the seconds beyond those in which the best gives as many
   tokens; it ends early once that is a plain stretch's time, and while trials have cost more than :data:`TRIALS` of the time,
   none begins.

So what drafts has been tried, what is unknown is tried when that is affordable, and where nothing pays trials cost no more than
their share. Statistics live as long as the object. Plans depend on timing: greedy output does not depend on the plan, and
neither does the distribution of sampled output, but the draws do.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from telltale.decode.acceptance import PRIOR_OUTCOMES, Acceptance
from telltale.decode.drafting import PLAIN, Choice, FixedPlan, Plan
from telltale.decode.ngrams import SIZES
from telltale.decode.pass_costs import costs_of
from telltale.models.decoder import Decoder

LONGEST = 16
"""Longest draft: the widest pass whose cost is measured."""
STRETCH = 8
"""Tokens for which a decision stands, and a trial: fewer tell nothing, more are wasted on a bad exit."""
TRIALS = 0.02
"""Share of the decoding time that trials may cost: what a user would not notice."""
FIRST_TRIALS = 16
"""Plain steps' worth of trials that the share allows from the start, so that a first answer need not be decoded plainly."""
PROMISE = 2.0
"""Standard errors by which a line may be better than it looks: the usual 95%."""
TIMED = 32
"""Rounds whose median time corrects the predicted one: single rounds are slow when other work interrupts them."""
SHOWN = 8
"""Lines of the table that are shown."""

Drafter = tuple[str, int]
"""("exit", layer), ("ngram", size of the match) or ("plain", 0)."""
_PLAINLY: Drafter = ("plain", 0)


class Costs(Protocol):
    """What the planner asks of :class:`~telltale.decode.pass_costs.PassCosts`, in seconds."""

    @property
    def plain(self) -> float:
        """A plain step."""

    def round(self, exit_layer: int, length: int) -> float:
        """A round of so many drafts at an exit."""

    def score(self, width: int) -> float:
        """The whole model on so many tokens."""


class Line(NamedTuple):
    """A drafter at its best length: ``tokens`` of a round with their standard ``error``, and ``seconds`` of a round."""

    choice: Choice
    tokens: float
    error: float
    seconds: float
    tried: float = 0.0
    """Drafts so far, faded."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def promised(self) -> float:
        """Tokens per second that are not ruled out."""
        return (self.tokens + PROMISE * self.error) / self.seconds


class OnlinePlan(Plan):
    """Chooses among ``exits``, n-grams and ``lengths`` of drafts by the table."""

    def __init__(
        self,
        costs: Costs,
        *,
        exits: Sequence[int],
        lengths: Sequence[int],
        ngrams: bool,
        confidence: float | None = None,
    ) -> None:
        self.costs = costs
        self.drafter = "exit" if not ngrams else "both" if exits else "ngram"
        self.confidence = confidence
        self._choices: dict[Drafter, list[Choice]] = {
            ("exit", layer): [Choice("exit", layer, length) for length in lengths] for layer in exits
        }
        if ngrams:
            self._choices |= {("ngram", size): [Choice("ngram", 0, length) for length in lengths] for size in SIZES}
        self._acceptance = {drafter: Acceptance(own[-1].length) for drafter, own in self._choices.items()}
        self._predicted = {choice: _seconds(costs, choice) for own in self._choices.values() for choice in own}
        self._timed: dict[Any, deque[float]] = {}
        self._table: dict[Drafter, Line] = {_PLAINLY: Line(PLAIN, 1.0, 0.0, costs.plain)}
        self._best = self._table[_PLAINLY]
        self._use = {0: PLAIN}
        self._tried: set[Drafter] = set()
        """What is on trial in this stretch."""
        self._changed = set(self._choices)
        """Whose lines have to be made anew."""
        self._turn = 0
        # The first stretch is decoded plainly: everything is compared with the time of that.
        self._left, self._trial_cost = float(STRETCH), 0.0
        self._tokens = self._seconds = self._trial_seconds = 0.0

    def begin(self, rows: int) -> None:
        """See :meth:`Plan.begin`."""
        for acceptance in self._acceptance.values():
            acceptance.begin(1.0 / rows)
        self._changed |= set(self._choices)
        self._left = min(self._left, 0.0) if self._timed else self._left

    def next(self, match: int) -> Choice:
        """See :meth:`Plan.next`."""
        if self._left <= 0:
            self._decide()
        return self._use.get(match) or self._use[0]

    def learn(
        self, choice: Choice, match: int, drafted: Sequence[int], accepted: Sequence[int], seconds: float
    ) -> None:
        """See :meth:`Plan.learn`."""
        drafter = (choice.source, match if choice.source == "ngram" else choice.exit_layer)
        self._count(drafter, 1 + sum(accepted) / len(accepted), seconds)
        acceptance = self._acceptance[drafter]
        for count, stood in zip(drafted, accepted, strict=True):
            if count:
                acceptance.record(count, stood, self._tokens)
        if max(drafted) == choice.length:
            self._time(drafter, seconds / self._predicted[choice])
        self._changed.add(drafter)

    def learn_plain(self, steps: int, seconds: float) -> None:
        """See :meth:`Plan.learn_plain`."""
        self._count(_PLAINLY, steps, seconds)
        self._time(_PLAINLY, seconds / steps / self.costs.plain)

    def describe(self) -> str:
        """The decision, and the table behind it: plain decoding and the most promising lines."""
        table = {drafter: self._line(drafter) for drafter in (_PLAINLY, *self._choices)}
        plain = table[_PLAINLY].rate
        shown = sorted(self._choices, key=lambda drafter: -table[drafter].promised)[:SHOWN]
        share = self._trial_seconds / self._seconds if self._seconds else 0.0
        head = f"{self._best.choice.words}, {self._best.rate / plain:.2f}x plain expected; trials took {share:.1%} of the time"
        rows = [f"{'':18}{'tokens/round':>18}{'ms/round':>10}{'tokens/s':>10}{'rounds':>8}"]
        for drafter in (_PLAINLY, *shown):
            line = table[drafter]
            name = f"{drafter[1]}-grams, draft {line.choice.length}" if drafter[0] == "ngram" else line.choice.words
            tokens = f"{line.tokens:.2f} +- {line.error:.2f}"
            rows.append(f"{name:18}{tokens:>18}{1e3 * line.seconds:>10.3g}{line.rate:>10.4g}{line.tried:>8.0f}")
        return "\n  ".join([head, *rows])

    @property
    def _may_try(self) -> bool:
        return self._trial_seconds <= TRIALS * self._seconds + FIRST_TRIALS * self._table[_PLAINLY].seconds

    def _count(self, drafter: Drafter, tokens: float, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds
        self._left -= tokens
        if drafter in self._tried:
            self._trial_cost += seconds - tokens / self._best.rate
            if self._trial_cost > STRETCH * self._table[_PLAINLY].seconds:
                self._left = 0.0  # it has cost as much as the stretch would have taken plainly

    def _time(self, drafter: Drafter, ratio: float) -> None:
        """A round of this drafter took ``ratio`` times as long as predicted; a coarse clock may say that it took no time."""
        ratio = max(ratio, 1e-3)
        for key in {drafter, drafter[0]}:
            self._timed.setdefault(key, deque(maxlen=TIMED)).append(ratio)

    def _slower(self, drafter: Drafter) -> float:
        """How much longer than predicted a drafter's rounds take; an untried one's like its kind's, then like plain steps."""
        for key in (drafter, drafter[0], _PLAINLY):
            if key in self._timed:
                return statistics.median(self._timed[key])
        return 1.0

    def _line(self, drafter: Drafter) -> Line:
        """The drafter's line of the table, at the length that promises the most tokens per second."""
        slower = self._slower(drafter)
        if drafter == _PLAINLY:
            return Line(PLAIN, 1.0, 0.0, slower * self.costs.plain)
        choices = self._choices[drafter]
        expected = self._acceptance[drafter].expected(choices[-1].length, self._tokens)
        best, best_rate = choices[0], 0.0
        for choice in choices:
            rate = (1.0 + expected[choice.length - 1][0]) / self._predicted[choice]
            if rate > best_rate:
                best, best_rate = choice, rate
        accepted, error = expected[best.length - 1]
        return Line(best, 1.0 + accepted, error, slower * self._predicted[best], self._acceptance[drafter].tried)

    def _decide(self) -> None:
        """Make the lines anew that have changed, and choose what the next stretch uses."""
        self._trial_seconds += max(self._trial_cost, 0.0)
        drafters = list(self._choices)
        # What one drafter's rounds took tells about its kind; and all outcomes fade, so that each line has its turn.
        self._changed |= set(drafters) if self._tried else {drafters[self._turn % len(drafters)]}
        self._turn += 1
        for drafter in (_PLAINLY, *self._changed):
            self._table[drafter] = self._line(drafter)
        self._changed.clear()
        self._left, self._trial_cost = float(STRETCH), 0.0
        known = [line for drafter, line in self._table.items() if drafter[0] == "exit" and line.tried > PRIOR_OUTCOMES]
        best = self._best = max([self._table[_PLAINLY], *known], key=lambda line: line.rate)
        self._use = {0: best.choice}
        for drafter, line in self._table.items():
            if drafter[0] == "ngram" and line.rate > best.rate:
                self._use[drafter[1]] = line.choice
        self._tried = set(self._trials()) if self._may_try else set()
        for drafter in self._tried:
            self._use[drafter[1] if drafter[0] == "ngram" else 0] = self._table[drafter].choice

    def _trials(self) -> Iterable[Drafter]:
        """What to try in the next stretch: n-grams where they match, and one exit everywhere else."""
        found = {drafter: line for drafter, line in self._table.items() if line.promised > self._best.rate}
        yield from (drafter for drafter in found if drafter[0] == "ngram" and drafter[1] not in self._use)
        exits = [drafter for drafter in found if drafter[0] == "exit" and found[drafter].choice != self._best.choice]
        if exits:
            yield max(exits, key=lambda drafter: found[drafter].promised)


def _seconds(costs: Costs, choice: Choice) -> float:
    """What a round is predicted to take."""
    exit_layer, length = choice.exit_layer, choice.length
    return costs.round(exit_layer, length) if choice.source == "exit" else costs.score(length + 1)


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
        return "\n".join(f"{size} rows: {plan.describe()}" for size, plan in self.plans.items())


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
        exits = [self.exit_layer] if isinstance(self.exit_layer, int) else self.decoder.drafting_exits
        return OnlinePlan(
            costs_of(self.decoder, batch),
            exits=exits if self.drafter != "ngram" else [],
            lengths=[self.draft_length] if isinstance(self.draft_length, int) else range(1, LONGEST + 1),
            ngrams=self.drafter != "exit",
            confidence=self.confidence,
        )
