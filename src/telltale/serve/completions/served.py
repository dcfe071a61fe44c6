"""The one model that a server answers with: its name, its decoder, and what a client may know of both."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from telltale.decode.sampling import Sampling
from telltale.decode.step_verified.config import StepVerifiedConfig
from telltale.decode.step_verified.decoder import StepVerified
from telltale.errors import ConfigError

if TYPE_CHECKING:
    from telltale.decode.calibration.calibration import Calibration

DECODES = ("autoregressive", "self-speculative", "step-verified")


@dataclass(frozen=True)
class Served:
    """``decode``: one of :data:`DECODES`. ``about``: what was chosen at the start and why, plain JSON, shown by ``/v1/models``."""

    name: str
    decoder: StepVerified
    decode: str
    about: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    calibration: Calibration | None = None
    """What the decoder's configuration was calibrated for, if it was."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ConfigError(f"name={self.name!r}; expected a name that clients can ask for.")

    @property
    def context(self) -> int:
        """Positions of the shorter model: prompt and answer together."""
        return min(decoder.max_positions for decoder in self._decoders)

    @property
    def tokens(self) -> int:
        """Token ids below this can stand in a prompt: both models embed them."""
        sizes = [int(decoder.parts.embedding.weight.shape[0]) for decoder in self._decoders]
        return min([self.decoder.vocabulary, *sizes])

    @property
    def eos(self) -> list[int]:
        """Tokens that end an answer: the generation configuration's, or the tokenizer's if it names none."""
        defaults = getattr(self.decoder.target.model, "generation_config", None)
        found = getattr(defaults, "eos_token_id", None)
        if found is None:
            found = getattr(self.decoder.tokenizer, "eos_token_id", None)
        if found is None:
            return []
        return [int(token) for token in found] if isinstance(found, (list, tuple)) else [int(found)]

    def covered(self, config: StepVerifiedConfig, sampling: Sampling) -> bool:
        """Whether the calibration's promise holds for an answer: its configuration and its sampling, nothing overridden."""
        if self.calibration is None:
            return False
        asked = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        told = self.calibration.sampling
        # A top_p of 1 cuts nothing off, and is how clients leave it out.
        same = all(told.get(name) == value or {told.get(name), value} == {None, 1.0} for name, value in asked.items())
        return same and config == self.calibration.config

    @property
    def fingerprint(self) -> str:
        """Changes when the configuration that answers does; the same seed means the same answer as long as it stays."""
        target = self.decoder.target
        parts = [self.name, self.decode, self.decoder.config, target.backend, target.dtype, target.device]
        return "fp_" + hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()

    def entry(self) -> dict[str, Any]:
        """As ``/v1/models`` lists it."""
        about = {"decode": self.decode, "policy": self.decoder.config.policy, "context": self.context} | self.about
        if self.calibration is not None:
            one = self.calibration
            about["calibration"] = {
                "method": one.method,
                "risk": one.risk,
                "alpha": one.alpha,
                "problems": one.n,
                "sampling": dict(one.sampling),
                "feasible": one.feasible,
            }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "telltale",
            "telltale": about,
        }

    @property
    def _decoders(self) -> list[Any]:
        return [self.decoder.target] if self.decoder.draft is None else [self.decoder.target, self.decoder.draft]
