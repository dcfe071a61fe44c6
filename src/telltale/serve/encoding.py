"""Texts and messages become token ids on a thread of their own: a long prompt must not hold up the others' streams.

The tokenizer there is a copy. Encoding changes a fast tokenizer's settings, and the engine reads steps with the original meanwhile.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from telltale.models.conversations import ConversationError, read_text
from telltale.serve.http_errors import ApiError, refused, refused_conversation
from telltale.serve.openai_schema import Prompts

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """``text``: what an echo repeats; ``continued``: whether the answer goes on from visible text."""

    ids: list[int]
    text: str
    continued: bool


class Encoder:
    """Encodes for a model with ``context`` positions that knows the token ids below ``tokens``. Close it after use."""

    def __init__(self, tokenizer: Any, *, context: int, tokens: int) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.context = context
        self.tokens = tokens
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def completion(self, prompts: Prompts, *, room: int) -> list[Prompt]:
        """Prompts of /v1/completions that leave ``room`` tokens for the answer.

        Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming ``prompt``.
        """
        return await self.apart(lambda: [self._completion(prompt, room) for prompt in prompts])

    async def chat(self, messages: Sequence[Mapping[str, Any]], *, room: int, given: Mapping[str, Any]) -> Prompt:
        """The prompt that the tokenizer's chat template makes of messages; errors as in :meth:`completion`.

        ``given``: what else the template is given, such as tools.
        """
        return await self.apart(lambda: self._chat(messages, room, given))

    async def apart(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _completion(self, prompt: str | list[int], room: int) -> Prompt:
        if isinstance(prompt, str):
            ids = self._ids(lambda: self.tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"])
            return Prompt(self._checked(ids, "prompt", room), prompt, continued=True)
        ids = self._checked(prompt, "prompt", room)
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Prompt(ids, text, continued=bool(text))

    def _chat(self, messages: Sequence[Mapping[str, Any]], room: int, given: Mapping[str, Any]) -> Prompt:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(
                400,
                "the model's tokenizer has no chat template; use /v1/completions, or save a chat_template with the model.",
                param="messages",
                code="no_chat_template",
            )
        known = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if any(name in known for name in given if name != "tools"):
            # Its own arguments would replace the template, or what it is applied to.
            raise refused("chat_template_kwargs", "expected names that only the template knows.")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), **(dict(given) | {"add_generation_prompt": True, "tokenize": False})
            )
        except Exception as error:
            # Templates refuse with exceptions of their own, which may repeat the text: only their kind is reported.
            raise refused(
                "messages",
                f"the model's chat template does not take them ({type(error).__name__}); do the roles alternate?",
            ) from None
        # Tools and templates' own arguments may hold half of a surrogate pair, which no tokenizer takes.
        try:
            read_text(text, "messages")
        except ConversationError as error:
            raise refused_conversation(error) from None
        ids = self._ids(lambda: self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return Prompt(self._checked(ids, "messages", room), text, continued=False)

    def _ids(self, encode: Callable[[], Any]) -> list[int]:
        return [int(token) for token in encode()]

    def _checked(self, ids: Sequence[int], name: str, room: int) -> list[int]:
        if not ids:
            raise refused(name, "it has no token; expected some text.")
        if len(ids) + room > self.context:
            raise refused(
                name,
                f"{len(ids)} tokens and {room} of the answer are more than the model's {self.context} positions. Shorten "
                f"the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        if not 0 <= min(ids) <= max(ids) < self.tokens:
            raise refused(name, f"expected token ids from 0 to {self.tokens - 1}.")
        return list(ids)
