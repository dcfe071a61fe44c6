"""From messages to token ids and back, and the token at which the gate reads the prompt.

ArmoRM reads the gate's feature at the first token of the header that opens the assistant's turn, which is the one that closes
the last user turn. The released code searches for the header's ids, last occurrence first, so a response that prints the header
chooses its own gate. Here the prompt is rendered without the response, and its last token is taken. Special tokens that a user or a
response writes out are text, not control.

Reward servers are sent text that a chat template has rendered (OpenRLHF's ``query`` and ``prompts``). To parse it, the template
is rendered once around placeholders, which shows what it puts before, between and after messages. That is unambiguous as long as no
message contains those pieces. A response that does is safe only if the prompt is given, too.

A template may ask for today's date (Llama 3.2's does), and the same conversation would be another text tomorrow. A macro in
front of it answers with a fixed date; a fit puts it into the tokenizer that is saved with the judge, so that everybody who
renders with it reads the same. Templates of reasoning models open the assistant's turn with ``<think>`` for generation and
render a finished turn in another way; what the two openings share is where the response begins.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from telltale.errors import ConfigError, DataError
from telltale.models.conversations import Messages, read_conversation

LLAMA3_PATTERN = (128009, 128006, 78191, 128007, 271)
"""``<|eot_id|><|start_header_id|>assistant<|end_header_id|>`` and two newlines."""
GEMMA2_PATTERN = (107, 108, 106, 2516, 108)
JOINER = "⁠"
"""A word joiner is inserted into special tokens that a text writes out: they look the same and are not special."""
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""What templates that ask for the time are shown: the date that Llama 3's fall back to."""
_DIRECTIVES = tuple("aAwdbBmyYHIMSpfjUWcxXGuV")
_MACRO_END = "{#- the time is frozen -#}"
_PLACEHOLDERS = [f"QxTEXT{letter}xQ" for letter in "ABCDE"]


@dataclass(frozen=True)
class Encoded:
    """One conversation as a backbone takes it."""

    ids: list[int]
    gating_index: int
    """Where in ``ids`` the gate reads the prompt; -1 for encoders, which have ``prompt_ids``."""
    prompt_ids: list[int]
    """The prompt alone, for an encoder's separate pass."""
    truncated: bool
    """Whether the prompt lost its beginning, all of it if the response is cut."""
    response_truncated: bool = False
    """Whether the response alone is longer than the context, and lost its end."""


class EncodingConfig(Protocol):
    """What of a judge's configuration decides how it reads: see :class:`~telltale.align.judge.model.JudgeConfig`."""

    @property
    def pooling(self) -> str: ...
    @property
    def gating(self) -> str: ...
    @property
    def gating_pattern(self) -> Sequence[int] | None: ...
    @property
    def context_length(self) -> int | None: ...


def encode(tokenizer: Any, messages: Messages, config: EncodingConfig) -> Encoded:
    """Token ids of a conversation whose last message is the response that is judged. Only role and content are read.

    A decoder's ids have exactly one beginning-of-sequence token, if the tokenizer has one. A conversation longer than
    ``config.context_length`` loses the beginning of its prompt, never the gating token; a response that is too long alone
    loses its end, but for its last token. Encoders take prompt and response as a pair of texts, and lose the same.

    Raises :class:`~telltale.errors.DataError` for messages that are none, a tokenizer without chat template (decoders), or a
    template that renders the prompt in another way when a response follows.
    """
    messages = read_conversation(messages)
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer is of Transformers' slow kind, which knows no offsets; expected a tokenizer.json."
        )
    special = special_tokens(tokenizer)
    safe = [{"role": message["role"], "content": _broken_up(message["content"], special)} for message in messages]
    if config.pooling == "mean":
        return _for_encoder(tokenizer, safe, config.context_length)
    if config.gating == "pattern":
        ids = _one_beginning(
            tokenizer, tokenizer(rendered(tokenizer, safe), add_special_tokens=False, verbose=False)["input_ids"]
        )[0]
        return _cut(tokenizer, ids, pattern_index(ids, config.gating_pattern), config.context_length)
    whole, prompt = rendered(tokenizer, safe), rendered(tokenizer, safe[:-1]).rstrip()
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders the prompt in another way when a response follows; use gating='pattern' with "
            "gating_pattern, the token ids that open the assistant's turn."
        )
    ids, shift = _one_beginning(tokenizer, tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
    return _cut(tokenizer, ids, _last_token_of(tokenizer, whole, len(prompt)) + shift, config.context_length)


def parse_rendered_chat(tokenizer: Any, text: str, *, prompt: str | None = None) -> Messages:
    """The conversation that ``text`` renders, or that ``prompt`` followed by the response ``text`` is.

    A ``prompt`` that is not rendered by the tokenizer's template is one user's text.
    Raises :class:`~telltale.errors.DataError` if ``text`` alone is not in the template's form, or if there is no template.
    """
    frozen = _pieces(tokenizer, TEMPLATE_DATE)
    today = _pieces(tokenizer, datetime.datetime.now())  # who rendered the text may have asked for the date
    for pieces in [frozen] if today == frozen else [frozen, today]:
        found = (
            _turns(_begin(tokenizer, text), pieces) if prompt is None else _answered(tokenizer, prompt, text, pieces)
        )
        if found is not None:
            return found
    if prompt is not None:
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": _without(text, frozen.closing)},
        ]
    raise DataError(
        "the text is not in the form of the judge's chat template; expected the whole rendered conversation, or messages, or "
        "the prompts as well."
    )


