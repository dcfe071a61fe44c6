"""OpenAI's own optional fields that this server does not act on: which do no harm, and which it has to refuse.

A field is never ignored if leaving it out would have changed the answer. What cannot be honoured is refused by name, unless it
has the value that means the same as leaving it out.
"""

from __future__ import annotations

from typing import Any

from telltale.serve.completions.errors import refused
from telltale.serve.completions.reading import Fields

HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
)
"""They say who asks, what to keep or what to bill; no answer depends on them."""

Neutral = dict[str, tuple[Any, ...]]
"""Values of a field that mean the same as leaving it out."""

EITHER: Neutral = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
COMPLETIONS: Neutral = EITHER | {"logprobs": (), "suffix": ("",), "best_of": (1,)}
CHAT: Neutral = EITHER | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}


def check_unsupported(fields: Fields, neutral: Neutral) -> None:
    """Read the fields above. Raises :class:`~telltale.serve.completions.errors.ApiError` (400) for one that asks for something."""
    for name in HARMLESS:
        fields.get(name)
    for name, values in neutral.items():
        found = fields.get(name)
        if found is not None and not any(_same(found, value) for value in values):
            raise refused(
                fields.name(name), "this server does not support it; leave the field out.", code="unsupported_parameter"
            )


def _same(found: Any, value: Any) -> bool:
    # True == 1 in Python, not in JSON.
    return isinstance(found, bool) == isinstance(value, bool) and found == value
