"""One self-contained HTML page per run: text, tables and interactive plots, readable without a network."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telltale.errors import MissingExtraError
from telltale.runs.files import write_atomically

_TOOLS = 40
"""Pixels above a figure that Plotly's tools take."""
_MANY_COLUMNS = 8
_STYLE = """
:root { color-scheme: light; --ink: #1b2733; --soft: #5b6b7b; --line: #d9e0e7; --mark: #0b6e99; --paper: #ffffff; }
body { margin: 0; background: #f4f6f8; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2.5rem 2rem 4rem; background: var(--paper); }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { margin: 2.4rem 0 .4rem; font-size: 1.3rem; }
p { max-width: 46rem; } .caption { color: var(--soft); font-size: .92rem; margin-top: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .dense { font-size: .8rem; } .dense td { white-space: nowrap; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; }
.dense th, .dense td { padding: .3rem .45rem; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; font-size: .9rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-left: 4px solid var(--mark); padding: .6rem 1rem; min-width: 9rem; }
.card b { display: block; font-size: 1.5rem; } .card span { color: var(--soft); font-size: .88rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; } .pictures figure { margin: 0; max-width: 11rem; }
.pictures img { width: 10rem; image-rendering: pixelated; border: 1px solid var(--line); }
.pictures figcaption { color: var(--soft); font-size: .85rem; }
code { background: #eef2f5; padding: .1rem .3rem; border-radius: 3px; font-size: .92em; }
pre { background: #f6f8fa; border: 1px solid var(--line); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


class Report:
    """Collects sections in order; :meth:`save` writes the page whole."""

    def __init__(self, title: str, *, subtitle: str = "") -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>", f'<p class="caption">{html.escape(subtitle)}</p>']
        self._has_figures = False

    def heading(self, text: str) -> None:
        """A section heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph; ``backquoted`` words become code."""
        self._parts.append(f"<p>{_inline(text)}</p>")

    def code(self, text: str) -> None:
        """A block of code or output, as it is."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def cards(self, figures: Sequence[tuple[str, str]]) -> None:
        """The few figures that matter, as (value, what it is)."""
        cards = "".join(f'<div class="card"><b>{html.escape(v)}</b><span>{_inline(w)}</span></div>' for v, w in figures)
        self._parts.append(f'<div class="cards">{cards}</div>')

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "") -> None:
        """A table; the first column is left-aligned, the others are numbers. Wider than the page it scrolls by itself."""
        head = "".join(f"<th>{_inline(str(cell))}</th>" for cell in headers)
        body = "".join("<tr>" + "".join(f"<td>{_inline(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        dense = ' class="dense"' if len(headers) > _MANY_COLUMNS else ""
        self._parts.append(
            f'<div class="wide"><table{dense}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        self._caption(caption)

    def pictures(self, pictures: Sequence[tuple[bytes, str]], *, caption: str = "") -> None:
        """PNG images side by side, each with a line below."""
        cells = "".join(
            f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            f"<figcaption>{_inline(words)}</figcaption></figure>"
            for data, words in pictures
        )
        self._parts.append(f'<div class="pictures">{cells}</div>')
        self._caption(caption)

    def figure(self, figure: Any, *, caption: str = "") -> None:
        """A Plotly figure. Its margin at the top becomes large enough for the tools that Plotly shows there."""
        if figure.layout.margin.t is not None and figure.layout.margin.t < _TOOLS:
            figure.update_layout(margin_t=_TOOLS)
        self._parts.append(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
        self._has_figures = True
        self._caption(caption)

    def save(self, path: str | Path) -> Path:
        """Write the page to ``path``, whole or not at all.

        Raises :class:`~telltale.errors.CheckpointError` if it cannot be written.
        """
        script = f"<script>{plotly_module('plotly.offline').get_plotlyjs()}</script>" if self._has_figures else ""
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>{script}</head>'
            f"<body><main>{''.join(self._parts)}</main></body></html>"
        )
        write_atomically(path, page)
        return Path(path)

    def _caption(self, caption: str) -> None:
        if caption:
            self._parts.append(f'<p class="caption">{_inline(caption)}</p>')


def plotly_module(name: str = "plotly.graph_objects") -> Any:
    """A module of Plotly. Raises :class:`~telltale.errors.MissingExtraError` with the line that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("plots need Plotly: pip install 'telltale[report]'") from error


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
