"""A rank's own stage out of a checkpoint on disk, so that a model larger than one rank's memory can be trained.

Every rank builds the model without weights (on the meta device; buffers, such as rotary tables, are real and small), cuts it as
always, and reads the tensors of its own stage alone from the safetensors shards of a Hugging Face folder. What the other stages
hold stays on the meta device. A tied weight is read by every stage that has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils import swap_tensors

from telltale.errors import CheckpointError
from telltale.models.gguf import is_gguf
from telltale.models.loading import load_config
from telltale.train.pipeline.layers import LayeredModel


def without_weights(folder: str | Path) -> Any:
    """The float32 causal LM of the checkpoint ``folder`` with its parameters on the meta device: no memory for weights.

    Raises :class:`~telltale.errors.CheckpointError` for a GGUF file, which has no shards to read a stage from, and what
    :func:`~telltale.models.loading.load_config` raises.
    """
    from transformers import AutoModelForCausalLM

    if is_gguf(folder):
        raise CheckpointError(f"{folder} is a GGUF file; expected a Hugging Face folder, to read single stages from.")
    config = load_config(Path(folder))
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # every registration made a tensor of its own
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside the block have their parameters on the meta device and their buffers where they are made."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_stage(model: LayeredModel, first: int, stop: int, folder: str | Path) -> None:
    """Give the layers ``first`` to ``stop - 1`` their values from the safetensors file or shards in ``folder``, where their tensors
    are on the meta device, and their persistent buffers. Raises :class:`~telltale.errors.CheckpointError` naming a tensor that is
    absent, of another shape or quantised."""
    own = {id(tensor) for layer in model.layers[first:stop] for tensor in _tensors(layer.module)}
    names: dict[int, list[str]] = {}
    targets: dict[int, Tensor] = {}
    everything = [
        *model.root.named_parameters(remove_duplicate=False),
        *model.root.named_buffers(remove_duplicate=False),
    ]
    place = _shards(Path(folder))
    persistent = model.root.state_dict().keys()
    for name, tensor in everything:
        # A buffer that was made with real numbers (running statistics) has those of the checkpoint, if it holds it.
        if id(tensor) in own and (tensor.is_meta or (name in persistent and name in place)):
            names.setdefault(id(tensor), []).append(name)
            targets[id(tensor)] = tensor
    with ExitStack() as opened:
        files: dict[Path, Any] = {}
        for key, target in targets.items():
            known = next((alias for alias in names[key] if alias in place), None)
            if known is None:
                raise CheckpointError(f"{folder} has no tensor {names[key][0]}; expected a checkpoint of this model.")
            file = place[known]
            try:
                if file not in files:
                    files[file] = opened.enter_context(safe_open(file, framework="pt"))
                value = files[file].get_tensor(known)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file} cannot be read: {error}. Expected the shard that holds {known}."
                ) from error
            if value.shape != target.shape:
                raise CheckpointError(
                    f"{file} has {known} of shape {list(value.shape)}; expected {list(target.shape)}."
                )
            if target.is_floating_point() and not _is_plain(value):
                kind = str(value.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{file} has {known} as {kind}, whose scale stands elsewhere; expected float32, bfloat16 or float16."
                )
            value = value.to(target.dtype)
            # Swapped in place: what names a parameter by its identity (ties, optimizers) goes on to do so.
            if isinstance(target, nn.Parameter):
                value = nn.Parameter(value, requires_grad=target.requires_grad)
            swap_tensors(target, value)


def _is_plain(value: Tensor) -> bool:
    """Whether the numbers are the weights themselves: quantised ones have scales beside them."""
    return value.is_floating_point() and value.element_size() > 1


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / "model.safetensors")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be read stage by stage: {error}. Expected model.safetensors, or shards with their index."
        ) from error
