"""What a person may change about a fitted judge: how much an objective counts. Rewards and the gate stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor

from telltale.configuration import check_range
from telltale.errors import ConfigError


class UnknownObjective(ConfigError, KeyError):
    """An objective that the judge does not have; the message names the nearest one that it has."""

    def __init__(self, name: str, objectives: Sequence[str]) -> None:
        near = difflib.get_close_matches(name, objectives, n=1, cutoff=0.0)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"objective {name!r} is unknown; expected one of {', '.join(objectives)}.{hint}")

    def __str__(self) -> str:
        # KeyError would show the message's repr.
        return str(self.args[0])


def check_factors(factors: Mapping[str, float], objectives: Sequence[str], transform: Tensor) -> None:
    """Check factors of objectives against the judge's names and its transform T (K, K).

    Raises :class:`UnknownObjective` with the nearest name, and :class:`~telltale.errors.ConfigError` for a factor that is
    not a finite number >= 0 and for an objective whose decorrelated reward (r T)_i is zero, where no factor does anything.
    """
    for name, factor in factors.items():
        if name not in objectives:
            raise UnknownObjective(name, objectives)
        check_range(f"reweight[{name!r}]", factor, low=0.0, below=float("inf"))
        if not bool(transform[:, list(objectives).index(name)].any()):
            raise ConfigError(
                f"objective {name!r} is a nuisance that decorrelation takes out of every reward; its factor would do nothing. "
                f"Expected an objective that the gate weighs."
            )


def fold(factors: Mapping[str, float], objectives: Sequence[str], transform: Tensor) -> Tensor:
    """T diag(f), (K, K): sum_i f_i g_i (r T)_i = sum_i g_i (r T diag(f))_i, so factors can live in the transform."""
    scale = transform.new_tensor([factors.get(name, 1.0) for name in objectives])
    return transform * scale
