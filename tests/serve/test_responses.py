"""An answer's end, where the engine and the reader see different texts, and the deltas of its steps."""

from __future__ import annotations

import asyncio

import pytest

from serve.small_servers import NAME, offline, running, served
from serve.small_tokenizers import byte_level
from telltale.decode.results import StepVerifiedStatistics
from telltale.serve.detokenise import OutputText
from telltale.serve.responses import FINISH, Answer, End
from telltale.serve.scheduler import DROPPED, Event, ResponseHandle

HIDDEN = 3
"""A special token, which readers do not see: a stop string may stand across it."""


def answered(events, stops):
    """Text, finish reasons and counted tokens of an answer whose engine says ``events``."""

    async def run():
        ended = []
        handle = ResponseHandle(1, asyncio.get_running_loop(), lambda: ended.append(True))
        texts = [OutputText(byte_level(), stops=stops)]
        answer = Answer(chat=False, model=NAME, seed=0, policy="target", prompts=[1], texts=texts)
        for event in events:
            handle.deliver(event)
        pieces = [piece async for piece in answer.pieces(handle)]
        text = "".join(piece.text for piece in pieces if not isinstance(piece, End))
        ends = [answer.chunk(piece)["choices"][0] for piece in pieces if isinstance(piece, End)]
        reasons = [(end["finish_reason"], end["telltale"]["stop_reason"]) for end in ends]
        return text, reasons, answer.usage()["completion_tokens"], bool(ended)

    return asyncio.run(run())


def ids(text):
    return byte_level()(text)["input_ids"]


@pytest.mark.parametrize("reason", [DROPPED, "length", "eos"])
def test_a_stop_string_that_only_the_reader_sees_ends_the_answer_whatever_the_engine_says_later(reason):
    seen = [*ids("one tw"), HIDDEN, *ids("o")]
    events = [
        Event(0, seen),
        Event(0, ids(" three")),
        Event(0, ids("!"), reason=reason, stats=StepVerifiedStatistics()),
    ]
    text, reasons, counted, ended = answered(events, ["two"])
    assert (text, reasons) == ("one ", [("stop", "stop_string")])
    assert counted == len(seen), "what the engine wrote until it heard of the end depends on the moment"
    assert ended


def test_a_stop_string_in_the_last_tokens_is_no_length():
    events = [Event(0, [*ids("one tw"), HIDDEN, *ids("o")], reason="length", stats=StepVerifiedStatistics())]
    assert answered(events, ["two"])[:2] == ("one ", [("stop", "stop_string")])
    assert answered(events, ["three"])[:2] == ("one two", [("length", "length")])


def test_each_delta_is_the_text_of_its_step_and_nothing_else_is_sent():
    sampling = {"temperature": 1.0, "seed": 11}
    tokens, result = offline(served("step-verified"), [ids("two")], max_new_tokens=80, **sampling)
    text, expected = OutputText(byte_level(), continues=True), []
    for step in result.steps[0]:
        expected.append(text.push(step.tokens))
    assert sum((step.tokens for step in result.steps[0]), ()) == tuple(tokens[0])
    rest = text.finish()
    with running(served("step-verified")) as server:
        chunks = list(
            server.client().completions.create(model=NAME, prompt="two", max_tokens=80, stream=True, **sampling)
        )
    deltas = [chunk.choices[0] for chunk in chunks]
    assert len(expected) > 3
    assert [delta.text for delta in deltas] == [*expected[:-1], expected[-1] + rest, ""]
    assert ["step" in delta.telltale for delta in deltas] == [True] * len(expected) + [False]
    assert [delta.finish_reason for delta in deltas] == [None] * len(expected) + [FINISH[result.stop_reason[0]]]
