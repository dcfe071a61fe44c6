"""Training the gate on preferences, everything else frozen: -log sigma(beta * g(prompt) . (decorrelated reward difference)).

ArmoRM (arXiv 2406.12845), stage 2b. beta is trained through its logarithm, so that the score cannot change its sign, and
becomes ``logit_scale``. A prompt goes through the MLP once per batch, however many pairs it has. Pairs are split by prompt.

The gate and the baselines share one training loop: the Bradley-Terry loss, stopped early on held-out prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.align.judge.head import GateConfig, Head, normalised_entropy
from telltale.config import check_range
from telltale.errors import DataError, NumericalError
from telltale.runs.progress import ProgressBar

FASTER = 10.0
"""Learning rate of the scale, in units of the other parameters'."""
Margins = Callable[[Tensor], Tensor]
"""Rows (m,) of the data -> score of the chosen response less that of the rejected one, (m,)."""


@dataclass(frozen=True)
class PairFeatures:
    """n pairs: hidden states of the chosen and the rejected response and of their prompt, and the prompt's id.

    The ids are those of the rated responses' prompts, too: a prompt that has both has one id.
    """

    chosen: Tensor
    """(n, d)."""
    rejected: Tensor
    """(n, d)."""
    prompts: Tensor
    """(n, prompt size)."""
    groups: Tensor
    """(n,) int64: pairs of one prompt have one id."""
    dropped: int = 0
    """Pairs that were left out because both responses are the same text."""
    votes: Tensor | None = None
    """(n, 2): how many votes the chosen and the rejected response got, a tie half a vote each; None is one vote a pair."""
    lengths: Tensor | None = None
    """(n, 2): words of the chosen and of the rejected response; None where only features are known."""

    def __post_init__(self) -> None:
        count = len(self.groups)
        if self.groups.ndim != 1 or not count or self.chosen.shape != self.rejected.shape:
            raise DataError(
                f"chosen {tuple(self.chosen.shape)}, rejected {tuple(self.rejected.shape)} and groups "
                f"{tuple(self.groups.shape)} are no pairs; expected (n, d), (n, d) and (n,) with n >= 1."
            )
        if len(self.chosen) != count or len(self.prompts) != count:
            raise DataError(
                f"{len(self.chosen)} responses and {len(self.prompts)} prompts for {count} pairs; expected equal."
            )
        for name in ("votes", "lengths"):
            given = getattr(self, name)
            if given is not None and (given.shape != (count, 2) or not bool((given >= 0).all())):
                raise DataError(f"{name} of shape {tuple(given.shape)}: expected ({count}, 2), none below 0.")
        if self.votes is not None and not bool((self.votes.sum(1) > 0).all()):
            raise DataError("a pair has no votes at all; expected votes above 0 for one of its responses.")
        for name in ("chosen", "rejected", "prompts"):
            bad = (~torch.isfinite(getattr(self, name))).reshape(count, -1).any(1).nonzero()[:, 0]
            if len(bad):
                raise DataError(
                    f"pair {int(bad[0])} has a feature that is NaN or infinite in {name}; expected finite features."
                )

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: Tensor) -> PairFeatures:
        """The pairs ``rows`` (indices or a mask)."""
        return replace(
            self,
            chosen=self.chosen[rows],
            rejected=self.rejected[rows],
            prompts=self.prompts[rows],
            groups=self.groups[rows],
            dropped=0,
            votes=None if self.votes is None else self.votes[rows],
            lengths=None if self.lengths is None else self.lengths[rows],
        )

    @property
    def decided(self) -> Tensor:
        """(n,) of 1, 0 or -1: whether the chosen response has more votes, as many, or fewer."""
        if self.votes is None:
            return torch.ones(len(self), dtype=torch.long)
        return (self.votes[:, 0] - self.votes[:, 1]).sign().long()

    def split(self, held_out: float, *, seed: int) -> tuple[PairFeatures, PairFeatures]:
        """Two parts without a common prompt; about ``held_out`` of the prompts are in the second.

        Raises :class:`~telltale.errors.DataError` for a single prompt.
        """
        check_range("held_out", held_out, low=0.0, high=1.0)
        second = held_out_rows(self.groups, held_out, seed=seed)
        return self.take(~second), self.take(second)

    def distinct(self) -> PairFeatures:
        """Without pairs whose responses have the very same features: the same text twice says nothing."""
        same = (self.chosen == self.rejected).all(1)
        if bool(same.all()):
            raise DataError("both responses are the same in every pair; expected pairs that differ.")
        return replace(self.take(~same), dropped=self.dropped + int(same.sum()))


