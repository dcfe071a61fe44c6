"""From a model and a user's options to a decoder: the options of each method, and which of them exclude each other.

``telltale generate`` and ``telltale serve`` both open their decoders here, so that a combination that one of them refuses
is refused by the other in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telltale.config import check_choice, check_integer, from_mapping
from telltale.decode.decoders import StepVerified
from telltale.decode.drafting import DRAFTERS
from telltale.decode.step_config import StepVerifiedConfig
from telltale.errors import ConfigError
from telltale.models.loading import load_draft

if TYPE_CHECKING:
    from telltale.decode.calibration.calibration import Calibration

METHODS = ("autoregressive", "self-speculative", "step-verified")
_TAKEN_BY = {
    "draft": ("step-verified",),
    "guard": ("step-verified",),
    "settings": ("step-verified",),
    "exit_layer": ("self-speculative", "step-verified"),
    "draft_length": ("self-speculative",),
    "drafter": ("self-speculative",),
}
"""Option -> the methods that take it."""


@dataclass(frozen=True)
class MethodOptions:
    """Options of a decoding method; None leaves the choice to the decoder.

    Raises :class:`~telltale.errors.ConfigError` for a number that is out of range.
    """

    exit_layer: int | None = None
    """Layers that draft."""
    draft_length: int | None = None
    """Tokens per draft; 0 is plain decoding."""
    drafter: str | None = None
    """"exit", "ngram" or "both"."""
    draft: str | Path | None = None
    """The checkpoint that drafts steps."""
    guard: str | Path | None = None
    """The file of a calibration."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`~telltale.decode.step_config.StepVerifiedConfig`."""

    def __post_init__(self) -> None:
        if self.exit_layer is not None:
            check_integer("exit_layer", self.exit_layer, low=1)
        if self.draft_length is not None:
            check_integer("draft_length", self.draft_length, low=0)
        if self.drafter is not None:
            check_choice("drafter", self.drafter, DRAFTERS)

    def check(self, method: str) -> None:
        """Raise :class:`~telltale.errors.ConfigError` for an option that ``method`` does not take, or two that exclude each
        other."""
        for name, methods in _TAKEN_BY.items():
            if getattr(self, name) not in (None, {}) and method not in methods:
                raise ConfigError(
                    f"{_flag(name)} does nothing with {method} decoding; leave it out, or choose {' or '.join(methods)}."
                )
        if self.guard is not None and self.settings:
            raise ConfigError(
                "--set was given together with --guard; a calibration holds for its own settings only, so leave it out."
            )
        if self.draft is not None and self.exit_layer is not None:
            raise ConfigError("both --draft and --exit-layer were given; expected one model that drafts, or one exit.")
        if self.drafter == "ngram" and self.exit_layer is not None:
            raise ConfigError("--exit-layer does nothing with drafter='ngram'; leave it out, or choose 'both'.")


@dataclass(frozen=True)
class StepMethod:
    """How steps are verified, known before a model is loaded: a configuration, and the calibration that it comes from."""

    config: StepVerifiedConfig
    calibration: Calibration | None

    @classmethod
    def of(cls, options: MethodOptions) -> StepMethod:
        """Read the calibration of ``options``, or make their configuration.

        Raises :class:`~telltale.errors.ConfigError` if nothing drafts or the exit is not the calibration's, and
        :class:`~telltale.errors.CalibrationError` for a file that is none.
        """
        calibration = None
        if options.guard is not None:
            # It imports SciPy's statistics, which nothing else needs.
            from telltale.decode.calibration.calibration import Calibration

            calibration = Calibration.load(options.guard)
            config = calibration.config
            if options.exit_layer not in (None, config.exit_layer):
                raise ConfigError(
                    f"--exit-layer {options.exit_layer} was given, the calibration is for {config.exit_layer or 'a draft'}; "
                    f"leave it out."
                )
        else:
            exits = {} if options.exit_layer is None else {"exit_layer": options.exit_layer}
            config = from_mapping(StepVerifiedConfig, dict(options.settings) | exits)
        if options.draft is None and config.exit_layer is None and config.policy != "target":
            raise ConfigError(
                "step-verified decoding needs a draft: expected --draft CHECKPOINT, or --exit-layer to have the model's first "
                "layers draft."
            )
        return cls(config, calibration)

    def open(
        self,
        model: Any,
        tokenizer: Any,
        draft: str | Path | None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        weights: str | None = None,
        backend: str = "auto",
    ) -> StepVerified:
        """The decoder of ``model`` with the checkpoint ``draft``.

        Raises :class:`~telltale.errors.CalibrationError` for a calibration of other models.
        """
        drafting = None if draft is None else load_draft(draft, tokenizer, dtype=dtype, device=device, weights=weights)
        opened = StepVerified(model, drafting, tokenizer, self.config, backend=backend)
        if self.calibration is not None:
            self.calibration.check(opened)
        return opened


def _flag(name: str) -> str:
    return "--set" if name == "settings" else f"--{name.replace('_', '-')}"
