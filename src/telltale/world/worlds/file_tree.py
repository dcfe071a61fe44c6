"""A digital world: a file tree on disk, in a temporary folder. The operating system is the engine, errno the receipt."""

from __future__ import annotations

import errno
import os
import platform
import random
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.world.laws import contracts
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, World

FOLDERS = ("inbox", "archive")
FILES = ("report", "notes")
PLACES = (".", *FOLDERS)
ABSENT = len(PLACES)
FIELDS = (*(f"{name}/ exists" for name in FOLDERS), *(f"{name} is in" for name in FILES))
RANGES = ((0, 1), (0, 1), (0, ABSENT), (0, ABSENT))
"""A file's field is the number of its place in ``PLACES``, or ``ABSENT``."""


def _actions() -> list[tuple[str, ...]]:
    moves = [("move", name, place) for name in FILES for place in PLACES]
    return [*(("mkdir", n) for n in FOLDERS), *(("rmdir", n) for n in FOLDERS), *(("create", n) for n in FILES), *moves]


ACTIONS = _actions()


class Disk:
    """The tree under one temporary folder, removed on close."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="telltale-files-"))
        self._removed = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def act(self, action: int) -> str | None:
        """Do one thing; None, or the system's error."""
        verb, name, *rest = ACTIONS[action]
        try:
            if verb == "mkdir":
                (self.root / name).mkdir()
            elif verb == "rmdir":
                (self.root / name).rmdir()
            elif verb == "create":
                if self._find(name) is not None:  # one file of a name in the whole tree, so that a state says all
                    raise FileExistsError(errno.EEXIST, "File exists")
                with open(self.root / name, "x"):
                    pass
            else:
                source = self._find(name)
                if source is None:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory")
                target = self.root / rest[0] / name
                if target.exists():
                    raise FileExistsError(errno.EEXIST, "File exists")
                source.rename(target)
        except OSError as error:
            return f"{errno.errorcode.get(error.errno or 0, 'EUNKNOWN')}: {verb} {name}"
        return None

    def read(self) -> tuple[int, ...]:
        """The state, from the disk."""
        folders = [int((self.root / name).is_dir()) for name in FOLDERS]
        return (*folders, *(self._place(name) for name in FILES))

    def set(self, state: tuple[int, ...]) -> None:
        """Make the disk hold ``state``; a file whose folder does not exist cannot be made and is left out."""
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name, there in zip(FOLDERS, state, strict=False):
            if there == 1:
                (self.root / name).mkdir()
        for name, place in zip(FILES, state[len(FOLDERS) :], strict=True):
            if 0 <= place < ABSENT and (self.root / PLACES[place]).is_dir():
                (self.root / PLACES[place] / name).touch()

    def _find(self, name: str) -> Path | None:
        return next((self.root / place / name for place in PLACES if (self.root / place / name).is_file()), None)

    def _place(self, name: str) -> int:
        return next((i for i, place in enumerate(PLACES) if (self.root / place / name).is_file()), ABSENT)

    def close(self) -> None:
        """Remove the folder; what nobody closes is removed with the object, or when Python ends."""
        self._removed()


class FileTree(World):
    """Put the report into archive/ and the notes into inbox/. Starts are trees drawn at random."""

    id = "digital/files"
    regime = "digital"
    plain = True
    columns = FIELDS
    ranges = RANGES
    action_names = tuple(" ".join(action) for action in ACTIONS)
    max_steps = 16
    planner = "breadth_first"
    horizon = 8

    def __init__(self) -> None:
        from gymnasium import spaces

        self.action_space = spaces.Discrete(len(ACTIONS))
        self.disk = Disk()
        self._steps = 0
        self.laws = (
            contracts.schema(RANGES),
            contracts.invariant(_parents_exist, name="a file's folder exists"),
            contracts.idempotence((0, 1), self._disk_step, name="mkdir twice is mkdir once"),
        )

    def _disk_step(self, state: Any, action: Any) -> Any:
        self._scratch = getattr(self, "_scratch", None) or Disk()
        self._scratch.set(tuple(state))
        self._scratch.act(int(action))
        return self._scratch.read()

    def reset(self, seed: int) -> Any:
        """Draw folders and the files' places."""
        rng = random.Random(seed)
        folders = [rng.randint(0, 1) for _ in FOLDERS]
        open_places = [0, *(i + 1 for i, there in enumerate(folders) if there), ABSENT]
        self.disk.set((*folders, *(rng.choice(open_places) for _ in FILES)))
        self._steps = 0
        return self.disk.read()

    def step(self, action: Any) -> Outcome:
        """Do it; the receipt is errno's name, or empty."""
        refused = self.disk.act(self.checked_action(action))
        state = self.disk.read()
        self._steps += 1
        won = self.goal(state)
        return Outcome(
            state, float(won), won, self._steps >= self.max_steps, {} if refused is None else {"error": refused}
        )

    def goal(self, state: Any) -> bool:
        """Report in archive/, notes in inbox/."""
        return tuple(state[2:]) == (2, 1)

    def success(self, episode: Episode) -> bool:
        """The last state is the goal."""
        return self.goal(episode.observations[-1])

    def spawn(self) -> World:
        """A folder of its own."""
        return FileTree()

    def oracle(self) -> Any:
        """A second folder on the same disk."""
        return DiskModel()

    def embed(self, belief: Any) -> Tensor:
        """One-hot places, so that every wrong place is equally wrong."""
        parts = [torch.nn.functional.one_hot(torch.tensor(v), h + 1) for v, (_, h) in zip(belief, RANGES, strict=True)]
        return torch.cat(parts).float()

    def versions(self) -> dict[str, str]:
        """The operating system."""
        return {"system": f"{platform.system()} {os.name}"}

    def close(self) -> None:
        """Remove the folders."""
        self.disk.close()
        if getattr(self, "_scratch", None) is not None:
            self._scratch.close()


class DiskModel:
    """A real folder as a model."""

    stochastic = False

    def __init__(self) -> None:
        self.disk = Disk()

    def step(self, belief: Any, action: Any) -> Transition:
        """One action from one state."""
        self.disk.set(tuple(belief))
        self.disk.act(int(action))
        return Transition(self.disk.read())


def _parents_exist(state: Any) -> bool:
    return all(
        place in (0, ABSENT) or (1 <= place < ABSENT and state[place - 1] == 1) for place in state[len(FOLDERS) :]
    )
