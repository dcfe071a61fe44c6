"""The extension object ``telltale`` of a request: fields of the server's configuration for one answer.

An override that would change nothing under the policy in force is refused, so that it is not mistaken for one that does. Every
refusal names its field, those of combinations as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import FALLBACKS, SAMPLES, SCORES, SELECTORS, StepVerifiedConfig
from telltale.errors import ConfigError
from telltale.serve.http_errors import refused
from telltale.serve.http_json import NUMBER, WHOLE, Strict, fault

LONGEST_DRAFT = 64
"""Tokens per round of token-level speculation that a request may ask for."""
POLICIES = ("specguard", "target", "draft", "speculative", "random", "verifier")
STEPWISE = ("specguard", "draft", "random", "verifier")
JUDGED = ("specguard", "random", "verifier")
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


_THRESHOLD = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf"]}]}


class _OneOf:
    """One of a few words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return BeforeValidator(self._checked).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {"type": "string", "enum": list(self.choices)}

    def _checked(self, value: Any) -> Any:
        if not isinstance(value, str) or value not in self.choices:
            raise fault("invalid_value", f"expected one of {', '.join(self.choices)}.")
        return value


def _infinite(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf") and isinstance(value, str) else value


class Overrides(Strict):
    """Fields of :class:`~telltale.decode.step_verified.StepVerifiedConfig`; ``speculate`` False is the policy "target"."""

    policy: Annotated[str, _OneOf(*POLICIES)] | None = None
    threshold: Annotated[float, NUMBER, BeforeValidator(_infinite), WithJsonSchema(_THRESHOLD)] | None = None
    candidates: Annotated[int, Field(ge=1), WHOLE] | None = None
    selector: Annotated[str, _OneOf(*SELECTORS)] | None = None
    max_step_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    beta: Annotated[float, Field(ge=0, le=1), NUMBER] | None = None
    score: Annotated[str, _OneOf(*SCORES)] | None = None
    signal_model: Annotated[str, _OneOf("draft", "target")] | None = None
    fallback: Annotated[str, _OneOf(*FALLBACKS)] | None = None
    accept_rate: Annotated[float, Field(ge=0, le=1), NUMBER] | None = None
    draft_length: Annotated[int, Field(ge=1, le=LONGEST_DRAFT), WHOLE] | None = None
    repetition_limit: Annotated[int, Field(ge=2), WHOLE] | None = None
    speculate: bool | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The fields of the configuration that are given."""
        return self.model_dump(exclude={"speculate"}, exclude_none=True)

    @model_validator(mode="after")
    def _one_policy(self) -> Overrides:
        if self.speculate is not None and self.policy is not None:
            raise refused("telltale.speculate", "it was given together with policy; expected one of them.")
        return self


def configured(decoder: StepVerified, overrides: Overrides, *, temperature: float = 1.0) -> StepVerifiedConfig:
    """The configuration of one request. Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming the override."""
    found = _overridden(decoder, overrides)
    if temperature == 0 and found.drafts and found.compares_candidates:
        name = _blamed(overrides.values, ("score", "policy", "threshold", "candidates"))
        raise refused("temperature" if name is None else f"telltale.{name}", found.needs_candidates("temperature=0"))
    return found


def _blamed(values: dict[str, Any], suspects: Iterable[str]) -> str | None:
    """The first of the ``suspects`` that the request has given; without one, any field that it has."""
    return next((name for name in (*suspects, *values) if name in values), None)


def _overridden(decoder: StepVerified, overrides: Overrides) -> StepVerifiedConfig:
    base = decoder.config
    values = overrides.values
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
            raise refused(f"telltale.{name}", f"it does nothing under the policy {policy!r} of this request.")
    _check_sizes(decoder, values)
    try:
        found = replace(base, **values)
    except ConfigError as error:
        blamed = _blamed(values, [name for name in values if f"{name}=" in str(error)])
        raise refused(f"telltale.{blamed}", str(error)) from None
    if "beta" in values and found.score != "ensemble":
        raise refused("telltale.beta", f"it does nothing with the score {found.score!r}.")
    if "draft_length" in values and found.policy != "speculative" and found.fallback != "spec":
        raise refused("telltale.draft_length", "it needs fallback='spec' or policy='speculative'.")
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
