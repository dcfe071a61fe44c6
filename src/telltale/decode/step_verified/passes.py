"""What goes into a pass over rows and what comes out of it, and what a side remembers of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from telltale.signals.grounding import prefix_masses, sparsified


@dataclass
class Seat:
    """What a side has processed of a row: ``length`` tokens, and ``tail`` (hidden,), its state after the last of them."""

    length: int = 0
    tail: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)
    """States (n, hidden) that the layers above have not seen yet; empty unless one model has both roles."""
    masses: Tensor | None = None
    """(layers, length): see :func:`telltale.signals.grounding.prefix_masses`; only where grounding needs whole rows."""


@dataclass
class Work:
    """Tokens to be processed behind a row. ``since``: the position where its step starts, if attention is asked for."""

    slot: int
    tokens: list[int]
    since: int | None = None


@dataclass
class Passed:
    """What a pass gives of one row.

    ``states`` (T, hidden) after the side's last layer, before the final norm; ``blocks`` (layers, step tokens, step tokens), the
    attention of the step's tokens on the step, averaged over heads, None unless asked for; ``lower`` what the draft's layers gave
    where one model has both roles and a branch of the whole model grew.
    """

    states: Tensor
    blocks: Tensor | None = None
    lower: Passed | None = None
    rows: Tensor | None = None
    """(layers, step tokens, position + 1): whole rows of attention instead of ``blocks``, where grounding needs them."""
    masses: Tensor | None = None
    """(layers, T), of all tokens of the pass; with ``rows``."""


@dataclass(frozen=True)
class WholeRows:
    """Grounding from whole rows of attention: weights dropped, or first tokens that do not count as ground."""

    threshold: float
    renormalise: bool
    sinks: int
    residual: float

    def kept(self, rows: Tensor) -> Tensor:
        """:func:`~telltale.signals.grounding.sparsified` rows: (layers, heads, T, n) -> (layers, T, n)."""
        return sparsified(rows, threshold=self.threshold, renormalise=self.renormalise)

    def masses(self, rows: Tensor, before: Tensor | None, position: int) -> Tensor:
        """:func:`~telltale.signals.grounding.prefix_masses` of the tokens from ``position`` on; ``rows`` (layers, T, n)."""
        count = rows.shape[1]
        entering = (torch.arange(position, position + count, device=rows.device) >= self.sinks).to(rows.dtype)
        known = rows.new_zeros(rows.shape[0], 0) if before is None else before
        return prefix_masses(list(rows), known[:, :position], entering, residual=self.residual)


def append_masses(seat: Seat, passed: Sequence[Passed]) -> None:
    """Remember the masses of tokens that count from now on."""
    new = [one.masses for one in passed if one.masses is not None]
    if new:
        seat.masses = torch.cat(new if seat.masses is None else [seat.masses, *new], 1)


def cut_masses(seat: Seat, length: int) -> None:
    """Forget the masses of tokens from ``length`` on."""
    if seat.masses is not None:
        seat.masses = seat.masses[:, :length]
