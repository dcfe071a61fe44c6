"""Which draft to try next: exit layer, draft length, n-grams or none, from running acceptance and measured pass costs.

Expected tokens of a round that drafts k are ``1 + sum_j prod_{i<=j} alpha_i`` with the acceptance alpha_i of position i (for
equal alphas the (1 - alpha^(k+1)) / (1 - alpha) of DEL); the planner takes the choice with the most tokens per second and
decodes plainly unless that beats plain decoding by ``MARGIN``. Acceptance of exits that are not in use comes from
shadows: hidden states that pass by are read by the head, on the prompt once and later, in turn with short trials of the
most promising choice, within ``EXPLORATION`` of the time. Statistics live as long as the object. Plans depend on
timing: greedy output does not depend on the plan, and neither does the law of sampled output, but the draws do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from telltale.decode.costs import Costs
from telltale.decode.ngram import SIZES

MARGIN = 1.03
"""How much faster than plain decoding a draft must promise to be."""
EXPLORATION = 0.02
"""Share of the decoding time that shadows may cost."""
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
_YIELD_WEIGHT = 0.04
"""How fast the tokens that rounds really gave correct those that were expected. Expectation is biased: exits are judged on
all text but used where no n-gram matches, and the most promising of many estimates is the one that errs highest."""
_OPTIMISM = 1.5
"""Standard errors of acceptance that a choice is given for a trial."""


class Choice(NamedTuple):
    """What to do in a round: ``source`` is "exit", "ngram", "plain" or "shadow" (a plain step that reads every exit)."""

    source: str
    exit_layer: int
    length: int


PLAIN = Choice("plain", 0, 0)
SHADOW = Choice("shadow", 0, 0)


class Acceptance:
    """Running acceptance of one drafter by draft position, each given that all positions before it were accepted."""

    def __init__(self, prior: float = 0.5) -> None:
        self.prior = prior
        self._tried = [0.0] * (LONGEST_NGRAM + 1)
        self._stood = [0.0] * (LONGEST_NGRAM + 1)

    def record(self, drafted: int, accepted: int, *, weight: float = 1.0) -> None:
        """One round: the first ``accepted`` of ``drafted`` tokens stood, the next one fell, the others were not looked at."""
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


class FixedPlan:
    """Exit layer and draft length as given; no clock. With both drafters, n-grams go first while they are accepted as well."""

    timed = False
    wants_prompt = False

    def __init__(self, exit_layer: int, draft_length: int, drafter: str) -> None:
        self._exit = Choice("exit", exit_layer, draft_length)
        self._ngram = Choice("ngram", 0, draft_length)
        self._drafter = drafter
        self._exits = Acceptance()
        self._ngrams = {size: Acceptance() for size in SIZES}

    def next(self, match: int) -> Choice:
        """What to do, given the size of the current n-gram match (0 for none)."""
        if self._exit.length == 0:
            return PLAIN
        if self._drafter == "exit":
            return self._exit
        if self._drafter == "ngram":
            return self._ngram if match else PLAIN
        # An n-gram draft saves all draft passes, so it may be accepted somewhat less often and still be the better one.
        good = match and self._ngrams[match].first >= 0.7 * self._exits.first
        return self._ngram if good else self._exit

    def learn(self, choice: Choice, match: int, drafted: int, accepted: int, seconds: float) -> None:
        """Take in what came of a round of one row."""
        if drafted:
            (self._ngrams[match] if choice.source == "ngram" else self._exits).record(drafted, accepted)

    def shadow(self, agreement: Sequence[Sequence[bool]], seconds: float) -> None:
        """Nothing to learn: the plan is fixed."""

    def describe(self) -> str:
        """What the planner goes by, in words."""
        return "fixed"


class OnlinePlan:
    """Chooses among ``exits`` and ``lengths`` (``ngram_lengths`` for n-grams), re-planned every few rounds."""

    timed = True

    def __init__(self, costs: Costs, *, exits: Sequence[int], lengths: Sequence[int], ngrams: bool) -> None:
        self.costs = costs
        self._exits = {exit_layer: Acceptance() for exit_layer in exits}
        self._lengths = list(lengths)
        self._ngrams = {size: Acceptance() for size in SIZES} if ngrams else {}
        self._slowdown: dict[Choice | str, _Slowdown] = {}
        self._yield = {"exit": 1.0, "ngram": 1.0}
        self._best = PLAIN
        self._by_match: dict[int, Choice] = {}
        self._rounds_left = 0
        self._patience = _ROUNDS_PER_PLAN // 2
        self._known_seconds: dict[Choice, float] = {}
        self._plans = 0
        self._seconds = 0.0
        self._shadow_seconds = 0.0
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
        """What to do, given the size of the current n-gram match (0 for none)."""
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
            if len(self._exits) and self._shadow_seconds < EXPLORATION * self._seconds:
                self._explorations += 1
                if self._trial is PLAIN or self._explorations % 2:
                    return SHADOW
                self._trying = self._trial
        self._rounds_left -= 1
        if self._trying is not PLAIN:
            return self._trying
        return self._by_match.get(match, self._best) if match else self._best

    def learn(self, choice: Choice, match: int, drafted: int, accepted: int, seconds: float) -> None:
        """Take in what came of a round of one row, and how long it took (for "plain": seconds per token)."""
        self._seconds += seconds
        if choice is self._trying and choice is not PLAIN:
            self._shadow_seconds += max(seconds - (1 + accepted) / self._best_rate, 0.0)
        expected = self._predicted(choice)
        if expected > 0 and (choice.source == "plain" or drafted == choice.length):
            factor = min(max(seconds / expected, 0.25), 4.0)
            for key in (choice, choice.source):
                self._slowdown.setdefault(key, _Slowdown()).record(factor)
        if drafted:
            acceptance = self._ngrams[match] if choice.source == "ngram" else self._exits[choice.exit_layer]
            if drafted == choice.length:
                hoped = 1.0 + acceptance.expected(drafted)[-1]
                self._yield[choice.source] += _YIELD_WEIGHT * ((1 + accepted) / hoped - self._yield[choice.source])
            acceptance.record(drafted, accepted)

    def shadow(self, agreement: Sequence[Sequence[bool]], seconds: float) -> None:
        """``agreement[E-1][i]``: exit E predicts at position i what the last layer does; reading it cost ``seconds`` more."""
        # A shadow also costs the draft that was not tried meanwhile.
        self._shadow_seconds += seconds + self.costs.plain * (1.0 - 1.0 / self._gain)
        self._has_read_prompt |= len(agreement[0]) > 1
        for exit_layer, acceptance in self._exits.items():
            agreed = agreement[exit_layer - 1]
            for start in range(len(agreed)):
                run = 0
                while start + run < len(agreed) and agreed[start + run] and run < LONGEST:
                    run += 1
                # A run that the window cut off says nothing about the token after it.
                fell = start + run < len(agreed) and run < LONGEST
                acceptance.record(run + fell, run, weight=0.5 if len(agreed) > 1 else 1.0)

    def describe(self) -> str:
        """What the planner goes by, in words."""
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
        tokens = (1.0 + accepted) * self._yield.get(choice.source, 1.0)
        return tokens / (self._predicted(choice) * self._slower(choice))

    def _slower(self, choice: Choice) -> float:
        """How much longer than predicted the choice takes; an untried one like its kind, an untried kind like plain steps."""
        for key in (choice, choice.source, "plain"):
            if key in self._slowdown:
                return self._slowdown[key].value
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


class _Slowdown:
    """A running low value: other work on the machine only ever adds time, so single slow rounds count for little."""

    def __init__(self) -> None:
        self.value = 1.0
        self._count = 0

    def record(self, seen: float) -> None:
        self._count += 1
        weight = 0.25 if seen < self.value else 0.04
        self.value += max(weight, 1.0 / self._count) * (seen - self.value)
