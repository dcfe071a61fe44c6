"""``telltale list``: what there is to choose from."""

from __future__ import annotations

import typer

from telltale.cli.options import Json, emit


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("list")(catalogue)


def catalogue(json: Json = False) -> None:
    """List presets, model families, decoding backends and methods, tasks and benchmarks.

    Example: `telltale list --json`
    """
    from telltale.cli.bench import claims
    from telltale.cli.decode import METHODS
    from telltale.models.decoder import BACKENDS
    from telltale.models.families import FAMILIES
    from telltale.models.native import build
    from telltale.models.presets import PRESETS

    reason = build.unavailable_reason()
    listing = {
        "presets": {name: preset.description for name, preset in PRESETS.items()},
        "families": {name: "fused and native" if row.llama_like else "module" for name, row in FAMILIES.items()},
        "backends": dict.fromkeys(BACKENDS, "") | {"native": "available" if reason is None else f"not here: {reason}"},
        "methods": dict.fromkeys(METHODS, ""),
        "tasks": {"code": "Python's standard library, or your own text, as a corpus"},
        "benchmarks": dict.fromkeys(claims(), "") or {"-": "in a source checkout only"},
    }
    if json:
        emit(listing)
        return
    for heading, entries in listing.items():
        typer.echo(f"{heading}:")
        for name, note in entries.items():
            typer.echo(f"  {name:<18}{note}".rstrip())
