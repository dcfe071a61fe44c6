"""Models on disk: ``model.json`` (kind, config, hashes) and ``model.safetensors`` (numbers). Never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from telltale.errors import CheckpointError, UnsupportedModelError
from telltale.runs.files import atomic_directory
from telltale.world.models.classifier import ClassifierConfig, FieldClassifier
from telltale.world.models.ensemble import Ensemble, EnsembleConfig
from telltale.world.models.motion import Motion
from telltale.world.models.opponent import OpponentModel
from telltale.world.models.program import Program
from telltale.world.models.sindy import Equations
from telltale.world.models.tabular import Tabular

VERSION = 1


def save_model(model: Any, path: str | Path, *, about: dict[str, Any] | None = None) -> str:
    """Write ``model`` to the folder ``path``, whole or not at all; returns its id, a hash of what was written.

    ``about`` (JSON values: the world's id, how it was fitted, its parent) is kept beside it and is part of the id. Any model
    with ``describe() -> {"kind", "config"}`` can be saved; numbers come from ``state_dict`` or ``tensors``.

    Raises :class:`~telltale.errors.UnsupportedModelError` for a model that cannot describe itself.
    """
    if not callable(getattr(model, "describe", None)):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be saved: it has no describe() with its kind and config. Save it with your own code "
            f"(torch.save of a state_dict) and rebuild it before you evaluate."
        )
    tensors = _tensors(model)
    document = {"version": VERSION, **json.loads(json.dumps(model.describe())), "about": about or {}}
    with atomic_directory(path) as folder:
        save_file(tensors, folder / "model.safetensors")
        document["weights"] = _hash(folder / "model.safetensors")
        document["id"] = identity(document)
        (folder / "model.json").write_text(json.dumps(document, indent=1) + "\n")
    return str(document["id"])


def load_model(path: str | Path) -> Any:
    """The model of a folder. Raises :class:`~telltale.errors.CheckpointError` if it is missing, damaged, or not as hashed."""
    return open_model(path)[0]


def open_model(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The model and its document: kind, config, about, id."""
    folder = Path(path)
    try:
        document = json.loads((folder / "model.json").read_text())
        weights = folder / "model.safetensors"
        if document.get("version") != VERSION:
            raise CheckpointError(f"{folder} has version {document.get('version')}; this telltale reads {VERSION}.")
        if _hash(weights) != document["weights"]:
            raise CheckpointError(
                f"{weights} is not the file that was saved: its hash differs. Restore it or fit again."
            )
        if identity(document) != document["id"]:
            raise CheckpointError(
                f"{folder / 'model.json'} is not the file that was saved: its hash differs. Restore it or fit again."
            )
        rebuild = _REBUILD.get(document["kind"])
        if rebuild is None:
            raise CheckpointError(
                f"{folder} holds a model of kind {document['kind']!r}; known are {', '.join(_REBUILD)}."
            )
        return rebuild(document["config"], load_file(weights)), document
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} holds no whole world model: {error}. Fit it again.") from error


def identity(document: dict[str, Any]) -> str:
    """SHA-256 over everything but the id itself."""
    text = json.dumps({key: value for key, value in document.items() if key != "id"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    if isinstance(model, torch.nn.Module):
        return {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    given = model.tensors() if callable(getattr(model, "tensors", None)) else {}
    return {name: value.contiguous() for name, value in given.items()} or {"none": torch.zeros(1)}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _ensemble(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Ensemble:
    model = Ensemble(EnsembleConfig(**config))
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def _classifier(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> FieldClassifier:
    lows, highs = tuple(config["lows"]), tuple(config["highs"])
    changes = tuple(map(tuple, config["changes"]))
    model = FieldClassifier(ClassifierConfig(lows, highs, changes, config["actions"], config["hidden"]))
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def _equations(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Equations:
    return Equations(
        tensors["exponents"], tensors["coefficients"], config["dt"], config["columns"], tensors["deviation"]
    )


def _motion(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Motion:
    numbers = tensors["exponents"], tensors["coefficients"], config["dt"], config["columns"], tensors["deviation"]
    return Motion(*numbers, tuple(config["angle"]), config["top_speed"])


_REBUILD: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "ensemble": _ensemble,
    "mlp": _ensemble,
    "classifier": _classifier,
    "motion": _motion,
    "sindy": _equations,
    "program": lambda config, tensors: Program.from_config(config),
    "tabular": lambda config, tensors: Tabular.from_config(config),
    "opponent": lambda config, tensors: OpponentModel.from_config(config),
}
