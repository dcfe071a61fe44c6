"""The baselines that a gate has to beat, trained on the same pairs with the same early stopping.

Fixed weights (one softmax vector for all prompts), signed linear weights on the same rewards, and two unconstrained
Bradley-Terry heads that explain nothing: linear in the response, and an MLP of prompt and response. Use a gate only if it beats
fixed weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from telltale.align.judge.gate_fit import (
    Margins,
    PairFeatures,
    PairFit,
    accuracy,
    held_out_rows,
    initial_scale,
    reward_differences,
    standardised,
    train_pairs,
)
from telltale.align.judge.head import GateConfig, Head

PENALTIES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""Squared-norm penalties of the linear Bradley-Terry head; the best on held-out prompts is taken."""
LINEAR_RATE = 0.05
FIXED, SIGNED, LINEAR, MLP = "fixed weights", "signed weights", "Bradley-Terry, linear", "Bradley-Terry, MLP"
BLACK_BOXES = (LINEAR, MLP)


class FixedWeights(nn.Module):
    """score = scale * softmax(w) . r T: one weight vector for every prompt; masked objectives have none."""

    def __init__(self, masked: Tensor, scale: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(masked)))
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.register_buffer("masked", masked, persistent=False)

    def weights(self) -> Tensor:
        """(K,), positive or zero."""
        masked: Tensor = self.masked  # type: ignore[assignment]
        return self.log_scale.exp() * self.logits.masked_fill(masked, -torch.inf).softmax(-1)

    def forward(self, rewards: Tensor) -> Tensor:
        """Decorrelated rewards or differences (n, K) -> (n,)."""
        return rewards @ self.weights()


class SignedWeights(nn.Module):
    """score = w . r T with weights of any sign."""

    def __init__(self, objectives: int, scale: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((objectives,), scale / objectives))

    def forward(self, rewards: Tensor) -> Tensor:
        """Decorrelated rewards or differences (n, K) -> (n,)."""
        return rewards @ self.values


class LinearBradleyTerry(nn.Module):
    """score = w . h on standardised features of the response alone."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.values = nn.Parameter(torch.zeros(len(mean)))

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, d) -> (n,)."""
        found: Tensor = ((hidden.float() - self.mean) / self.deviation) @ self.values
        return found


