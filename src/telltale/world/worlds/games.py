"""Social worlds: OpenSpiel games against an opponent with a bias of its own that adapts to how it is played.

One episode is a session of many hands. The opponent is a policy over its information states, tilted towards its last
legal action (the raise, the high bid) the more often we fold: it is reflexive, so a policy that earns at first can stop
earning. A hand's cards are shown after it, as the receipt; that is what an opponent model learns from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from functools import lru_cache
from typing import Any

import numpy as np
import pyspiel
import torch
from gymnasium import spaces
from open_spiel.python import policy as spiel_policy
from open_spiel.python.algorithms import best_response, expected_game_score
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.errors import DataError
from telltale.world.laws import contracts
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, World

US, OPPONENT = 0, 1


class BiasedOpponent:
    """A fixed policy over information states: softmax of ``strength`` times noise that depends on (state, action, ``bias``)."""

    def __init__(self, bias: int = 0, strength: float = 1.5, tilt: float = 0.0) -> None:
        self.bias, self.strength, self.tilt = bias, strength, tilt

    def policy(self, information_state: str, legal: list[int]) -> list[float]:
        """Probabilities of the legal actions."""
        logits = [self.strength * _noise(f"{self.bias}|{information_state}|{a}") for a in legal]
        logits[-1] += self.tilt
        top = max(logits)
        weights = [math.exp(value - top) for value in logits]
        return [weight / sum(weights) for weight in weights]


@lru_cache(maxsize=100_000)
def _noise(text: str) -> float:
    """A number in [-1, 1] that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**63 - 1


