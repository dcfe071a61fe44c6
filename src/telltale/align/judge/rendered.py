"""Messages from text that a chat template has rendered, as reward servers are sent it (OpenRLHF's ``query`` and ``prompts``).

The template says itself what it puts before, between and after messages: it is rendered once around marks. Reading back is
unambiguous as long as no message contains those pieces. A response that does is safe only if the prompt is given, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from telltale.errors import DataError

Messages = list[dict[str, str]]

_MARKS = [f"QxMARK{letter}xQ" for letter in "ABCDE"]


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
    closing: str
    """After the last of the assistant's texts."""


def read_rendered(tokenizer: Any, text: str, *, prompt: str | None = None) -> Messages:
    """The conversation that ``text`` renders, or that ``prompt`` followed by the response ``text`` is.

    A ``prompt`` that is not rendered by the tokenizer's template is one user's text.
    Raises :class:`~telltale.errors.DataError` if ``text`` alone is not in the template's form, or if there is no template.
    """
    pieces = _pieces(tokenizer)
    if prompt is not None:
        before, gap = _begin(tokenizer, prompt), pieces.after_user[len(pieces.after_user.rstrip()) :]
        if not before.endswith(pieces.after_user):
            # Templates without a generation prompt put the gap before the assistant's text, so it stands in the response.
            before, text = before + gap, text.removeprefix(gap)
        response = {"role": "assistant", "content": _without(text, pieces.closing)}
        begun = _turns(before, pieces)
        if begun is None or begun[-1] != {"role": "assistant", "content": ""}:
            return [{"role": "user", "content": prompt}, response]
        return [*begun[:-1], response]
    found = _turns(_begin(tokenizer, text), pieces)
    if found is None:
        raise DataError(
            "the text is not in the form of the judge's chat template; expected the whole rendered conversation, or messages, or "
            "the prompts beside it."
        )
    return found


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
            return [*found, {"role": "assistant", "content": _without(rest, pieces.closing)}]
        found.append({"role": "assistant", "content": assistant})
        rest = after


def _pieces(tokenizer: Any) -> _Pieces:
    user, answer, again, last, system = _MARKS
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, (user, answer, again, last), strict=True)]
    try:
        plain = _begin(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
        opening, rest = plain.split(user)
        after_user, rest = rest.split(answer)
        after_assistant, rest = rest.split(again)
        closing = rest.split(last)[1]
    except Exception as error:  # templates raise errors of their own
        raise DataError(
            f"the judge's tokenizer has no chat template that shows messages as they are ({type(error).__name__}); send messages "
            f"instead of rendered text."
        ) from error
    try:
        told = [{"role": "system", "content": system}, *messages]
        opening_system, rest = _begin(tokenizer, tokenizer.apply_chat_template(told, tokenize=False)).split(system)
        return _Pieces(opening, opening_system, rest.split(user)[0], after_user, after_assistant, closing)
    except Exception:  # a template may refuse system messages
        return _Pieces(opening, None, "", after_user, after_assistant, closing)


def _begin(tokenizer: Any, text: str) -> str:
    """``text`` without the beginning-of-text token, which a decoded text may or may not have."""
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text


def _without(text: str, closing: str) -> str:
    """``text`` without the template's end, of which decoding may have taken the white space."""
    for ending in (closing, closing.rstrip(), closing.strip()):
        if ending and text.endswith(ending):
            return text.removesuffix(ending)
    return text
