"""Training the gate with everything else frozen: -log sigma(beta * g(prompt) . (difference of decorrelated rewards)).

ArmoRM (arXiv 2406.12845), stage 2b. beta is trained through its logarithm, so that the score cannot change its sign, and
becomes ``logit_scale``. A prompt goes through the MLP once per batch, however many pairs it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from telltale.align.judge.gating import GateConfig, entropy_share
from telltale.align.judge.head import Head
from telltale.align.judge.pair_training import PairFit, train_pairs
from telltale.align.judge.preferences import PairFeatures, held_out_rows
from telltale.runs.progress import ProgressBar


@dataclass(frozen=True)
class GateFit:
    """How the gate's training went."""

    training: PairFit
    scale: float
    """logit_scale = beta."""
    entropy: float
    """Mean entropy of g over that of equal weights, on held-out prompts: 1 is a gate that does not choose."""
    mean_weights: dict[str, float]
    """g by objective, averaged over held-out prompts."""


def reward_differences(head: Head, pairs: PairFeatures) -> Tensor:
    """Decorrelated rewards of the chosen less those of the rejected responses, (n, K), float32."""
    with torch.no_grad():
        return head.transformed(head.rewards(pairs.chosen)) - head.transformed(head.rewards(pairs.rejected))


def train_gate(
    head: Head,
    pairs: PairFeatures,
    config: GateConfig | None = None,
    *,
    seed: int = 0,
    held_out: Tensor | None = None,
    progress: ProgressBar | None = None,
) -> GateFit:
    """Train ``head.gating`` in place on ``pairs``, from fresh weights drawn from ``seed``.

    ``held_out`` (n,) marks the pairs to stop by; None holds out ``config.held_out`` of the prompts. Prompt states are
    standardised for training, which the first layer absorbs.
    Raises :class:`~telltale.errors.DataError` for pairs of a single prompt.
    """
    config = config or head.gating.config
    if held_out is None:
        held_out = held_out_rows(pairs.groups, config.held_out, seed=seed)
    differences = reward_differences(head, pairs)
    prompts, mean, deviation = standardised(pairs.prompts[~held_out], pairs.prompts)
    first, where = first_of_each(pairs.groups, pairs.prompts)
    unique = prompts[first]
    gate = head.gating
    _reset(gate, seed)
    scale = config.initial_scale or initial_scale(differences[~held_out], gate.masked)
    log_scale = nn.Parameter(torch.tensor(float(scale)).log())

    def margins(rows: Tensor) -> Tensor:
        present, local = where[rows].unique(return_inverse=True)
        weights = gate.distribution(unique[present])[local]
        return log_scale.exp() * (weights * differences[rows]).sum(-1)

    gate.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        fit = train_pairs(
            margins,
            [*gate.layers.parameters(), log_scale],
            (~held_out).nonzero()[:, 0],
            held_out.nonzero()[:, 0],
            config,
            seed=seed,
            modules=[gate],
            faster=[log_scale],
            on_step=None if progress is None else lambda step: progress.update(step, "gate"),
        )
    gate.eval()
    with torch.no_grad():
        there = where[held_out].unique()
        found = gate.distribution(unique[there])
        gate.logit_scale.copy_(log_scale.exp())
    gate.absorb_standardisation(mean, deviation)
    means = dict(zip(head.objectives, found.mean(0).tolist(), strict=True))
    return GateFit(fit, float(gate.logit_scale.detach()), entropy_share(found), means)


def standardised(fitted_on: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``states`` less the mean of ``fitted_on`` over its deviation, by column; and both. Constant columns stay centred."""
    mean, deviation = fitted_on.float().mean(0), fitted_on.float().std(0, correction=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp_min(1e-30), deviation, torch.ones_like(deviation))
    return (states.float() - mean) / deviation, mean, deviation


def first_of_each(groups: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A row of each distinct prompt state (m,), and which of these each row (n,) has: states differ within no group by rule,
    but a truncated prompt may, so groups whose states differ are told apart."""
    _, by_group = groups.unique(return_inverse=True)
    first = torch.full((int(by_group.max()) + 1,), len(groups), dtype=torch.long)
    first.scatter_reduce_(0, by_group, torch.arange(len(groups)), "amin")
    if torch.equal(prompts[first[by_group]], prompts):
        return first, by_group
    return torch.arange(len(groups)), torch.arange(len(groups))


def initial_scale(differences: Tensor, masked: Tensor | nn.Module) -> float:
    """beta at which margins under equal weights have a standard deviation of 1."""
    kept = differences[:, ~masked] if isinstance(masked, Tensor) else differences
    return 1.0 / max(float(kept.mean(1).std()), 1e-6)


def _reset(gate: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in gate.layers:  # type: ignore[union-attr]
            layer.reset_parameters()
