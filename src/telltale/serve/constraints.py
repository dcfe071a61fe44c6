"""What a request asks of its answer's tokens, made ready for the rows that decode it: a grammar, biases and penalties, tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import LogitsProcessorList

from telltale.decode.grammar import Grammar, Grammars
from telltale.decode.rows import Row
from telltale.errors import ConfigError, MissingExtraError
from telltale.serve.encoding import Encoder
from telltale.serve.formats import Format, compiled, unavailable
from telltale.serve.http_errors import ApiError, refused
from telltale.serve.logit_processors import BiasAndPenalties
from telltale.serve.open_model import ServedModel
from telltale.serve.openai_schema import ChatRequest, GenerationRequest
from telltale.serve.tool_forms import ToolForm
from telltale.serve.tools import ToolCallReader


class Constraints:
    """Grammars and tool forms of one served model. They are read on the tokenizer's thread, when the first request needs them."""

    def __init__(self, served: ServedModel, encoder: Encoder) -> None:
        self._served = served
        self._encoder = encoder
        self._grammars: Grammars | None = None
        self._form: ToolForm | None = None

    async def tool_form(self, asked: GenerationRequest) -> ToolForm | None:
        """How the model calls the tools of a request; None where it has none.

        Raises :class:`~telltale.serve.http_errors.ApiError` (400) for a template that has no form known here.
        """
        if not isinstance(asked, ChatRequest) or not asked.shown_tools:
            return None
        if self._form is None:
            self._form = await self._encoder.apart(partial(ToolForm.of, self._encoder.tokenizer))
        return self._form

    async def grammar(self, asked: GenerationRequest, form: ToolForm | None) -> Grammar | None:
        """The grammar that an answer has to keep to; None for any text.

        Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming the field, and the extra if that is missing.
        """
        if form is not None and isinstance(asked, ChatRequest) and asked.called_tools:
            return await self._encoder.apart(partial(self._calling, form, asked))
        wanted = asked.wanted_format
        return None if wanted is None else await self._encoder.apart(partial(self._compiled, wanted))

    def _calling(self, form: ToolForm, asked: ChatRequest) -> Grammar:
        """A call of one of the tools that may be called."""
        self._open("tool_choice")
        try:
            return self._compiled(Format("grammar", form.grammar(asked.called_tools), "tools"))
        except ApiError:
            # Which of them it is shows when each is looked at alone.
            for place, tool in enumerate(asked.tools or ()):
                schema = tool["function"].get("parameters") or {"type": "object"}
                if tool in asked.called_tools:
                    self._compiled(Format("json", schema, f"tools[{place}].function.parameters"))
            raise

    def _compiled(self, wanted: Format) -> Grammar:
        return compiled(wanted, self._open(wanted.param))

    def _open(self, param: str) -> Grammars:
        """The grammars of the model's tokenizer. Raises :class:`~telltale.serve.http_errors.ApiError` (400) naming ``param``."""
        if self._grammars is None:
            served = self._served
            try:
                self._grammars = Grammars(self._encoder.tokenizer, vocabulary=served.decoder.vocabulary, eos=served.eos)
            except (ConfigError, MissingExtraError) as error:
                raise unavailable(error, param) from None
        return self._grammars

    def apply(self, asked: GenerationRequest, rows: Sequence[Row], grammar: Grammar | None) -> None:
        """Have ``rows`` decoded so. Raises :class:`~telltale.serve.http_errors.ApiError` (400) for a bias of no token."""
        tokens = self._served.decoder.vocabulary
        if any(token >= tokens for token in asked.logit_bias):
            raise refused("logit_bias", f"expected token ids from 0 to {tokens - 1}.")
        weighed = asked.logit_bias or asked.frequency_penalty or asked.presence_penalty
        for row in rows if weighed or grammar is not None else ():
            start, found = len(row.prompt), LogitsProcessorList()
            if weighed:
                found.append(
                    BiasAndPenalties(
                        start,
                        bias=asked.logit_bias,
                        frequency=asked.frequency_penalty,
                        presence=asked.presence_penalty,
                    )
                )
            if grammar is not None:
                found.append(grammar.processor(start))
            row.sampling = replace(row.sampling, processor=found)


def constrained_by(asked: GenerationRequest) -> str | None:
    """The field that an answer's grammar comes from, for errors on the way; None for no grammar."""
    if isinstance(asked, ChatRequest) and asked.called_tools:
        return "tools"
    return None if asked.wanted_format is None else asked.wanted_format.param


def calls_of(asked: GenerationRequest, form: ToolForm) -> Callable[[], ToolCallReader]:
    """What makes a reader of tool calls, one for each choice."""
    assert isinstance(asked, ChatRequest)
    names: list[Any] = [tool["function"]["name"] for tool in asked.shown_tools]
    return partial(ToolCallReader, form, names, single=not asked.parallel_tool_calls)