def template_pattern(tokenizer: Any) -> tuple[int, ...]:
    """The ids between the end of a user's turn and a response, its closing token first, as the template has them."""
    user = [{"role": "user", "content": "x"}]
    prompt = rendered(tokenizer, user).rstrip()
    try:
        opened = _applied(tokenizer, user, add_generation_prompt=True)
    except Exception as error:
        raise DataError(f"the chat template has no generation prompt: {error}") from error
    found = _ids_from(tokenizer, opened, len(prompt))
    # A template that starts the response itself (with <think>) does so in another way once the response is there.
    whole = rendered(tokenizer, [*user, {"role": "assistant", "content": _PLACEHOLDERS[0]}])
    if whole.startswith(prompt):
        finished = _ids_from(tokenizer, whole, len(prompt))
        shared = next((i for i, (a, b) in enumerate(zip(found, finished, strict=False)) if a != b), len(found))
        found = found[: max(1, shared)]
    return tuple(found)


def pattern_index(ids: Sequence[int], pattern: Sequence[int] | None) -> int:
    """The first token of the last occurrence of ``pattern`` in ``ids``: the official rule.

    Raises :class:`~telltale.errors.ConfigError` without a pattern and :class:`~telltale.errors.DataError` if it does not occur.
    """
    if not pattern:
        raise ConfigError("gating='pattern' needs gating_pattern, the token ids that open the assistant's turn.")
    width = len(pattern)
    for start in range(len(ids) - width, -1, -1):
        if list(ids[start : start + width]) == list(pattern):
            return start
    raise DataError(f"the gating pattern {list(pattern)} does not occur in the conversation's {len(ids)} tokens.")


def rendered(tokenizer: Any, messages: Messages) -> str:
    """The chat template's text. Raises :class:`~telltale.errors.DataError` for a tokenizer without one, or one that refuses."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, so messages cannot be put together; set tokenizer.chat_template, or judge "
            "with an encoder (pooling='mean')."
        )
    try:
        return _applied(tokenizer, messages)
    except Exception as error:  # Jinja raises its own kinds, templates raise what they like
        raise DataError(f"the chat template does not take this conversation: {error}") from error


def freeze_template_date(tokenizer: Any) -> None:
    """Put the fixed date into the tokenizer's chat template, which is saved with it; other templates stay as they are."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        tokenizer.chat_template = {name: dated(text, TEMPLATE_DATE) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = dated(template, TEMPLATE_DATE)


def dated(template: str, time: datetime.datetime) -> str:
    """``template`` with a ``strftime_now`` that always tells ``time``, in place of one that was put there before."""
    own = template.rpartition(_MACRO_END)[2]
    if "strftime_now" not in own:
        return own
    told = "".join(
        f' | replace("%{dash}{letter}", "{text.lstrip("0") or "0" if dash else text}")'
        for letter in _DIRECTIVES
        for text in [time.strftime(f"%{letter}")]
        for dash in ("", "-")
    )
    macro = f'{{%- macro strftime_now(format) -%}}{{{{- format{told} | replace("%%", "%") -}}}}{{%- endmacro -%}}'
    return macro + _MACRO_END + own


