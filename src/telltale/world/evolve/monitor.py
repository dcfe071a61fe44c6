"""The monitor: does the model still predict as well as it did in this phase of its life? A conformal CUSUM over blocks.

Scores of single steps are averaged over blocks, because residuals within an episode are not exchangeable and a test that takes
them so alarms at once. A block's p-value is its rank among at least 200 blocks of the same phase (Vovk et al., conformal test
martingales), a fixed reference: one that grows dilutes a change. The bet log e = log(eps) + (eps - 1) log p feeds a CUSUM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.errors import DataError
from telltale.world.protocol import adapt
from telltale.world.transitions import Transitions

FEWEST_BLOCKS = 200
"""Least number of calibration blocks: the smallest p-value is one over their number, and with few the bets are coarse."""


def residuals(model: Any, transitions: Transitions) -> Tensor:
    """What one step of the model leaves unexplained: (N, D) for numeric worlds; (N, 1), 1 where wrong, for plain ones.

    A prediction that is not finite counts as 1e6 off.
    """
    adapted = adapt(model)
    if transitions.plain:
        wrong = [
            float(adapted.observed(adapted.step(adapted.infer(before), action).belief) != after)
            for before, action, after in zip(
                transitions.before, transitions.actions.tolist(), transitions.after, strict=True
            )
        ]
        return torch.tensor(wrong).reshape(-1, 1)
    with torch.no_grad():
        after = adapted.observed(adapted.step(adapted.infer(transitions.before), transitions.actions).belief)
    return (transitions.after - after).nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)


def same_predictions(first: Any, second: Any, transitions: Transitions) -> bool:
    """Whether two models predict the same bits."""
    return bool(torch.equal(residuals(first, transitions), residuals(second, transitions)))


def column_scale(transitions: Transitions, residual: Tensor) -> list[float]:
    """What a column's residual is measured in: its own root mean square, at least 1e-6 of the column's spread."""
    if transitions.plain:
        return [1.0]
    spread = transitions.after.std(0) if len(transitions) > 1 else torch.ones(residual.shape[1])
    scale = torch.maximum(residual.pow(2).mean(0).sqrt(), 1e-6 * spread.clamp(min=1e-6))
    return [float(value) for value in scale]


def step_scores(residual: Tensor, scale: Sequence[float]) -> list[float]:
    """Mean over columns of the residual's size in units of ``scale``, one number a step."""
    return [float(value) for value in (residual.abs() / torch.tensor(scale)).mean(1)]


