"""Log-probabilities in OpenAI's two forms. They are the model's own, of its raw distribution, whatever drafted the tokens.

The texts of an answer's tokens, joined, are the text: a token that ends within a character has none, and the one that completes it
has the whole character. Other tokens at a place are read behind the tokens before it, never by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from telltale.decode.rows import Scoring
from telltale.decode.stopping import UNREADABLE
from telltale.serve.detokenise import Detokeniser

CONTEXT = 8
"""Tokens behind which another token is read."""


@dataclass(frozen=True)
class ReadToken:
    """One token: its text, where that begins, its log-probability (None for a text's first), and the most likely ones at its place
    with the token itself among them."""

    text: str
    offset: int
    log_probability: float | None
    likely: dict[str, float] | None


def read_tokens(tokenizer: Any, tokens: Sequence[int], scoring: Scoring, *, since: int) -> list[ReadToken]:
    """The ``tokens`` from place ``since`` on; ``scoring`` knows those from its start on."""
    reader, special = Detokeniser(tokenizer), set(getattr(tokenizer, "all_special_ids", ()))
    found, offset = [], 0
    for place, token in enumerate(tokens):
        piece = reader.push([token])
        if place == len(tokens) - 1:
            piece += reader.finish()
        text = piece
        if not piece and token in special:
            text = tokenizer.decode([token], skip_special_tokens=False)
        if place >= since:
            at = place - scoring.start
            value = scoring.chosen[at] if at >= 0 else None
            likely = None
            if value is not None:
                likely = {
                    _behind(tokenizer, tokens[max(0, place - CONTEXT) : place], other): number
                    for other, number in reversed(scoring.best[at])
                    if other != token
                }
                # Last, so that no other token of the same text takes its place.
                likely = _sorted(likely | {text: value})
            found.append(ReadToken(text, offset, value, likely))
        offset += len(piece)
    return found


def completion_logprobs(read: Sequence[ReadToken]) -> dict[str, Any]:
    """As ``/v1/completions`` has them."""
    return {
        "tokens": [one.text for one in read],
        "token_logprobs": [one.log_probability for one in read],
        "top_logprobs": [one.likely for one in read],
        "text_offset": [one.offset for one in read],
    }


def chat_logprobs(read: Sequence[ReadToken]) -> dict[str, Any]:
    """As ``/v1/chat/completions`` has them."""
    return {
        "content": [
            _entry(one.text, one.log_probability)
            | {"top_logprobs": [_entry(text, value) for text, value in (one.likely or {}).items()]}
            for one in read
        ],
        "refusal": None,
    }


def _entry(text: str, value: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _sorted(likely: dict[str, float]) -> dict[str, float]:
    return dict(sorted(likely.items(), key=lambda one: -one[1]))


def _behind(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """The text of ``token`` behind those ``before`` it; how the vocabulary writes it where it is no text by itself."""
    read = [
        tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for tokens in (before, [*before, token])
    ]
    text = read[1][len(read[0]) :] if read[1].startswith(read[0]) else ""
    if text and UNREADABLE not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))
