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
        self._folded: list[tuple[Tensor, Tensor]] | None = None

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
        if self.config.discrete:
            coded = functional.one_hot(action.long(), self.config.actions).to(belief.dtype)
        else:
            coded = action.to(belief.dtype)
        if coded.shape[-1] != self.config.actions or belief.shape[-1] != self.config.width:
            raise DataError(
                f"state width {belief.shape[-1]} and action width {coded.shape[-1]} do not fit the model's "
                f"{self.config.width} and {self.config.actions}; use the world that it was fitted on."
            )
        if not self.config.hears_actions:
            coded = torch.zeros_like(coded)
        return torch.cat([belief, coded.expand(*belief.shape[:-1], coded.shape[-1])], -1)

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

    def _fast(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Unnormalised change (E, N, G), its standard deviation if this model has noise, and the termination logit."""
        if self._folded is None:
            with torch.no_grad():
                self._folded = self._fold()
        single = self.config.members == 1 and rows.ndim == 3
        out = rows[0] if single else rows
        for layer, (weight, bias) in enumerate(self._folded):
            out = torch.addmm(bias[0, 0], out, weight[0]) if single else torch.baddbmm(bias, out, weight)
            if layer < 2:
                out = functional.silu(out, inplace=True)
        out = out.unsqueeze(0) if single else out
        change = out[..., : self.gaussians]
        logit = out[..., -1] if self.config.learn_termination else None
        if not self.config.noise:
            return change, None, logit
        _, log_variance, _ = self._split(out)
        return change, torch.exp(0.5 * log_variance) * (self.target_scale * self.spread), logit

    def _fold(self) -> list[tuple[Tensor, Tensor]]:
        """Normalisation folded into the first and last layer: two passes over every batch saved per step."""
        first = self.weights[0] / self.input_scale.unsqueeze(-1)
        shift = torch.einsum("i,eio->eo", self.input_mean / self.input_scale, self.weights[0])
        start = self.biases[0] - shift.unsqueeze(1)
        last, end = self.weights[2].clone(), self.biases[2].clone()
        last[..., : self.gaussians] *= self.target_scale
        end[..., : self.gaussians] = end[..., : self.gaussians] * self.target_scale + self.target_mean
        if not self.config.noise and not self.config.learn_termination:  # nobody asks for the log variance
            last, end = last[..., : self.gaussians].contiguous(), end[..., : self.gaussians].contiguous()
        return [(first, start), (self.weights[1].detach(), self.biases[1].detach()), (last, end)]

    @torch.no_grad()
    def step_particles(
        self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step of every member with its own particle: ``belief`` (E, N, D), ``action`` (N, A) or (N,).

        ``common`` draws one noise vector per member for all rows. No generator: no noise.
        """
        change, deviation, logit = self._fast(self.inputs(belief, action))
        if deviation is not None and generator is not None:
            rows = 1 if common else change.shape[1]
            noise = torch.randn((self.config.members, rows, self.gaussians), generator=generator, dtype=change.dtype)
            change = change + noise * deviation
        return self._transition(belief, change, logit)

    @torch.no_grad()
    def step(
        self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step for rows (..., D): the members' mean without a generator, else one member and its noise per row.

        ``common``: one member and one noise vector for all rows.
        """
        rows = self.inputs(belief, action)
        flat = rows.reshape(-1, rows.shape[-1])
        change, deviation, logit = self._fast(flat.unsqueeze(0).expand(self.config.members, *flat.shape))
        if generator is None or not self.stochastic:
            chosen, chance = change.mean(0), None if logit is None else logit.mean(0)
        else:
            count = 1 if common else len(flat)
            member = torch.randint(self.config.members, (count,), generator=generator).expand(len(flat))
            index = torch.arange(len(flat))
            chosen, chance = change[member, index], None if logit is None else logit[member, index]
            if deviation is not None:
                noise = torch.randn((count, self.gaussians), generator=generator, dtype=change.dtype)
                chosen = chosen + noise * deviation[member, index]
        shaped = chosen.reshape(*belief.shape[:-1], -1)
        return self._transition(belief, shaped, None if chance is None else chance.reshape(belief.shape[:-1]))

    def _transition(self, belief: Tensor, change: Tensor, logit: Tensor | None) -> Transition:
        reward = change[..., -1] if self.config.learn_reward else None
        return Transition(belief + change[..., : self.config.width], reward, None if logit is None else logit > 0)

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
