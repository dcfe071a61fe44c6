"""A causal LM and a plan, made to fit to each other for training, or refused before any process waits for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import ConfigError, PlanError
from telltale.train.config import TrainConfig
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.pipeline.layered import LayeredModel
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.policies import policy_of
from telltale.train.pipeline.splitters import split


def minibatches_per_step(plan: Plan) -> int:
    """Minibatches of one optimizer step of every stage: m for policies by batch, else 1.

    Raises :class:`~telltale.errors.PlanError` for an interleaved plan, which has no schedule of ours.
    """
    policy = policy_of(plan)
    return policy.microbatches if policy.synchronous else 1


def tied_across_stages(model: LayeredModel, plan: Plan) -> list[str]:
    """Names of the weights that layers of different stages share."""
    stage_of = {layer: number for number, stage in enumerate(plan.stages) for layer in stage.layers}
    shared = model.shared_parameters().items()
    return [name for name, layers in shared if len({stage_of.get(layer) for layer in layers}) > 1]


def check_job(model: LayeredModel, plan: Plan, config: TrainConfig) -> None:
    """Refuse what does not go together before any process waits for another.

    Raises :class:`~telltale.errors.PlanError` for a plan of another model or one that a tied weight forbids, and
    :class:`~telltale.errors.ConfigError` for a batch that cannot be cut into the plan's minibatches.
    """
    per_step = minibatches_per_step(plan)
    if plan.n_layers != len(model.layers):
        raise PlanError(
            f"the plan has {plan.n_layers} layers and the model {len(model.layers)}; expected a plan of this model."
        )
    if config.batch_size % per_step:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be cut into the plan's {per_step} minibatches per optimizer step; "
            f"expected a multiple of {per_step}."
        )
    if config.gradient_accumulation not in (1, per_step):
        raise ConfigError(
            f"gradient_accumulation={config.gradient_accumulation} contradicts the plan, which has {per_step} minibatches per "
            f"optimizer step; leave it out."
        )
    tied = tied_across_stages(model, plan)
    if tied and not policy_of(plan).synchronous:
        raise PlanError(
            f"{tied[0]} is tied across stages, which policy {plan.policy!r} updates at different times; add --untie (untie the "
            f"model and plan it so), or make a plan with --policy 2bw or flush."
        )


def layered_for_training(
    model: nn.Module, *, precision: str, layerskip: LayerSkipConfig | None, per_step: int = 1
) -> LayeredModel:
    """``model`` as layers, with the recipe if given, whose forwards run under autocast for ``precision="bfloat16"``."""
    layered = split(model, layerskip=layerskip, minibatches_per_step=per_step)
    if precision == "float32":
        return layered
    layers = tuple(dataclasses.replace(layer, call=_under_autocast(layer.call)) for layer in layered.layers)
    return dataclasses.replace(layered, layers=layers, loss=_under_autocast(layered.loss))


def autocast(device: str, *, enabled: bool) -> torch.autocast:
    """bfloat16 autocast on a device type, or nothing."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)


def _under_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(values: tuple[Tensor, ...], batch: Any, minibatch: int) -> Any:
        device = values[0].device.type if values else "cpu"
        with autocast(device, enabled=True):
            return call(values, batch, minibatch)

    return run
