"""From checkpoints on disk to what is served: the models, how they decode together, and in words what was chosen and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telltale.config import check_choice, check_integer, from_mapping
from telltale.decode.step_verified.config import StepVerifiedConfig
from telltale.decode.step_verified.decoder import StepVerified
from telltale.errors import ConfigError
from telltale.models.loading import load, load_draft
from telltale.models.open import open_decoder
from telltale.serve.completions.served import DECODES, Served
from telltale.serve.completions.tuning import tune

if TYPE_CHECKING:
    from telltale.decode.calibration.calibration import Calibration

Automatic = int | None
"""None is "auto"."""


def open_served(
    model: str | Path,
    *,
    draft: str | Path | None = None,
    guard: str | Path | None = None,
    decode: str | None = None,
    exit_layer: Automatic = None,
    draft_length: Automatic = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str = "auto",
) -> Served:
    """Open the checkpoint ``model`` and say how it decodes.

    ``decode`` None is "step-verified" with a ``draft`` or a ``guard`` (a calibration's file), else "autoregressive". ``exit_layer``
    and ``draft_length`` are for drafts by the model's own first layers; what is None is chosen by :func:`tune` for
    "self-speculative". ``settings``: fields of :class:`~telltale.decode.step_verified.StepVerifiedConfig` for "step-verified".
    Raises :class:`~telltale.errors.ConfigError` for options that do not go together, and what :func:`telltale.load` raises.
    """
    if decode is None:
        decode = "autoregressive" if draft is None and guard is None else "step-verified"
    check_choice("decode", decode, DECODES)
    given = {
        "draft": draft is not None,
        "guard": guard is not None,
        "exit_layer": exit_layer is not None,
        "draft_length": draft_length is not None,
        "set": bool(settings),
    }
    for option, modes in _OPTIONS.items():
        if given[option] and decode not in modes:
            raise ConfigError(
                f"--{option.replace('_', '-')} does nothing with decode={decode!r}; leave it out, or choose "
                f"{' or '.join(modes)}."
            )
    for option, value in (("exit_layer", exit_layer), ("draft_length", draft_length)):
        if value is not None:
            check_integer(option, value, low=1)
    calibration = None if guard is None else _calibration(guard)
    config = None
    if decode == "step-verified":
        config = _step_config(calibration, exit_layer, settings or {})
        if draft is None and config.exit_layer is None:
            raise ConfigError(
                "step-verified decoding needs a draft: expected --draft CHECKPOINT, or --exit-layer to have the model's first "
                "layers draft."
            )
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    name = Path(model).resolve().name if name is None else name
    if decode == "autoregressive":
        plain = StepVerified(loaded, None, tokenizer, StepVerifiedConfig(policy="target"), backend=backend)
        return Served(name, plain, decode, _about(plain, "every token by the whole model"))
    if config is None:
        return _self_speculative(name, loaded, tokenizer, exit_layer, draft_length, backend)
    drafting = None if draft is None else load_draft(draft, tokenizer, dtype=dtype, device=device)
    opened = StepVerified(loaded, drafting, tokenizer, config, backend=backend)
    return _step_verified(name, opened, calibration, None if draft is None else Path(draft).resolve().name)


_OPTIONS = {
    "draft": ("step-verified",),
    "guard": ("step-verified",),
    "exit_layer": ("self-speculative", "step-verified"),
    "draft_length": ("self-speculative",),
    "set": ("step-verified",),
}
"""The decodes that an option means something to."""


def _self_speculative(
    name: str, model: Any, tokenizer: Any, exit_layer: Automatic, draft_length: Automatic, backend: str
) -> Served:
    decoder = open_decoder(model, backend=backend)
    config = StepVerifiedConfig(policy="speculative", exit_layer=exit_layer)
    about: dict[str, Any] = {}
    if exit_layer is not None and draft_length is not None:
        config = replace(config, draft_length=draft_length)
        words = "drafts as asked for, verified token by token"
    else:
        tuned = tune(decoder, tokenizer, exit_layer=exit_layer, draft_length=draft_length)
        config = replace(config, exit_layer=tuned.exit_layer, draft_length=tuned.draft_length)
        about = {"predicted_speedup": round(tuned.predicted, 3), "measured_speedup": round(tuned.measured, 3)}
        words = tuned.describe()
        if exit_layer is None and not tuned.pays:
            config = replace(config, policy="target")
            words = f"no exit pays, so every token is by the whole model; the best was {words}"
    opened = StepVerified(decoder, None, tokenizer, config)
    return Served(name, opened, "self-speculative", _about(opened, words) | about)


def _calibration(guard: str | Path) -> Calibration:
    # It brings SciPy's statistics, which a server without a guard does not need.
    from telltale.decode.calibration.calibration import Calibration

    return Calibration.load(guard)


def _step_config(
    calibration: Calibration | None, exit_layer: Automatic, settings: Mapping[str, Any]
) -> StepVerifiedConfig:
    if calibration is None:
        values = dict(settings) if exit_layer is None else dict(settings) | {"exit_layer": exit_layer}
        return from_mapping(StepVerifiedConfig, values)
    for option, given in (("set", settings), ("exit-layer", exit_layer)):
        if given:
            raise ConfigError(
                f"--{option} was given together with --guard; a calibration holds for its own settings only, so leave it out."
            )
    return calibration.config


def _step_verified(name: str, opened: StepVerified, calibration: Calibration | None, draft: str | None) -> Served:
    config = opened.config
    if calibration is not None:
        calibration.check(opened)
    drafted = draft or f"the first {config.exit_layer} layers"
    words = f"steps of {drafted}, accepted by {config.score} at {config.threshold:g}"
    if config.policy != "specguard":
        words = f"the policy {config.policy!r}, drafts of {drafted}"
    elif calibration is None:
        words += ", which is not calibrated for these models"
    else:
        words += f", calibrated for {calibration.risk} risk {calibration.alpha:g} ({calibration.method})"
        if not calibration.feasible:
            words += ": no threshold kept it, so nothing is accepted"
    return Served(name, opened, "step-verified", _about(opened, words) | {"draft": draft}, calibration=calibration)


def _about(opened: StepVerified, words: str) -> dict[str, Any]:
    config = opened.config
    found: dict[str, Any] = {
        "chosen": words,
        "backend": opened.target.backend,
        "dtype": str(opened.target.dtype).removeprefix("torch."),
        "layers": opened.target.layers,
    }
    if config.exit_layer is not None:
        found |= {"exit_layer": config.exit_layer, "draft_length": config.draft_length}
    if config.policy == "specguard":
        threshold = config.threshold if abs(config.threshold) != float("inf") else str(config.threshold)
        found |= {
            "score": config.score,
            "threshold": threshold,
            "candidates": config.samples(greedy=False),
        }
    return found
