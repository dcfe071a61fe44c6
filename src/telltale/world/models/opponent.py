"""An opponent model: how often each action was taken in each information state, over a prior of one uniform hand."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from telltale.config import check_range
from telltale.errors import DataError
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World


class OpponentModel:
    """Dirichlet counts by information state. ``prior``: pseudo-count of each legal action. Steps like the game itself."""

    stochastic = True

    def __init__(self, game: str, counts: dict[str, dict[int, int]], prior: float = 1.0) -> None:
        check_range("prior", prior, low=1e-6)
        self.game, self.counts, self.prior = game, counts, prior
        self._table: Any = None

    def policy(self, information_state: str, legal: list[int]) -> list[float]:
        """Posterior mean probabilities of the legal actions."""
        seen = self.counts.get(information_state, {})
        weights = [self.prior + seen.get(action, 0) for action in legal]
        return [weight / sum(weights) for weight in weights]

    def step(self, belief: Any, action: Any, *, generator: Any = None, common: bool = False) -> Any:
        """Play on from an information state against this opponent."""
        if self._table is None:
            from telltale.world.worlds.games import GameModel

            self._table = GameModel(self.game, self)
        return self._table.step(belief, action, generator=generator)

    def describe(self) -> dict[str, Any]:
        """Kind and counts, as saved."""
        counts = {state: {str(a): n for a, n in seen.items()} for state, seen in self.counts.items()}
        return {"kind": "opponent", "config": {"game": self.game, "counts": counts, "prior": self.prior}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OpponentModel:
        """The model of a saved config."""
        counts = {state: {int(a): int(n) for a, n in seen.items()} for state, seen in config["counts"].items()}
        return cls(config["game"], counts, float(config["prior"]))


def fit_opponent(
    transitions: Transitions, *, world: World | None = None, seed: int = 0, prior: float = 1.0
) -> OpponentModel:
    """Count the opponent's actions in the hands of the receipts.

    Raises :class:`~telltale.errors.DataError` if the receipts show no finished hand, or the world is no game.
    """
    game_name = getattr(world, "game_name", None)
    if game_name is None:
        raise DataError(
            f"an opponent model needs a game to replay hands in; pass world=make('social/...'), not {world!r}."
        )
    hands = [hand["history"] for receipt in transitions.receipts for hand in receipt.get("hands", ())]
    return observe(game_name, hands, prior=prior)


def observe(game_name: str, hands: list[list[int]], *, prior: float = 1.0) -> OpponentModel:
    """Count the moves of player 1 in complete histories of hands. No hand gives the prior."""
    import pyspiel

    game = pyspiel.load_game(game_name)
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for history in hands:
        state = game.new_initial_state()
        for move in history:
            if state.current_player() == 1:
                counts[state.information_state_string(1)][move] += 1
            state.apply_action(move)
    return OpponentModel(game_name, {state: dict(seen) for state, seen in counts.items()}, prior)
