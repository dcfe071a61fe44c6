"""The extension object ``telltale`` of a request: how this one answer is to be decoded, unlike the server's configuration.

An override that would change nothing under the policy in force is refused, so that nobody believes it did.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import (
    FALLBACKS,
    SAMPLES,
    SCORES,
    SELECTORS,
    StepVerifiedConfig,
)
from telltale.errors import ConfigError
from telltale.serve.completions.errors import refused
from telltale.serve.completions.reading import Fields

POLICIES = ("specguard", "target", "draft", "speculative", "random", "verifier")
STEPWISE = ("specguard", "draft", "random", "verifier")
JUDGED = ("specguard", "random", "verifier")
LONGEST_DRAFT = 64
"""Tokens per round of token-level speculation that a request may ask for."""
ACTS: dict[str, tuple[str, ...]] = {
    "threshold": ("specguard", "verifier"),
    "candidates": STEPWISE,
    "selector": STEPWISE,
    "max_step_tokens": STEPWISE,
    "beta": ("specguard",),
    "score": ("specguard",),
    "signal_model": ("specguard",),
    "fallback": JUDGED,
    "accept_rate": ("random",),
    "draft_length": ("speculative", *JUDGED),
    "repetition_limit": STEPWISE,
}
"""The policies under which an override does something."""


@dataclass(frozen=True)
class Overrides:
    """``values``: fields of :class:`~telltale.decode.step_verified.StepVerifiedConfig`; ``speculate`` False is "target"."""

    values: dict[str, Any] = field(default_factory=dict)
    speculate: bool | None = None


def read_overrides(fields: Fields | None) -> Overrides:
    """The object ``telltale`` of a body, each field checked by itself."""
    if fields is None:
        return Overrides()
    found = {
        "policy": fields.choice("policy", POLICIES),
        "threshold": fields.number("threshold", low=-inf, high=inf, infinite=True),
        "candidates": fields.integer("candidates", low=1),
        "selector": fields.choice("selector", SELECTORS),
        "max_step_tokens": fields.integer("max_step_tokens", low=1),
        "beta": fields.number("beta", low=0, high=1),
        "score": fields.choice("score", SCORES),
        "signal_model": fields.choice("signal_model", ("draft", "target")),
        "fallback": fields.choice("fallback", FALLBACKS),
        "accept_rate": fields.number("accept_rate", low=0, high=1),
        "draft_length": fields.integer("draft_length", low=1, high=LONGEST_DRAFT),
        "repetition_limit": fields.integer("repetition_limit", low=2),
    }
    speculate = None if fields.get("speculate") is None else fields.boolean("speculate")
    fields.refuse_unread()
    values = {name: value for name, value in found.items() if value is not None}
    if speculate is not None and "policy" in values:
        raise refused("telltale.speculate", "it was given together with policy; expected one of them.")
    return Overrides(values, speculate)


def configured(decoder: StepVerified, overrides: Overrides) -> StepVerifiedConfig:
    """The configuration of one request. Raises :class:`~telltale.serve.completions.errors.ApiError` (400) naming the override."""
    base = decoder.config
    values = dict(overrides.values)
    if overrides.speculate is False:
        values["policy"] = "target"
    elif overrides.speculate and base.policy == "target":
        values["policy"] = "speculative"
    if not values:
        return base
    policy = values.get("policy", base.policy)
    _check_policy(decoder, policy, "speculate" if overrides.speculate is not None else "policy")
    for name in values:
        if name != "policy" and policy not in ACTS[name]:
            raise refused(
                f"telltale.{name}",
                f"it does nothing under the policy {policy!r} of this request.",
            )
    _check_sizes(decoder, values)
    try:
        found = replace(base, **values)
    except ConfigError as error:
        raise refused("telltale", str(error)) from None
    if "beta" in values and found.score != "ensemble":
        raise refused("telltale.beta", f"it does nothing with the score {found.score!r}.")
    if "draft_length" in values and found.policy != "speculative" and found.fallback != "spec":
        raise refused(
            "telltale.draft_length", "it needs fallback='spec' or policy='speculative'.", code="invalid_value"
        )
    if found.reads_grounding and not (base.reads_grounding or base.record_signals):
        name = next(name for name in ("beta", "score", "policy") if name in values)
        raise refused(
            f"telltale.{name}",
            "it needs attention, which this server was started without; expected beta=1 or a score that reads none.",
        )
    return found


def _check_policy(decoder: StepVerified, policy: str, name: str) -> None:
    drafts = decoder.draft is not None or decoder.exit_layer is not None
    if policy == "speculative" and decoder.plan is not None:
        drafts = True
    if policy != "target" and not drafts:
        raise refused(f"telltale.{name}", "this server has no draft; it decodes with the policy 'target'.")
    if policy == "verifier" and decoder.verifier is None:
        raise refused(f"telltale.{name}", "this server has no verifier.")


def _check_sizes(decoder: StepVerified, values: dict[str, Any]) -> None:
    most = {"candidates": max(SAMPLES, decoder.config.candidates or 1), "max_step_tokens": decoder.target.max_positions}
    for name, high in most.items():
        if values.get(name, 0) > high:
            raise refused(f"telltale.{name}", f"expected an integer up to {high}.")
