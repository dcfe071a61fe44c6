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

TokenScore = tuple[float, list[tuple[int, float]]]
"""A token's log-probability, and the most likely tokens at its place with theirs."""
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


class TokenReader:
    """Reads a text's tokens as they come, with their log-probabilities. ``before``: tokens in front of them, read as well."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._reader = Detokeniser(tokenizer)
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._tokens: list[int] = []
        self._offset = 0
        # At once as far as no character can be open at the end.
        for piece in (before[:-CONTEXT], *([token] for token in before[-CONTEXT:])):
            self._tokens += piece
            self._offset += len(self._reader.push(piece))

    def push(self, token: int, score: TokenScore | None, *, last: bool = False) -> ReadToken:
        """The next token. ``score``: log-probability and most likely ones, None for a text's first; ``last``: none follows."""
        piece = self._reader.push([token])
        if last:
            piece += self._reader.finish()
        text = piece
        if not piece and token in self._special:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
        value, likely = None, None
        if score is not None:
            value, best = score
            behind = self._tokens[-CONTEXT:]
            likely = {
                _behind(self._tokenizer, behind, other): number for other, number in reversed(best) if other != token
            }
            # Last, so that no other token of the same text takes its place.
            likely = _sorted(likely | {text: value})
        found = ReadToken(text, self._offset, value, likely)
        self._tokens.append(token)
        self._offset += len(piece)
        return found


def read_tokens(tokenizer: Any, tokens: Sequence[int], scoring: Scoring, *, since: int) -> list[ReadToken]:
    """The ``tokens`` from place ``since`` on; ``scoring`` knows those from its start on."""
    reader = TokenReader(tokenizer, tokens[:since])
    found = []
    for place, token in enumerate(tokens[since:], start=since):
        at = place - scoring.start
        score = (scoring.chosen[at], scoring.best[at]) if at >= 0 else None
        found.append(reader.push(token, score, last=place == len(tokens) - 1))
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
