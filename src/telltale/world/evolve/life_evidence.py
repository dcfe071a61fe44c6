"""What a life may make candidates of in one round: evidence of finished rounds, and what this round has added so far.

A process that was killed leaves batches of a round that never ended. The round is repeated, and must not see them before it adds
them itself, or else the repeated round is another one.
"""

from __future__ import annotations

from telltale.world.evolve.evidence import Batch, Evidence
from telltale.world.evolve.life import State
from telltale.world.evolve.version_registry import Version
from telltale.world.transitions import Transitions

MOST_OLDER = 8
"""Batches from before an alarm that are looked at, the newest ones: what a refit remembers and a diagnosis compares with."""


class LifeEvidence:
    """The evidence in ``store`` as one life sees it, round by round."""

    def __init__(self, store: Evidence) -> None:
        self.store = store
        self._of_round: set[str] = set()

    def begin_round(self) -> None:
        """Nothing of the round has been added yet."""
        self._of_round = set()

    def keep(self, data: Transitions, source: str, note: str) -> Batch:
        """Add transitions that candidates may be made of."""
        batch = self.store.add(data, source=source, role="fit", note=note)
        self._of_round.add(batch.key)
        return batch

    def newer(self, state: State) -> Transitions | None:
        """What came after the change; while an offer is tried, what was offered, and nothing of one's own."""
        if state.trying:
            # a process that was killed in this round may have withdrawn them already
            return self.store.transitions([b for b in self.store.batches() if b.key in state.trying and b.count])
        return self.store.transitions(self._own(state, since=state.since))

    def older(self, state: State) -> Transitions | None:
        """What came before it."""
        return self.store.transitions([b for b in self._own(state) if b.number <= state.since][-MOST_OLDER:])

    def behind(self, version: Version) -> list[str]:
        """Keys of the batches that a version was made of, without those from before the change that it answers."""
        used, since = set(version.evidence), version.document["about"].get("since", 0)
        made = [b for b in self.store.batches() if b.role == "fit" and b.number > since]
        return [b.key for b in made if used & {name[:16] for name in self.store.read(b.key).ids()}]

    def _own(self, state: State, since: int = 0) -> list[Batch]:
        own = self.store.chosen("fit", since=since, sources=("stream", "probe"))
        return [b for b in own if b.number <= state.batches or b.key in self._of_round]
