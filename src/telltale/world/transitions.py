"""Transitions: what a model is fitted on. Built from episodes, saved as safetensors (numbers) and JSON (the rest)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from telltale.config import check_range
from telltale.errors import CheckpointError, DataError
from telltale.runs.files import atomic_directory
from telltale.world.protocol import check_finite
from telltale.world.worlds.base import Episode, World


@dataclass(frozen=True)
class Transitions:
    """N transitions of one world. ``before`` and ``after`` (N, D) float32, or lists of plain states; ``actions`` (N, A), or
    (N,) int64; ``rewards`` (N,); ``terminated`` (N,) bool: true ends, not time limits; ``episodes`` (N,) the episode of each.
    """

    world: str
    before: Any
    actions: Tensor
    rewards: Tensor
    after: Any
    terminated: Tensor
    episodes: Tensor
    receipts: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for name in ("rewards", "after", "terminated", "episodes", "before"):
            if len(getattr(self, name)) != len(self.actions):
                raise DataError(
                    f"{name} has {len(getattr(self, name))} rows for {len(self.actions)} actions; expected as many of each."
                )
        if self.plain or not len(self):
            return
        if self.before.ndim != 2 or self.after.shape != self.before.shape:
            raise DataError(
                f"before {tuple(self.before.shape)} and after {tuple(self.after.shape)} are no rows of one width; expected (N, D) "
                f"of both."
            )
        for name in ("before", "actions", "rewards", "after"):
            check_finite(getattr(self, name), name)

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def plain(self) -> bool:
        """Whether the states are Python values."""
        return not isinstance(self.before, Tensor)

    @classmethod
    def from_episodes(cls, world: World, episodes: Sequence[Episode]) -> Transitions:
        """All steps of the episodes, in order. Raises :class:`~telltale.errors.DataError` if there is no step."""
        steps = [(e, t) for e in range(len(episodes)) for t in range(len(episodes[e]))]
        if not steps:
            raise DataError("the episodes hold no step; collect at least one transition.")
        before = [world.belief(episodes[e].observations[t]) for e, t in steps]
        after = [world.belief(episodes[e].observations[t + 1]) for e, t in steps]
        return cls(
            world.id,
            before if world.plain else torch.stack(before),
            world.batch_actions([episodes[e].actions[t] for e, t in steps]),
            torch.tensor([episodes[e].rewards[t] for e, t in steps], dtype=torch.float32),
            after if world.plain else torch.stack(after),
            torch.tensor([episodes[e].terminated and t == len(episodes[e]) - 1 for e, t in steps]),
            torch.tensor([e for e, _ in steps]),
            [episodes[e].receipts[t] for e, t in steps],
        )

    @classmethod
    def from_arrays(
        cls, world: str, *, before: Any, actions: Any, after: Any, rewards: Any = None, terminated: Any = None,
        episodes: Any = None,
    ) -> Transitions:  # fmt: skip
        """From arrays of one's own: ``before`` and ``after`` (N, D), ``actions`` (N, A), or (N,) integers, ``rewards`` (N,)
        (None: 0), ``terminated`` (N,) (None: never), ``episodes`` (N,) (None: a new one where a state is not the one that came
        before it).

        Raises :class:`~telltale.errors.DataError` for arrays that are no numbers, or do not fit together.
        """
        found = {"before": before, "after": after, "actions": actions}
        arrays = {}
        for name, value in found.items():
            array = np.asarray(value)
            if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
                raise DataError(f"{name} holds {array.dtype}; expected numbers.")
            arrays[name] = array.reshape(len(array), -1) if name != "actions" or array.ndim > 2 else array
        counted = arrays["actions"].ndim == 1 and np.issubdtype(arrays["actions"].dtype, np.integer)
        acts = torch.as_tensor(arrays["actions"]).to(torch.int64 if counted else torch.float32)
        count = len(acts)
        if episodes is None:
            joins = arrays["before"].shape == arrays["after"].shape and len(arrays["before"]) == count
            breaks = (arrays["before"][1:] != arrays["after"][:-1]).any(-1) if joins else np.zeros(count - 1, bool)
            episodes = np.concatenate([[0], np.cumsum(breaks)]) if count else np.zeros(0)
        return cls(
            world,
            torch.as_tensor(arrays["before"], dtype=torch.float32),
            acts if counted or acts.ndim == 2 else acts.unsqueeze(-1),
            torch.zeros(count)
            if rewards is None
            else torch.as_tensor(np.asarray(rewards, dtype=np.float32)).reshape(-1),
            torch.as_tensor(arrays["after"], dtype=torch.float32),
            torch.zeros(count, dtype=torch.bool)
            if terminated is None
            else torch.as_tensor(np.asarray(terminated, dtype=bool)),
            torch.as_tensor(np.asarray(episodes).astype(np.int64)),
        )

    def select(self, index: Tensor) -> Transitions:
        """The transitions at ``index``."""
        chosen = [int(i) for i in index]

        def taken(states: Any) -> Any:
            return [states[i] for i in chosen] if self.plain else states[index]

        return Transitions(
            self.world,
            taken(self.before),
            self.actions[index],
            self.rewards[index],
            taken(self.after),
            self.terminated[index],
            self.episodes[index],
            [self.receipts[i] for i in chosen] if self.receipts else [],
        )

    def ids(self) -> list[str]:
        """One id per transition: a hash of the world, what was before, done, and after. Equal evidence has equal ids."""
        return [
            hashlib.sha256(
                repr((self.world, *(_listed(side[i]) for side in (self.before, self.actions, self.after)))).encode()
            ).hexdigest()
            for i in range(len(self))
        ]

    def split(self, share: float, *, seed: int = 0) -> tuple[Transitions, Transitions]:
        """Two sets without a common id: about ``share`` of the episodes' transitions, and the rest. Decided by hash.

        Whole episodes stay together, and so do equal transitions. Raises :class:`~telltale.errors.ConfigError` unless
        0 < share < 1.
        """
        check_range("share", share, low=1e-9, below=1.0)
        chosen = {
            episode: int(hashlib.sha256(f"{seed}|{episode}".encode()).hexdigest()[:8], 16) / 16**8 < share
            for episode in set(self.episodes.tolist())
        }
        side: dict[str, bool] = {}
        first = torch.tensor(
            [
                side.setdefault(name, chosen[episode])
                for name, episode in zip(self.ids(), self.episodes.tolist(), strict=True)
            ]
        )
        return self.select(first.nonzero().flatten()), self.select((~first).nonzero().flatten())

    def joined(self, other: Transitions) -> Transitions:
        """Both, the other's episodes numbered on. Raises :class:`~telltale.errors.DataError` for another world."""
        if other.world != self.world:
            raise DataError(f"transitions of {self.world} and {other.world} cannot be joined; use one world.")
        shift = int(self.episodes.max()) + 1 if len(self) else 0
        return Transitions(
            self.world,
            self.before + other.before if self.plain else torch.cat([self.before, other.before]),
            torch.cat([self.actions, other.actions]),
            torch.cat([self.rewards, other.rewards]),
            self.after + other.after if self.plain else torch.cat([self.after, other.after]),
            torch.cat([self.terminated, other.terminated]),
            torch.cat([self.episodes, other.episodes + shift]),
            self.receipts + other.receipts,
        )

    def save(self, path: str | Path) -> None:
        """Write a folder: ``transitions.safetensors`` and ``transitions.json``, whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in ("actions", "rewards", "terminated", "episodes")}
        document: dict[str, Any] = {"world": self.world, "receipts": self.receipts}
        if self.plain:
            document.update(before=self.before, after=self.after)
        else:
            tensors.update(before=self.before.contiguous(), after=self.after.contiguous())
        with atomic_directory(path) as folder:
            save_file(tensors, folder / "transitions.safetensors")
            (folder / "transitions.json").write_text(json.dumps(document))

    @classmethod
    def load(cls, path: str | Path, *, world: str | None = None) -> Transitions:
        """Read what :meth:`save` wrote, or an ``.npz`` file with the arrays of :meth:`from_arrays`, which are of ``world``.

        Raises :class:`~telltale.errors.CheckpointError` if it is not whole, and :class:`~telltale.errors.DataError` for arrays that
        are missing or do not fit together.
        """
        folder = Path(path)
        if folder.suffix == ".npz":
            return _from_npz(folder, world)
        try:
            tensors = load_file(folder / "transitions.safetensors")
            document = json.loads((folder / "transitions.json").read_text())
            states = {
                name: tensors[name] if name in tensors else [as_state(value) for value in document[name]]
                for name in ("before", "after")
            }
            return cls(
                document["world"], states["before"], tensors["actions"], tensors["rewards"], states["after"],
                tensors["terminated"], tensors["episodes"], document["receipts"],
            )  # fmt: skip
        except Exception as error:
            if isinstance(error, DataError):
                raise
            raise CheckpointError(
                f"{folder} holds no whole transitions ({type(error).__name__}: {error}). Collect them again, or give an .npz file."
            ) from error


_ARRAYS = ("before", "actions", "after", "rewards", "terminated", "episodes")


def _from_npz(path: Path, world: str | None) -> Transitions:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as arrays: {type(error).__name__}: {error}.") from error
    missing = [name for name in _ARRAYS[:3] if name not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; expected the arrays {', '.join(_ARRAYS)}, of which the last three may be left "
            f"out. It holds {', '.join(sorted(arrays)) or 'nothing'}."
        )
    if world is None:
        raise DataError(f"{path} does not say of which world it is; pass world=.")
    return Transitions.from_arrays(world, **{name: arrays[name] for name in _ARRAYS if name in arrays})


def check_disjoint(fitted_on: Transitions, held_out: Transitions) -> None:
    """Raise :class:`~telltale.errors.DataError` naming the first id that is in both sets."""
    known = set(fitted_on.ids())
    for number, name in enumerate(held_out.ids()):
        if name in known:
            raise DataError(
                f"transition {number} of the held-out set (id {name[:12]}) was fitted on; use evidence that was not."
            )


def _listed(value: Any) -> Any:
    """Numbers as an id takes them: in single precision, and with one zero."""
    if not isinstance(value, Tensor):
        return value
    return (value.float() + 0.0 if value.is_floating_point() else value).tolist()


def as_state(value: Any) -> Any:
    """JSON has no tuples: a list becomes one, and so do the lists in it."""
    return tuple(as_state(item) for item in value) if isinstance(value, list) else value
