"""The baselines that a gate has to beat, fitted on the same pairs and chosen by the same held-out prompts.

Fixed weights (one vector for all prompts, none below 0: a scaled softmax that does not see the prompt), signed weights on the same
rewards, and two unconstrained Bradley-Terry heads that explain nothing: linear in the response, and an MLP of prompt and response.
The MLP goes through the gate's loop and stops early, as it does; the others are convex, so they are solved for, at the penalty that
is best on the held-out prompts. Use a gate only if it beats fixed weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor, nn

from telltale.align.judge.gate_fit import (
    PairFeatures,
    PairFit,
    accuracy,
    bradley_terry,
    held_out_rows,
    reward_differences,
    standardised,
    train_pairs,
)
from telltale.align.judge.head import GateConfig, Head

PENALTIES = tuple(10.0**power for power in range(1, -6, -1))
"""Of half the squared norm of a linear model's weights, in nats per vote; the best on held-out prompts is taken."""
FIXED, SIGNED, LINEAR, MLP = "fixed weights", "signed weights", "Bradley-Terry, linear", "Bradley-Terry, MLP"
BLACK_BOXES = (LINEAR, MLP)
WIDEST = 256
"""Width of the MLP; that of a narrower gate if there is one."""


class LinearWeights(nn.Module):
    """score = w . r T with one weight vector for every prompt."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

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

    fixed: LinearWeights
    signed: LinearWeights
    linear: LinearBradleyTerry
    mlp: MlpBradleyTerry
    fits: dict[str, PairFit]
    penalties: dict[str, float]
    """Of the linear models, as the held-out prompts have chosen them."""

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
) -> Baselines:
    """Train the four on ``pairs`` with the head's regression and transform; ``held_out`` (n,) is true for the pairs to stop by.

    ``like`` fits on all pairs instead, with the numbers of steps and the penalties that these found best on a part of them.
    Raises :class:`~telltale.errors.DataError` for pairs of a single prompt.
    """
    config = config or head.gating.config
    if like is not None:
        held_out = torch.zeros(len(pairs), dtype=torch.bool)
    elif held_out is None:
        held_out = held_out_rows(pairs.groups, config.held_out, seed=seed)
    train, stop = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    differences, penalties, fits = reward_differences(head, pairs), {}, {}
    size = differences[train].std(0).clamp_min(1e-12)
    free = torch.ones(len(head.objectives), dtype=torch.bool)
    free[list(head.nuisance_columns)] = not head.gating.config.mask_nuisances
    both = torch.cat([pairs.chosen[train], pairs.rejected[train]])
    _, *response = standardised(both, both[:1])
    found = {}
    for name, x, least in (
        (FIXED, differences * free / size, 0.0),
        (SIGNED, differences / size, -np.inf),
        (LINEAR, (pairs.chosen.float() - pairs.rejected.float()) / response[1], -np.inf),
    ):
        known = () if like is None else (like.penalties[name],)
        found[name], fits[name], penalties[name] = logistic(x, pairs.votes, train, stop, penalties=known, least=least)
    fixed, signed = LinearWeights(found[FIXED] * free / size), LinearWeights(found[SIGNED] / size)
    linear = LinearBradleyTerry(*response)
    with torch.no_grad():
        linear.values.copy_(found[LINEAR])
    prompt = standardised(pairs.prompts[train], pairs.prompts[:1])[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = MlpBradleyTerry((response[0], response[1]), prompt, min(WIDEST, config.hidden))
    fits[MLP] = train_pairs(
        lambda rows: mlp(pairs.chosen[rows], pairs.prompts[rows]) - mlp(pairs.rejected[rows], pairs.prompts[rows]),
        [*mlp.parameters()],
        train,
        stop,
        replace(config, weight_decay=1e-2),
        seed=seed,
        votes=pairs.votes,
        until=None if like is None else like.fits[MLP].best_step,
        modules=[mlp],
    )
    return Baselines(fixed, signed, linear, mlp, fits, penalties)


def logistic(
    differences: Tensor,
    votes: Tensor | None,
    train: Tensor,
    stop: Tensor,
    *,
    penalties: Sequence[float] = (),
    least: float = -np.inf,
) -> tuple[Tensor, PairFit, float]:
    """Bradley-Terry weights (d,), none below ``least``, on differences (n, d); how they do; and their penalty: of ``PENALTIES``
    the one with the smallest loss on the rows ``stop``, or the only one of ``penalties``. ``votes``: of
    :class:`~telltale.align.judge.gate_fit.PairFeatures`."""
    x = differences.numpy()
    counts = np.ones((len(x), 2)) * [1.0, 0.0] if votes is None else votes.double().numpy()
    rows, best, weights = train.numpy(), None, np.zeros(x.shape[1])
    own, own_counts = x[rows], counts[rows]
    total = own_counts.sum()
    for penalty in penalties or PENALTIES:

        def loss(w: np.ndarray, penalty: float = penalty) -> tuple[float, np.ndarray]:
            margins = (own @ w.astype(own.dtype)).astype(np.float64)
            wrong = own_counts[:, 0] * special.expit(-margins) - own_counts[:, 1] * special.expit(margins)
            value = own_counts[:, 0] @ np.logaddexp(0, -margins) + own_counts[:, 1] @ np.logaddexp(0, margins)
            gradient = -(wrong.astype(own.dtype) @ own).astype(np.float64) / total + penalty * w
            return float(value) / total + 0.5 * penalty * float(w @ w), gradient

        # From the last solution: penalties fall, so the next one is near.
        solved = optimize.minimize(
            loss,
            weights,
            jac=True,
            method="L-BFGS-B",
            bounds=None if np.isinf(least) else [(least, None)] * len(weights),
            options={"maxiter": 500, "ftol": 1e-10},
        )
        weights = solved.x
        found = torch.from_numpy(weights).float()
        fit = _told(differences @ found, votes, train, stop, solved.nit)
        if best is None or fit.held_out_loss < best[1].held_out_loss:
            best = found, fit, penalty
    assert best is not None
    return best


def _told(margins: Tensor, votes: Tensor | None, train: Tensor, stop: Tensor, steps: int) -> PairFit:
    sides = []
    for rows in (train, stop):
        own = None if votes is None else votes[rows]
        decided = None if own is None else (own[:, 0] - own[:, 1]).sign()
        there = len(rows) > 0
        sides.append(
            (
                float(bradley_terry(margins[rows], own)) if there else math.nan,
                accuracy(margins[rows], decided) if there else math.nan,
            )
        )
    return PairFit(steps, steps, *sides[0], *sides[1], ())
