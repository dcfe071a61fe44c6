"""Weights that several stages use: a tied embedding and head, say.

Each stage has its own copy, so the copies stay equal only if every one of them takes the same step: the sum of all owners'
gradients, at the same update. Policies that update every stage once per batch can do that; under stashing the stages step
at different times with gradients of different minibatches, and sharing is refused instead of silently undone.
"""

from __future__ import annotations

from torch import nn

from telltale.errors import PlanError
from telltale.train.pipeline.layered import LayeredModel
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.policies import Policy


def tied_groups(model: LayeredModel, plan: Plan, policy: Policy) -> dict[str, tuple[int, ...]]:
    """Unsplit name -> stages, for every trainable parameter on more than one stage.

    Raises :class:`~telltale.errors.PlanError` if there is one and the policy lets stages update at different times.
    """
    stage_of = {layer: number for number, stage in enumerate(plan.stages) for layer in stage.layers}
    trainable = {name for name, parameter in model.root.named_parameters() if parameter.requires_grad}
    groups = {}
    for name, layers in model.shared_parameters().items():
        stages = tuple(sorted({stage_of[layer] for layer in layers}))
        if len(stages) > 1 and name in trainable:
            groups[name] = stages
    if groups and not policy.synchronous:
        name, stages = next(iter(groups.items()))
        raise PlanError(
            f"{name} is shared by stages {', '.join(map(str, stages))}, which policy {policy.name!r} updates at different "
            f"times; expected vertical, 2bw, flush or gpipe, a plan that keeps them on one stage, or untie(model) first."
        )
    return groups


def untie(model: nn.Module) -> list[str]:
    """Give every later use of a shared parameter a copy of its own; returns the names that were untied.

    A Hugging Face model is told so in its configuration, so that saving it keeps both.
    """
    untied = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
                untied.append(f"{prefix}.{name}" if prefix else name)
            seen.add(id(parameter))
    config = getattr(model, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return untied
