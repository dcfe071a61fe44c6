"""Accuracy against bytes: selectors at several budgets through a real codec, whole-image baselines beside them, paired errors.

Every row is computed from frames: what the server model sees is what the codec gives back, every byte is a byte on the socket.
Accuracies are those of offloaded images; the edge's own on the same images stands beside them. Fusion weights are fitted on one
half of the images and everything is told of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np

from telltale.edge.arbitration import Arbiter, fit_weight
from telltale.edge.budget import Space, on_socket, pack
from telltale.edge.codecs import codec_named
from telltale.edge.evaluation import PAPER, Choice, View, answers, check_pair, paired, view_of
from telltale.edge.gate import Gate, gated_accuracy
from telltale.edge.images import Images
from telltale.edge.wire import Frame
from telltale.errors import DataError
from telltale.models.vision import VisionModel

Array = np.ndarray
WHOLE = ("jpeg", "webp", "lowres")
"""Codecs of the whole-image baselines."""


@dataclass(frozen=True)
class Row:
    """One contestant at one budget, over the offloaded images of the reported half. Accuracies in %, differences in points.

    ``versus_edge`` and ``fused_versus_edge``: (difference, paired standard error). ``versus_topk``: against top-k with the same
    importance at the same budget. ``bytes``, ``largest``: mean and most on the socket.
    """

    name: str
    budget: int
    patches: float
    bytes: float
    largest: int
    server: float
    fused: float
    weight: float
    overall: float
    versus_edge: tuple[float, float]
    fused_versus_edge: tuple[float, float]
    versus_topk: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sweep:
    """Result of :func:`sweep_budgets`. ``edge``: the edge's accuracy on offloaded images; ``kept``: on those it kept (all in %)."""

    images: int
    offloaded: int
    edge: float
    kept: float
    edge_only: float
    ceiling: float
    rows: tuple[Row, ...]
    swap: tuple[dict[str, Any], ...] = ()
    coverage: tuple[dict[str, Any], ...] = ()

    def document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def arbiter(self, name: str) -> Arbiter:
        """The fitted weights of one contestant, by patches."""
        weights = {row.budget: row.weight for row in self.rows if row.name == name}
        if not weights:
            raise DataError(
                f"the sweep has no contestant {name!r}; it has {', '.join(sorted({r.name for r in self.rows}))}."
            )
        return Arbiter("fused", weights)

    def weights_of_whole(self, codec: str) -> dict[int, float]:
        """The fitted weights of a whole-image codec, by mean bytes on the socket."""
        return {round(row.bytes): row.weight for row in self.rows if row.name == f"whole image, {codec}"}


