"""The safetensors of a checkpoint folder, in one file or in shards with an index. Nothing else of the folder is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from telltale.errors import CheckpointError

SHARD_BYTES = 5 * 2**30


def read_tensors(folder: Path, *, names_only: bool = False) -> dict[str, Any]:
    """Every tensor of the folder's safetensors files by name; ``names_only`` leaves the tensors where they are (None).

    Raises :class:`~telltale.errors.CheckpointError` for files that are missing, damaged, or outside of the folder.
    """
    index = folder / "model.safetensors.index.json"
    try:
        # Where both are there the single file counts, as it does to Transformers.
        sharded = index.is_file() and not (folder / "model.safetensors").is_file()
        files = sorted({*json.loads(index.read_text())["weight_map"].values()}) if sharded else ["model.safetensors"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no shard index: {error}") from error
    found: dict[str, Any] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; expected files of the folder itself.")
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    found[key] = None if names_only else file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} is missing or damaged: {error}") from error
    return found


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """``model.safetensors``, or shards of 5 GiB and their index."""
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
