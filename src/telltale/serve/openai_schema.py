"""Requests of clients: the bodies of ``POST /v1/completions`` and ``POST /v1/chat/completions``, as pydantic models.

Nothing here tokenises or decodes. Errors are 400s that name the field; defaults are OpenAI's. No field is ignored that would have
changed the answer: what is not supported is refused by name, unless it has the value that means the same as leaving it out.

The extension object ``telltale`` overrides the server's configuration for one answer. An override that would change nothing
under the policy in force is refused, so that it is not mistaken for one that does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, model_validator

from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import (
    FALLBACKS,
    SAMPLES,
    SCORES,
    SELECTORS,
    StepVerifiedConfig,
)
from telltale.errors import ConfigError
from telltale.models.conversations import Messages, json_kind, read_messages, read_text
from telltale.serve.http_errors import refused
from telltale.serve.http_json import NUMBER, WHOLE, Body, fault, message_schema, validated

STOPS = 4
"""Stop strings in a request, as OpenAI has it."""
STOP_LENGTH = 256
"""Characters of a stop string: at each token the server reads that much text again."""
COLDEST = 1e-4
"""Smallest temperature above 0: below it, logits leave the range of float32."""
CHOICES = 128
"""Most choices of a prompt, as OpenAI has it."""
COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions where the body gives none, as OpenAI has it."""
ROLES = ("system", "user", "assistant")
MOST_LIKELY = 20
"""Most likely tokens beside each token, as OpenAI's chats have it."""
LONGEST_DRAFT = 64
"""Tokens per round of token-level speculation that a request may ask for."""
Prompts = list[str] | list[list[int]]

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


