"""What a decoder relies on in a live model, and whether it is still there.

Weights are read where they are. Writing into them, through ``.data`` or otherwise, needs no notice; what has to be noticed is a
tensor that lies elsewhere, and another module in the place of one. That is compared for every request, without looking at a
number: about a microsecond a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from telltale.models.int8_weights import int8_of


class Snapshot:
    """The modules below ``roots`` and the addresses of their parameters, as they are now."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        # Kept alive: an address or an id says nothing about what has been freed.
        self._modules, self._tensors = _walked(roots)
        self._shape = _shape_of(self._modules)
        self._places = _places_of(self._tensors)

    def change(self, roots: Iterable[nn.Module]) -> str | None:
        """What has happened since: "modules" (another one, or other hooks), "weights" (they lie elsewhere), or None."""
        modules, tensors = _walked(roots)
        if _shape_of(modules) != self._shape:
            return "modules"
        return None if _places_of(tensors) == self._places else "weights"


def contents_of(model: nn.Module, *, shared: bool = True, compared: bool = False) -> list[Any]:
    """What shows whether somebody has written into the weights since: each one's place and version, and two sums over all of every
    row for those who go round the version, as writing into ``.data`` does.

    The sum of the bits changes with any single number. That of the numbers by place changes where the bits' may cancel, as under
    other signs or in another order. About 40 ms for 44M of float32 on one thread, in proportion to the bytes: PyTorch counts no
    writes into ``.data`` or through NumPy, so nothing short of reading all of it sees them. ``shared`` False leaves the sums out
    where nobody else holds the model; tensors without a version are read all the same. ``compared``: matrices in 8 bits were found
    to be what their short form says a moment ago, which says all about them.
    """
    found: list[Any] = []
    for tensor in model.parameters():
        version = None if tensor.is_inference() else tensor._version
        if not shared and version is not None:
            found.append((version, _place_of(tensor)))
            continue
        short = int8_of(tensor) if compared else None
        if short is not None:
            found.append((version, _place_of(tensor), id(short)))
            continue
        rows = tensor.detach().contiguous()
        rows = rows.reshape(rows.shape[0], -1) if rows.numel() and rows.dim() > 1 else rows.reshape(1, -1)
        size = rows.shape[-1] * rows.element_size()
        unit = torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.int8
        sums = [rows.view(unit).sum(-1, dtype=torch.int32)]
        if rows.is_floating_point():
            sums.append((rows @ torch.linspace(1, 2, rows.shape[-1], dtype=rows.dtype, device=rows.device)).float())
        found.append((version, _place_of(tensor), *(hash(one.cpu().numpy().tobytes()) for one in sums)))
    return found


def unreadable_reason(model: nn.Module, layers: nn.ModuleList) -> str | None:
    """Why no decoder can read the weights of ``model``, or None: they are elsewhere, nowhere, or serve two layers."""
    devices: dict[torch.device, str] = {}
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
            why = "accelerate has offloaded it" if hooked else "it was never loaded"
            return f"{name} is on the meta device, {why}; load the model whole, on one device"
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        (here, one), (there, other) = list(devices.items())[:2]
        return f"{one} is on {here} and {other} on {there}; load the model whole, on one device"
    if len({id(layer) for layer in layers}) < len(layers):
        return "two of its layers are one module, whose keys and values would share a place in the cache"
    return None


def _walked(roots: Iterable[nn.Module]) -> tuple[list[nn.Module], list[Any]]:
    modules: list[nn.Module] = []
    tensors: list[Any] = []
    todo = list(roots)
    while todo:
        module = todo.pop()
        modules.append(module)
        tensors += module._parameters.values()
        todo += [child for child in module._modules.values() if child is not None]
    return modules, tensors


def _shape_of(modules: list[nn.Module]) -> list[Any]:
    return [
        (id(module), type(module), vars(module).get("forward"), *module._forward_hooks, *module._forward_pre_hooks)
        for module in modules
    ]


def _places_of(tensors: list[Any]) -> list[Any]:
    return [None if tensor is None else _place_of(tensor) for tensor in tensors]


def _place_of(tensor: Any) -> Any:
    # A tensor subclass (quantised, sharded) may have no address of its own.
    if type(tensor) not in (nn.Parameter, torch.Tensor):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.stride()
