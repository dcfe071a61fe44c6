"""From files to a judge: features on disk, the fit, its audit, and the folder that is written.

Features are the expensive part. They are kept in a folder and computed only where they are missing, so that a second fit with
other options costs no pass of the backbone. Preferences alone will do: their file may hold ratings as well, and where it does not,
objectives are counted in the responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from telltale.align.judge.auditing import Audit, audit
from telltale.align.judge.countable import countable_ratings
from telltale.align.judge.data import Conversation, Pair, Ratings, read_objectives
from telltale.align.judge.feature_store import FeatureStore
from telltale.align.judge.features import Backbone, extract, pair_conversations, pair_features
from telltale.align.judge.fitting import JudgeFit, fit
from telltale.align.judge.gate_fit import PairFeatures
from telltale.align.judge.head import Head
from telltale.align.judge.importing import Imported, checked_pairs, read_conversations, read_file
from telltale.align.judge.judge import Judge
from telltale.align.judge.model import JudgeModel
from telltale.align.judge.prompt_split import COMPARE
from telltale.errors import ConfigError
from telltale.runs.files import write_json
from telltale.runs.progress import ProgressBar

REPORT_FILE, AUDIT_FILE = "fit.json", "audit.json"
"""In the judge's folder: the fit's report, and the audit on prompts that nothing was fitted on."""
AUDITED_PAIRS = 200
"""Most pairs of these prompts that are audited: each response goes through the backbone again."""


@dataclass(frozen=True)
class JudgeFiles:
    """What a judge is fitted on. ``ratings`` None takes those in the file of preferences, or countable objectives; ``objectives``
    None the file's own scales, or 0 to 1; ``reference`` None the rated responses."""

    ratings: Path | None
    preferences: Path
    objectives: Path | None = None
    reference: Path | None = None

    @cached_property
    def imported(self) -> Imported:
        """The file of preferences."""
        return read_file(self.preferences)

    @cached_property
    def pairs(self) -> list[Pair]:
        """The preferences; raises :class:`~telltale.errors.DataError` for a file without any."""
        return checked_pairs(self.imported, self.preferences)[0]

    @cached_property
    def rated(self) -> Ratings:
        """The rated responses, or both responses of every pair with what can be counted in them."""
        scales = None if self.objectives is None else read_objectives(self.objectives)
        if self.ratings is not None:
            found = read_file(self.ratings)
            if not found.rated:
                raise ConfigError(f"{self.ratings} holds no ratings; expected a file that does, or no --ratings.")
            return found.ratings(scales)
        if self.imported.rated:
            return self.imported.ratings(scales)
        if scales is not None:
            raise ConfigError(
                f"{self.preferences} holds no ratings that the objectives of {self.objectives} could be fitted on; expected "
                f"--ratings, or no --objectives."
            )
        return countable_ratings(self.pairs)

    @property
    def counted(self) -> bool:
        """Whether objectives are counted in the responses of the pairs."""
        return self.ratings is None and not self.imported.rated


def fit_files(
    backbone: Backbone, files: JudgeFiles, features: Path, *, batch_size: int = 16, **options: Any
) -> tuple[Judge, JudgeFit]:
    """Fit a judge on ``files``, with features in the folder ``features``; ``options`` are those of ``fit``.

    ``nuisances`` default to "verbosity" if there is such an objective. Raises :class:`~telltale.errors.ConfigError` for a
    nuisance that is no objective, and what reading, extraction and the fit raise.
    """
    ratings = files.rated
    nuisances = tuple(options.pop("nuisances", None) or [n for n in ("verbosity",) if n in ratings.objectives])
    for name in nuisances:
        if name not in ratings.objectives:
            raise ConfigError(f"nuisance {name!r} is no objective; expected one of {', '.join(ratings.objectives)}.")
    if files.counted:
        options["intercept"] = True  # counts are far from 0, and no file says that they should be fitted without
    stores = compute_features(backbone, files, features, batch_size=batch_size)
    gate = options.get("gate")
    with ProgressBar("gate", gate.steps if gate is not None else 2000) as progress:
        result = fit(
            stores["preferences" if files.counted else "ratings"],
            ratings.labels,  # features are in the order of the conversations
            ratings.objectives,
            preferences=loaded_pairs(stores["preferences"], files),
            reference=stores.get("reference"),
            nuisances=nuisances,
            progress=progress,
            **options,
        )
    report = dataclasses.replace(result.report, notes=(*files.imported.notes, *_cut(stores)))
    result = dataclasses.replace(result, report=report)
    told = report.calibration.to_config()
    return assembled(backbone, result.head, ratings.scales, calibration=told, batch_size=batch_size), result


