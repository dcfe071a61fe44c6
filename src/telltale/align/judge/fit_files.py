"""From files to a judge: features on disk, the fit, and the folder that is written.

Features are the expensive part. They are kept in a folder and computed only where they are missing, so that a second fit with
other options costs no pass of the backbone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.align.judge.data import (
    Conversation,
    read_conversations,
    read_objectives,
    read_preferences,
    read_ratings,
)
from telltale.align.judge.feature_store import FeatureStore
from telltale.align.judge.features import Backbone, extract, pair_conversations, pair_features
from telltale.align.judge.fitting import JudgeFit, fit
from telltale.align.judge.judge import Judge
from telltale.align.judge.model import JudgeModel
from telltale.errors import ConfigError
from telltale.runs.progress import ProgressBar

REPORT_FILE = "fit.json"
"""The fit's report, in the judge's folder."""


@dataclass(frozen=True)
class JudgeFiles:
    """What a judge is fitted on. ``objectives`` None takes every rating from 0 to 1, ``reference`` None the rated responses."""

    ratings: Path
    preferences: Path
    objectives: Path | None = None
    reference: Path | None = None


def fit_files(
    backbone: Backbone, files: JudgeFiles, features: Path, *, batch_size: int = 16, **options: Any
) -> tuple[Judge, JudgeFit]:
    """Fit a judge on ``files``, with features in the folder ``features``; ``options`` are those of ``fit``.

    ``nuisances`` default to "verbosity" if there is such an objective. Raises :class:`~telltale.errors.ConfigError` for a
    nuisance that is no objective, and what reading, extraction and the fit raise.
    """
    scales = None if files.objectives is None else read_objectives(files.objectives)
    ratings = read_ratings(files.ratings, scales)
    nuisances = tuple(options.pop("nuisances", None) or [n for n in ("verbosity",) if n in ratings.objectives])
    for name in nuisances:
        if name not in ratings.objectives:
            raise ConfigError(f"nuisance {name!r} is no objective; expected one of {', '.join(ratings.objectives)}.")
    stores = compute_features(backbone, files, features, batch_size=batch_size)
    same = read_preferences(files.preferences)[1]
    pairs = dataclasses.replace(pair_features(stores["preferences"].load()), dropped=same)
    gate = options.get("gate")
    with ProgressBar("gate", gate.steps if gate is not None else 2000) as progress:
        result = fit(
            stores["ratings"],
            ratings.labels,  # features are in the order of the conversations
            ratings.objectives,
            preferences=pairs,
            reference=stores.get("reference"),
            nuisances=nuisances,
            progress=progress,
            **options,
        )
    return assembled(backbone, result, ratings.scales, batch_size=batch_size), result


def compute_features(
    backbone: Backbone, files: JudgeFiles, out: Path, *, batch_size: int = 16
) -> dict[str, FeatureStore]:
    """Features of all ``files`` in folders of ``out``; what is there already is kept. Under torchrun every rank does its share.

    Raises what reading and :func:`~telltale.align.judge.features.extract` raise.
    """
    scales = None if files.objectives is None else read_objectives(files.objectives)
    parts: dict[str, Sequence[Conversation]] = {
        "ratings": read_ratings(files.ratings, scales).conversations,
        "preferences": pair_conversations(read_preferences(files.preferences)[0]),
    }
    if files.reference is not None:
        parts["reference"] = read_conversations(files.reference)
    found = {}
    for name, conversations in parts.items():
        with ProgressBar(f"features of {name}", len(conversations), unit="row") as progress:
            found[name] = extract(
                backbone.model,
                backbone.tokenizer,
                conversations,
                out / name,
                backbone,
                batch_size=batch_size,
                progress=progress,
            )
    return found


def assembled(backbone: Backbone, result: JudgeFit, scales: Any, *, batch_size: int = 16) -> Judge:
    """The judge of a fitted head on its backbone."""
    model = JudgeModel.assembled(
        backbone.model,
        result.head,
        scales=scales,
        pooling=backbone.pooling,
        gating=backbone.gating,
        gating_pattern=backbone.gating_pattern,
        context_length=backbone.context_length,
    )
    return Judge(model, backbone.tokenizer, batch_size=batch_size)


def save_fit(judge: Judge, result: JudgeFit, out: Path, *, layout: str = "telltale") -> None:
    """Write the judge, and the report of its fit into its folder."""
    judge.save(out, layout=layout)
    result.report.save(out / REPORT_FILE)