def special_tokens(tokenizer: Any) -> list[str]:
    """Every token that is control and not text, the longest first.

    Llama 3 names only the first and the last token of a text; its headers are special in the vocabulary alone.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token))


def without_special_tokens(tokenizer: Any, text: str) -> str:
    """``text`` with every special token that it writes out broken up."""
    return _broken_up(text, special_tokens(tokenizer))


def _applied(
    tokenizer: Any, messages: Messages, time: datetime.datetime = TEMPLATE_DATE, *, add_generation_prompt: bool = False
) -> str:
    """What the template renders at ``time``."""
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=dated(tokenizer.get_chat_template(), time),
        )
    )


def _ids_from(tokenizer: Any, text: str, end: int) -> list[int]:
    """Ids of ``text`` from the token on that holds the character before ``end``."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[_last_token_of(tokenizer, text, end) :]


def _broken_up(text: str, special: Sequence[str]) -> str:
    for token in special:
        if len(token) > 1 and token[0] in text and token in text:
            text = text.replace(token, token[0] + JOINER + token[1:])
    return text


def _last_token_of(tokenizer: Any, text: str, end: int) -> int:
    """The token of ``text`` that holds the character before ``end``."""
    if end == 0:
        return 0
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for index, (start, stop) in enumerate(encoded["offset_mapping"]):
        if start < end <= stop:
            return index
    covered = [index for index, (_, stop) in enumerate(encoded["offset_mapping"]) if 0 < stop <= end]
    return covered[-1] if covered else 0


def _one_beginning(tokenizer: Any, ids: list[int]) -> tuple[list[int], int]:
    """``ids`` with exactly one beginning-of-sequence token if the tokenizer has one; and by how much they moved."""
    beginning = tokenizer.bos_token_id
    if beginning is None:
        return list(ids), 0
    count = 0
    while count < len(ids) and ids[count] == beginning:
        count += 1
    if count == 0:
        # Some models (Qwen) name such a token and never use it: the tokenizer itself is asked.
        adds = tokenizer("x")["input_ids"][:1] == [beginning]
        return ([beginning, *ids], 1) if adds else (list(ids), 0)
    return list(ids[count - 1 :]), 1 - count


def _cut(tokenizer: Any, ids: list[int], gating: int, limit: int | None) -> Encoded:
    if limit is None or len(ids) <= limit:
        return Encoded(ids, gating, [], False)
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and gating > 0 else []
    tail = ids[gating:]
    left = limit - len(head) - len(tail)
    if left >= 0:
        kept = [*head, *ids[gating - left : gating], *tail]
        return Encoded(kept, len(head) + left, [], True)
    tail = [*tail[: limit - len(head) - 1], tail[-1]]
    return Encoded([*head, *tail], len(head), [], True, True)


def _for_encoder(tokenizer: Any, messages: Messages, limit: int | None) -> Encoded:
    """Prompt and response as a pair of texts, and the prompt alone."""
    prompt = "\n".join(message["content"] for message in messages[:-1])
    whole, cut, response_cut = _paired(tokenizer(prompt, messages[-1]["content"], verbose=False), limit)
    alone, cut_alone, _ = _paired(tokenizer(prompt, verbose=False), limit)
    return Encoded(whole, -1, alone, cut or cut_alone, response_cut)


def _paired(encoded: Any, limit: int | None) -> tuple[list[int], bool, bool]:
    """Ids of a text or a pair of texts within ``limit``: the first text loses its beginning, then the second its end; and
    whether the first did, and the second."""
    ids = list(encoded["input_ids"])
    excess = 0 if limit is None else len(ids) - limit
    if excess <= 0:
        return ids, False, False
    sides = encoded.sequence_ids(0)
    first = [place for place, side in enumerate(sides) if side == 0]
    second = [place for place, side in enumerate(sides) if side == 1]
    from_second = second[len(second) - max(0, excess - len(first)) :]
    left_out = {*first[:excess], *from_second}
    return [token for place, token in enumerate(ids) if place not in left_out], True, bool(from_second)


