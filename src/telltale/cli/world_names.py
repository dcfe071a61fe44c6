"""What people type for a world, a model and a law file, as objects: ids, folders, and ``file.py:function``."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.config import parse_overrides
from telltale.errors import ConfigError

WorldName = Annotated[str, typer.Argument(metavar="WORLD", help="An id, or file.py:function.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, oracle, or file.py:function.")]
Planner = Annotated[str | None, typer.Option(help="cem, icem, mppi, categorical_cem, breadth_first, best_response.")]
WorldSettings = Annotated[list[str] | None, typer.Option("--world-set", help="A setting of the world, key=value.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of the planner or model, key=value.")]
LifeSettings = Annotated[list[str] | None, typer.Option("--set", help="A setting of the life or its gate, key=value.")]
PlannerSettings = Annotated[
    list[str] | None, typer.Option("--planner-set", help="A setting of the planner, key=value.")
]
FitSettings = Annotated[list[str] | None, typer.Option("--fit-set", help="A setting of the model's fit, key=value.")]


def world_of(name: str, settings: list[str] | None) -> Any:
    """The world of an id or of ``file.py:function``, with ``key=value`` settings."""
    from telltale.world.worlds.registry import make

    options = parse_overrides(settings or [])
    if ".py:" in name:
        return make(from_file(name), **options)
    return make(name, **options)


def model_of(name: str, world: Any) -> Any:
    """The model of a folder, a language model, ``oracle`` or ``file.py:function``, fitted on ``world`` if it says on which."""
    from telltale.cli.world_text import is_language_model, open_text_model
    from telltale.world.models.saving import open_model

    if name == "oracle":
        oracle = world.oracle()
        if oracle is None:
            raise ConfigError(f"{world.id} has no oracle; give the folder of a model.")
        return oracle
    if ".py:" in name:
        return from_file(name)
    if is_language_model(Path(name)):
        return open_text_model(Path(name), world)
    model, document = open_model(name)
    fitted = document["about"].get("world", world.id)
    if fitted != world.id:
        raise ConfigError(f"{name} was fitted on {fitted}, not on {world.id}; give a model of that world.")
    return model


def from_file(name: str) -> Any:
    """Call ``function`` of ``file.py:function``."""
    from telltale.world.plugs import called

    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{path} is no file; expected file.py:function.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(path).stem, module)  # for dataclasses and inspect, which look a class's module up
    called(f"importing {path}", spec.loader.exec_module, module)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{path} has no function {function!r}.")
    found = called(f"{function} of {path}", getattr(module, function))
    if found is None:
        raise ConfigError(f"{function} of {path} returned nothing; return the model or the world that it makes.")
    return found


def laws_of(path: Path | None, world: Any) -> Any:
    """The laws of a YAML file, or None for the world's own."""
    from telltale.world.laws.reading import read_laws

    return None if path is None else read_laws(path, world.columns)


def read_json(path: Path) -> Any:
    """The document of a file that telltale wrote."""
    return jsonlib.loads(path.read_text())


def check_bundle(out: Path) -> None:
    """Raise unless a bundle can be written to ``out``, which it would replace."""
    from telltale.runs.files import check_writable

    check_writable(out / "manifest.json")
    if out.exists() and not (out / "manifest.json").is_file():
        raise ConfigError(f"{out} exists and is no bundle; give a folder that does not exist, or a bundle to replace.")
