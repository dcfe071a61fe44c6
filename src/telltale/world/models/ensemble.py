"""A probabilistic ensemble: Gaussian heads over the change of state, all members in one batched matrix product.

Chua et al. (arXiv 1805.12114): each of E members predicts mean and variance; a particle stays with one member over a
trajectory, which keeps what the members disagree about apart from what each says is noise. One member and no sampling
is the plain network (kind ``mlp``). Reward and termination are learned as further outputs where they are not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.config import check_integer, check_range
from telltale.errors import DataError
from telltale.world.protocol import Transition

ONE_BY_ONE = 512
"""From so many rows on, members are evaluated one after another: the activations of one stay in the cache, those of all do not."""


@dataclass(frozen=True)
class EnsembleConfig:
    """Shape of an ensemble. ``actions``: number of discrete actions, or width of continuous ones. ``learn_reward`` and
    ``learn_termination`` add outputs. ``hears_actions=False`` is the control of every certificate: the same network without
    the action among its inputs. ``noise=False`` predicts the mean of each member.
    """

    width: int
    actions: int
    discrete: bool = False
    members: int = 4
    hidden: int = 64
    learn_reward: bool = False
    learn_termination: bool = False
    hears_actions: bool = True
    noise: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "actions", "members", "hidden"):
            check_integer(name, getattr(self, name), low=1)


class Ensemble(nn.Module):
    """``members`` networks with two hidden layers of SiLU units, from normalised (state, action) to a normalised change."""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self.config = config
        e, hidden = config.members, config.hidden
        inputs = config.width + config.actions
        self.gaussians = config.width + int(config.learn_reward)
        outputs = 2 * self.gaussians + int(config.learn_termination)
        sizes = [(inputs, hidden), (hidden, hidden), (hidden, outputs)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(e, i, o) / math.sqrt(i)) for i, o in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(e, 1, o)) for _, o in sizes)
        self.low = nn.Parameter(torch.full((self.gaussians,), -10.0))
        self.high = nn.Parameter(torch.full((self.gaussians,), 0.5))
        for name, size in (("input_mean", inputs), ("target_mean", self.gaussians)):
            self.register_buffer(name, torch.zeros(size))
        for name, size in (("input_scale", inputs), ("target_scale", self.gaussians), ("spread", self.gaussians)):
            self.register_buffer(name, torch.ones(size))
        self._folded: list[Tensor] | None = None

    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor
    spread: Tensor

    @property
    def particles(self) -> int:
        """One hypothesis per member."""
        return self.config.members

    @property
    def stochastic(self) -> bool:
        """Whether a step draws a member or noise."""
        return self.config.members > 1 or self.config.noise

    def train(self, mode: bool = True) -> Ensemble:
        """Weights may change from here on: forget the folded ones."""
        self._folded = None
        return super().train(mode)

    def inputs(self, belief: Tensor, action: Tensor) -> Tensor:
        """(state, action) rows; discrete actions one-hot, zeros for an ensemble that does not hear actions."""
        coded = self._coded(belief, action)
        return torch.cat([belief, coded.expand(*belief.shape[:-1], coded.shape[-1])], -1)

    def _coded(self, belief: Tensor, action: Tensor) -> Tensor:
        if self.config.discrete:
            coded = functional.one_hot(action.long(), self.config.actions).to(belief.dtype)
        else:
            coded = action.to(belief.dtype)
        if coded.shape[-1] != self.config.actions or belief.shape[-1] != self.config.width:
            raise DataError(
                f"state width {belief.shape[-1]} and action width {coded.shape[-1]} do not fit the model's "
                f"{self.config.width} and {self.config.actions}; use the world that it was fitted on."
            )
        return coded if self.config.hears_actions else torch.zeros_like(coded)

    def _columns(self, belief: Tensor, action: Tensor) -> Tensor:
        """:meth:`inputs` and a 1, transposed: (I + 1, N) for rows (N, D), (E, I + 1, N) for (E, N, D)."""
        coded = self._coded(belief, action)
        coded = coded.expand(*belief.shape[:-1], coded.shape[-1])
        return torch.cat([belief.mT, coded.mT, belief.new_ones(()).expand(*belief.shape[:-2], 1, belief.shape[-2])], -2)

    def heads(self, normalised: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normalised inputs (E, N, I) to normalised mean and log variance (E, N, G), and the termination logit (E, N)."""
        out = normalised
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = torch.baddbmm(bias, out, weight)
            if layer < 2:
                out = functional.silu(out)
        return self._split(out)

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, log_variance = out[..., : self.gaussians], out[..., self.gaussians : 2 * self.gaussians]
        log_variance = self.high - functional.softplus(self.high - log_variance)
        log_variance = self.low + functional.softplus(log_variance - self.low)
        return mean, log_variance, out[..., -1] if self.config.learn_termination else None

    def _fast(self, columns: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Unnormalised change (E, G, N), its standard deviation if this model has noise, and the termination logit (E, N).

        ``columns`` (I + 1, N), the same for every member, or (E, I + 1, N). One column per row of a batch: with a few
        outputs per row, a product whose long side is contiguous takes a fifth of the time of one whose short side is.
        """
        if self._folded is None:
            with torch.no_grad():
                self._folded, self._variances = self._fold()
        members, total = self.config.members, columns.shape[-1]
        if members == 1 or total >= ONE_BY_ONE:
            parts = [self._member(e, columns if columns.ndim == 2 else columns[e]) for e in range(members)]
            out = parts[0].unsqueeze(0) if members == 1 else torch.stack(parts)
        else:
            first, weight, bias, last, end = self._folded
            hidden = functional.silu(first @ columns, inplace=True)
            hidden = functional.silu(torch.baddbmm(bias, weight, hidden), inplace=True)
            out = torch.baddbmm(end, last, hidden)
        change = out[:, : self.gaussians]
        logit = out[:, -1] if self.config.learn_termination else None
        if not self.config.noise:
            return change, None, logit
        # both softplus bounds of the log variance at once: exp(bounded) = exp(low) + exp(high) * sigmoid(x - high)
        least, most = self._variances
        variance = torch.addcmul(least, most, torch.sigmoid(out[:, self.gaussians : 2 * self.gaussians]))
        return change, variance.sqrt_(), logit

    def _member(self, number: int, columns: Tensor) -> Tensor:
        """Outputs (O, N) of one member for (I + 1, N)."""
        assert self._folded is not None
        first, weight, bias, last, end = (layer[number] for layer in self._folded)
        hidden = functional.silu(first @ columns, inplace=True)
        hidden = functional.silu(torch.addmm(bias, weight, hidden), inplace=True)
        return torch.addmm(end, last, hidden)

    def _fold(self) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Weights (E, O, I) and biases (E, O, 1) of the three layers, normalisation folded into the first and last.

        The first bias is the last column of the first weight: it multiplies the 1 of the input. Then the bounds (G, 1) of
        the variance of the change, in its unit.
        """
        first = self.weights[0] / self.input_scale.unsqueeze(-1)
        shift = torch.einsum("i,eio->eo", self.input_mean / self.input_scale, self.weights[0])
        start = self.biases[0] - shift.unsqueeze(1)
        last, end = self.weights[2].clone(), self.biases[2].clone()
        last[..., : self.gaussians] *= self.target_scale
        end[..., : self.gaussians] = end[..., : self.gaussians] * self.target_scale + self.target_mean
        if not self.config.noise and not self.config.learn_termination:  # nobody asks for the log variance
            last, end = last[..., : self.gaussians], end[..., : self.gaussians]
        elif self.config.noise:
            end[..., self.gaussians : 2 * self.gaussians] -= self.high
        scale = (self.target_scale * self.spread) ** 2
        least, most = (bound.exp() * scale for bound in (self.low, self.high))
        layers = [torch.cat([first, start], 1), self.weights[1].detach(), self.biases[1].detach(), last, end]
        return [layer.mT.contiguous() for layer in layers], (least.unsqueeze(-1), most.unsqueeze(-1))

    @torch.no_grad()
    def step_particles(
        self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step of every member with its own particle: ``belief`` (E, N, D), ``action`` (N, A) or (N,).

        ``common`` draws one noise vector per member for all rows. No generator: no noise.
        """
        change, deviation, logit = self._fast(self._columns(belief, action))
        if deviation is not None and generator is not None:
            rows = 1 if common else change.shape[-1]
            noise = torch.randn((self.config.members, rows, self.gaussians), generator=generator, dtype=change.dtype)
            change = torch.addcmul(change, noise.mT, deviation)
        return self._transition(belief, change.mT, logit)

    @torch.no_grad()
    def step(
        self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step for rows (..., D): the members' mean without a generator, else one member and its noise per row.

        ``common``: one member and one noise vector for all rows.
        """
        if belief.ndim == 2:
            columns = self._columns(belief, action)
        else:
            rows = self.inputs(belief, action).reshape(-1, len(self.input_scale))
            columns = functional.pad(rows, (0, 1), value=1.0).mT
        change, deviation, logit = self._fast(columns)
        if generator is None or not self.stochastic:
            chosen, chance = _mean(change).mT, None if logit is None else _mean(logit)
        else:
            total = columns.shape[-1]
            count = 1 if common else total
            member = torch.randint(self.config.members, (count,), generator=generator).expand(total)
            index = torch.arange(total)
            chosen, chance = change[member, :, index], None if logit is None else logit[member, index]
            if deviation is not None:
                noise = torch.randn((count, self.gaussians), generator=generator, dtype=change.dtype)
                chosen = chosen + noise * deviation[member, :, index]
        shaped = chosen if belief.ndim == 2 else chosen.reshape(*belief.shape[:-1], -1)
        return self._transition(belief, shaped, None if chance is None else chance.reshape(belief.shape[:-1]))

    def _transition(self, belief: Tensor, change: Tensor, logit: Tensor | None) -> Transition:
        reward = change[..., -1] if self.config.learn_reward else None
        # the first summand decides the layout of the sum: columns stay columns from step to step
        after = change[..., : self.config.width] + belief
        return Transition(after, reward, None if logit is None else logit > 0)

    @torch.no_grad()
    def predict(self, belief: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, D) of the next state: the mixture of the members, matched in both moments."""
        rows = self.inputs(belief, action).unsqueeze(0)
        rows = rows.expand(self.config.members, *rows.shape[1:])
        mean, log_variance, _ = self.heads((rows - self.input_mean) / self.input_scale)
        mean = mean * self.target_scale + self.target_mean
        variance = log_variance.exp() * self.target_scale**2
        center = mean.mean(0)
        # the calibrated factor ``spread`` covers the whole predictive deviation, the members' disagreement included
        deviation = (variance.mean(0) + mean.var(0, unbiased=False)).sqrt() * self.spread
        width = self.config.width
        return belief + center[..., :width], deviation[..., :width]

    def describe(self) -> dict[str, Any]:
        """Kind and config, as saved."""
        return {
            "kind": "ensemble" if self.config.members > 1 or self.config.noise else "mlp",
            "config": vars(self.config),
        }


def _mean(members: Tensor) -> Tensor:
    return members[0] if len(members) == 1 else members.mean(0)


@dataclass(frozen=True)
class FitConfig:
    """How networks are fitted: AdamW with early stopping on held-out rows. ``patience`` in epochs."""

    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    batch_size: int = 128
    epochs: int = 80
    patience: int = 8
    held_out: float = 0.1

    def __post_init__(self) -> None:
        check_range("learning_rate", self.learning_rate, low=1e-8, high=1.0)
        check_range("held_out", self.held_out, low=0.0, below=0.9)
        for name in ("batch_size", "epochs", "patience"):
            check_integer(name, getattr(self, name), low=1)
