"""The tour's plots, as Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from telltale.runs.report import plotly_module
from telltale.tour.comparison import Row

_LAYOUT = {"template": "plotly_white", "margin": {"l": 60, "r": 20, "t": 20, "b": 50}, "height": 400}


def loss_per_exit(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """Held-out loss of every exit layer over training steps; the darkest line is the last layer."""
    plotly = plotly_module()
    records = [record for record in metrics if "held_out" in record]
    layers = len(records[0]["held_out"]["losses"]) if records else 0
    figure = plotly.Figure(layout=_LAYOUT)
    for exit_layer in range(1, layers + 1):
        shade = 0.25 + 0.75 * exit_layer / layers
        figure.add_scatter(
            x=[record["step"] for record in records],
            y=[record["held_out"]["losses"][exit_layer - 1] for record in records],
            name=f"exit {exit_layer}",
            mode="lines+markers",
            line={"color": f"rgba(11, 110, 153, {shade:.2f})"},
        )
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="held-out loss (nats per token)")
    return figure


def acceptance_by_exit(agreement: Sequence[float], acceptance: Mapping[int, float], draft_length: int) -> Any:
    """How often each exit's top token is the last layer's, and what part of its drafts was accepted."""
    plotly = plotly_module()
    exits = list(range(1, len(agreement)))
    figure = plotly.Figure(layout=_LAYOUT)
    figure.add_bar(
        x=exits, y=list(agreement[:-1]), name="agrees with the last layer (next token)", marker_color="#a9c8d8"
    )
    figure.add_bar(
        x=list(acceptance),
        y=list(acceptance.values()),
        name=f"drafts accepted (draft length {draft_length})",
        marker_color="#0b6e99",
    )
    figure.update_xaxes(title="exit layer", dtick=1)
    figure.update_yaxes(title="fraction", range=[0, 1])
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return figure


def tokens_per_second(rows: Sequence[Row]) -> Any:
    """Tokens per second of CPU time, by method."""
    plotly = plotly_module()
    figure = plotly.Figure(layout=_LAYOUT)
    figure.add_bar(
        y=[row.method for row in rows],
        x=[row.tokens_per_cpu_second for row in rows],
        orientation="h",
        marker_color=["#0b6e99" if row.method.startswith("telltale") else "#b8c2cc" for row in rows],
        text=[f"{row.tokens_per_cpu_second:,.0f}" for row in rows],
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="tokens per second of CPU time, one thread")
    return figure


def speed_up(points: Sequence[Any]) -> Any:
    """Measured speed-up over plain decoding for each exit layer and draft length (marks), and the cost model's (lines)."""
    plotly = plotly_module()
    figure = plotly.Figure(layout=_LAYOUT)
    colours = plotly_module("plotly.colors").qualitative.Dark24
    for index, exit_layer in enumerate(sorted({point.exit_layer for point in points})):
        chosen = sorted((p for p in points if p.exit_layer == exit_layer), key=lambda p: p.draft_length)
        lengths = [point.draft_length for point in chosen]
        colour = colours[index % len(colours)]
        figure.add_scatter(
            x=lengths,
            y=[p.speedup for p in chosen],
            mode="markers",
            marker={"size": 9, "color": colour},
            name=f"exit {exit_layer}",
            legendgroup=str(exit_layer),
        )
        figure.add_scatter(
            x=lengths,
            y=[p.predicted_speedup for p in chosen],
            mode="lines",
            line={"color": colour, "dash": "dot"},
            name=f"exit {exit_layer}, cost model",
            legendgroup=str(exit_layer),
            showlegend=False,
        )
    figure.add_hline(y=1.0, line_color="#888888", line_width=1)
    figure.update_xaxes(title="draft length", dtick=1)
    figure.update_yaxes(title="speed-up over our plain decoding")
    return figure
