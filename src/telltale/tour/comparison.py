"""Decode the same prompts with Transformers' generate and with ours, check that the tokens agree, and time them all.

Contestants are interleaved, one round after the other, on one thread; CPU time is what counts on a shared machine.

The tour's plots, as Plotly figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers import logging as transformers_logging

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.runs.html_report import plotly_module

PLAIN = "transformers generate"
EARLY_EXIT = "transformers assistant_early_exit"
PROMPT_LOOKUP = "transformers prompt lookup"
OURS_PLAIN = "telltale autoregressive"
OURS_FIXED = "telltale self-speculative, same exit and draft"
OURS_AUTO = "telltale self-speculative, auto"
OURS_BOTH = "telltale self-speculative, n-gram + exit"


@dataclass(frozen=True)
class Row:
    """One method: tokens per second of CPU and wall time (medians over rounds) and whether its tokens are plain generate's."""

    method: str
    tokens_per_cpu_second: float
    tokens_per_second: float
    identical: int
    prompts: int
    acceptance: float | None


def compare(
    model: Any, prompts: Sequence[Tensor], *, new_tokens: int, exit_layer: int, draft_length: int, rounds: int
) -> list[Row]:
    """Time every method on ``prompts`` (1-D token tensors), greedily, ``new_tokens`` each."""
    plain, fixed = Autoregressive(model), SelfSpeculative(model, exit_layer=exit_layer, draft_length=draft_length)
    auto = SelfSpeculative(model)
    both = SelfSpeculative(model, drafter="both")
    early = {"num_assistant_tokens": draft_length, "num_assistant_tokens_schedule": "constant"}
    early["assistant_confidence_threshold"] = 0.0
    contestants: dict[str, Callable[[Tensor], tuple[Tensor, Any]]] = {
        PLAIN: lambda prompt: (_transformers(model, prompt, new_tokens), None),
        EARLY_EXIT: lambda prompt: (
            _transformers(model, prompt, new_tokens, settings=early, assistant_early_exit=exit_layer),
            None,
        ),
        PROMPT_LOOKUP: lambda prompt: (
            _transformers(model, prompt, new_tokens, settings={"prompt_lookup_num_tokens": 6}),
            None,
        ),
        OURS_PLAIN: lambda prompt: _ours(plain, prompt, new_tokens),
        OURS_FIXED: lambda prompt: _ours(fixed, prompt, new_tokens),
        OURS_AUTO: lambda prompt: _ours(auto, prompt, new_tokens),
        OURS_BOTH: lambda prompt: _ours(both, prompt, new_tokens),
    }
    quiet = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _race(contestants, prompts, new_tokens, rounds)
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(quiet)


def _race(
    contestants: dict[str, Callable[[Tensor], tuple[Tensor, Any]]],
    prompts: Sequence[Tensor],
    new_tokens: int,
    rounds: int,
) -> list[Row]:
    outputs: dict[str, list[Tensor]] = {}
    accepted: dict[str, list[Any]] = {}
    for name, decode in contestants.items():
        pairs = [decode(prompt) for prompt in prompts]
        outputs[name] = [tokens for tokens, _ in pairs]
        accepted[name] = [stats for _, stats in pairs if stats is not None and hasattr(stats, "drafted")]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, decode in contestants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for prompt in prompts:
                decode(prompt)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = []
    for name in contestants:
        tokens = len(prompts) * new_tokens
        same = sum(torch.equal(a, b) for a, b in zip(outputs[name], outputs[PLAIN], strict=True))
        drafted = sum(stats.drafted for stats in accepted[name])
        rows.append(
            Row(
                method=name,
                tokens_per_cpu_second=tokens / statistics.median(cpu for cpu, _ in times[name]),
                tokens_per_second=tokens / statistics.median(wall for _, wall in times[name]),
                identical=same,
                prompts=len(prompts),
                acceptance=sum(stats.accepted for stats in accepted[name]) / drafted if drafted else None,
            )
        )
    return rows


def _ours(decoder: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, Any]:
    result = decoder.generate(prompt, max_new_tokens=new_tokens, eos_token_id=[])
    return result.tokens[0], result.stats


def _transformers(
    model: Any, prompt: Tensor, new_tokens: int, *, settings: dict[str, Any] | None = None, **options: Any
) -> Tensor:
    ids = prompt.view(1, -1)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **(settings or {}))
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **options)
    return output[0, ids.shape[1] :]


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
