"""How often the tokens of one drafter are accepted, by position of the draft: on this text, and before.

A draft of k tokens has ``A_k = sum_{j<=k} prod_{i<=j} r_i`` tokens accepted, r_i being the rate of position i given that all before
it were accepted (for equal rates the geometric sum of Leviathan et al., arXiv 2211.17192, eq. 1). Texts differ from one another far
more than a text does within itself, so the outcomes of a text count for that text alone, and what the drafter did before is no
more than a first guess.
"""

from __future__ import annotations

import math

WINDOW = 256.0
"""Decoded tokens after which an outcome weighs 1/e on its text, which may change its kind."""
LIFE = 2048.0
"""The same for the first guess: a dozen answers, so that no odd text decides and nothing is held against an exit for good."""
PRIOR_OUTCOMES = 4.0
"""Outcomes that a guess is worth: what the drafter did before for the first position, the rate of the one before for the others."""


class Acceptance:
    """Acceptance of one drafter at up to ``longest`` positions. ``now``, the tokens decoded so far, is what outcomes fade by."""

    def __init__(self, longest: int) -> None:
        self._tried = [0.0] * longest
        self._stood = [0.0] * longest
        self._life_tried = self._life_stood = 0.0
        self._at = 0.0

    def begin(self, share: float) -> None:
        """``share`` of the text is another from now on: all of it, or one row of several."""
        self._tried = [(1.0 - share) * count for count in self._tried]
        self._stood = [(1.0 - share) * count for count in self._stood]

    def record(self, drafted: int, accepted: int, now: float) -> None:
        """One round: the first ``accepted`` of ``drafted`` tokens were accepted, the next was rejected, the rest not checked."""
        self._fade(now)
        for position in range(min(accepted + 1, drafted, len(self._tried))):
            self._tried[position] += 1.0
            self._stood[position] += position < accepted
        self._life_tried += 1.0
        self._life_stood += accepted > 0

    @property
    def tried(self) -> float:
        """Drafts so far, of all texts, faded."""
        return self._life_tried

    @property
    def first(self) -> float:
        """Acceptance of the first drafted token."""
        return (self._stood[0] + PRIOR_OUTCOMES * self._prior) / (self._tried[0] + PRIOR_OUTCOMES)

    def expected(self, longest: int, now: float) -> list[tuple[float, float]]:
        """Entry k-1: accepted tokens expected of a draft of length k, and their standard error, for k = 1..longest.

        The error is that of the rates, carried on to first order: ``sum_i (dA_k/dr_i)^2 r_i (1 - r_i) / n_i``.
        """
        self._fade(now)
        rate, standing, total = self._prior, 1.0, 0.0
        # dA_k/dr_i = (A_k - A_{i-1}) / r_i; the square is multiplied out, so that one pass gives every k.
        weights = firsts = squares = 0.0
        found = []
        for tried, stood in zip(self._tried[:longest], self._stood, strict=False):
            count = tried + PRIOR_OUTCOMES
            rate = (stood + PRIOR_OUTCOMES * rate) / count
            weight = (1.0 - rate) / (rate * count)
            weights += weight
            firsts += weight * total
            squares += weight * total * total
            standing *= rate
            total += standing
            variance = total * total * weights - 2.0 * total * firsts + squares
            found.append((total, math.sqrt(max(variance, 0.0))))
        return found

    @property
    def _prior(self) -> float:
        """What the drafter did before: one half where nothing is known."""
        return (self._life_stood + 0.5 * PRIOR_OUTCOMES) / (self._life_tried + PRIOR_OUTCOMES)

    def _fade(self, now: float) -> None:
        passed = now - self._at
        if passed <= 0:
            return
        kept, alive = math.exp(-passed / WINDOW), math.exp(-passed / LIFE)
        self._tried = [kept * count for count in self._tried]
        self._stood = [kept * count for count in self._stood]
        self._life_tried, self._life_stood, self._at = alive * self._life_tried, alive * self._life_stood, now
