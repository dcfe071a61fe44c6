"""Optimizer state by the unsplit model's names, whatever stages the parameters were or will be on.

Tensors go to the checkpoint as ``optimizer.state.<name>.<key>``, the names that torch's flattened optimizer state dicts have;
plain values and the options of parameter groups go to the manifest, per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import CheckpointError
from telltale.train.pipeline.checkpoints.steps import PART_FILE, Part

_NOT_RESTORED = ("params", "param_names", "lr")


def write_optimizer(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain values for the manifest, tensors by key) of ``optimizer``, None for a stage without trainable parameters.

    Raises :class:`~telltale.errors.CheckpointError` if the optimizer keeps anything but tensors and plain values.
    """
    document: dict[str, Any] = {"class": None, "state": {}, "options": {}}
    tensors: dict[str, Tensor] = {}
    if optimizer is None:
        return document, tensors
    names = {id(parameter): name for name, parameter in parameters.items()}
    document["class"] = type(optimizer).__name__
    for group in optimizer.param_groups:
        options = {key: _plain(key, value) for key, value in group.items() if key not in _NOT_RESTORED}
        document["options"] |= {names[id(parameter)]: options for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        document["state"][name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.state.{name}.{key}"] = value.detach()
            else:
                document["state"][name][key] = _plain(key, value)
    return document, tensors


def read_optimizer(
    optimizer: torch.optim.Optimizer | None,
    parameters: Mapping[str, nn.Parameter],
    parts: Iterable[Part],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any] | None:
    """What ``optimizer.load_state_dict`` takes: the state of its parameters out of ``parts`` and ``tensors``; learning rates
    stay its own. None for no optimizer. Nothing is changed here.

    Raises :class:`~telltale.errors.CheckpointError` if another kind of optimizer wrote it, or if parameters that one group
    holds now had different options.
    """
    if optimizer is None:
        return None
    kinds, states, options = _merged(parts)
    wrong = [(file, kind) for kind, file in kinds.items() if kind not in (None, type(optimizer).__name__)]
    if wrong:
        raise CheckpointError(f"{wrong[0][0]} holds the state of {wrong[0][1]}; expected {type(optimizer).__name__}.")
    names = {id(parameter): name for name, parameter in parameters.items()}
    restored = optimizer.state_dict()
    restored["state"] = {}
    for own, group in zip(optimizer.param_groups, restored["param_groups"], strict=True):
        members = [names[id(parameter)] for parameter in own["params"]]
        for index, name in zip(group["params"], members, strict=True):
            prefix = f"optimizer.state.{name}."
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found or states.get(name):
                restored["state"][index] = states.get(name, {}) | found
        known = [options[name] for name in members if name in options]
        if any(other != known[0] for other in known):
            raise CheckpointError(
                f"the optimizer's options for {members[0]} and others of its group differ in the checkpoint; expected groups "
                f"of parameters that had the same ones."
            )
        for key, value in known[0].items() if known else ():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    return restored


def _merged(
    parts: Iterable[Part],
) -> tuple[dict[str | None, str], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    kinds: dict[str | None, str] = {}
    states: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for part in parts:
        document = part.manifest["optimizer"]
        kinds[document["class"]] = str(part.path / PART_FILE)
        states |= document["state"]
        options |= document["options"]
    return kinds, states, options


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(key, item) for item in value]
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"the optimizer keeps {key!r} as {type(value).__name__}; expected tensors or plain values.")
