"""Fitting an ensemble on transitions: maximum likelihood, early stopping, and the calibration of its deviations."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor
from torch.nn import functional

from telltale.config import check_seed
from telltale.errors import DataError
from telltale.world.models.ensemble import Ensemble, EnsembleConfig, FitConfig

SMALLEST_SCALE = 1e-6
NORMAL_90 = 1.6449
"""Half width, in standard deviations, of the middle 90% of a Gaussian."""


def fit_ensemble(
    before: Tensor,
    actions: Tensor,
    rewards: Tensor,
    after: Tensor,
    terminated: Tensor,
    *,
    config: EnsembleConfig,
    fitting: FitConfig | None = None,
    seed: int = 0,
    start: Ensemble | None = None,
) -> Ensemble:
    """Fit on rows ``before`` (N, D), ``actions``, ``rewards`` (N,), ``after`` (N, D), ``terminated`` (N,).

    Each member sees the rows in an order of its own. ``start`` continues from a fitted ensemble, whose normalisation
    stays. A column that never changes gets the smallest scale, with a warning.

    Raises :class:`~telltale.errors.DataError` for fewer than 10 transitions.
    """
    check_seed(seed)
    settings = fitting or FitConfig()
    if len(before) < 10:
        raise DataError(f"{len(before)} transitions are too few to fit an ensemble; collect at least 10.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(start) if start is not None else Ensemble(config)
    rows = model.inputs(before, actions)
    target = after - before
    if config.learn_reward:
        target = torch.cat([target, rewards.unsqueeze(-1)], -1)
    if start is None:
        _normalise(model, rows, target)
    inputs = (rows - model.input_mean) / model.input_scale
    wanted = (target - model.target_mean) / model.target_scale
    order = torch.randperm(len(inputs), generator=generator)
    held = max(2, int(settings.held_out * len(inputs)))
    test, train = order[:held], order[held:]
    _train(model, inputs, wanted, terminated.float(), train, test, settings, generator)
    model.eval()
    _calibrate(model, before[test], actions[test], target[test])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _normalise(model: Ensemble, rows: Tensor, target: Tensor) -> None:
    for values, mean, scale in (
        (rows, model.input_mean, model.input_scale),
        (target, model.target_mean, model.target_scale),
    ):
        mean.copy_(values.mean(0))
        deviation = values.std(0)
        if values is target and bool((deviation < SMALLEST_SCALE).any()):
            constant = [int(i) for i in (deviation < SMALLEST_SCALE).nonzero().flatten()]
            warnings.warn(
                f"column {constant} of the change of state never varies; it is predicted as constant.", stacklevel=4
            )
        scale.copy_(
            torch.where(
                deviation < SMALLEST_SCALE,
                torch.full_like(deviation, 1.0 if values is rows else SMALLEST_SCALE),
                deviation,
            )
        )


def _train(
    model: Ensemble,
    inputs: Tensor,
    wanted: Tensor,
    ended: Tensor,
    train: Tensor,
    test: Tensor,
    settings: FitConfig,
    generator: torch.Generator,
) -> None:
    members = model.config.members
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_state, waited = float("inf"), copy.deepcopy(model.state_dict()), 0
    model.train()
    for _ in range(settings.epochs):
        orders = torch.stack([train[torch.randperm(len(train), generator=generator)] for _ in range(members)])
        for first in range(0, len(train), settings.batch_size):
            chosen = orders[:, first : first + settings.batch_size]
            loss = _loss(model, inputs[chosen], wanted[chosen], ended[chosen]) + 0.01 * (
                model.high.sum() - model.low.sum()
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            repeated = inputs[test].expand(members, -1, -1)
            score = float(_loss(model, repeated, wanted[test].expand(members, -1, -1), ended[test].expand(members, -1)))
        if score < best - 1e-3:
            best, best_state, waited = score, copy.deepcopy(model.state_dict()), 0
        else:
            waited += 1
            if waited >= settings.patience:
                break
    model.load_state_dict(best_state)


def _loss(model: Ensemble, inputs: Tensor, wanted: Tensor, ended: Tensor) -> Tensor:
    """Negative log-likelihood per row, summed over outputs and members."""
    mean, log_variance, logit = model.heads(inputs)
    if model.config.noise:
        loss = (0.5 * ((wanted - mean) ** 2 * torch.exp(-log_variance) + log_variance)).sum(-1).mean(-1).sum()
    else:
        loss = ((wanted - mean) ** 2).sum(-1).mean(-1).sum() + 0.0 * log_variance.sum()
    if logit is not None:
        loss = loss + functional.binary_cross_entropy_with_logits(logit, ended, reduction="none").mean(-1).sum()
    return loss


def _calibrate(model: Ensemble, before: Tensor, actions: Tensor, target: Tensor) -> None:
    """Scale the deviations so that 90% intervals hold 90% of the held-out changes, column by column."""
    model.spread.fill_(1.0)
    rows = model.inputs(before, actions).expand(model.config.members, -1, -1)
    with torch.no_grad():
        mean, log_variance, _ = model.heads((rows - model.input_mean) / model.input_scale)
        mean = mean * model.target_scale + model.target_mean
        deviation = ((log_variance.exp() * model.target_scale**2).mean(0) + mean.var(0, unbiased=False)).sqrt()
        standard = (target - mean.mean(0)).abs() / deviation.clamp(min=1e-12)
        quantile = torch.quantile(standard, 0.9, dim=0)
    model.spread.copy_((quantile / NORMAL_90).clamp(0.05, 20.0))
