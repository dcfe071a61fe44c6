"""A table of what was seen: the most frequent next state of every (state, action); where nothing was seen, nothing changes."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from telltale.errors import DataError
from telltale.world.protocol import Transition
from telltale.world.transitions import Transitions, as_state
from telltale.world.worlds.base import World


class Tabular:
    """Counts of next states by (state, action)."""

    stochastic = False

    def __init__(self, counts: dict[tuple[Any, int], Counter[Any]]) -> None:
        self.counts = counts
        self._best = {key: found.most_common(1)[0][0] for key, found in counts.items()}

    def step(self, belief: Any, action: int) -> Transition:
        """The most frequent next state."""
        return Transition(self._best.get((belief, int(action)), belief))

    def knows(self, belief: Any, action: int) -> bool:
        """Whether this state and action were seen."""
        return (belief, int(action)) in self._best

    def describe(self) -> dict[str, Any]:
        """Kind and counts, as saved."""
        entries = [[state, action, list(found.items())] for (state, action), found in self.counts.items()]
        return {"kind": "tabular", "config": {"entries": entries}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Tabular:
        """The table of a saved config."""
        return cls(
            {
                (as_state(state), int(action)): Counter({as_state(after): int(n) for after, n in found})
                for state, action, found in config["entries"]
            }
        )


def fit_tabular(transitions: Transitions, *, world: World | None = None, seed: int = 0) -> Tabular:
    """Count the transitions. Raises :class:`~telltale.errors.DataError` for numeric states, which rarely repeat."""
    if not transitions.plain:
        raise DataError("a table needs plain states; for numeric states use kind ensemble.")
    counts: dict[tuple[Any, int], Counter[Any]] = defaultdict(Counter)
    for before, action, after in zip(transitions.before, transitions.actions.tolist(), transitions.after, strict=True):
        counts[(before, int(action))][after] += 1
    return Tabular(dict(counts))
