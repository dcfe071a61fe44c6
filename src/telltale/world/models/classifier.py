"""A network over plain states: one softmax per field over the changes seen in training. Kind ``mlp`` on plain states."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.config import check_integer, from_mapping
from telltale.errors import DataError
from telltale.world.models.ensemble import FitConfig
from telltale.world.protocol import Transition
from telltale.world.transitions import Transitions
from telltale.world.worlds.base import World


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes: ``lows`` and ``highs`` of the fields, the ``changes`` that each field can make, number of ``actions``, and
    ``hidden`` units in each of two layers."""

    lows: tuple[int, ...]
    highs: tuple[int, ...]
    changes: tuple[tuple[int, ...], ...]
    actions: int
    hidden: int = 128

    def __post_init__(self) -> None:
        check_integer("hidden", self.hidden, low=1)
        check_integer("actions", self.actions, low=1)


class FieldClassifier(nn.Module):
    """Logits for the change of every field, from one-hot fields, the fields as numbers, and a one-hot action."""

    stochastic = False

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = [high - low + 1 for low, high in zip(config.lows, config.highs, strict=True)]
        inputs = sum(self.sizes) + len(self.sizes) + config.actions
        self.net = nn.Sequential(
            nn.Linear(inputs, config.hidden), nn.SiLU(), nn.Linear(config.hidden, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, sum(map(len, config.changes))),
        )  # fmt: skip

    def encode(self, states: Tensor, actions: Tensor) -> Tensor:
        """One-hot fields, fields as numbers, and the one-hot action: (N, inputs)."""
        sizes = torch.tensor(self.sizes)
        shifted = states - torch.tensor(self.config.lows)
        places = torch.minimum(shifted.clamp(min=0), sizes - 1) + (sizes.cumsum(0) - sizes)
        fields = torch.zeros(len(states), sum(self.sizes)).scatter_(1, places, 1.0)
        return torch.cat(
            [fields, (shifted / sizes).float(), functional.one_hot(actions, self.config.actions).float()], 1
        )

    def step(self, belief: Any, action: int) -> Transition:
        """The most probable change of every field."""
        return Transition(self._after(belief, torch.tensor([int(action)]))[0])

    def successors(self, belief: Any) -> list[Any]:
        """The next state of every action, in one pass of the network."""
        return self._after(belief, torch.arange(self.config.actions))

    @torch.no_grad()
    def _after(self, belief: Any, actions: Tensor) -> list[Any]:
        logits = self.net(self.encode(torch.tensor([belief]).expand(len(actions), -1), actions))
        parts = logits.split([len(choices) for choices in self.config.changes], 1)
        chosen = torch.stack([part.argmax(1) for part in parts], 1).tolist()
        return [
            tuple(
                value + choices[index] for value, choices, index in zip(belief, self.config.changes, row, strict=True)
            )
            for row in chosen
        ]

    def describe(self) -> dict[str, Any]:
        """Kind and config, as saved."""
        return {"kind": "classifier", "config": vars(self.config)}


def fit_classifier(
    transitions: Transitions, *, world: World | None = None, seed: int = 0, **options: Any
) -> FieldClassifier:
    """Cross-entropy per field, early stopping. Fields' ranges are the world's, else those seen."""
    width = len(transitions.before[0]) if isinstance(transitions.before[0], tuple) else 0
    for state in (*transitions.before, *transitions.after):
        if not isinstance(state, tuple) or len(state) != width or not width or any(type(v) is not int for v in state):
            raise DataError(
                f"a classifier needs states that are tuples of integers of one length, not {state!r}; for games use kind opponent."
            )
    states, after = torch.tensor(transitions.before), torch.tensor(transitions.after)
    both = torch.cat([states, after])
    ranges = getattr(world, "ranges", None) or list(zip(both.amin(0).tolist(), both.amax(0).tolist(), strict=True))
    count = world.action_width if world is not None else int(transitions.actions.max()) + 1
    hidden = options.pop("hidden", 128)
    settings = from_mapping(FitConfig, {"epochs": 150, "patience": 20, **options})
    changes = tuple(tuple(sorted({*column, 0})) for column in (after - states).T.tolist())
    config = ClassifierConfig(
        tuple(low for low, _ in ranges), tuple(high for _, high in ranges), changes, count, hidden
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FieldClassifier(config)
    inputs = model.encode(states, transitions.actions)
    moved = zip((after - states).T.tolist(), changes, strict=True)
    target = torch.tensor([[choices.index(change) for change in column] for column, choices in moved]).T
    order = torch.randperm(len(inputs), generator=generator)
    held = max(2, int(settings.held_out * len(inputs)))
    test, train = order[:held], order[held:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_state, waited = float("inf"), copy.deepcopy(model.state_dict()), 0
    for _ in range(settings.epochs):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for first in range(0, len(train), settings.batch_size):
            rows = shuffled[first : first + settings.batch_size]
            optimizer.zero_grad(set_to_none=True)
            _field_loss(model, inputs[rows], target[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            score = float(_field_loss(model, inputs[test], target[test]))
        if score < best - 1e-4:
            best, best_state, waited = score, copy.deepcopy(model.state_dict()), 0
        else:
            waited += 1
            if waited >= settings.patience:
                break
    model.load_state_dict(best_state)
    return model.eval().requires_grad_(False)


def _field_loss(model: FieldClassifier, inputs: Tensor, target: Tensor) -> Tensor:
    parts = model.net(inputs).split([len(choices) for choices in model.config.changes], 1)
    return torch.stack([functional.cross_entropy(part, target[:, i]) for i, part in enumerate(parts)]).sum()
