"""Requests of clients: the bodies of ``POST /v1/completions`` and ``POST /v1/chat/completions``, as pydantic models.

Nothing here tokenises or decodes. Errors are 400s that name the field; defaults are OpenAI's. No field is ignored that would have
changed the answer: what is not supported is refused by name, unless it has the value that means the same as leaving it out.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator

from telltale.models.conversations import json_kind, read_text
from telltale.serve import formats
from telltale.serve import tools as calling
from telltale.serve.formats import Format
from telltale.serve.http_errors import refused
from telltale.serve.http_json import NUMBER, WHOLE, Strict, fault, message_schema, validated
from telltale.serve.logit_processors import BIAS, PENALTY
from telltale.serve.overrides import Overrides

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
BIASED = 1024
"""Most tokens of a ``logit_bias``."""
MOST_LIKELY = 20
"""Most likely tokens beside each token, as OpenAI's chats have it."""
Prompts = list[str] | list[list[int]]


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


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise fault("invalid_type", f"expected an object of token ids and biases, got {json_kind(value)}.")
    if len(value) > BIASED:
        raise fault("invalid_value", f"expected up to {BIASED} tokens, got {len(value)}.")
    found = {}
    for token, bias in value.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and number and -BIAS <= bias <= BIAS):
            raise fault("invalid_value", f"expected token ids with numbers from -{BIAS:g} to {BIAS:g}.")
        found[int(token)] = float(bias)
    return found


def _no_top_k(value: Any) -> Any:
    """-1 is vLLM's word for none."""
    return 0 if isinstance(value, int) and not isinstance(value, bool) and value == -1 else value


_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [_TEXTS["items"], _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_BIASES = {"type": "object", "additionalProperties": {"type": "number", "minimum": -BIAS, "maximum": BIAS}}
_OBJECT = WithJsonSchema({"type": "object"})
_TEXT = WithJsonSchema({"type": "string", "minLength": 1})
_TOOLS = {"type": "array", "maxItems": calling.TOOLS, "items": {"type": "object", "required": ["type", "function"]}}
_TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": STOP_LENGTH}
_STOP = {"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": STOPS}]}
_MESSAGES = {"type": "array", "items": message_schema(calling.ROLES, strict=True), "minItems": 1}


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """It pads chunks against eavesdroppers who measure them; there is nothing to pad on a loopback."""


def _with_stream(value: StreamOptions, info: ValidationInfo) -> StreamOptions:
    if not info.data.get("stream"):
        raise fault("invalid_value", "it is only allowed with stream: true.")
    return value


def _or_none(value: Any) -> Any:
    return None if value is False else value