class _Only:
    """A field of OpenAI's that this server does not support, with the ``values`` that mean the same as leaving it out."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return AfterValidator(self._left_out).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {"enum": [*self.values, None]}

    def _left_out(self, found: Any) -> None:
        # True == 1 in Python, not in JSON.
        same = (isinstance(found, bool) == isinstance(value, bool) and found == value for value in self.values)
        if found is not None and not any(same):
            raise fault("unsupported_parameter", "this server does not support it; leave the field out.")


def _infinite(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf") and isinstance(value, str) else value


def _not_too_cold(value: float) -> float:
    if 0 < value < COLDEST:
        raise fault("invalid_value", f"expected 0 or a number from {COLDEST:g} to 2.")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        value = [value]
    elif len(value) > STOPS:
        raise fault("invalid_value", f"expected up to {STOPS} strings, got {len(value)}.")
    found = [read_text(stop, "stop") for stop in value]
    if any(not 0 < len(stop) <= STOP_LENGTH for stop in found):
        raise fault("invalid_value", f"expected strings of 1 to {STOP_LENGTH} characters.")
    return tuple(dict.fromkeys(found))


def _prompts(value: Any) -> Prompts:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise fault("invalid_type", f"expected text, token ids or an array of them, got {json_kind(value)}.")
    if not value:
        raise fault("invalid_value", "it is empty; expected at least one prompt.")
    if _is_token(value[0]):
        value = [value]
    if isinstance(value[0], str):
        found = [read_text(prompt, "prompt") for prompt in value]
        if not all(found):
            raise fault("invalid_value", "a prompt is empty; expected some text.")
        return found
    for ids in value:
        if not isinstance(ids, list) or not all(map(_is_token, ids)):
            raise fault("invalid_type", "expected one kind of prompt: texts, or arrays of token ids.")
        if not ids:
            raise fault("invalid_value", "a prompt is empty; expected at least one token.")
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(value: Any) -> Messages:
    return read_messages(value, roles=ROLES, strict=True)


_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [_TEXTS["items"], _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
_STOP = {"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": STOPS}]}
_THRESHOLD = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf"]}]}
_MESSAGES = {"type": "array", "items": message_schema(ROLES, strict=True), "minItems": 1}


class Strict(Body):
    """A body of which no field may be ignored."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """It pads chunks against eavesdroppers who measure them; there is nothing to pad on a loopback."""


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


def _with_stream(value: StreamOptions, info: ValidationInfo) -> StreamOptions:
    if not info.data.get("stream"):
        raise fault("invalid_value", "it is only allowed with stream: true.")
    return value


def _at_once(value: Any, info: ValidationInfo) -> Any:
    """Log-probabilities are read when an answer is complete, so a stream has none."""
    if value is False:
        return None
    if info.data.get("stream"):
        raise fault("unsupported_parameter", "a stream has no log-probabilities here; leave out one of the two.")
    return value


class GenerationRequest(Strict):
    """What both endpoints have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=CHOICES), WHOLE] = 1
    max_tokens: int | None = None
    """None: up to the model's last position."""
    temperature: Annotated[float, Field(ge=0, le=2), NUMBER, AfterValidator(_not_too_cold)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), NUMBER] | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE, AfterValidator(lambda count: count or None)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(_STOP)] = ()
    stream: bool = False
    stream_options: Annotated[StreamOptions, AfterValidator(_with_stream)] | None = None
    telltale: Overrides = Overrides()

    # They are about the caller, storage or billing; no answer depends on them.
    user: Annotated[Any, AfterValidator(lambda _: None)] = None
    metadata: Annotated[Any, AfterValidator(lambda _: None)] = None
    store: Annotated[Any, AfterValidator(lambda _: None)] = None
    service_tier: Annotated[Any, AfterValidator(lambda _: None)] = None
    safety_identifier: Annotated[Any, AfterValidator(lambda _: None)] = None
    prompt_cache_key: Annotated[Any, AfterValidator(lambda _: None)] = None
    prompt_cache_retention: Annotated[Any, AfterValidator(lambda _: None)] = None
    prompt_cache_options: Annotated[Any, AfterValidator(lambda _: None)] = None

    frequency_penalty: Annotated[Any, _Only(0)] = None
    presence_penalty: Annotated[Any, _Only(0)] = None
    logit_bias: Annotated[Any, _Only({})] = None

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are asked for beside each token's log-probability; None for no log-probabilities."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def overrides(self) -> Overrides:
        """How this answer is decoded, unlike the server's configuration."""
        return self.telltale

    @property
    def limited_by(self) -> str:
        """The field that ``max_tokens`` comes from, for errors."""
        return "max_tokens"


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[Prompts, BeforeValidator(_prompts), WithJsonSchema(_PROMPT)]
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = COMPLETION_TOKENS
    """0 decodes nothing: for the log-probabilities of an echo."""
    echo: bool = False
    """Whether an answer repeats its prompt."""

    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY), WHOLE, AfterValidator(_at_once)] | None = None
    suffix: Annotated[Any, _Only("")] = None
    best_of: Annotated[Any, _Only(1)] = None

    @property
    def top(self) -> int | None:
        """See :attr:`GenerationRequest.top`."""
        return self.logprobs

    @property
    def prompts(self) -> Prompts:
        """Texts or token ids."""
        return self.prompt


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``. ``messages`` as the chat template takes them: role, content and perhaps a name."""

    messages: Annotated[Messages, BeforeValidator(_messages), WithJsonSchema(_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None

    logprobs: Annotated[bool, AfterValidator(_at_once)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY), WHOLE, AfterValidator(lambda n: n or None)] | None = None
    tools: Annotated[Any, _Only([])] = None
    tool_choice: Annotated[Any, _Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, _Only(True, False)] = None
    functions: Annotated[Any, _Only([])] = None
    function_call: Annotated[Any, _Only("none", "auto")] = None
    response_format: Annotated[Any, _Only({"type": "text"})] = None
    modalities: Annotated[Any, _Only(["text"])] = None
    audio: Annotated[Any, _Only()] = None
    prediction: Annotated[Any, _Only()] = None
    reasoning_effort: Annotated[Any, _Only("none")] = None
    verbosity: Annotated[Any, _Only("medium")] = None
    web_search_options: Annotated[Any, _Only()] = None
    moderation: Annotated[Any, _Only()] = None

    @property
    def limited_by(self) -> str:
        """The field that ``max_tokens`` comes from, for errors."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def top(self) -> int | None:
        """See :attr:`GenerationRequest.top`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _with_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "it is only allowed with logprobs: true.")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise refused("max_tokens", "it differs from max_completion_tokens; give one of them.")
            self.max_tokens = self.max_completion_tokens
        return self


def completion_body(value: Any) -> CompletionRequest:
    """The body of ``POST /v1/completions``. Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming the field."""
    return validated(CompletionRequest, value)


def chat_body(value: Any) -> ChatRequest:
    """The body of ``POST /v1/chat/completions``. Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming the field."""
    return validated(ChatRequest, value)


def configured(decoder: StepVerified, overrides: Overrides) -> StepVerifiedConfig:
    """The configuration of one request. Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming the override."""
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
        raise refused("telltale", str(error)) from None
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
