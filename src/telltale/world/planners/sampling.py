"""Planners that sample continuous action sequences: the cross-entropy method (CEM), iCEM and MPPI.

Each plans for a batch of starts at once. All starts share one draw of sampling noise, so that the plan of a start does
not depend on the others beside it, and one decision costs about as much as the network's largest matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from telltale.config import check_integer, check_range
from telltale.errors import ConfigError
from telltale.world.planners.problem import Plan, Problem


@dataclass(frozen=True)
class CEM:
    """Sample around a mean, keep the elites, refit mean and deviation with momentum ``alpha`` (Rubinstein, 1999).

    Defaults: 96 samples, 3 iterations, 10% elites, deviation starting at half the action range. ``horizon`` None takes the
    world's. The next decision starts from the plan moved on by one step.
    """

    samples: int = 96
    iterations: int = 3
    elites: float = 0.1
    alpha: float = 0.1
    spread: float = 0.5
    horizon: int | None = None
    name: ClassVar[str] = "cem"
    kinds: ClassVar[tuple[str, ...]] = ("continuous",)

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, low=2)
        check_integer("iterations", self.iterations, low=1)
        check_range("elites", self.elites, low=0.0, high=1.0)
        check_range("alpha", self.alpha, low=0.0, below=1.0)
        check_range("spread", self.spread, low=1e-6)
        check_horizon(self.horizon)
        if self.samples * self.elites < 1:
            raise ConfigError(f"elites={self.elites} of samples={self.samples} is less than one; raise either.")

    def plan(self, problem: Problem, belief: Tensor, *, generator: torch.Generator, warm: Tensor | None = None) -> Plan:
        """A plan for every row of ``belief`` (B, D)."""
        low, high = action_bounds(problem)
        shape = (len(belief), problem.horizon, len(low))
        mean = started(warm, shape, (low + high) / 2)
        deviation = (self.spread * (high - low)).expand(shape)
        keep = max(1, int(self.samples * self.elites))
        noise_of_model = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        value = belief.new_zeros(len(belief))
        for _ in range(self.iterations):
            noise = torch.randn((self.samples, *shape[1:]), generator=generator)
            noise[0] = 0.0  # the mean itself is a candidate
            candidates = (mean.unsqueeze(1) + deviation.unsqueeze(1) * noise).clamp(low, high)
            scores = problem.score(belief, candidates, noise_of_model)
            best, elite = elites_of(scores, candidates, keep)
            mean = self.alpha * mean + (1 - self.alpha) * elite.mean(1)
            deviation = self.alpha * deviation + (1 - self.alpha) * elite.std(1, unbiased=False)
            value = best.mean(1)
        plan = problem.settled(belief, mean, elite[:, 0], noise_of_model)
        return Plan(plan, value, self.iterations * self.samples * problem.horizon, moved_on(mean))


@dataclass(frozen=True)
class ICEM:
    """Improved CEM (Pinneri et al., arXiv 2008.06389): coloured noise, kept elites, fewer samples later, best plan executed.

    ``color``: exponent of the noise's power spectrum over the horizon, 0 is white. ``kept``: share of the elites that
    enters the next iteration. ``decay``: the samples of iteration i are ``samples * decay**-i``.
    """

    samples: int = 96
    iterations: int = 3
    elites: float = 0.1
    alpha: float = 0.1
    spread: float = 0.5
    color: float = 2.0
    kept: float = 0.3
    decay: float = 1.25
    horizon: int | None = None
    name: ClassVar[str] = "icem"
    kinds: ClassVar[tuple[str, ...]] = ("continuous",)

    def __post_init__(self) -> None:
        CEM(self.samples, self.iterations, self.elites, self.alpha, self.spread, self.horizon)
        check_range("color", self.color, low=0.0, high=4.0)
        check_range("kept", self.kept, low=0.0, high=1.0)
        check_range("decay", self.decay, low=1.0)

    def plan(self, problem: Problem, belief: Tensor, *, generator: torch.Generator, warm: Tensor | None = None) -> Plan:
        """A plan for every row of ``belief`` (B, D): the best sequence seen."""
        low, high = action_bounds(problem)
        shape = (len(belief), problem.horizon, len(low))
        mean = started(warm, shape, (low + high) / 2)
        deviation = (self.spread * (high - low)).expand(shape)
        keep = max(1, int(self.samples * self.elites))
        noise_of_model = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        kept: Tensor | None = None
        steps, best_plan, value = 0, mean, belief.new_full((len(belief),), -float("inf"))
        for iteration in range(self.iterations):
            count = max(2 * keep, int(self.samples * self.decay**-iteration))
            noise = coloured_noise(count, problem.horizon, len(low), self.color, generator)
            noise[0] = 0.0
            candidates = (mean.unsqueeze(1) + deviation.unsqueeze(1) * noise).clamp(low, high)
            if kept is not None:
                candidates = torch.cat([candidates, kept], 1)
            scores = problem.score(belief, candidates, noise_of_model)
            steps += candidates.shape[1] * problem.horizon
            best, elite = elites_of(scores, candidates, keep)
            kept = elite[:, : max(1, int(self.kept * keep))]
            mean = self.alpha * mean + (1 - self.alpha) * elite.mean(1)
            deviation = self.alpha * deviation + (1 - self.alpha) * elite.std(1, unbiased=False)
            better = (best[:, 0] > value)[:, None, None]
            best_plan, value = torch.where(better, elite[:, 0], best_plan), torch.maximum(best[:, 0], value)
        return Plan(best_plan, value, steps, moved_on(mean))


@dataclass(frozen=True)
class MPPI:
    """Model predictive path integral control (Williams et al., 2017): samples weighted by exp(score / temperature).

    Scores are standardised per start, so that the temperature does not depend on the reward's unit.
    """

    samples: int = 128
    iterations: int = 3
    temperature: float = 0.5
    spread: float = 0.5
    horizon: int | None = None
    name: ClassVar[str] = "mppi"
    kinds: ClassVar[tuple[str, ...]] = ("continuous",)

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, low=2)
        check_integer("iterations", self.iterations, low=1)
        check_range("temperature", self.temperature, low=1e-6)
        check_range("spread", self.spread, low=1e-6)
        check_horizon(self.horizon)

    def plan(self, problem: Problem, belief: Tensor, *, generator: torch.Generator, warm: Tensor | None = None) -> Plan:
        """A plan for every row of ``belief`` (B, D): the weighted mean."""
        low, high = action_bounds(problem)
        shape = (len(belief), problem.horizon, len(low))
        mean = started(warm, shape, (low + high) / 2)
        deviation = (self.spread * (high - low)).expand(shape)
        floor = 0.05 * (high - low)
        noise_of_model = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        value = belief.new_zeros(len(belief))
        for _ in range(self.iterations):
            noise = torch.randn((self.samples, *shape[1:]), generator=generator)
            noise[0] = 0.0
            candidates = (mean.unsqueeze(1) + deviation.unsqueeze(1) * noise).clamp(low, high)
            scores = problem.score(belief, candidates, noise_of_model)
            ruled_out = scores == -float("inf")
            least = scores.masked_fill(ruled_out, float("inf")).amin(1, keepdim=True)
            scores = torch.where(ruled_out, least, scores)
            standard = (scores - scores.amax(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-9)
            weights = torch.softmax((standard / self.temperature).masked_fill(ruled_out, -float("inf")), 1)
            mean = (weights[..., None, None] * candidates).sum(1)
            deviation = torch.maximum(
                (weights[..., None, None] * (candidates - mean.unsqueeze(1)) ** 2).sum(1).sqrt(), floor
            )
            value = (weights * scores).sum(1)
            best = candidates[torch.arange(len(candidates)), scores.masked_fill(ruled_out, -float("inf")).argmax(1)]
        plan = problem.settled(belief, mean, best, noise_of_model)
        return Plan(plan, value, self.iterations * self.samples * problem.horizon, moved_on(mean))


def elites_of(scores: Tensor, candidates: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The best scores (B, keep) and their candidates (B, keep, ...). Where fewer are worth more than -inf, the best fills up."""
    best, index = scores.topk(keep, dim=1)
    elite = candidates.gather(
        1, index.reshape(*index.shape, *[1] * (candidates.ndim - 2)).expand(-1, -1, *candidates.shape[2:])
    )
    kept = best > -float("inf")
    wide = kept.reshape(*kept.shape, *[1] * (candidates.ndim - 2))
    return torch.where(kept, best, best[:, :1]), torch.where(wide, elite, elite[:, :1])


