"""``telltale generate --method step-verified``: the models behind it, and what its output says of the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from telltale.configuration import parse_overrides
from telltale.errors import ConfigError

if TYPE_CHECKING:
    from telltale.decode.step_verified import StepVerified


def check_step_options(
    method: str, *, draft: Path | None, guard: Path | None, overrides: list[str] | None, exit_layer: int | str
) -> None:
    """Raise :class:`~telltale.errors.ConfigError` for options that do nothing together."""
    if method != "step-verified":
        for option, given in (("draft", draft), ("guard", guard), ("set", overrides)):
            if given:
                raise ConfigError(f"--{option} is for --method step-verified; leave it out or choose that method.")
        return
    if guard is not None and overrides:
        raise ConfigError(
            "--set was given together with --guard; a calibration holds for its own settings only, so leave it out."
        )
    if draft is not None and exit_layer != "auto":
        raise ConfigError("both --draft and --exit-layer were given; expected one model that drafts, or one exit.")


def open_step_decoder(
    model: Any,
    tokenizer: Any,
    *,
    draft: Path | None,
    guard: Path | None,
    overrides: list[str] | None,
    exit_layer: int | str,
    dtype: str | None,
    backend: str,
) -> StepVerified:
    """The step-verified decoder of ``model``, under a calibration's configuration or that of ``overrides``.

    Raises :class:`~telltale.errors.ConfigError` if nothing drafts, and :class:`~telltale.errors.CalibrationError` for a
    calibration of other models.
    """
    from telltale.configuration import from_mapping
    from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
    from telltale.models.loading import load_draft

    drafting = None if draft is None else load_draft(draft, tokenizer, dtype=dtype)
    if guard is not None:
        from telltale.decode.step_verified.calibration.calibrated import Calibration

        calibration = Calibration.load(guard)
        if exit_layer not in ("auto", calibration.config.exit_layer):
            raise ConfigError(
                f"--exit-layer {exit_layer} was given, the calibration is for {calibration.config.exit_layer or 'a draft'}; "
                f"leave it out."
            )
        return calibration.guard(model, drafting, tokenizer, backend=backend)
    values: dict[str, Any] = parse_overrides(overrides or ())
    if exit_layer != "auto":
        values["exit_layer"] = exit_layer
    config = from_mapping(StepVerifiedConfig, values)
    if drafting is None and config.exit_layer is None and config.policy != "target":
        raise ConfigError(
            "step-verified decoding needs a draft: expected --draft CHECKPOINT, or --exit-layer to have the model's first "
            "layers draft."
        )
    return StepVerified(model, drafting, tokenizer, config, backend=backend)


def step_line(stats: Any) -> str:
    """What became of the steps, in words."""
    drafted = stats.accepted_steps + stats.rejected_steps
    line = f"{stats.accepted_steps}/{drafted} drafted steps accepted, the target wrote {stats.target_share:.0%} of the tokens"
    return line if stats.calibrated else f"{line} (scores are not calibrated for these models)"