def held_out_rows(groups: Tensor, share: float, *, seed: int) -> Tensor:
    """Mask (n,) of the rows whose prompt is held out; at least one prompt is on either side."""
    unique, where = groups.unique(return_inverse=True)
    if len(unique) < 2:
        raise DataError("all rows belong to one prompt; expected several prompts, so that some can be held out.")
    count = min(max(1, round(share * len(unique))), len(unique) - 1)
    chosen = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))[:count]
    mask = torch.zeros(len(unique), dtype=torch.bool)
    mask[chosen] = True
    return mask[where]


def reward_differences(head: Head, pairs: PairFeatures) -> Tensor:
    """Decorrelated rewards of the chosen less those of the rejected responses, (n, K), float32."""
    with torch.no_grad():
        return head.transformed(head.rewards(pairs.chosen)) - head.transformed(head.rewards(pairs.rejected))


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


def train_gate(
    head: Head,
    pairs: PairFeatures,
    config: GateConfig | None = None,
    *,
    seed: int = 0,
    held_out: Tensor | None = None,
    steps: int | None = None,
    progress: ProgressBar | None = None,
) -> GateFit:
    """Train ``head.gating`` in place on ``pairs``, from fresh weights drawn from ``seed``.

    ``held_out`` (n,) marks the pairs to stop by; None holds out ``config.held_out`` of the prompts. ``steps`` takes all pairs
    and so many steps instead, such as the best step of an earlier training on a part of them. Prompt states are standardised
    for training, which the first layer absorbs.
    Raises :class:`~telltale.errors.DataError` for pairs of a single prompt.
    """
    config = config or head.gating.config
    if steps is not None:
        held_out = torch.zeros(len(pairs), dtype=torch.bool)
    elif held_out is None:
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
            votes=pairs.votes,
            until=steps,
            modules=[gate],
            faster=[log_scale],
            on_step=None if progress is None else lambda step: progress.update(step, "gate"),
        )
    gate.eval()
    with torch.no_grad():
        there = where[held_out if steps is None else ~held_out].unique()
        found = gate.distribution(unique[there])
        gate.logit_scale.copy_(log_scale.exp())
    gate.absorb_standardisation(mean, deviation)
    means = dict(zip(head.objectives, found.mean(0).tolist(), strict=True))
    return GateFit(fit, float(gate.logit_scale.detach()), normalised_entropy(found), means)


@dataclass(frozen=True)
class PairFit:
    """How one training went. Losses in nats per vote; accuracies over pairs with a majority, equal scores counted as one half.
    What is held out is NaN where nothing was."""

    steps: int
    best_step: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    curve: tuple[tuple[int, float], ...]
    """(step, held-out loss)."""


