"""Teacher traces as the policy's own tokens: one end-of-sequence token, no chat markup, nothing cut."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from telltale.align.oger.teachers import TeacherStore, Trace
from telltale.align.oger.verification import judge_texts, text_of
from telltale.errors import DataError

_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|endoftext)\|>|\[/?INST\]|<(?:start|end)_of_turn>"
)


@dataclass(frozen=True)
class TokenTrace:
    """A trace that can stand in a group: ``ids`` end with one end-of-sequence token; ``text`` is what decoding them gives.

    ``log_probs`` has one number per id, NaN where the teacher recorded none (an end-of-sequence token that was added here).
    """

    teacher: str
    text: str
    ids: tuple[int, ...]
    reward: float
    log_probs: tuple[float, ...] | None


class TokenisedTeachers:
    """The usable traces of a store for one tokenizer. ``dropped`` counts the others by reason, per teacher.

    A trace is dropped, never cut, if it is longer than ``longest`` tokens with its end of sequence, holds chat markup or
    repeats its prompt, or is no longer correct once it has been through the tokenizer.
    """

    def __init__(self, store: TeacherStore, tokenizer: Any, *, end_ids: Sequence[int], longest: int) -> None:
        self.store, self.tokenizer, self.longest = store, tokenizer, longest
        self.end_ids = tuple(end_ids)
        self.dropped: dict[str, Counter[str]] = {name: Counter() for name in store.teachers()}
        self._traces: dict[str, list[TokenTrace]] = {}
        changed: list[tuple[Trace, TokenTrace]] = []
        conversational = {prompt.id: not isinstance(prompt.prompt, str) for prompt in store.prompts.values()}
        ends = {
            kind: _end_of_turn(tokenizer, self.end_ids, conversational=kind) for kind in set(conversational.values())
        }
        for trace in store.traces():
            made = self._tokenise(trace, ends[conversational[trace.prompt_id]])
            if isinstance(made, str):
                self.dropped[trace.teacher][made] += 1
            elif made.text != trace.text:
                changed.append((trace, made))
            else:
                self._traces.setdefault(trace.prompt_id, []).append(made)
        self._judge_again(changed)

    def of(self, prompt_id: str) -> list[TokenTrace]:
        """The usable traces of a prompt; an empty list if it has none or is not in the store."""
        return self._traces.get(prompt_id, [])

    def all(self) -> list[tuple[str, TokenTrace]]:
        """(prompt id, trace) of every usable trace."""
        return [(name, trace) for name, traces in self._traces.items() for trace in traces]

    def without_log_probs(self) -> int:
        """How many traces have no recorded log-probabilities."""
        return sum(trace.log_probs is None for _, trace in self.all())

    def _tokenise(self, trace: Trace, end: int) -> TokenTrace | str:
        text = trace.text
        end_text = self.tokenizer.decode([end])
        if end_text and text.rstrip().endswith(end_text):
            text = text.rstrip()[: -len(end_text)]
        prompt = text_of(self.store.prompts[trace.prompt_id].prompt).strip()
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        specials = ({*self.tokenizer.all_special_tokens} | added) - {self.tokenizer.unk_token}
        if _MARKUP.search(text) or any(token in text for token in specials):
            return "chat markup"
        if prompt and text.lstrip().startswith(prompt):
            return "repeats its prompt"
        own = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = [*own, end]
        if not own or any(token in self.end_ids for token in own):
            return "empty" if not own else "ends early"
        if len(ids) > self.longest:
            return "too long"
        log_probs = _log_probs(trace, len(ids))
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True)
        return TokenTrace(trace.teacher, decoded, tuple(ids), trace.reward, log_probs)

    def _judge_again(self, changed: Sequence[tuple[Trace, TokenTrace]]) -> None:
        """A tokenizer may lose characters; what it gives back has to be as correct as what the teacher wrote."""
        prompts = [self.store.prompts[trace.prompt_id] for trace, _ in changed]
        names = sorted({key for prompt in prompts for key in prompt.columns})
        columns: dict[str, list[Any]] = {key: [prompt.columns.get(key) for prompt in prompts] for key in names}
        columns["id"] = [prompt.id for prompt in prompts]
        rewards = judge_texts(
            self.store.verifier, [p.prompt for p in prompts], [made.text for _, made in changed], columns
        )
        for (trace, made), reward in zip(changed, rewards, strict=True):
            if reward == trace.reward:
                self._traces.setdefault(trace.prompt_id, []).append(made)
            else:
                self.dropped[trace.teacher]["changed by the tokenizer"] += 1


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a completion of ``model``: its tokenizer's and those of its generation config, as TRL has them."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if token is not None))


def _log_probs(trace: Trace, length: int) -> tuple[float, ...] | None:
    if trace.log_probs is None:
        return None
    if len(trace.log_probs) not in (length, length - 1):
        raise DataError(
            f"the trace of teacher {trace.teacher!r} for prompt {trace.prompt_id!r} has {len(trace.log_probs)} log_probs and "
            f"{length} tokens with its end of sequence; expected {length} or {length - 1}. They have to be of this policy's tokens."
        )
    return (*trace.log_probs, math.nan)[:length]


def _end_of_turn(tokenizer: Any, end_ids: Sequence[int], *, conversational: bool) -> int:
    """The token that ends a completion: in a conversation the one that the chat template puts after an answer."""
    if conversational:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the prompts are conversations and the tokenizer has no chat template; expected texts, or a template."
            )
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        found = [token for token in rendered if token in end_ids]
        if found:
            return int(found[-1])
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; expected one, so that a trace can end.")
    return int(tokenizer.eos_token_id)
