"""The best response in the model: against an opponent as modelled, the policy of highest expected value, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from telltale.world.planners.sampling import check_horizon


@dataclass(frozen=True)
class BestResponse:
    """Walk the whole game tree against ``model.policy(information_state, legal_actions)``; for games of a few thousand nodes."""

    horizon: int | None = None
    name: ClassVar[str] = "best_response"
    kinds: ClassVar[tuple[str, ...]] = ("policy",)

    def __post_init__(self) -> None:
        check_horizon(self.horizon)

    def policy(self, model: Any, world: Any) -> Any:
        """A policy object: ``action(information_state) -> action`` and ``value``, the value that the model promises."""
        return world.best_response(model)
