"""A second model over the same weights: for a question that the live one cannot be asked without changing it.

Only modules that hold the configuration, and those above them, are made anew; all others, and with them every weight, adapter and
hook inside, are the live model's own. So a twin costs no memory to speak of, and can have another configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


def twin_of(model: nn.Module, config: Any, *, replaced: Mapping[int, nn.Module] | None = None) -> Any:
    """``model`` with ``config`` in the place of its configuration, wherever a module holds that.

    ``replaced`` maps the ``id`` of a module to what takes its place. Hooks on modules that are made anew are left out.
    """
    known: dict[int, nn.Module] = dict(replaced or {})
    old = model.config

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in known:
            return known[id(module)]
        children = {name: None if child is None else copied(child) for name, child in module._modules.items()}
        holders = [name for name, value in vars(module).items() if value is old]
        if not holders and all(child is module._modules[name] for name, child in children.items()):
            known[id(module)] = module
            return module
        new = copy.copy(module)
        fields = vars(new)
        # Wrappers that live in an attribute are bound to the live module.
        for name in ("forward", "_hf_hook", "_old_forward"):
            fields.pop(name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            fields[name] = type(fields[name])()
        fields["_parameters"], fields["_buffers"] = dict(module._parameters), dict(module._buffers)
        fields["_modules"] = children
        fields.update(dict.fromkeys(holders, config))
        known[id(module)] = new
        return new

    return copied(model)
