"""How often the tokens of one drafter are accepted, by position of the draft, over a window of the text.

A draft of k tokens has ``A_k = sum_{j<=k} prod_{i<=j} r_i`` tokens accepted, r_i being the rate of position i given that all before
it were accepted (for equal rates the geometric sum of Leviathan et al., arXiv 2211.17192, eq. 1).
"""

from __future__ import annotations

import math

WINDOW = 256.0
"""Decoded tokens after which an outcome weighs 1/e: text changes its kind within a few hundred tokens."""
PRIOR_OUTCOMES = 4.0
"""Outcomes that a guess is worth: what the drafter did before for the first position, the rate of the one before for the others."""


class Acceptance:
    """Acceptance of one drafter at up to ``longest`` positions. ``now``, the tokens decoded so far, is what outcomes fade by."""

    def __init__(self, longest: int) -> None:
        self._ever_tried = self._ever_stood = 0
        self._tried = [0.0] * longest
        self._stood = [0.0] * longest
        self._at = 0.0

    def record(self, drafted: int, accepted: int, now: float) -> None:
        """One round: the first ``accepted`` of ``drafted`` tokens were accepted, the next was rejected, the rest not checked."""
        self._fade(now)
        for position in range(min(accepted + 1, drafted, len(self._tried))):
            self._tried[position] += 1.0
            self._stood[position] += position < accepted
        if drafted:
            self._ever_tried += 1
            self._ever_stood += accepted > 0

    @property
    def prior(self) -> float:
        """The rate expected of the first token whatever the text: that of the drafter's whole life, one half before it."""
        return (self._ever_stood + 0.5) / (self._ever_tried + 1)

    @property
    def tried(self) -> float:
        """Drafts of the window."""
        return self._tried[0]

    @property
    def first(self) -> float:
        """Acceptance of the first drafted token."""
        return (self._stood[0] + PRIOR_OUTCOMES * self.prior) / (self._tried[0] + PRIOR_OUTCOMES)

    def expected(self, longest: int, now: float) -> list[tuple[float, float]]:
        """Entry k-1: accepted tokens expected of a draft of length k, and their standard error, for k = 1..longest.

        The error is that of the rates, carried on to first order: ``sum_i (dA_k/dr_i)^2 r_i (1 - r_i) / n_i``.
        """
        self._fade(now)
        rate, standing, total = self.prior, 1.0, 0.0
        # (dA_k/dr_i) = (A_k - A_{i-1}) / r_i; the square is multiplied out, so that one pass gives every k.
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

    def _fade(self, now: float) -> None:
        if now > self._at:
            kept = math.exp((self._at - now) / WINDOW)
            self._tried = [kept * count for count in self._tried]
            self._stood = [kept * count for count in self._stood]
            self._at = now
