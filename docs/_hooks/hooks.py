"""MkDocs hooks: figures from ``benchmarks/results`` and the command-line reference from the Typer app.

``<!-- figure: NAME -->`` in a page becomes a plot, a link to its JSON and the folded table.
``<!-- command line -->`` becomes the reference of every command.
"""

from __future__ import annotations

import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import armorm  # noqa: F401  (each of these registers its figures)
import layerskip  # noqa: F401
import oger  # noqa: F401
import pipedream  # noqa: F401
import sage  # noqa: F401
import serving  # noqa: F401
import sharpness  # noqa: F401
import specguard  # noqa: F401
from drawing import RESULTS, Figure, figure
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import world  # noqa: F401

PLACE = re.compile(r"^<!-- figure: (?P<name>[\w-]+) -->$", re.MULTILINE)
COMMAND_LINE = "<!-- command line -->"
ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc):(?:`|<code>)~?(?P<name>[\w.]+)(?:`|</code>)")
"""A Sphinx role in a docstring, as Markdown renders it."""
_folder = tempfile.TemporaryDirectory(prefix="telltale-figures-")
_made: dict[str, Figure] = {}


def on_files(files: Any, config: Any) -> Any:
    """Draws every figure and adds the plots and the JSON to the site."""
    for name, maker in figure.makers.items():
        made = _made[name] = maker()
        if made.plot is not None:
            path = Path(_folder.name) / f"{name}.svg"
            made.svg(path)
            files.append(File.generated(config, f"assets/figures/{name}.svg", abs_src_path=str(path)))
    for name in sorted({source for made in _made.values() for source in made.sources}):
        path = RESULTS / f"{name}.json"
        files.append(File.generated(config, f"results/{name}.json", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts figures and the command-line reference in their places."""
    up = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")

    def shown(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in _made:
            raise PluginError(
                f"{page.file.src_uri} asks for the figure {name!r}; there are {', '.join(sorted(_made))}."
            )
        return block(name, _made[name], up)

    markdown = PLACE.sub(shown, markdown)
    return markdown.replace(COMMAND_LINE, command_line()) if COMMAND_LINE in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects by Sphinx roles; on these pages the bare name is what a reader needs."""
    return ROLE.sub(lambda match: f"<code>{match['name'].rpartition('.')[2]}</code>", html)


def block(name: str, made: Figure, up: str) -> str:
    """One figure as Markdown; ``up`` is the way from the page to the root of the site."""
    links = ", ".join(f"[{source}.json]({up}/results/{source}.json)" for source in made.sources)
    plot = f"![{made.caption}]({up}/assets/figures/{name}.svg)\n\n" if made.plot is not None else ""
    table = "\n".join(f"    {line}" for line in made.table().splitlines())
    note = f"\n\n    {made.note}" if made.note else ""
    return f'{plot}*{made.caption}.* {links}\n\n??? note "The table"\n\n{table}{note}\n'


def command_line() -> str:
    """Every command, its arguments and its options, as Typer writes them."""
    import click
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    import telltale.cli

    if not telltale.cli.app.registered_commands:
        telltale.cli._register()
    command = get_command(telltale.cli.app)
    text = get_docs_for_click(obj=command, ctx=click.Context(command, info_name="telltale"), name="telltale")
    return re.sub(r"\n{3,}", "\n\n", text)
