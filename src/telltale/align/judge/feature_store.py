"""Features on disk: shards of a fixed number of rows, each whole or absent, whose bytes depend on their rows alone.

An extraction that was killed resumes, and leaves the same bytes as one that was not: finished rows of an unfinished shard are kept
in part files, which are removed once the shard is written. Under torchrun each process writes its own shards.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.runs.files import write_atomically, write_json

SETTINGS_FILE = "features.json"
PROMPT_IDS = "normalised"
"""How :func:`prompt_id` reads a prompt; a store with other ids cannot be split together with these."""
TENSORS = ("responses", "prompts", "groups", "truncated", "response_truncated")
LAYOUT_SETTINGS = ("batch_size", "shard_rows")
"""Settings that decide the last bits and the files, not what the features are: ignored once all rows are there."""


@dataclass(frozen=True)
class Features:
    """n responses with the states of their prompts."""

    responses: Tensor
    """(n, d)."""
    prompts: Tensor
    """(n, prompt size)."""
    groups: Tensor
    """(n,) int64: responses to one prompt have one id, also across files."""
    rows: list[str]
    """Ids, for messages."""
    truncated: Tensor
    """(n,) bool: prompt and response were too long together, and the prompt lost its beginning."""
    response_truncated: Tensor
    """(n,) bool: the response alone was too long and lost its end."""

    def __post_init__(self) -> None:
        sides = (self.responses, self.prompts, self.groups, self.rows, self.truncated, self.response_truncated)
        lengths = {len(side) for side in sides}
        if len(lengths) != 1:
            raise DataError(f"features of {sorted(lengths)} rows do not fit together; expected one number of rows.")
        for name in ("responses", "prompts"):
            bad = (~torch.isfinite(getattr(self, name))).reshape(len(self.rows), -1).any(1).nonzero()[:, 0]
            if len(bad):
                raise DataError(
                    f"{self.rows[int(bad[0])]} has a feature that is NaN or infinite in {name}; expected finite features."
                )

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, responses: Tensor, prompts: Tensor, groups: Tensor, rows: Sequence[str] | None = None) -> Features:
        """From plain tensors; ``rows`` None numbers them."""
        ids = [f"row {index}" for index in range(len(responses))] if rows is None else list(rows)
        whole = torch.zeros(len(ids), dtype=torch.bool)
        return cls(responses, prompts, groups.long(), ids, whole, whole.clone())


class FeatureStore:
    """A folder of features: ``features.json`` and ``shard-00000.safetensors``, ``shard-00001...``"""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.count = int(settings["rows"])
        self.shard_rows = int(settings["shard_rows"])

    @classmethod
    def create(cls, path: str | Path, settings: dict[str, Any]) -> FeatureStore:
        """Start a store, or continue one of the same ``settings`` (they hold at least ``rows`` and ``shard_rows``).

        A complete store is accepted whatever its batches and shards were.
        Raises :class:`~telltale.errors.ConfigError` naming the first setting in which a store that is there differs.
        """
        folder = Path(path)
        if (folder / SETTINGS_FILE).is_file():
            store = cls.open(folder)
            whole = not store.missing()
            for name in sorted(set(settings) | set(store.settings)):
                if settings.get(name) != store.settings.get(name) and not (whole and name in LAYOUT_SETTINGS):
                    raise ConfigError(
                        f"{folder} holds features with {_difference(name, store.settings.get(name), settings.get(name))}; "
                        f"give another folder, or remove this one."
                    )
            return store
        write_json(folder / SETTINGS_FILE, dict(sorted(settings.items())))
        return cls(folder, settings)

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open a store; raises :class:`~telltale.errors.CheckpointError` if ``path`` holds none."""
        folder = Path(path)
        try:
            return cls(folder, json.loads((folder / SETTINGS_FILE).read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} holds no features: {error}") from error

    @property
    def shards(self) -> int:
        """How many there are when all are written."""
        return -(-self.count // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of ``shard``."""
        return range(shard * self.shard_rows, min(self.count, (shard + 1) * self.shard_rows))

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.shards) if not self._file(shard).is_file()]

    def write(self, shard: int, features: Features) -> None:
        """Write one shard, whole or not at all."""
        if len(features) != len(self.rows_of(shard)):
            raise DataError(f"shard {shard} has {len(self.rows_of(shard))} rows; {len(features)} were given.")
        tensors = {
            "responses": features.responses.contiguous(),
            "prompts": features.prompts.contiguous(),
            "groups": features.groups,
            "truncated": features.truncated,
            "response_truncated": features.response_truncated,
        }
        write_atomically(self._file(shard), save(tensors, metadata={"rows": json.dumps(features.rows)}))
        self.clear(shard)

    def write_part(self, shard: int, places: Sequence[int], responses: Tensor, prompts: Tensor) -> None:
        """Keep some rows of a shard that is not whole yet, by their ``places`` in it."""
        number = len(self._parts(shard))
        tensors = {"places": torch.tensor(list(places)), "responses": responses, "prompts": prompts}
        write_atomically(self.path / f"part-{shard:05d}-{number:05d}.safetensors", save(tensors))

    def parts(self, shard: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Response and prompt, (d,) each, by place, of the rows of a shard that parts hold.

        Raises :class:`~telltale.errors.CheckpointError` for a part that cannot be read.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for path in self._parts(shard):
            try:
                with safe_open(path, framework="pt") as file:
                    places, responses, prompts = (file.get_tensor(name) for name in ("places", "responses", "prompts"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}. Remove it and run again.") from error
            found |= {int(place): (a, b) for place, a, b in zip(places, responses, prompts, strict=True)}
        return found

    def clear(self, shard: int) -> None:
        """Remove the part files of a shard that is written."""
        for path in self._parts(shard):
            path.unlink(missing_ok=True)

    def blocks(self) -> Iterator[Features]:
        """Shard by shard, in the order of rows. Raises :class:`~telltale.errors.CheckpointError` for one that is missing."""
        for shard in range(self.shards):
            with self._opened(shard) as file:
                rows = json.loads((file.metadata() or {})["rows"])
                parts = {name: file.get_tensor(name) for name in TENSORS}
            yield Features(rows=rows, **parts)

    def prompt_ids(self) -> Tensor:
        """Prompt ids of all rows, (n,), without the features. Raises what :meth:`blocks` raises."""
        found = []
        for shard in range(self.shards):
            with self._opened(shard) as file:
                found.append(file.get_tensor("groups"))
        return torch.cat(found)

    def load(self) -> Features:
        """All rows in memory."""
        blocks = list(self.blocks())
        return Features(
            responses=torch.cat([block.responses for block in blocks]),
            prompts=torch.cat([block.prompts for block in blocks]),
            groups=torch.cat([block.groups for block in blocks]),
            rows=[row for block in blocks for row in block.rows],
            truncated=torch.cat([block.truncated for block in blocks]),
            response_truncated=torch.cat([block.response_truncated for block in blocks]),
        )

    @contextmanager
    def _opened(self, shard: int) -> Iterator[Any]:
        try:
            with safe_open(self._file(shard), framework="pt") as file:
                yield file
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self._file(shard)} cannot be read: {error}. Run the extraction again; it resumes."
            ) from error

    def _parts(self, shard: int) -> list[Path]:
        return sorted(self.path.glob(f"part-{shard:05d}-*.safetensors"))

    def _file(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.safetensors"


def _difference(name: str, old: Any, new: Any) -> str:
    """The difference of a setting in words; digests are not shown."""
    digests = {"conversations": "other texts", "backbone": "another backbone", "tokenizer": "another tokenizer"}
    return digests.get(name, f"{name}={old!r}, not {new!r}")


def group_id(prompt: str) -> int:
    """The id of a prompt's text: the same in every file and process, in [0, 2^62)."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 2


def prompt_id(messages: Sequence[Mapping[str, str]]) -> int:
    """The :func:`group_id` of a prompt's messages, by which it is split.

    Unicode's normal form, letters' case and white space do not count: copies of a prompt in other files differ in them, and in
    two parts of a split they would leak.
    """
    turns = [
        [one["role"], " ".join(unicodedata.normalize("NFKC", one["content"]).casefold().split())] for one in messages
    ]
    return group_id(json.dumps(turns))