@dataclass(frozen=True)
class _Pieces:
    """What a template puts around messages; no beginning-of-text token."""

    opening: str
    """Before the first user's text."""
    opening_system: str | None
    """Before a system message, None if the template takes none."""
    after_system: str
    after_user: str
    """Between a user's text and the assistant's."""
    after_assistant: str
    """Between the assistant's text and the next user's."""
    before_last: str
    """Between the last user's text and the assistant's answer; reasoning models have an empty thought there."""
    generation: str
    """Between the last user's text and an answer that is to be generated."""
    closing: str
    """After the last of the assistant's texts."""


def _answered(tokenizer: Any, prompt: str, text: str, pieces: _Pieces) -> Messages | None:
    """Messages of a rendered ``prompt`` and the response ``text``; None if the prompt has another form."""
    before, gap = _begin(tokenizer, prompt), pieces.after_user[len(pieces.after_user.rstrip()) :]
    if before.endswith(pieces.generation) and pieces.generation.startswith(pieces.after_user):
        # What the template has begun to say is part of the response.
        begun_by_template = pieces.generation.removeprefix(pieces.after_user)
        before, text = before.removesuffix(begun_by_template), begun_by_template + text
    elif not before.endswith(pieces.after_user):
        # Templates without a generation prompt put the gap before the assistant's text, so it is part of the response.
        before, text = before + gap, text.removeprefix(gap)
    begun = _turns(before, pieces)
    if begun is None or begun[-1] != {"role": "assistant", "content": ""}:
        return None
    return [*begun[:-1], {"role": "assistant", "content": _without(text, pieces.closing)}]


def _turns(text: str, pieces: _Pieces) -> Messages | None:
    """Messages of rendered ``text``, the last one the assistant's; None if it has another form."""
    found: Messages = []
    system = pieces.opening_system
    # The longer opening first: a template's default system prompt begins like a given one.
    if text.startswith(pieces.opening):
        rest = text[len(pieces.opening) :]
    elif system is not None and text.startswith(system) and pieces.after_system in text:
        content, _, rest = text[len(system) :].partition(pieces.after_system)
        found.append({"role": "system", "content": content})
    else:
        return None
    while True:
        user, separator, rest = rest.partition(pieces.after_user)
        if not separator:
            return None
        found.append({"role": "user", "content": user})
        assistant, separator, after = rest.partition(pieces.after_assistant)
        if not separator:
            last = rest.removeprefix(pieces.before_last.removeprefix(pieces.after_user))
            return [*found, {"role": "assistant", "content": _without(last, pieces.closing)}]
        found.append({"role": "assistant", "content": assistant})
        rest = after


def _pieces(tokenizer: Any, time: datetime.datetime) -> _Pieces:
    user, answer, again, last, system = _PLACEHOLDERS
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, (user, answer, again, last), strict=True)]
    try:
        plain = _begin(tokenizer, _applied(tokenizer, messages, time))
        opening, rest = plain.split(user)
        after_user, rest = rest.split(answer)
        after_assistant, rest = rest.split(again)
        before_last, closing = rest.split(last)
        opened = _applied(tokenizer, messages[:3], time, add_generation_prompt=True).split(again)[1]
    except Exception as error:  # templates raise errors of their own
        raise DataError(
            f"the judge's tokenizer has no chat template that shows messages as they are ({type(error).__name__}); send messages "
            f"instead of rendered text."
        ) from error
    opening_system, after_system = None, ""
    try:
        with_system = [{"role": "system", "content": system}, *messages]
        opening_system, rest = _begin(tokenizer, _applied(tokenizer, with_system, time)).split(system)
        after_system = rest.split(user)[0]
    except Exception:  # a template may refuse system messages
        opening_system = None
    return _Pieces(
        opening, opening_system, after_system, after_user, after_assistant, before_last, opened or after_user, closing
    )


def _begin(tokenizer: Any, text: str) -> str:
    """``text`` without the beginning-of-text token, which a decoded text may or may not have."""
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text


def _without(text: str, closing: str) -> str:
    """``text`` without the template's end, of which decoding may have taken the white space."""
    for ending in (closing, closing.rstrip(), closing.strip()):
        if ending and text.endswith(ending):
            return text.removesuffix(ending)
    return text
