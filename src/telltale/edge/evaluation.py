"""What audit and sweep share: the edge's view of many images, the server's answers to parts of them, and paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from telltale.edge.importance import look_at_all
from telltale.edge.selection import select
from telltale.errors import DataError
from telltale.models.vision import VisionModel

Array = np.ndarray


@dataclass(frozen=True)
class View:
    """What the edge model says of n images: log-probabilities (n, classes), importances (n, N) and embeddings (n, N, D) by name."""

    logs: Array
    importances: dict[str, Array]
    embeddings: dict[str, Array]

    def take(self, rows: Array) -> View:
        """Some of the images."""
        return View(
            self.logs[rows],
            {name: values[rows] for name, values in self.importances.items()},
            {name: values[rows] for name, values in self.embeddings.items()},
        )


@dataclass(frozen=True)
class Choice:
    """A way to choose patches: selector with its options, importance, and space in which patches are compared."""

    selector: str
    importance: str = "rollout"
    space: str = "patch"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # JSON knows no tuples; choices are compared and serve as keys.
        frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in self.options)
        object.__setattr__(self, "options", frozen)

    @property
    def name(self) -> str:
        """Short: ``sage(cls_last, last)``; selectors that look at neither have their name alone."""
        if self.selector in ("random", "uniform"):
            return self.selector
        spaced = "" if self.selector in ("topk", "attention_sum", "threshold") else f", {self.space}"
        extra = "".join(f", {key}={value}" for key, value in self.options)
        return f"{self.selector}({self.importance}{spaced}{extra})"

    def indices(self, view: View, budget: int, *, seed: int = 0) -> Array:
        """The patches (n, budget) of each image of ``view``."""
        importance = view.importances[self.importance]
        return select(
            self.selector, importance, view.embeddings.get(self.space), budget, generator=seed, **dict(self.options)
        )


PAPER = Choice("sage", "cls_last", "last")
"""SAGE as published: attention of the class token in the last layer, final-norm tokens, k = 2."""


def view_of(
    vision: VisionModel, images: Array, *, importances: tuple[str, ...], spaces: tuple[str, ...], batch: int = 64
) -> View:
    """Run the edge model over images (n, height, width, 3) uint8."""
    logs, found, tokens = [], [], []
    for start in range(0, len(images), batch):
        pixels = vision.pixels(images[start : start + batch])
        logits, values, embeddings = look_at_all(vision, pixels, importances=importances, spaces=spaces)
        logs.append(logits.float().log_softmax(dim=-1).cpu().numpy())
        found.append({name: value.cpu().numpy() for name, value in values.items()})
        tokens.append({name: value.float().cpu().numpy() for name, value in embeddings.items()})
    return View(
        np.concatenate(logs),
        {name: np.concatenate([part[name] for part in found]) for name in importances},
        {name: np.concatenate([part[name] for part in tokens]) for name in spaces},
    )


def answers(vision: VisionModel, images: Array, indices: Array | None = None, *, batch: int = 128) -> Array:
    """Log-probabilities (n, classes) of the server from whole images, or from the patches ``indices`` (n, B) alone.

    Pixels of other patches are made NaN before the model sees them: an answer cannot have used them. -1 stands for no patch.
    """
    if indices is not None and (indices < 0).any():
        return _answers_by_count(vision, images, indices, batch)
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            pixels = vision.pixels(images[start : start + batch])
            chosen = None if indices is None else torch.from_numpy(indices[start : start + batch])
            if chosen is not None:
                hidden = torch.ones(len(pixels), vision.patches, dtype=torch.bool).scatter_(1, chosen, False)
                mask = hidden.view(-1, vision.rows, vision.columns)
                mask = mask.repeat_interleave(vision.patch, 1).repeat_interleave(vision.patch, 2)[:, None]
                pixels = pixels.masked_fill(mask.to(pixels.device), torch.nan)
            found.append(vision.logits(pixels, chosen).float().log_softmax(dim=-1).cpu().numpy())
    logs = np.concatenate(found)
    if not np.isfinite(logs).all():
        raise DataError("the server's answer is not finite although only sent patches reach it; check the checkpoint.")
    return logs


def _answers_by_count(vision: VisionModel, images: Array, indices: Array, batch: int) -> Array:
    """:func:`answers` where images have different numbers of patches: those with as many go together."""
    counts = (indices >= 0).sum(axis=1)
    logs = np.empty((len(images), len(vision.labels)), dtype=np.float32)
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        chosen = np.stack([indices[row][indices[row] >= 0] for row in rows])
        logs[rows] = answers(vision, images[rows], chosen, batch=batch)
    return logs


def paired(first: Array, second: Array) -> tuple[float, float]:
    """Mean of ``first - second`` over the same images, in percentage points, and its standard error."""
    difference = 100 * (np.asarray(first, dtype=float) - np.asarray(second, dtype=float))
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(
        difference
    ) > 1 else 0.0


def grid_options(vision: VisionModel) -> tuple[tuple[str, Any], ...]:
    """Options of a :class:`Choice` of ``uniform``, which has to be told of a grid that is no square."""
    return () if vision.rows == vision.columns else (("grid", (vision.rows, vision.columns)),)


def check_pair(edge: VisionModel, server: VisionModel) -> None:
    """Raise :class:`~telltale.errors.DataError` unless edge and server have the same grid of patches and the same labels."""
    if (edge.rows, edge.columns, edge.patch) != (server.rows, server.columns, server.patch):
        raise DataError(
            f"the edge has {edge.rows} x {edge.columns} patches of {edge.patch} pixels and the server {server.rows} x "
            f"{server.columns} of {server.patch}; expected the same grid. Give two checkpoints of one image and patch size."
        )
    if edge.labels != server.labels:
        raise DataError(
            f"edge and server name {len(edge.labels)} and {len(server.labels)} labels that differ; expected the same labels in the "
            "same order. Give two checkpoints trained on one set of classes."
        )


def budgets_of(shares: tuple[float, ...], patches: int) -> tuple[int, ...]:
    """Numbers of patches for shares of an image, each at least 1, without repeats."""
    return tuple(sorted({max(1, round(share * patches)) for share in shares}))