def train_pairs(
    margins: Margins,
    parameters: Sequence[nn.Parameter],
    train: Tensor,
    held_out: Tensor,
    config: GateConfig,
    *,
    seed: int,
    votes: Tensor | None = None,
    until: int | None = None,
    modules: Sequence[nn.Module] = (),
    faster: Sequence[nn.Parameter] = (),
    on_step: Callable[[int], None] | None = None,
) -> PairFit:
    """AdamW with a cosine to zero on rows ``train``; parameters end as they were at the best loss on rows ``held_out``.

    ``votes`` (n, 2) weigh both orders of a pair. ``until`` takes so many steps of the same schedule, without looking at
    ``held_out``. ``modules`` are in train mode for steps and in eval mode for evaluations; ``faster`` parameters learn ten
    times as fast. Raises :class:`~telltale.errors.NumericalError` for a loss that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    quick = {id(parameter) for parameter in faster}
    groups = [
        {"params": [p for p in parameters if id(p) not in quick], "times": 1.0, "weight_decay": config.weight_decay},
        {"params": list(faster), "times": FASTER, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
    best, best_step, kept, curve = math.inf, 0, [p.detach().clone() for p in parameters], []
    order, place, step = train[torch.randperm(len(train), generator=generator)], 0, 0
    while True:
        if step == until:
            best_step, kept = step, [p.detach().clone() for p in parameters]
            break
        if until is None and (step % config.evaluate_every == 0 or step == config.steps):
            loss = _evaluated(margins, held_out, votes, modules)[0]
            curve.append((step, loss))
            if loss < best - 1e-7:
                best, best_step, kept = loss, step, [p.detach().clone() for p in parameters]
            elif step - best_step >= config.patience * config.evaluate_every:
                break
        if step == config.steps:
            break
        if place >= len(order):
            order, place = train[torch.randperm(len(train), generator=generator)], 0
        rows = order[place : place + config.batch_size]
        place += config.batch_size
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        loss_tensor = bradley_terry(margins(rows), None if votes is None else votes[rows])
        if not bool(torch.isfinite(loss_tensor)):
            raise NumericalError(
                f"the pair loss is {float(loss_tensor)} at step {step}; lower learning_rate or check the rewards."
            )
        optimizer.zero_grad(set_to_none=True)
        loss_tensor.backward()
        optimizer.step()
        step += 1
        if on_step is not None:
            on_step(step)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    train_loss, train_accuracy = _evaluated(margins, train, votes, modules)
    held_loss, held_accuracy = _evaluated(margins, held_out, votes, modules)
    return PairFit(step, best_step, train_loss, train_accuracy, held_loss, held_accuracy, tuple(curve))


def bradley_terry(margins: Tensor, votes: Tensor | None = None) -> Tensor:
    """Mean of -ln sigma(margin) over votes (n, 2) for either side (None: one for the first): ln 2 when all scores tie."""
    if votes is None:
        return functional.softplus(-margins).mean()
    both = torch.stack([functional.softplus(-margins), functional.softplus(margins)], -1)
    return (both * votes.to(both.dtype)).sum() / votes.sum().to(both.dtype)


def accuracy(margins: Tensor, decided: Tensor | None = None) -> float:
    """Share of pairs in the right order; ties count one half. ``decided`` as in :func:`credits`."""
    return float(credits(margins, decided).mean())


def credits(margins: Tensor, decided: Tensor | None = None) -> Tensor:
    """1 for a pair in the right order, 1/2 for equal scores, else 0; float64, of the pairs that votes have ``decided`` (1 or -1,
    None: all for the first), so at most (n,)."""
    if decided is not None:
        margins = (margins * decided)[decided != 0]
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def standardised(fitted_on: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``states`` less the mean of ``fitted_on`` over its deviation, by column; and both. Constant columns stay centred."""
    mean, deviation = fitted_on.float().mean(0), fitted_on.float().std(0, correction=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp_min(1e-30), deviation, torch.ones_like(deviation))
    return (states.float() - mean) / deviation, mean, deviation


def initial_scale(differences: Tensor, masked: Tensor | nn.Module) -> float:
    """beta at which margins under equal weights have a standard deviation of 1."""
    kept = differences[:, ~masked] if isinstance(masked, Tensor) else differences
    return 1.0 / max(float(kept.mean(1).std()), 1e-6)


def first_of_each(groups: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A row of each distinct prompt state (m,), and which of these each row (n,) has.

    Rows of a group have one state, except where truncation cut their prompt differently; then every row is its own."""
    _, by_group = groups.unique(return_inverse=True)
    first = torch.full((int(by_group.max()) + 1,), len(groups), dtype=torch.long)
    first.scatter_reduce_(0, by_group, torch.arange(len(groups)), "amin")
    if torch.equal(prompts[first[by_group]], prompts):
        return first, by_group
    return torch.arange(len(groups)), torch.arange(len(groups))


def _reset(gate: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in gate.layers:  # type: ignore[union-attr]
            layer.reset_parameters()


@torch.no_grad()
def _evaluated(
    margins: Margins, rows: Tensor, votes: Tensor | None, modules: Sequence[nn.Module]
) -> tuple[float, float]:
    if not len(rows):
        return math.nan, math.nan
    states = [module.training for module in modules]
    for module in modules:
        module.eval()
    found = margins(rows)
    for module, state in zip(modules, states, strict=True):
        module.train(state)
    if votes is None:
        return float(bradley_terry(found)), accuracy(found)
    return float(bradley_terry(found, votes[rows])), accuracy(found, (votes[rows, 0] - votes[rows, 1]).sign())
