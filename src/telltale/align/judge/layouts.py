"""Judges on disk: our own folder, and the layout of the official ArmoRM checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from telltale.align.judge.model import MODEL_TYPE, JudgeModel
from telltale.align.judge.official_layout import (
    OFFICIAL_CLASS,
    check_official,
    load_official,
    write_official,
)
from telltale.align.judge.tensor_files import read_tensors
from telltale.configuration import check_choice
from telltale.errors import CheckpointError, ConfigError
from telltale.models.loading import DTYPES, in_a_line, moved, quietly
from telltale.runs.atomic import atomic_directory

LAYOUTS = ("telltale", "official")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)


def load_judge_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> JudgeModel:
    """The judge of the folder ``path``, in eval mode; no code of the folder runs.

    ``dtype`` is the backbone's (None: as saved; the widest, where tensors are of several); the head is in float32.

    Raises :class:`~telltale.errors.CheckpointError` for a folder that is damaged or no judge, and
    :class:`~telltale.errors.UnsupportedModelError` for a look-alike, naming the key.
    """
    folder = Path(path)
    raw = _raw_config(folder)
    wanted = _dtype(dtype)
    if raw.get("model_type") == MODEL_TYPE:
        model = _load_own(folder, wanted)
    elif any(str(name).endswith(OFFICIAL_CLASS.removeprefix("Llama")) for name in raw.get("architectures") or ()):
        model = load_official(folder, raw, wanted)
    else:
        raise CheckpointError(
            f"{folder} is no judge: its config.json names model_type {raw.get('model_type')!r} and architectures "
            f"{raw.get('architectures')!r}; expected {MODEL_TYPE} or {OFFICIAL_CLASS}."
        )
    return cast(JudgeModel, moved(model, device).eval())


def save(model: JudgeModel, path: str | Path, *, layout: str = "telltale", tokenizer: Any = None) -> None:
    """Write ``model``, and ``tokenizer`` if given, to the folder ``path``, whole or not at all; other files there stay.

    "official" needs a Llama backbone. Tensors that were loaded in a narrower dtype are written in it again, bit by bit.
    Raises what :func:`check_target` raises, and :class:`~telltale.errors.ConfigError` for a judge that a layout cannot hold.
    """
    check_choice("layout", layout, LAYOUTS)
    folder = Path(path)
    check_target(folder)
    if layout == "official":
        check_official(model)
    with atomic_directory(folder) as aside:
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.is_dir() and not file.is_symlink():
                shutil.copytree(file, aside / file.name, symlinks=True)
            elif not _is_replaced(file.name, tokenizer is not None):
                shutil.copy2(file, aside / file.name, follow_symlinks=False)
        if layout == "official":
            write_official(model, aside)
        else:
            with quietly():
                model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


def check_target(path: str | Path) -> None:
    """Raise :class:`~telltale.errors.CheckpointError` unless ``path`` is new, an empty folder or one that holds a model."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder to save the judge in.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds something that is no judge; expected a new folder, or one of a judge.")


def _is_replaced(name: str, tokenizer: bool) -> bool:
    """Whether a file of the folder belongs to the model (or tokenizer) that is written now."""
    weights = name.startswith("model") and name.endswith((".safetensors", ".json"))
    return weights or (tokenizer and name in TOKENIZER_FILES)


def _load_own(folder: Path, dtype: torch.dtype | None) -> JudgeModel:
    read_tensors(folder, names_only=True)
    try:
        with quietly():
            model, report = JudgeModel.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_a_line(error)}") from error
    for name, found, wanted in sorted(report.get("mismatched_keys") or []):
        raise CheckpointError(f"{folder}: {name} has shape {tuple(found)}; expected {tuple(wanted)}.")
    for kind, words in (("missing_keys", "lacks"), ("unexpected_keys", "holds the unknown")):
        keys = sorted(map(str, report.get(kind) or []))
        if keys:
            raise CheckpointError(f"{folder} {words} {keys[0]} ({len(keys)} in all); expected a whole judge.")
    model.head.float()
    return model


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable config.json: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds {type(raw).__name__}; expected a mapping.")
    return raw


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
