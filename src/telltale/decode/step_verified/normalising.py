"""Signals on one scale: log-probability and grounding mapped to [0, 1] before they are weighed against each other.

SpecGuard (arXiv 2604.15244) writes (l - l_min) / (l_max - l_min) and does not say what the extremes are taken over. Here they are
constants fitted on held-out steps (see :mod:`telltale.decode.calibration.calibrate`); the other readings have names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from telltale.config import check_choice, check_range
from telltale.errors import ConfigError

KINDS = ("minmax", "ecdf", "running", "group")
"""Fitted extremes, clipped; fitted quantiles; extremes of the steps so far of the same row; extremes of the candidates."""


@dataclass(frozen=True)
class Scale:
    """How one signal is mapped to [0, 1]: ``low`` and ``high`` for "minmax", sorted ``quantiles`` for "ecdf"."""

    low: float
    high: float
    quantiles: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_range("low", self.low)
        check_range("high", self.high)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f"the scale {self.low!r}..{self.high!r} is degenerate; expected finite numbers, the first below the second."
            )
        if any(a > b for a, b in zip(self.quantiles, self.quantiles[1:], strict=False)):
            raise ConfigError("the quantiles of a scale are not sorted; expected them to rise.")

    def linear(self, value: float) -> float:
        """(value - low) / (high - low), clipped to [0, 1]."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def rank(self, value: float) -> float:
        """The share of fitted values that are not above ``value``."""
        return bisect_right(self.quantiles, value) / len(self.quantiles)


LOG_PROBABILITY = Scale(-5.0, 0.0)
"""Of the smallest log-probability of a step, nats, before anything is fitted."""
GROUNDING = Scale(0.0, 1.0)
"""Of the smallest grounding of a step, before anything is fitted."""


@dataclass(frozen=True)
class Normaliser:
    """``kind`` of normalisation, and the scales of both signals. Uncalibrated scales are wide guesses: see ``fitted``."""

    kind: str = "minmax"
    log_probability: Scale = LOG_PROBABILITY
    grounding: Scale = GROUNDING
    fitted: bool = False
    """Whether the scales come from a calibration."""

    def __post_init__(self) -> None:
        check_choice("normaliser", self.kind, KINDS)
        if self.kind == "ecdf" and not (self.log_probability.quantiles and self.grounding.quantiles):
            raise ConfigError("normaliser='ecdf' needs fitted quantiles of both signals; calibrate first.")

    def normalised(self, signal: str, value: float, *, among: Sequence[float] = ()) -> float:
        """``value`` of ``signal`` ("log_probability" or "grounding") in [0, 1].

        ``among``: what "running" and "group" take the extremes over, ``value`` included. If these are all the same there is
        no scale yet, and the value reads as 0.5.
        """
        scale: Scale = getattr(self, signal)
        if self.kind == "minmax":
            return scale.linear(value)
        if self.kind == "ecdf":
            return scale.rank(value)
        low, high = min(among), max(among)
        return 0.5 if low == high else (value - low) / (high - low)

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "kind": self.kind,
            "fitted": self.fitted,
            "log_probability": _plain(self.log_probability),
            "grounding": _plain(self.grounding),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Normaliser:
        """What :meth:`to_dict` wrote. Raises :class:`~telltale.errors.ConfigError` for anything else."""
        try:
            scales = {
                name: Scale(
                    float(values[name]["low"]),
                    float(values[name]["high"]),
                    tuple(map(float, values[name]["quantiles"])),
                )
                for name in ("log_probability", "grounding")
            }
            return Normaliser(kind=values["kind"], fitted=bool(values["fitted"]), **scales)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the normaliser cannot be read: {error}; expected what a calibration wrote.") from error


def _plain(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "quantiles": list(scale.quantiles)}
