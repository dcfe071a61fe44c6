"""Is the importance worth anything? The deletion test, on the user's own images, with a verdict and a default that follows from it.

A model answers from the most important patches alone, from the least important alone, and from random ones. An importance whose
worst patches do better than its best is rejected: last-layer class attention of small models often is (its mass lies on
background tokens that serve as sinks). Selectors then compete with the importances that are left, and with an even grid, by
their accuracy at several budgets.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telltale.config import check_range
from telltale.edge.evaluation import PAPER, Choice, View, answers, budgets_of, check_pair, grid_options, paired, view_of
from telltale.edge.images import Images
from telltale.edge.importance import available
from telltale.errors import DataError
from telltale.models.vision import VisionModel
from telltale.runs.files import write_atomically

SHARES = (0.1, 0.2, 0.3, 0.4)
DRAWS = 3
"""Random sets per image."""
SELECTORS = ("topk", "sage", "facility")
SPACES = ("patch", "last")


@dataclass(frozen=True)
class Deletion:
    """Accuracies (%) of the deletion test of one importance, and the verdict: ``informative``, ``uninformative`` or ``inverted``.

    gain: top minus random, percentage points, with its paired standard error.
    """

    importance: str
    top: float
    bottom: float
    random: float
    gain: float
    error: float
    verdict: str


@dataclass(frozen=True)
class Audit:
    """Result of :func:`audit_importances`. ``candidates``: mean accuracy (%) over the budgets by choice, best first."""

    images: int
    share: float
    deletions: tuple[Deletion, ...]
    candidates: tuple[tuple[str, float], ...]
    choice: Choice
    warning: str
    labelled: bool

    def document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "choice": {**asdict(self.choice), "options": dict(self.choice.options)}}

    def save(self, path: str | Path) -> Path:
        """Write the audit as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.document(), indent=1) + "\n")
        return Path(path)


def load_choice(path: str | Path) -> Choice:
    """The choice of a saved audit. Raises DataError for another file."""
    try:
        chosen = json.loads(Path(path).read_text())["choice"]
        return Choice(chosen["selector"], chosen["importance"], chosen["space"], tuple(chosen["options"].items()))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no audit of telltale; make one with telltale edge audit.") from error


def audit_importances(
    edge: VisionModel,
    images: Images,
    *,
    server: VisionModel | None = None,
    share: float = 0.3,
    importances: tuple[str, ...] | None = None,
    selectors: tuple[str, ...] = SELECTORS,
    seed: int = 0,
) -> Audit:
    """Test every importance of ``edge`` on ``images`` and choose a selector, an importance and a space.

    server: the model that answers from patches; None: the edge's own. share: of the patches, in the deletion test. Without labels
    an answer is right if it is the one for the whole image.

    Raises :class:`~telltale.errors.DataError` for fewer than 20 images, :class:`~telltale.errors.ConfigError` for a share
    outside 0..1.
    """
    check_range("share", share, low=0.0, high=1.0)
    judge = server or edge
    check_pair(edge, judge)
    if len(images) < 20:
        raise DataError(f"{len(images)} images are too few for an audit; expected at least 20.")
    names = importances or tuple(available(edge))
    view = view_of(edge, images.pixels, importances=names, spaces=SPACES)
    truth = images.labels if images.labels is not None else answers(judge, images.pixels).argmax(axis=1)

    def right(indices: np.ndarray) -> np.ndarray:
        return answers(judge, images.pixels, indices).argmax(axis=1) == truth

    budget = budgets_of((share,), edge.patches)[0]
    drawn = _random_right(right, view, names[0], budget, seed)
    deletions = tuple(_deletion(name, right, view, budget, drawn) for name in names)
    # An even grid needs no importance, and wins ties. The best patches alone may do no better than random ones and their importance
    # still be a useful weight, so that only inverted ones are left out.
    candidates = [Choice("uniform", names[0], "patch", grid_options(edge))]
    candidates += [
        Choice(selector, row.importance, space)
        for row in deletions
        if row.verdict != "inverted"
        for selector in selectors
        for space in (SPACES[:1] if selector == "topk" else SPACES)
    ]
    budgets = budgets_of(SHARES, edge.patches)
    scores = {
        choice: float(np.mean([right(choice.indices(view, number)).mean() for number in budgets]))
        for choice in candidates
    }
    best = max(candidates, key=lambda choice: scores[choice])
    listed = sorted(((choice.name, 100 * score) for choice, score in scores.items()), key=lambda row: -row[1])
    warning = _warning(deletions, best)
    return Audit(len(images), share, deletions, tuple(listed), best, warning, images.labels is not None)


def _random_right(right: Any, view: View, name: str, budget: int, seed: int) -> np.ndarray:
    """Share of right answers (images,) over :data:`DRAWS` random sets."""
    draws = [right(Choice("random", name).indices(view, budget, seed=seed + number)) for number in range(DRAWS)]
    return np.mean(draws, axis=0)


def _deletion(name: str, right: Any, view: View, budget: int, drawn: np.ndarray) -> Deletion:
    ranked = np.argsort(-view.importances[name], axis=1, kind="stable")
    top, bottom = right(ranked[:, :budget].copy()), right(ranked[:, -budget:].copy())
    gain, error = paired(top, drawn)
    reverse, reverse_error = paired(bottom, top)
    if reverse > 2 * reverse_error and reverse > 0:
        verdict = "inverted"
    elif gain > 2 * error:
        verdict = "informative"
    else:
        verdict = "uninformative"
    return Deletion(name, 100 * top.mean(), 100 * bottom.mean(), 100 * drawn.mean(), gain, error, verdict)


def _warning(deletions: tuple[Deletion, ...], best: Choice) -> str:
    if all(row.verdict != "informative" for row in deletions):
        return (
            f"the best patches of no importance beat random ones here: {best.name} was the best of all choices all the same; send "
            "whole images if bytes allow"
        )
    paper = next((row for row in deletions if row.importance == PAPER.importance), None)
    if paper is not None and paper.verdict != "informative":
        return f"{PAPER.importance}, the paper's importance, is {paper.verdict} here: do not use the sage preset"
    return ""
