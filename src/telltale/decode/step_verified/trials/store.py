"""Finished trials in a folder, a file for each policy, named by all that its trials depend on: nothing stale is ever reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from telltale.decode.decoders import StepVerified
from telltale.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from telltale.runs.records import Records


class TrialStore:
    """Trials kept in ``folder``. One process at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._models: dict[int, tuple[Any, str]] = {}
        """Models by identity, held so that an identity is not given again."""

    @staticmethod
    def key(prompt: Sequence[int], again: int) -> str:
        """The name of one problem among the trials of a policy: its prompt, and how many equal ones came before."""
        return hashlib.blake2b(f"{again} {list(prompt)}".encode(), digest_size=12).hexdigest()

    def opened(self, guard: StepVerified, sampling: Any, seed: int, name: str) -> KeptTrials:
        """The trials of ``guard`` under these settings; ``name`` stands for the labeler and the verifier."""
        known = {
            "target": self._fingerprint(guard.target.model),
            "draft": None if guard.draft is None else self._fingerprint(guard.draft.model),
            "tokenizer": tokenizer_fingerprint(guard.tokenizer),
            "config": asdict(guard.config),
            "encoder": described(guard.encoder),
            "sampling": asdict(sampling),
            "seed": seed,
            "name": name,
        }
        if guard.verifier is not None:
            known["verifier"] = described(guard.verifier)
        text = json.dumps(known, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return KeptTrials(Records(self.folder / f"{digest}.jsonl"), known)

    def _fingerprint(self, model: Any) -> str:
        if id(model) not in self._models:
            self._models[id(model)] = (model, model_fingerprint(model))
        return self._models[id(model)][1]


def described(one: Any) -> str:
    """The kind of a labeler, a verifier or an encoder, and its ``settings`` (a text) if it has some."""
    kind, settings = getattr(one, "__qualname__", type(one).__name__), getattr(one, "settings", "")
    return f"{kind} {settings}" if settings else kind


class KeptTrials:
    """One file: a header, then a record for each batch with its trials and what they cost."""

    def __init__(self, records: Records, header: dict[str, Any]) -> None:
        self.records = records
        self._header = header
        self._batches = [record for record in records if "trials" in record]

    def trials(self) -> dict[str, dict[str, Any]]:
        """Every kept trial by its problem's key."""
        return {key: trial for batch in self._batches for key, trial in batch["trials"].items()}

    def cost(self, keys: set[str]) -> dict[str, float]:
        """What the batches cost that ``keys`` were in."""
        total: dict[str, float] = {}
        for batch in self._batches:
            share = len(keys & batch["trials"].keys()) / len(batch["trials"])
            for name, value in batch["cost"].items():
                total[name] = total.get(name, 0.0) + share * value
        return total

    def append(self, trials: dict[str, dict[str, Any]], cost: dict[str, float]) -> None:
        """Keep one batch."""
        header = [] if self.records.path.exists() else [self._header]
        self.records.append([*header, {"trials": trials, "cost": cost}])