class PokerTable(World):
    """A session of ``hands`` hands as player 0. Beliefs are (information state, our chips won, the opponent's).

    ``bias`` picks the opponent; ``adapts`` is how fast it tilts with our folds, per hand (0: it never does). Success: at
    least the value of the game per hand, which is what an equilibrium player is sure of in expectation.
    """

    regime = "social"
    plain = True
    planner = "best_response"
    horizon = 3
    columns = ("information state", "ours", "theirs")

    def __init__(self, *, game: str = "kuhn_poker", hands: int = 60, bias: int = 0, adapts: float = 0.5) -> None:
        check_integer("hands", hands, low=1)
        check_range("adapts", adapts, low=0.0, high=10.0)
        self.id = f"social/{game}"
        self.game_name, self.hands, self.bias, self.adapts = game, hands, bias, adapts
        self.game = pyspiel.load_game(game)
        self.action_space = spaces.Discrete(self.game.num_distinct_actions())
        self.max_steps = hands * self.game.max_game_length()
        self.equilibrium = {"kuhn_poker": -1 / 18, "leduc_poker": -0.0856}.get(game, 0.0)
        self.laws = (contracts.zero_sum(lambda state: state[1:3]),)

    def reset(self, seed: int) -> Any:
        """Sit down: a new shuffle, an opponent that knows nothing of us."""
        self._rng = np.random.default_rng(seed)
        self.opponent = BiasedOpponent(self.bias)
        self._won, self._played, self._folds = [0.0, 0.0], 0, 0
        self._deal()
        return self._observed()

    def _deal(self) -> None:
        self._state = self.game.new_initial_state()
        self._advance(self._state)

    def _advance(self, state: Any) -> None:
        """Chance and the opponent, until we decide or the hand is over."""
        while not state.is_terminal() and state.current_player() != US:
            if state.is_chance_node():
                actions, chances = map(list, zip(*state.chance_outcomes(), strict=True))
            else:
                actions = state.legal_actions()
                chances = self.opponent.policy(state.information_state_string(OPPONENT), actions)
            state.apply_action(int(self._rng.choice(actions, p=np.asarray(chances) / sum(chances))))

    def _observed(self) -> Any:
        return (self._state.information_state_string(US), *self._won)

    def step(self, action: Any) -> Outcome:
        """One decision. An action that the rules do not allow is refused with an error. A finished hand is in the receipt."""
        chosen = self.checked_action(action)
        legal = self._state.legal_actions()
        if chosen not in legal:
            raise DataError(f"action {chosen} is not legal here; the rules of {self.id} allow {legal}.")
        self._folds += int(chosen == legal[0])
        self._state.apply_action(chosen)
        self._advance(self._state)
        receipt: dict[str, Any] = {}
        reward = 0.0
        while self._state.is_terminal():
            returns = self._state.returns()
            reward += float(returns[US])
            self._won = [total + float(r) for total, r in zip(self._won, returns, strict=True)]
            receipt.setdefault("hands", []).append({"history": self._state.history(), "returns": list(returns)})
            self._played += 1
            self.opponent.tilt = self.adapts * self._folds / max(1, self._played)
            if self._played >= self.hands:
                return Outcome(("", *self._won), reward, True, False, receipt)
            self._deal()
        return Outcome(self._observed(), reward, False, False, receipt)

    def legal(self, belief: Any) -> list[int]:
        """What the rules allow in an information state."""
        return legal_actions(self.game_name)[belief[0]]

    def sample_action(self, generator: torch.Generator) -> Any:
        """A uniform legal action in the present state."""
        legal = self._state.legal_actions()
        return legal[int(torch.randint(len(legal), (), generator=generator))]

    def spawn(self) -> World:
        """Another table with the same rules and opponent."""
        return type(self)(**self.settings())

    def settings(self) -> dict[str, Any]:
        """game, hands, bias, adapts."""
        return {"game": self.game_name, "hands": self.hands, "bias": self.bias, "adapts": self.adapts}

    def success(self, episode: Episode) -> bool:
        """At least the game's value per hand."""
        return episode.total >= self.equilibrium * self.hands

    def oracle(self) -> Any:
        """The opponent's true policy before it tilts."""
        return GameModel(self.game_name, BiasedOpponent(self.bias))

    def embed(self, belief: Any) -> Tensor:
        """The information state's tensor and the chips won, (D,)."""
        known = information_tensors(self.game_name)
        tensor = known.get(belief[0])
        if tensor is None:
            tensor = torch.zeros_like(next(iter(known.values())))
        return torch.cat([tensor, torch.tensor([belief[1] / 10.0])])

    def best_response(self, model: Any) -> Any:
        """The policy of highest expected value against ``model.policy``, by a walk of the whole tree."""
        table = tabular(self.game, model)
        found = best_response.BestResponsePolicy(self.game, US, table)
        return BestResponder(found, self.game)

    def value_of(self, policy: Any, opponent: Any) -> float:
        """Expected chips per hand of ``policy`` (a BestResponder, or None for uniform) against ``opponent.policy``, exactly."""
        ours = spiel_policy.UniformRandomPolicy(self.game) if policy is None else policy.found
        scores = expected_game_score.policy_value(self.game.new_initial_state(), [ours, tabular(self.game, opponent)])
        return float(scores[US])

    def versions(self) -> dict[str, str]:
        """OpenSpiel."""
        return {"open_spiel": importlib.metadata.version("open_spiel")}


class Auction(PokerTable):
    """First-price sealed bids for a good worth 1-10 to us. Law: no bid above our value (individual rationality).

    Success: at least 1.6 units of profit per round on average.
    """

    def __init__(self, *, hands: int = 40, bias: int = 0, adapts: float = 0.5) -> None:
        super().__init__(game="first_sealed_auction(max_value=10)", hands=hands, bias=bias, adapts=adapts)
        self.id = "social/first_sealed_auction"
        self.equilibrium = 1.6
        self.laws = (
            contracts.individual_rationality(
                lambda state, bid: float(int(state[0] or 0) - bid), name="no bid above value"
            ),
        )

    def settings(self) -> dict[str, Any]:
        """hands, bias, adapts."""
        return {"hands": self.hands, "bias": self.bias, "adapts": self.adapts}


class BestResponder:
    """A best response: its action in each information state, and the value it expects."""

    def __init__(self, found: Any, game: Any) -> None:
        self.found = found
        self.value = float(found.value(game.new_initial_state()))

    def action(self, observation: Any) -> int:
        """The action in the information state that was observed."""
        return int(self.found.best_response_action(observation[0]))


