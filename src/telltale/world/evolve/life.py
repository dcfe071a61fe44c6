"""What is written down of a life: one entry per finished round, from which the next process goes on as if nothing had happened.

An entry holds the state after its round, what happened in it, and the episodes played (start, actions, hash of what was observed),
so that a verifier can play them again. A round is a function of the state before it, the seed and the world. What a killed
process left of an unfinished round (evidence, versions, receipts) is found again by its hash when the round is repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from telltale.config import check_integer, check_range
from telltale.errors import CheckpointError, ConfigError
from telltale.runs.files import strict_json
from telltale.world.evolve.chain import ChainedLog, digest
from telltale.world.evolve.evidence import OWN
from telltale.world.evolve.monitor import FEWEST_BLOCKS
from telltale.world.plugs import called
from telltale.world.records import plain_value
from telltale.world.transitions import Transitions, as_state
from telltale.world.worlds.base import Episode, World

PHASES = ("calibrate", "watch", "revise", "shadow", "canary", "waiting")


@dataclass(frozen=True)
class EvolveConfig:
    """Settings of a life. ``episodes`` are played side by side in a round. ``attempts``: revisions after one alarm, each with
    ``probe_steps`` more of probing in episodes of ``probe_length``, before doing nothing is accepted. ``trial_share``: of a
    canary's episodes the candidate plays this share. ``watch_rounds``: for so long a promoted version is compared with its
    parent on the same stream. ``stream_evidence`` False keeps what the active model lives through out of what candidates are
    fitted on.
    """

    episodes: int = 8
    block: int = 10
    calibration_blocks: int = FEWEST_BLOCKS
    threshold: float = 1000.0
    probe_steps: int = 200
    probe_depth: int = 8
    probe_length: int = 25
    attempts: int = 2
    shadow_rounds: int = 1
    canary_rounds: int = 2
    trial_share: float = 0.25
    watch_rounds: int = 6
    cases: int = 12
    mode: str = "project"
    stream_evidence: bool = True

    def __post_init__(self) -> None:
        check_integer("calibration_blocks", self.calibration_blocks, low=FEWEST_BLOCKS)
        check_range("threshold", self.threshold, above=1.0)
        check_range("trial_share", self.trial_share, above=0.0, below=1.0)
        for name in (
            "episodes",
            "block",
            "probe_steps",
            "probe_depth",
            "probe_length",
            "attempts",
            "shadow_rounds",
            "canary_rounds",
        ):
            check_integer(name, getattr(self, name), low=1)
        for name in ("watch_rounds", "cases"):
            check_integer(name, getattr(self, name), low=0)


@dataclass
class State:
    """Where a life stands after a round; JSON values only. ``steps`` and ``episodes``: of the stream. ``active``: the version that
    acts, as far as finished rounds go. ``suspended``: laws that the engine itself breaks now, so that plans are not held to them.
    ``level``: the error of the founding version in its first phase, which a revision has to come back to; ``unfinished``: how
    often one that did not was taken up again. ``compared``: errors of the active version and its parent, newest episodes last.
    ``offered``: batches that wait to be tried; ``trying``: those that candidates are made of now; ``tried_at``: the episodes of
    the stream when the last ones were. ``batches``: of evidence, when the round was done.
    """

    round: int = 0
    phase: str = "calibrate"
    steps: int = 0
    episodes: int = 0
    scale: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    monitor: dict[str, Any] | None = None
    watched: list[list[int]] = field(default_factory=list)
    since: int = 0
    offered: list[str] = field(default_factory=list)
    trying: list[str] = field(default_factory=list)
    tried_at: int = -1
    attempts: int = 0
    trials: int = 0
    active: str = ""
    candidate: str | None = None
    receipt: str | None = None
    done: int = 0
    wins: list[list[bool]] = field(default_factory=lambda: [[], []])
    promoted: int | None = None
    compared: list[list[float]] = field(default_factory=list)
    level: float | None = None
    unfinished: int = 0
    suspended: list[str] = field(default_factory=list)
    probe_steps: int = 0
    gate_steps: int = 0
    batches: int = 0

    def begin_phase(self) -> None:
        """Another model or another world from here on: the monitor is calibrated anew."""
        self.phase, self.scale, self.scores, self.monitor, self.watched = "calibrate", [], [], None, []
        self.candidate, self.receipt, self.attempts, self.done, self.trying = None, None, 0, 0, []
        self.compared = []

    def resume(self) -> None:
        """Go on as before an offer was tried."""
        self.trying, self.phase = [], "watch" if self.monitor is not None else "calibrate"

    def copy(self) -> State:
        """A copy that shares nothing."""
        return State(**asdict(self))


@dataclass(frozen=True)
class Round:
    """One finished round: the ``state`` after it, ``events`` in order, figures for the timeline, and the episodes."""

    number: int
    state: State
    events: list[dict[str, Any]]
    figures: dict[str, Any]
    episodes: list[dict[str, Any]]


class LifeLog:
    """The rounds in ``path``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._log = ChainedLog(self.path)

    def begin(self, about: dict[str, Any]) -> None:
        """Write what the life is of, once. Raises :class:`~telltale.errors.CheckpointError` if another life is there."""
        entries = self._log.entries()
        try:
            about = json.loads(json.dumps(strict_json(about)))  # as it is read back: JSON has no tuples
        except TypeError as error:
            raise ConfigError(f"a setting of the life cannot be written down as JSON: {error}.") from error
        if not entries:
            self._log.append("begin", about, expected=0)
        elif entries[0]["body"] != about:
            differing = "; ".join(_differing(entries[0]["body"], about))
            raise CheckpointError(f"{self.path.parent} holds another life ({differing}); give a folder of its own.")

    def about(self) -> dict[str, Any]:
        """What :meth:`begin` wrote."""
        entries = self._log.entries()
        if not entries:
            raise CheckpointError(f"{self.path} holds no life.")
        return dict(entries[0]["body"])

    def rounds(self) -> list[Round]:
        """All finished rounds."""
        found = []
        for number, entry in enumerate(self._log.entries()[1:], start=1):
            body = entry["body"]
            found.append(Round(number, self._state(body), body["events"], body["figures"], body["episodes"]))
        return found

    def _state(self, body: dict[str, Any]) -> State:
        try:
            return State(**body["state"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} was written by another telltale: {error}.") from error

    def state(self) -> State:
        """The state to go on from."""
        entries = self._log.entries()
        return self._state(entries[-1]["body"]) if len(entries) > 1 else State()

    def commit(self, done: Round) -> None:
        """Write a finished round: from here on it has happened."""
        body = {"state": asdict(done.state), "events": done.events, "figures": done.figures, "episodes": done.episodes}
        self._log.append("round", body, expected=done.number)

    def findings(self) -> list[tuple[str, str]]:
        """(file, problem) of what is damaged."""
        return self._log.findings()

    def head(self) -> str:
        """Hash of the last entry: two lives with one head are one life."""
        self._log.entries()
        return self._log.head()

    def cases(self) -> list[Episode]:
        """The regression suite: cases of all promotions, oldest first."""
        return [
            Episode(
                case["seed"], [as_state(o) for o in case["observations"]], [as_state(a) for a in case["actions"]],
                case["rewards"], [{} for _ in case["actions"]], source="regression",
            )
            for done in self.rounds() for event in done.events for case in event.get("cases", [])
        ]  # fmt: skip


def _differing(kept: dict[str, Any], given: dict[str, Any], of: str = "") -> list[str]:
    """What differs between the settings of a life and those given now, by name."""
    found = []
    for key in sorted({*kept, *given}):
        one, two = kept.get(key), given.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _differing(one, two, f"{of}{key}.")
        elif one != two:
            found.append(f"{of}{key} was {one}, now {two}")
    return found


def kept_case(episode: Episode) -> dict[str, Any]:
    """A regression case as JSON values that read back exactly."""
    return {
        "seed": episode.seed, "observations": plain_value(episode.observations), "actions": plain_value(episode.actions),
        "rewards": [float(r) for r in episode.rewards],
    }  # fmt: skip


def kept_episode(episode: Episode, success: bool, by: str) -> dict[str, Any]:
    """Start, actions and hash of what an episode observed; ``by`` names the version that acted."""
    return {
        "seed": episode.seed, "actions": plain_value(episode.actions), "observed": digest(plain_value(episode.observations)),
        "success": bool(success), "by": by, "return": float(episode.total),
    }  # fmt: skip


Feed = Callable[[World, int], "tuple[str, Transitions] | None"]
"""``feed(world, round) -> (source, transitions)``, or None: evidence that others offer."""


def offer_of(feed: Feed, world: World, number: int) -> tuple[str, Transitions | None, str] | None:
    """(source, transitions, why they are not taken) of what a feed offers in a round; None where it offers nothing."""
    found: Any = called("the feed", feed, world, number)
    if found is None:
        return None
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Transitions)):
        raise ConfigError(f"the feed returned {type(found).__name__}; expected None, or (source, transitions).")
    source, data = str(found[0]), found[1]
    if source.strip().casefold() in OWN:
        return source, None, f"{source!r} is the name of what the life collects itself"
    if data.world != world.id or data.plain != world.plain:
        return source, None, f"they are of {data.world}"
    if not len(data) or (not data.plain and data.actions.shape[1:] != world.batch_actions([_some(world)]).shape[1:]):
        return source, None, "they hold no action of this world"
    return source, data, ""


def _some(world: World) -> Any:
    return world.sample_action(torch.Generator().manual_seed(0))


def contiguous(rounds: Sequence[Round]) -> bool:
    """Whether every round follows from the one before: nothing lost and nothing doubled."""
    steps, episodes = 0, 0
    for number, done in enumerate(rounds, start=1):
        played = sum(len(e["actions"]) for e in done.episodes)
        steps, episodes = steps + played, episodes + len(done.episodes)
        if (done.state.round, done.state.steps, done.state.episodes) != (number, steps, episodes):
            return False
    return True