def check_horizon(horizon: int | None) -> None:
    """Raise :class:`~telltale.errors.ConfigError` unless ``horizon`` is None or at least 1."""
    if horizon is not None:
        check_integer("horizon", horizon, low=1)


def action_bounds(problem: Problem) -> tuple[Tensor, Tensor]:
    """Bounds of a continuous problem."""
    assert problem.low is not None
    assert problem.high is not None
    return problem.low, problem.high


def started(warm: Tensor | None, shape: tuple[int, ...], middle: Tensor) -> Tensor:
    """The plan to start from: ``warm``, or the middle of the action range."""
    return warm if warm is not None else middle.expand(shape).clone()


def moved_on(mean: Tensor) -> Tensor:
    """The plan one step later; its last action repeats."""
    return torch.cat([mean[:, 1:], mean[:, -1:]], 1)


def coloured_noise(count: int, horizon: int, width: int, color: float, generator: torch.Generator) -> Tensor:
    """Noise (count, horizon, width) of unit variance whose power falls with frequency as f^-color."""
    white = torch.randn((count, horizon, width), generator=generator)
    if color == 0 or horizon < 3:
        return white
    frequencies = torch.fft.rfftfreq(horizon)
    frequencies[0] = frequencies[1]
    shaped = torch.fft.irfft(
        torch.fft.rfft(white, dim=1) * (frequencies ** (-color / 2))[None, :, None], n=horizon, dim=1
    )
    return shaped / shaped.pow(2).mean().sqrt().clamp(min=1e-9)