def loaded_pairs(store: FeatureStore, files: JudgeFiles) -> PairFeatures:
    """The features of the pairs with their votes and lengths."""
    return dataclasses.replace(
        pair_features(store.load()),
        dropped=files.imported.same,
        votes=torch.tensor([pair.votes for pair in files.pairs], dtype=torch.float32),
        lengths=torch.tensor(
            [[len(text.split()) for text in (pair.chosen, pair.rejected)] for pair in files.pairs], dtype=torch.float32
        ),
    )


def compute_features(
    backbone: Backbone, files: JudgeFiles, out: Path, *, batch_size: int = 16
) -> dict[str, FeatureStore]:
    """Features of all ``files`` in folders of ``out``; what is there already is kept. Under torchrun every rank does its share.

    Raises what reading and :func:`~telltale.align.judge.features.extract` raise.
    """
    parts: dict[str, Sequence[Conversation]] = {"preferences": pair_conversations(files.pairs)}
    if not files.counted:
        parts["ratings"] = files.rated.conversations
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


def assembled(
    backbone: Backbone,
    head: Head,
    scales: Any,
    *,
    calibration: dict[str, Any] | None = None,
    batch_size: int = 16,
) -> Judge:
    """The judge of a fitted head on its backbone."""
    model = JudgeModel.assembled(
        backbone.model,
        head,
        scales=scales,
        pooling=backbone.pooling,
        gating=backbone.gating,
        gating_pattern=backbone.gating_pattern,
        context_length=backbone.context_length,
        calibration=calibration,
    )
    return Judge(model, backbone.tokenizer, batch_size=batch_size)


def audit_on_split(
    backbone: Backbone, files: JudgeFiles, features: Path, result: JudgeFit, *, batch_size: int = 16, seed: int = 0
) -> Audit:
    """The audit of the judge that was fitted on the training part, on pairs of the prompts to compare on."""
    groups = FeatureStore.open(features / "preferences").prompt_ids()[0::2]
    unseen = (result.compared.split.part_of(groups) == COMPARE).tolist()
    pairs = [pair for pair, out in zip(files.pairs, unseen, strict=True) if out][:AUDITED_PAIRS]
    judge = assembled(backbone, result.compared.head, files.rated.scales, batch_size=batch_size)
    return audit(judge, preferences=pairs, tokens=judge.count_tokens, seed=seed)


def save_fit(
    judge: Judge, result: JudgeFit, out: Path, *, layout: str = "telltale", audited: Audit | None = None
) -> None:
    """Write the judge, and the report of its fit and its audit into its folder."""
    judge.save(out, layout=layout)
    result.report.save(out / REPORT_FILE)
    if audited is not None:
        write_json(out / AUDIT_FILE, audited.to_dict())


def _cut(stores: dict[str, FeatureStore]) -> list[str]:
    """What was too long for the backbone."""
    found = []
    for name, store in stores.items():
        prompts = responses = 0
        for block in store.blocks():
            prompts += int((block.truncated & ~block.response_truncated).sum())
            responses += int(block.response_truncated.sum())
        if responses:
            found.append(
                f"{responses} of the {store.count} responses of {name} are longer than the context and lost their end, which "
                f"nothing was fitted on."
            )
        if prompts:
            found.append(
                f"{prompts} of the {store.count} prompts of {name} lost their beginning to the context's length."
            )
    return found
