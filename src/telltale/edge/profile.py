"""What an edge was set up with: the choice of an audit, the weights of a sweep, codec and gate, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telltale.edge.arbitration import Arbiter
from telltale.edge.client import Policy
from telltale.edge.evaluation import Choice
from telltale.edge.gate import Gate
from telltale.errors import DataError
from telltale.runs.files import write_atomically


@dataclass(frozen=True)
class Profile:
    """choice: selector, importance, space. weights: the server's weight in the fused answer, by what ``weigh`` says."""

    choice: Choice = field(default_factory=lambda: Choice("facility"))
    weights: dict[int, float] = field(default_factory=dict)
    codec: str = "mosaic_webp"
    gate: Gate = field(default_factory=Gate)
    weigh: str = "patches"

    def policy(self, *, deadline: float, arbitration: str = "fused") -> Policy:
        """The client's policy."""
        return Policy(
            selector=self.choice.selector,
            options=dict(self.choice.options),
            codec=self.codec,
            deadline=deadline,
            gate=self.gate,
            arbiter=Arbiter(arbitration, self.weights),
            weigh=self.weigh,
        )

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all."""
        choice = self.choice
        document = {
            "selector": choice.selector,
            "importance": choice.importance,
            "space": choice.space,
            "options": dict(choice.options),
            "codec": self.codec,
            "gate": {"kind": self.gate.kind, "threshold": self.gate.threshold},
            "weigh": self.weigh,
            "weights": {str(budget): weight for budget, weight in self.weights.items()},
        }
        write_atomically(path, json.dumps(document, indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read one. Raises :class:`~telltale.errors.DataError` for a file that is none."""
        try:
            said: dict[str, Any] = json.loads(Path(path).read_text())
            choice = Choice(said["selector"], said["importance"], said["space"], tuple(said["options"].items()))
            weights = {int(budget): float(weight) for budget, weight in said["weights"].items()}
            return cls(choice, weights, said["codec"], Gate(**said["gate"]), said.get("weigh", "patches"))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no profile of an edge ({error}); make one with telltale edge sweep.") from error