class MlpBradleyTerry(nn.Module):
    """score = MLP(prompt, response) on standardised features: two hidden layers."""

    mean: Tensor
    deviation: Tensor
    prompt_mean: Tensor
    prompt_deviation: Tensor

    def __init__(self, response: tuple[Tensor, Tensor], prompt: tuple[Tensor, Tensor], hidden: int = 256) -> None:
        super().__init__()
        for name, value in zip(
            ("mean", "deviation", "prompt_mean", "prompt_deviation"), (*response, *prompt), strict=True
        ):
            self.register_buffer(name, value)
        size = len(response[0]) + len(prompt[0])
        self.layers = nn.Sequential(
            nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        """(n, d) and (n, prompt size) -> (n,)."""
        response = (hidden.float() - self.mean) / self.deviation
        prompt = (prompts.float() - self.prompt_mean) / self.prompt_deviation
        found: Tensor = self.layers(torch.cat([response, prompt], -1)).squeeze(-1)
        return found


@dataclass(frozen=True)
class Baselines:
    """The fitted baselines and how each training went."""

    fixed: FixedWeights
    signed: SignedWeights
    linear: LinearBradleyTerry
    mlp: MlpBradleyTerry
    fits: dict[str, PairFit]
    penalty: float
    """Of the linear Bradley-Terry head, as the held-out prompts have chosen it."""

    @torch.no_grad()
    def margins(self, head: Head, pairs: PairFeatures) -> dict[str, Tensor]:
        """Score of the chosen response less that of the rejected one, (n,), of each on ``pairs``."""
        differences = reward_differences(head, pairs)
        return {
            FIXED: self.fixed(differences),
            SIGNED: self.signed(differences),
            LINEAR: self.linear(pairs.chosen) - self.linear(pairs.rejected),
            MLP: self.mlp(pairs.chosen, pairs.prompts) - self.mlp(pairs.rejected, pairs.prompts),
        }

    def accuracies(self, head: Head, pairs: PairFeatures) -> dict[str, float]:
        """Accuracy of each on ``pairs``, ties counted one half."""
        return {name: accuracy(margins, pairs.decided) for name, margins in self.margins(head, pairs).items()}


def fit_baselines(
    head: Head,
    pairs: PairFeatures,
    config: GateConfig | None = None,
    *,
    seed: int = 0,
    held_out: Tensor | None = None,
    like: Baselines | None = None,
    hidden: int = 256,
) -> Baselines:
    """Train the four on ``pairs`` with the head's regression and transform; ``held_out`` (n,) is true for the pairs to stop by.

    ``like`` trains on all pairs instead, for as many steps and with the penalty that these baselines found best on a part of them.
    Raises :class:`~telltale.errors.DataError` for pairs of a single prompt.
    """
    config = config or head.gating.config
    if like is not None:
        held_out = torch.zeros(len(pairs), dtype=torch.bool)
    elif held_out is None:
        held_out = held_out_rows(pairs.groups, config.held_out, seed=seed)
    train, stop = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    differences = reward_differences(head, pairs)
    masked = torch.zeros(len(head.objectives), dtype=torch.bool)
    masked[list(head.nuisance_columns)] = head.gating.config.mask_nuisances
    scale = initial_scale(differences[train], masked)
    linear_config = replace(config, learning_rate=LINEAR_RATE, weight_decay=0.0)

    def trained(name: str, margins: Margins, model: nn.Module, settings: GateConfig) -> PairFit:
        return train_pairs(
            margins,
            [*model.parameters()],
            train,
            stop,
            settings,
            seed=seed,
            votes=pairs.votes,
            until=None if like is None else like.fits[name].best_step,
            modules=[model],
        )

    fixed, signed = FixedWeights(masked, scale), SignedWeights(len(head.objectives), scale)
    signed_config = replace(linear_config, learning_rate=LINEAR_RATE * max(1.0, scale))
    fits = {
        FIXED: trained(FIXED, lambda rows: fixed(differences[rows]), fixed, linear_config),
        SIGNED: trained(SIGNED, lambda rows: signed(differences[rows]), signed, signed_config),
    }
    both = torch.cat([pairs.chosen[train], pairs.rejected[train]])
    _, *response = standardised(both, both[:1])
    along = (pairs.chosen.float() - pairs.rejected.float()) / response[1]
    found: tuple[PairFit, LinearBradleyTerry, float] | None = None
    for penalty in PENALTIES if like is None else (like.penalty,):
        candidate = LinearBradleyTerry(*response)
        decayed = replace(linear_config, weight_decay=penalty / LINEAR_RATE)
        fit = trained(LINEAR, _linear_margins(candidate, along), candidate, decayed)
        if found is None or fit.held_out_loss < found[0].held_out_loss:
            found = fit, candidate, penalty
    assert found is not None
    fits[LINEAR], linear, penalty = found
    prompt = standardised(pairs.prompts[train], pairs.prompts[:1])[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = MlpBradleyTerry((response[0], response[1]), prompt, hidden)
    fits[MLP] = trained(
        MLP,
        lambda rows: mlp(pairs.chosen[rows], pairs.prompts[rows]) - mlp(pairs.rejected[rows], pairs.prompts[rows]),
        mlp,
        replace(config, weight_decay=1e-2),
    )
    return Baselines(fixed, signed, linear, mlp, fits, penalty)


def _linear_margins(model: LinearBradleyTerry, difference: Tensor) -> Margins:
    return lambda rows: difference[rows] @ model.values
