"""The page of a sweep: accuracy against bytes, tables, and pictures of what was sent."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telltale.edge.arbitration import Arbiter
from telltale.edge.audit import Audit
from telltale.edge.budget import Space, on_socket, pack
from telltale.edge.evaluation import Choice, answers, view_of
from telltale.edge.images import Images
from telltale.edge.sweep import Row, Sweep
from telltale.edge.wire import Frame
from telltale.models.vision import VisionModel
from telltale.runs.html_report import Report, plotly_module

ENLARGED = 160
"""Pixels of a picture's side on the page."""


def write_page(
    path: str | Path,
    sweep: Sweep,
    *,
    audit: Audit | None = None,
    pictures: Sequence[tuple[bytes, str]] = (),
    title: str = "",
) -> Path:
    """Write one self-contained HTML page, whole or not at all."""
    report = Report(title or "What fits into the uplink", subtitle="SAGE, arXiv 2604.19623: accuracy against bytes")
    report.cards(
        [
            (f"{sweep.edge:.1f}%", f"the edge alone, on the {sweep.offloaded} images that it is unsure of"),
            (f"{sweep.ceiling:.1f}%", "the server on the same images, uncompressed and whole"),
            (f"{sweep.kept:.1f}%", f"the edge on the {sweep.images - sweep.offloaded} images that it keeps"),
        ]
    )
    report.figure(
        _figure(sweep), caption="Bytes on the socket are means over requests; every point is told of held-out images."
    )
    if pictures:
        report.heading("What was sent")
        report.pictures(pictures)
    report.heading("Patches")
    report.table(
        _HEADERS, [_cells(row) for row in sweep.rows if not row.name.startswith("whole image")], caption=_CAPTION
    )
    report.heading("Whole images")
    report.table(_HEADERS, [_cells(row) for row in sweep.rows if row.name.startswith("whole image")])
    if audit is not None:
        report.heading("Audit of the importances")
        if audit.warning:
            report.text(f"Warning: {audit.warning}.")
        report.table(
            ("importance", "top %", "random %", "bottom %", "top - random", "verdict"),
            [
                (
                    d.importance,
                    f"{d.top:.1f}",
                    f"{d.random:.1f}",
                    f"{d.bottom:.1f}",
                    f"{d.gain:+.1f} ± {d.error:.1f}",
                    d.verdict,
                )
                for d in audit.deletions
            ],
            caption=f"Accuracy from {audit.share:.0%} of the patches. Chosen: {audit.choice.name}.",
        )
    if sweep.swap:
        report.heading("Swap test")
        report.table(
            ("patches", "swapped per image", "server attention, taken out / put in", "accuracy gained, points"),
            [
                (
                    entry["budget"],
                    f"{entry['swapped']:.1f}",
                    f"{entry['attention_dropped_over_added']:.2f}",
                    f"{entry['gain'][0]:+.1f} ± {entry['gain'][1]:.1f}",
                )
                for entry in sweep.swap
            ],
        )
    if sweep.coverage:
        report.heading("Coverage of 2 x 2 cells, %")
        names = list(sweep.coverage[0])
        report.table(names, [[_plain(entry[name]) for name in names] for entry in sweep.coverage])
    return report.save(path)


def pictures_of(
    edge: VisionModel,
    server: VisionModel,
    images: Images,
    choice: Choice,
    budgets: Sequence[int],
    *,
    codec: str = "mosaic_webp",
    arbiter: Arbiter | None = None,
) -> list[tuple[bytes, str]]:
    """For each image: the image with the edge's answer, then what is sent at each budget (patches), bytes and answers."""
    view = view_of(edge, images.pixels, importances=(choice.importance,), spaces=(choice.space,))
    found = []
    for number, image in enumerate(images.pixels):
        truth = "" if images.labels is None else f", truth {edge.labels[images.labels[number]]}"
        found.append((_png(image), f"edge says {edge.labels[int(view.logs[number].argmax())]}{truth}"))
        row = view.take(np.array([number]))
        for budget in budgets:
            frame = frame_of(edge, image, choice.indices(row, budget)[0], codec)
            logs = answers(server, frame.image()[None], np.array([frame.indices]))[0]
            words = f"{budget} patches, {on_socket(len(frame.encode()))} B: server {server.labels[int(logs.argmax())]}"
            if arbiter is not None:
                fused, _ = arbiter.decide(view.logs[number], logs, budget)
                words += f", fused {server.labels[int(fused.argmax())]}"
            found.append((_png(_shown(frame)), words))
    return found


def frame_of(edge: VisionModel, image: np.ndarray, indices: np.ndarray, codec: str) -> Frame:
    """The frame that carries exactly these patches at the codec's quality 50."""
    setting = 5 if codec not in ("raw8", "raw4") else 0
    space = Space(edge.rows, edge.columns, edge.patch)
    chosen: list[int] = indices.tolist()

    def choose(count: int) -> list[int]:
        return chosen[:count]

    return pack(image, choose, space=space, codec=codec, limit=1 << 24, count=len(chosen), setting=setting)


def _shown(frame: Frame) -> np.ndarray:
    """What the server got; the rest is blue, so that black patches can be told from missing ones."""
    image = frame.image().copy()
    for index in set(range(frame.rows * frame.columns)) - set(frame.indices):
        row, column = divmod(index, frame.columns)
        image[row * frame.patch : (row + 1) * frame.patch, column * frame.patch : (column + 1) * frame.patch] = (
            40,
            60,
            110,
        )
    return image


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    factor = max(1, ENLARGED // image.shape[0])
    stream = io.BytesIO()
    Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1)).save(stream, "PNG")
    return stream.getvalue()


def _figure(sweep: Sweep) -> Any:
    plotly = plotly_module()
    figure = plotly.Figure()
    for name in dict.fromkeys(row.name for row in sweep.rows):
        rows = sorted((row for row in sweep.rows if row.name == name), key=lambda row: row.bytes)
        whole = name.startswith("whole image")
        figure.add_scatter(
            x=[row.bytes for row in rows],
            y=[row.server for row in rows],
            mode="lines+markers",
            name=name,
            line={"dash": "dot" if whole else "solid"},
            marker={"size": 5 if whole else 8},
        )
    figure.add_hline(y=sweep.edge, line_dash="dash", annotation_text="edge alone")
    figure.update_layout(
        xaxis={"title": "bytes on the socket", "type": "log"},
        yaxis={"title": "accuracy on offloaded images, %"},
        height=520,
    )
    return figure


_HEADERS = (
    "contestant",
    "patches",
    "bytes",
    "most",
    "server %",
    "server - edge",
    "fused %",
    "fused - edge",
    "weight",
    "SAGE - top-k",
)
_CAPTION = (
    "Accuracy on offloaded images of the half that fitted no weight; differences in points with paired standard errors; "
    "the last column compares with top-k of the same importance, on all offloaded images."
)


def _cells(row: Row) -> tuple[str, ...]:
    against = "" if row.versus_topk is None else f"{row.versus_topk[0]:+.1f} ± {row.versus_topk[1]:.1f}"
    return (
        row.name,
        f"{row.patches:.0f}" if row.patches else "all",
        f"{row.bytes:.0f}",
        str(row.largest),
        f"{row.server:.1f}",
        f"{row.versus_edge[0]:+.1f} ± {row.versus_edge[1]:.1f}",
        f"{row.fused:.1f}",
        f"{row.fused_versus_edge[0]:+.1f} ± {row.fused_versus_edge[1]:.1f}",
        f"{row.weight:g}",
        against,
    )


def _plain(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
