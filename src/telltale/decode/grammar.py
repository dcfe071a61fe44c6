"""Output that keeps to a grammar: a JSON schema, a regular expression, some choices, or rules in Lark's form, by llguidance.

A grammar is a logits processor, so every way of decoding takes it. It is asked for one position at a time with that position's own
prefix; what it has taken in of a draft that was rejected is rolled back before the next question. A position behind a token that
the grammar forbids is left as it is: that token has no probability, so nothing behind it is ever accepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.errors import ConfigError, MissingExtraError, NumericalError

MISSING_EXTRA = "constrained output needs llguidance: pip install 'telltale[grammar]'"
WHITESPACE = r"[ \n\t]{0,16}"
"""White space wherever JSON allows it: enough to indent by, and not a whole answer of it."""
BEYOND_LIMITS = "no next token is possible: the grammar has grown beyond llguidance's limits."
SHOWN = 120
"""Characters of llguidance's own words that an error repeats."""


class GrammarError(NumericalError):
    """An output cannot go on as its grammar wants; that is its caller's, not the model's."""


class Grammar:
    """One grammar, checked; :meth:`processor` makes what a row is decoded with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def processor(self, start: int) -> GrammarProcessor:
        """A logits processor for one output, the first token of which stands at position ``start``: behind the prompt."""
        return GrammarProcessor(self._matcher.deep_copy(), start)


class Grammars:
    """Grammars for one tokenizer. ``vocabulary``: width of the logits; ``eos``: tokens that end an output.

    Raises :class:`~telltale.errors.MissingExtraError` without llguidance, and :class:`~telltale.errors.ConfigError` for a tokenizer
    that it does not read, or where no token ends an output.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos: Sequence[int]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise MissingExtraError(MISSING_EXTRA) from error
        if not eos:
            raise ConfigError("constrained output needs a token that ends it, and the model names none.")
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos))
        except Exception as error:
            raise ConfigError(
                f"llguidance does not read a {type(tokenizer).__name__}; expected a fast tokenizer of Transformers."
            ) from error
        self._kind = llguidance.LLMatcher

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that a JSON schema allows; any object for ``{"type": "object"}``."""
        spaced = {"whitespace_pattern": WHITESPACE}
        return self._checked(
            lambda: self._kind.grammar_from_json_schema(json.dumps(schema), defaults=spaced), "the JSON schema"
        )

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression (of Rust's syntax) matches as a whole."""
        return self._checked(lambda: self._kind.grammar_from_regex(pattern), "the regular expression")

    def choices(self, texts: Sequence[str]) -> Grammar:
        """One of ``texts``."""
        quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self.lark(f"start: {quoted}", what="the choices")

    def lark(self, rules: str, *, what: str = "the grammar") -> Grammar:
        """Text that rules in llguidance's variant of Lark derive from ``start``."""
        return self._checked(lambda: self._kind.grammar_from_lark(rules), what)

    def _checked(self, make: Callable[[], str], what: str) -> Grammar:
        try:
            matcher = self._kind(self._tokenizer, make(), log_level=0)
        except (ValueError, TypeError, RecursionError) as error:
            # Also text that UTF-8 cannot write.
            raise ConfigError(f"{what} cannot be used: {_shown(type(error).__name__)}") from None
        if matcher.is_error():
            raise ConfigError(f"{what} cannot be used: {_shown(matcher.get_error())}")
        return Grammar(matcher)


class GrammarProcessor:
    """A logits processor: (token ids (1, length), scores (1, vocabulary)) -> scores, -inf for what the grammar forbids.

    Raises :class:`GrammarError` for a grammar that grows beyond llguidance's limits on the way, or that no token can go on with.
    """

    def __init__(self, matcher: Any, start: int) -> None:
        self._matcher = matcher
        self._start = start
        self._taken: list[int] = []
        """The tokens that the matcher has taken in."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not self._follow(ids[0, self._start :].tolist()):
            return scores
        try:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        except Exception as error:
            raise GrammarError(BEYOND_LIMITS) from error
        if self._matcher.is_error():
            raise GrammarError(BEYOND_LIMITS)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool().to(scores.device)
        width = scores.shape[-1]
        if len(allowed) < width:
            allowed = torch.cat([allowed, allowed.new_zeros(width - len(allowed))])
        if not bool(allowed[:width].any()):
            raise GrammarError("no next token is possible: no token of the model goes on as the grammar wants.")
        return scores.masked_fill(~allowed[:width], -torch.inf)

    def _follow(self, tokens: list[int]) -> bool:
        """Have the matcher take in exactly ``tokens``; False if it forbids one of them."""
        count = 0
        while count < min(len(tokens), len(self._taken)) and tokens[count] == self._taken[count]:
            count += 1
        if count < len(self._taken):
            self._matcher.rollback(len(self._taken) - count)
            del self._taken[count:]
        new = tokens[count:]
        taken = self._matcher.validate_tokens(new) if new else 0
        if taken:
            self._matcher.consume_tokens(new[:taken])
            self._taken += new[:taken]
        return taken == len(new)


def _shown(error: object) -> str:
    """The first line of llguidance's words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "it is not valid.")[:SHOWN]