def sweep_budgets(
    edge: VisionModel,
    server: VisionModel,
    images: Images,
    *,
    choices: Sequence[Choice],
    budgets: Sequence[int],
    codec: str = "mosaic_webp",
    setting: int | None = None,
    gate: Gate | None = None,
    whole: Sequence[str] = WHOLE,
    swap: bool = False,
    coverage: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Every choice at every budget (patches) through ``codec``, and the whole-image codecs at each of their settings.

    Raises :class:`~telltale.errors.DataError` for images without labels or a gate that offloads fewer than 20 of them, and for
    models that do not fit together.
    """
    check_pair(edge, server)
    if images.labels is None:
        raise DataError("the images have no labels; expected one subfolder per class.")
    gate = gate or Gate()
    importances = tuple(dict.fromkeys([choice.importance for choice in choices] or ["rollout"]))
    spaces = tuple(dict.fromkeys([choice.space for choice in choices] or ["patch"]))
    view = view_of(edge, images.pixels, importances=importances, spaces=spaces)
    away = gate.offloads(np.exp(view.logs.astype(np.float64)))
    right_at_edge = view.logs.argmax(axis=1) == images.labels
    rows = np.flatnonzero(away)
    if len(rows) < 20:
        raise DataError(
            f"the gate offloads {len(rows)} of {len(images)} images; expected at least 20: lower its threshold."
        )
    job = _Job(edge, server, images.take(rows), view.take(rows), rows, away, right_at_edge, images.labels, seed)
    found: list[Row] = []
    right: dict[tuple[str, int], Array] = {}
    for choice in choices:
        for budget in budgets:
            frames = job.frames(choice, budget, codec, setting)
            row, correct = job.row(choice.name, budget, frames)
            right[choice.name, budget] = correct
            found.append(row)
            if tell is not None:
                tell(f"{choice.name} at {budget} patches: {row.server:.1f}% from {row.bytes:.0f} B")
    for name in whole:
        for step in range(codec_named(name).settings):
            frames = job.whole_frames(name, step)
            found.append(job.row(f"whole image, {name}", step, frames)[0])
    compared = [_beside_topk(row, right, choices) for row in found]
    kept = ~away
    return Sweep(
        images=len(images),
        offloaded=len(rows),
        edge=100 * float(right_at_edge[rows].mean()),
        kept=100 * float(right_at_edge[kept].mean()) if kept.any() else 0.0,
        edge_only=100 * float(right_at_edge.mean()),
        ceiling=100 * float((answers(server, images.pixels[rows]).argmax(axis=1) == images.labels[rows]).mean()),
        rows=tuple(compared),
        swap=swap_test(server, images.take(rows), view.take(rows), budgets) if swap else (),
        coverage=coverage_table(view.take(rows), choices, budgets, edge.rows, edge.columns) if coverage else (),
    )


@dataclass(frozen=True)
class _Job:
    edge: VisionModel
    server: VisionModel
    images: Images
    view: View
    rows: Array
    away: Array
    right_at_edge: Array
    labels: Array
    seed: int

    def frames(self, choice: Choice, budget: int, codec: str, setting: int | None) -> list[Frame]:
        indices = choice.indices(self.view, budget, seed=self.seed)
        return [
            self._frame(image, codec, setting, lambda count, row=row: row[:count], count=budget)
            for image, row in zip(self.images.pixels, indices, strict=True)
        ]

    def whole_frames(self, codec: str, setting: int) -> list[Frame]:
        return [self._frame(image, codec, setting, lambda count: [], count=None) for image in self.images.pixels]

    def _frame(self, image: Array, codec: str, setting: int | None, choose: Any, *, count: int | None) -> Frame:
        space = Space(self.edge.rows, self.edge.columns, self.edge.patch)
        chosen = setting
        if chosen is None and codec_named(codec).uses_patches:
            chosen = 5 if codec_named(codec).settings > 5 else 0
        return pack(image, choose, space=space, codec=codec, limit=1 << 24, count=count, setting=chosen)

    def row(self, name: str, budget: int, frames: list[Frame]) -> tuple[Row, Array]:
        labels = self.images.labels
        assert labels is not None
        logs = self.answers(frames)
        half = np.random.default_rng(self.seed).permutation(len(labels))
        fitting, told = half[: len(half) // 2], half[len(half) // 2 :]
        weight = fit_weight(self.view.logs[fitting], logs[fitting], labels[fitting])
        fused, _ = Arbiter("fused", {0: weight}).decide(self.view.logs, logs, 0)
        by_server, by_both = logs.argmax(axis=1) == labels, fused.argmax(axis=1) == labels
        by_edge = self.view.logs.argmax(axis=1) == labels
        sizes = np.array([on_socket(len(frame.encode())) for frame in frames])
        gated = gated_accuracy(self.away, self.right_at_edge, self._final(by_both))
        return (
            Row(
                name=name,
                budget=budget,
                patches=float(np.mean([len(frame.indices) for frame in frames])),
                bytes=float(sizes.mean()),
                largest=int(sizes.max()),
                server=100 * float(by_server[told].mean()),
                fused=100 * float(by_both[told].mean()),
                weight=weight,
                overall=100 * gated.overall,
                versus_edge=paired(by_server[told], by_edge[told]),
                fused_versus_edge=paired(by_both[told], by_edge[told]),
            ),
            by_server,
        )

    def answers(self, frames: list[Frame]) -> Array:
        """Log-probabilities (images, classes); frames with as many patches go together."""
        logs = np.empty_like(self.view.logs)
        whole = codec_named(frames[0].codec).whole
        groups: dict[int, list[int]] = {}
        for number, frame in enumerate(frames):
            groups.setdefault(0 if whole else len(frame.indices), []).append(number)
        for members in groups.values():
            pixels = np.stack([frames[number].image() for number in members])
            indices = None if whole else np.array([frames[number].indices for number in members])
            logs[members] = answers(self.server, pixels, indices)
        return logs

    def _final(self, right_when_away: Array) -> Array:
        final = self.right_at_edge.copy()
        final[self.rows] = right_when_away
        return final


def _beside_topk(row: Row, right: dict[tuple[str, int], Array], choices: Sequence[Choice]) -> Row:
    choice = next((choice for choice in choices if choice.name == row.name), None)
    if choice is None or choice.selector == "topk":
        return row
    base = right.get((Choice("topk", choice.importance, choice.space).name, row.budget))
    if base is None or choice.selector in ("random", "uniform"):
        return row
    return Row(**{**row.__dict__, "versus_topk": paired(right[row.name, row.budget], base)})


def swap_test(server: VisionModel, images: Images, view: View, budgets: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """SAGE's swap test: what does the server attend to in the patches that SAGE puts in (D+) and takes out (D-) of top-k?

    For each budget: mean server attention (class token, last layer, whole image) over D- divided by that over D+, and the server's
    accuracy with SAGE minus that with top-k, in points with its paired standard error. Raises DataError without cls_last.
    """
    if "cls_last" not in view.importances or "last" not in view.embeddings:
        raise DataError("the swap test needs the paper's preset among the choices: sage with cls_last and last.")
    attention = view_of(server, images.pixels, importances=("cls_last",), spaces=()).importances["cls_last"]
    found = []
    for budget in budgets:
        sage = PAPER.indices(view, budget)
        top = Choice("topk", "cls_last", "last").indices(view, budget)
        inside, outside = [], []
        for row, (ours, theirs) in enumerate(zip(sage, top, strict=True)):
            added, dropped = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)
            inside += attention[row, added].tolist()
            outside += attention[row, dropped].tolist()
        labels = images.labels
        gain = paired(*(answers(server, images.pixels, chosen).argmax(axis=1) == labels for chosen in (sage, top)))
        ratio = float(np.mean(outside) / np.mean(inside)) if inside else 1.0
        found.append(
            {"budget": budget, "swapped": len(inside) / len(sage), "attention_dropped_over_added": ratio, "gain": gain}
        )
    return tuple(found)


def coverage_table(
    view: View, choices: Sequence[Choice], budgets: Sequence[int], rows: int, columns: int
) -> tuple[dict[str, Any], ...]:
    """Share (%) of 2 x 2 cells of the grid with a sent patch, by choice and budget, and the closed form for random sets."""
    cell_of = (np.arange(rows * columns) // columns // 2) * (-(-columns // 2)) + np.arange(
        rows * columns
    ) % columns // 2
    sizes = np.bincount(cell_of)
    found = []
    for budget in budgets:
        random = float(np.mean([random_coverage(rows * columns, int(size), budget) for size in sizes]))
        entry: dict[str, Any] = {"budget": budget, "random, closed form": 100 * random}
        for choice in choices:
            chosen = choice.indices(view, budget)
            cells = [len(np.unique(cell_of[row[row >= 0]])) for row in chosen]
            entry[choice.name] = 100 * float(np.mean(cells)) / len(sizes)
        found.append(entry)
    return tuple(found)


def random_coverage(patches: int, cell: int, budget: int) -> float:
    """Probability that ``budget`` random of ``patches`` touch a cell of ``cell`` patches: 1 - C(N - cell, B) / C(N, B)."""
    return 1.0 - comb(patches - cell, budget) / comb(patches, budget)


def cheapest_above(sweep: Sweep, accuracy: float) -> Row | None:
    """The row with the fewest bytes whose server accuracy is at least ``accuracy`` %, or None."""
    rows = [row for row in sweep.rows if row.server >= accuracy]
    return min(rows, key=lambda row: row.bytes) if rows else None
