"""Responses in OpenAI's form, whole and as chunks, with telltale's telemetry in a field of its own.

Both forms are made of the same pieces, so what is streamed and what is sent at once cannot differ.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telltale.decode.results import StepRecord, StepVerifiedStatistics
from telltale.serve.completions.deltas import OutputText
from telltale.serve.completions.tickets import Ticket

FINISH = {"eos": "stop", "stop_string": "stop", "repetition": "stop", "length": "length"}
"""OpenAI's ``finish_reason`` of each of our stop reasons."""


@dataclass
class Piece:
    """Text that one choice has gained; ``step`` if the text is of an accepted step."""

    choice: int
    text: str
    step: StepRecord | None = None


@dataclass
class End:
    """One choice has ended."""

    choice: int
    stop_reason: str
    stats: StepVerifiedStatistics


@dataclass
class Answer:
    """One response under way. ``prompts`` are token counts; choice c belongs to prompt c // n."""

    chat: bool
    model: str
    seed: int
    policy: str
    prompts: list[int]
    texts: list[OutputText]
    echoes: list[str] = field(default_factory=list)
    """What each choice repeats of its prompt; empty for none."""
    stepwise: bool = False
    """Whether steps are told."""
    calibrated: bool = False
    """Whether the threshold's promise covers this answer."""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.completion_tokens = 0
        self._ends: list[End] = []

    async def pieces(self, ticket: Ticket) -> AsyncIterator[Piece | End]:
        """What comes of a ticket, in order. Raises the :class:`~telltale.serve.completions.errors.ApiError` that ended it."""
        for choice, echo in enumerate(self.echoes):
            yield Piece(choice, echo)
        async for event in ticket:
            if event.failure is not None:
                raise event.failure
            text = self.texts[event.choice]
            if text.stopped:
                # The engine went on until it heard of the end; how far depends on the moment, so none of it is told or counted.
                new, step = "", None
            else:
                count, new = text.push_counted(event.tokens)
                self.completion_tokens += count
                if event.reason is not None:
                    new += text.finish()
                step = event.step if self.stepwise else None
            if new or step is not None:
                yield Piece(event.choice, new, step)
            if event.reason is None:
                if text.stopped:
                    # The engine sees what was written, the reader not what is hidden: a stop string may stand across it.
                    ticket.end(event.choice)
                continue
            stats = event.stats
            assert stats is not None
            end = End(event.choice, "stop_string" if text.stopped else event.reason, stats)
            self._ends.append(end)
            yield end

    async def whole(self, ticket: Ticket) -> dict[str, Any]:
        """The response that is sent at once."""
        texts = ["" for _ in self.texts]
        steps: list[list[StepRecord]] = [[] for _ in self.texts]
        ends: list[End | None] = [None] * len(self.texts)
        async for piece in self.pieces(ticket):
            if isinstance(piece, End):
                ends[piece.choice] = piece
                continue
            texts[piece.choice] += piece.text
            if piece.step is not None:
                steps[piece.choice].append(piece.step)
        choices = []
        for choice, (text, end) in enumerate(zip(texts, ends, strict=True)):
            assert end is not None
            told = self._told(end)
            if self.stepwise:
                told["steps"] = [_plain(step.to_dict()) for step in steps[choice]]
            choices.append(self._choice(choice, self._content(text), FINISH[end.stop_reason]) | {"telltale": told})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage(), "telltale": self._about()}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: a chat's roles."""
        if not self.chat:
            return []
        return [
            self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None)
            for choice in range(len(self.texts))
        ]

    def chunk(self, piece: Piece | End) -> dict[str, Any]:
        """A piece as a chunk; an end is the only one with a finish reason."""
        if isinstance(piece, Piece):
            found = self._chunk(piece.choice, self._delta(piece.text), None)
            if piece.step is not None:
                found["choices"][0]["telltale"] = {"step": _plain(piece.step.to_dict())}
            return found
        last = self._chunk(piece.choice, {"delta": {}} if self.chat else {"text": ""}, FINISH[piece.stop_reason])
        last["choices"][0]["telltale"] = self._told(piece)
        last["telltale"] = self._about()
        return last

    def closing(self) -> dict[str, Any]:
        """The chunk that tells the usage, without a choice."""
        return self._head(self._chunk_kind) | {"choices": [], "usage": self.usage(), "telltale": self._about()}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and outputs, and what became of the draft's: accepted ones are in the output, rejected ones not."""
        stats = [end.stats for end in self._ends]
        prompt = sum(self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(one.accepted_tokens + one.speculated_accepted for one in stats),
                "rejected_prediction_tokens": sum(
                    one.rejected_tokens + one.speculated - one.speculated_accepted for one in stats
                ),
                "reasoning_tokens": 0,
                "audio_tokens": 0,
            },
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _about(self) -> dict[str, Any]:
        return {"seed": self.seed, "policy": self.policy, "calibrated": self.calibrated}

    def _content(self, text: str) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _choice(self, choice: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": choice, **content, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choice: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return self._head(self._chunk_kind) | {"choices": [self._choice(choice, content, finish)]}

    def _told(self, end: End) -> dict[str, Any]:
        stats = end.stats
        return {
            "stop_reason": end.stop_reason,
            "accepted_steps": stats.accepted_steps,
            "rejected_steps": stats.rejected_steps,
            "accepted_tokens": stats.accepted_tokens,
            "rejected_tokens": stats.rejected_tokens,
            "not_selected_tokens": stats.discarded_tokens + stats.target_discarded_tokens,
            "target_tokens": stats.target_tokens,
            "speculated_tokens": stats.speculated,
            "speculated_accepted_tokens": stats.speculated_accepted,
        }


def _plain(value: Any) -> Any:
    """``value`` as JSON can write it: infinite scores are told as None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