class Monitor:
    """A CUSUM on block means. ``calibration``: block scores of the phase that is watched, at least 200.

    ``threshold``: alarm where the CUSUM exceeds its logarithm; :meth:`false_alarms` says what that means for a watch of given
    length. ``epsilon`` shapes the bet: small ones wait for small p-values.

    Raises :class:`~telltale.errors.DataError` for fewer blocks or one that is not finite.
    """

    def __init__(
        self,
        calibration: Sequence[float],
        *,
        block: int = 10,
        threshold: float = 1000.0,
        epsilon: float = 0.3,
        seed: int = 0,
    ) -> None:
        if len(calibration) < FEWEST_BLOCKS:
            raise DataError(
                f"{len(calibration)} calibration blocks are too few; collect at least {FEWEST_BLOCKS} of the phase to watch."
            )
        self.calibration = np.sort(np.asarray(calibration, dtype=float))
        if not np.isfinite(self.calibration).all():
            raise DataError("a calibration block is not finite; the model predicted no number there.")
        self.block = check_integer("block", block, low=1)
        self.threshold = check_range("threshold", threshold, above=1.0)
        self.epsilon = check_range("epsilon", epsilon, above=0.0, below=1.0)
        self.seed = seed
        self.cusum, self.blocks, self.steps, self.quiet_until = 0.0, 0, 0, 0
        self._open: list[float] = []

    def update(self, scores: Sequence[float]) -> int | None:
        """Take step scores, in order; the step of the watch (from 1) at which it alarmed, or None.

        After an alarm the rest is left out, and the monitor stays as it was then.
        """
        for score in scores:
            self._open.append(float(score))
            self.steps += 1
            if len(self._open) == self.block:
                mean = sum(self._open) / self.block
                self._open = []
                self.cusum = max(0.0, self.cusum + self.bet(self.p_value(mean)))
                self.blocks += 1
                if self.cusum == 0.0:
                    self.quiet_until = self.steps
                if self.cusum > math.log(self.threshold):
                    return self.steps
        return None

    def p_value(self, score: float) -> float:
        """Rank of ``score`` among the calibration blocks, ties broken by a number that block and seed fix."""
        above = len(self.calibration) - np.searchsorted(self.calibration, score, side="right")
        equal = len(self.calibration) - np.searchsorted(self.calibration, score, side="left") - above
        lot = np.random.default_rng([self.seed, self.blocks]).random()
        return float((above + lot * (equal + 1)) / (len(self.calibration) + 1))

    def bet(self, p: float) -> float:
        """log e of one p-value; its expectation under a uniform p is 1 before the logarithm."""
        return math.log(self.epsilon) + (self.epsilon - 1) * math.log(max(p, 1e-12))

    def false_alarms(self, steps: int, *, runs: int = 2000, seed: int = 0) -> float:
        """Simulated chance of an alarm in a watch of ``steps`` without any change: this threshold, bet and number of
        calibration blocks, with blocks that are exchangeable. Those of one episode are alike, and alarm more often even in random
        order (:func:`shuffled`): about four times as often where episodes differ half as much as the blocks within them do, and
        nine times where they differ as much; in the order of time, thirteen and twenty-five times."""
        return false_alarm_rate(
            max(1, steps // self.block), calibration=len(self.calibration), threshold=self.threshold, epsilon=self.epsilon,
            runs=runs, seed=seed,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """JSON values from which :meth:`from_state` goes on."""
        return {
            "calibration": self.calibration.tolist(), "block": self.block, "threshold": self.threshold,
            "epsilon": self.epsilon, "seed": self.seed, "cusum": self.cusum, "blocks": self.blocks, "steps": self.steps,
            "quiet_until": self.quiet_until, "open": list(self._open),
        }  # fmt: skip

    @property
    def pending(self) -> int:
        """Scores of the block that is open."""
        return len(self._open)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Monitor:
        """The monitor as it was."""
        settings = {name: state[name] for name in ("block", "threshold", "epsilon", "seed")}
        found = cls(state["calibration"], **settings)
        found.cusum, found.blocks, found.steps = state["cusum"], state["blocks"], state["steps"]
        found.quiet_until, found._open = state["quiet_until"], list(state["open"])
        return found


def block_means(scores: Sequence[float], block: int) -> list[float]:
    """Means of consecutive blocks; what does not fill the last one is left out."""
    whole = len(scores) // block * block
    return np.asarray(scores[:whole], dtype=float).reshape(-1, block).mean(1).tolist() if whole else []


def shuffled(scores: Sequence[float], block: int, *, seed: Sequence[int], pending: int = 0) -> list[float]:
    """Scores with their whole blocks in random order. An episode's blocks are alike, and the errors of its beginning are often the
    large ones: taken in order, a few such blocks in a row alarm several times as often as exchangeable ones do.

    ``pending``: scores of a block that is open already. The first scores complete it, so that no block is of two places.
    """
    first = min(-pending % block, len(scores))
    last = first + (len(scores) - first) // block * block
    blocks = np.asarray(scores[first:last], dtype=float).reshape(-1, block)
    mixed = np.random.default_rng(list(seed)).permutation(blocks).flatten().tolist()
    return [*scores[:first], *mixed, *scores[last:]]


def false_alarm_rate(
    blocks: int, *, calibration: int = FEWEST_BLOCKS, threshold: float = 1000.0, epsilon: float = 0.3, runs: int = 2000,
    seed: int = 0,
) -> float:  # fmt: skip
    """Share of simulated watches of ``blocks`` exchangeable blocks that alarm. Each run draws a calibration of its own: a poor
    one is shared by all the blocks of its watch, which is most of the risk."""
    check_integer("blocks", blocks, low=1)
    check_integer("runs", runs, low=1)
    rng = np.random.default_rng(seed)
    alarms = 0
    for _ in range(runs):
        reference = np.sort(rng.random(calibration))
        above = calibration - np.searchsorted(reference, rng.random(blocks))
        p = (above + rng.random(blocks)) / (calibration + 1)
        bets = math.log(epsilon) + (epsilon - 1) * np.log(p)
        cusum = 0.0
        for bet in bets:
            cusum = max(0.0, cusum + bet)
            if cusum > math.log(threshold):
                alarms += 1
                break
    return alarms / runs