class GenerationRequest(Strict):
    """What both endpoints have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=CHOICES), WHOLE] = 1
    max_tokens: int | None = None
    """None: up to the model's last position."""
    temperature: Annotated[float, Field(ge=0, le=2), NUMBER, AfterValidator(_not_too_cold)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), NUMBER] | None = None
    top_k: (
        Annotated[int, Field(ge=0), WHOLE, BeforeValidator(_no_top_k), AfterValidator(lambda count: count or None)]
        | None
    ) = None
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

    frequency_penalty: Annotated[float, Field(ge=-PENALTY, le=PENALTY), NUMBER] = 0.0
    presence_penalty: Annotated[float, Field(ge=-PENALTY, le=PENALTY), NUMBER] = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases), WithJsonSchema(_BIASES)] = Field(
        default_factory=dict
    )

    response_format: Annotated[Format | None, BeforeValidator(formats.read_response_format), _OBJECT] = None
    structured_outputs: Annotated[Format | None, BeforeValidator(formats.read_structured), _OBJECT] = None
    guided_json: Annotated[Format | None, BeforeValidator(formats.read_json), _OBJECT] = None
    guided_regex: Annotated[Format | None, BeforeValidator(formats.read_regex), _TEXT] = None
    guided_choice: Annotated[Format | None, BeforeValidator(formats.read_choice), WithJsonSchema(_TEXTS)] = None
    guided_grammar: Annotated[Format | None, BeforeValidator(formats.read_grammar), _TEXT] = None

    # Other servers' fields, as far as they ask for what is done here anyway. Where they say how a server keeps its caches or in
    # which order it works, no answer depends on them.
    cache_prompt: Annotated[Any, AfterValidator(lambda _: None)] = None
    id_slot: Annotated[Any, AfterValidator(lambda _: None)] = None
    request_id: Annotated[Any, AfterValidator(lambda _: None)] = None
    priority: Annotated[Any, _Only(0)] = None
    min_p: Annotated[Any, _Only(0)] = None
    typical_p: Annotated[Any, _Only(1)] = None
    repetition_penalty: Annotated[Any, _Only(1)] = None
    repeat_penalty: Annotated[Any, _Only(1)] = None
    length_penalty: Annotated[Any, _Only(1)] = None
    min_tokens: Annotated[Any, _Only(0)] = None
    mirostat: Annotated[Any, _Only(0)] = None
    use_beam_search: Annotated[Any, _Only(False)] = None
    ignore_eos: Annotated[Any, _Only(False)] = None
    stop_token_ids: Annotated[Any, _Only([])] = None
    include_stop_str_in_output: Annotated[Any, _Only(False)] = None
    skip_special_tokens: Annotated[Any, _Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, _Only(True)] = None
    prompt_logprobs: Annotated[Any, _Only(0)] = None
    return_token_ids: Annotated[Any, _Only(False)] = None

    @model_validator(mode="after")
    def _one_format(self) -> GenerationRequest:
        fields = (
            "response_format",
            "structured_outputs",
            *(name for name in type(self).model_fields if "guided_" in name),
        )
        given = [name for name in fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise refused(given[1], f"it was given together with {given[0]}; expected one of them.")
        self._format = getattr(self, given[0]) if given else None
        return self

    _format: Format | None = None

    @property
    def wanted_format(self) -> Format | None:
        """What the answer has to look like; None for any text."""
        return self._format

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

    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY), WHOLE] | None = None
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

    messages: Annotated[list[dict[str, Any]], BeforeValidator(calling.read_chat), WithJsonSchema(_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None

    logprobs: Annotated[bool, AfterValidator(_or_none)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY), WHOLE, AfterValidator(lambda n: n or None)] | None = None
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(calling.read_tools), WithJsonSchema(_TOOLS)] = None
    tool_choice: Annotated[str | None, BeforeValidator(calling.read_tool_choice), WithJsonSchema(_TOOL_CHOICE)] = None
    parallel_tool_calls: bool = True
    functions: Annotated[Any, _Only([])] = None
    function_call: Annotated[Any, _Only("none", "auto")] = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides the messages, such as ``enable_thinking``."""
    add_generation_prompt: Annotated[Any, _Only(True)] = None
    continue_final_message: Annotated[Any, _Only(False)] = None
    add_special_tokens: Annotated[Any, _Only(False)] = None
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
    def _one_of_the_tools(self) -> ChatRequest:
        names = [tool["function"]["name"] for tool in self.tools or ()]
        wanted = self.tool_choice
        if wanted in (None, "none"):
            self.tool_choice = wanted if names else None
            return self
        if not names:
            raise refused("tool_choice", "it needs tools.")
        if wanted != "required" and (wanted or "").removeprefix("function ") not in names:
            raise refused("tool_choice", "there is no tool of this name.")
        if self.wanted_format is not None:
            raise refused(
                "tool_choice", f"it was given together with {self.wanted_format.param}; expected one of them."
            )
        return self

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def called_tools(self) -> list[dict[str, Any]]:
        """The tools one of which has to be called; none where the model chooses."""
        if self.tool_choice in (None, "none"):
            return []
        one = self.tool_choice.removeprefix("function ")
        return [tool for tool in self.shown_tools if self.tool_choice == "required" or tool["function"]["name"] == one]

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