class GameModel:
    """A game whose opponent is ``opponent.policy``: steps from information states by drawing a deal that fits them."""

    stochastic = True

    def __init__(self, game: str, opponent: Any) -> None:
        self.game_name, self.opponent = game, opponent
        self.game = pyspiel.load_game(game)

    def policy(self, information_state: str, legal: list[int]) -> list[float]:
        """The opponent's, as modelled."""
        return self.opponent.policy(information_state, legal)

    def step(
        self, belief: Any, action: Any, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """Draw a deal that fits the information state, weighed by how the opponent would have played it; act; play on."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)) if generator is not None else 0)
        information_state, ours, theirs = belief
        candidates = deals(self.game_name).get(information_state)
        if candidates is None:
            return Transition(belief, 0.0)
        weights = np.array([self._likelihood(history, chance) for history, chance in candidates])
        weights = np.ones(len(weights)) if weights.sum() <= 0 else weights
        history, _ = candidates[int(rng.choice(len(candidates), p=weights / weights.sum()))]
        state = self.game.new_initial_state()
        for move in history:
            state.apply_action(move)
        legal = state.legal_actions()
        state.apply_action(int(action) if int(action) in legal else legal[0])
        self._advance(state, rng)
        reward = 0.0
        while state.is_terminal():
            returns = state.returns()
            reward += float(returns[US])
            ours, theirs = ours + float(returns[US]), theirs + float(returns[OPPONENT])
            state = self.game.new_initial_state()
            self._advance(state, rng)
        return Transition((state.information_state_string(US), ours, theirs), reward)

    def _advance(self, state: Any, rng: Any) -> None:
        while not state.is_terminal() and state.current_player() != US:
            if state.is_chance_node():
                actions, chances = map(list, zip(*state.chance_outcomes(), strict=True))
            else:
                actions = state.legal_actions()
                chances = self.policy(state.information_state_string(OPPONENT), actions)
            state.apply_action(int(rng.choice(actions, p=np.asarray(chances) / sum(chances))))

    def _likelihood(self, history: tuple[int, ...], chance: float) -> float:
        """Chance of the deal times the probability of the opponent's moves in it."""
        state, weight = self.game.new_initial_state(), chance
        for move in history:
            if state.current_player() == OPPONENT:
                legal = state.legal_actions()
                weight *= self.policy(state.information_state_string(OPPONENT), legal)[legal.index(move)]
            state.apply_action(move)
        return weight


def tabular(game: Any, model: Any) -> Any:
    """A model's opponent policy as OpenSpiel's TabularPolicy; our own rows stay uniform."""
    table = spiel_policy.TabularPolicy(game)
    for state in table.states:
        if state.current_player() != OPPONENT:
            continue
        row = table.policy_for_key(state.information_state_string(OPPONENT))
        legal = state.legal_actions()
        row[:] = 0.0
        row[legal] = model.policy(state.information_state_string(OPPONENT), legal)
    return table


@lru_cache(maxsize=8)
def _tree(
    game_name: str,
) -> tuple[dict[str, list[tuple[tuple[int, ...], float]]], dict[str, Tensor], dict[str, list[int]]]:
    """Walk the game once: per information state of ours the histories that lead to it, its tensor, and its legal actions."""
    game = pyspiel.load_game(game_name)
    found: dict[str, list[tuple[tuple[int, ...], float]]] = {}
    tensors: dict[str, Tensor] = {}
    legal: dict[str, list[int]] = {}

    def walk(state: Any, chance: float) -> None:
        if state.is_terminal():
            return
        if state.is_chance_node():
            for action, probability in state.chance_outcomes():
                walk(state.child(action), chance * probability)
            return
        if state.current_player() == US:
            key = state.information_state_string(US)
            found.setdefault(key, []).append((tuple(state.history()), chance))
            legal[key] = state.legal_actions()
            if key not in tensors:
                tensors[key] = torch.tensor(state.information_state_tensor(US))
        for action in state.legal_actions():
            walk(state.child(action), chance)

    walk(game.new_initial_state(), 1.0)
    return found, tensors, legal


def deals(game_name: str) -> dict[str, list[tuple[tuple[int, ...], float]]]:
    """Histories, with the chance of their deals, by information state of player 0."""
    return _tree(game_name)[0]


def information_tensors(game_name: str) -> dict[str, Tensor]:
    """Tensors by information state of player 0."""
    return _tree(game_name)[1]


def legal_actions(game_name: str) -> dict[str, list[int]]:
    """Legal actions by information state of player 0."""
    return _tree(game_name)[2]
