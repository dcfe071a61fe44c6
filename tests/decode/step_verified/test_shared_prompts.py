"""Rows of one request that have the same prompt: it is read once, and no output changes by a bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from decode.step_verified.tiny_guards import model
from telltale.decode import reading
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.tasks import chains

STEPS = {"delimiter": "a", "max_step_tokens": 6, "repetition_limit": None, "candidates": 3}
LATE = {"score": "log-probability", "threshold": -3.0, "signal_model": "draft"}
GUARDS = {
    "target alone": (False, {"policy": "target"}),
    "speculation by a draft": (True, {"policy": "speculative", "draft_length": 3}),
    "speculation by first layers": (False, {"policy": "speculative", "exit_layer": 1, "draft_length": 3}),
    "draft alone": (True, {"policy": "draft"}),
    "the target reads at a rejection": (True, LATE),
    "the target scores": (True, LATE | {"signal_model": "target"}),
    "first layers draft": (False, LATE | {"exit_layer": 1}),
    "first layers draft, the target scores": (False, LATE | {"exit_layer": 1, "signal_model": "target"}),
    "first layers, nothing accepted": (False, LATE | {"exit_layer": 1, "threshold": float("inf")}),
    "spec fallback": (True, LATE | {"fallback": "spec"}),
}
PROMPT = [3 + place * 7 % 29 for place in range(150)]


@cache
def guard(kind: str) -> StepVerified:
    drafted, changes = GUARDS[kind]
    return StepVerified(
        model(0), model(1) if drafted else None, chains.tokenizer(), StepVerifiedConfig(**STEPS | changes)
    )


def decoded(kind: str, count: int, *, shares: bool, places: int | None = None, dropped: int | None = None):
    """Outputs of ``count`` rows, at most ``places`` at a time, and the tokens that went through the first layer of each state."""
    found = guard(kind)
    request = found.request(
        [PROMPT] * count,
        max_new_tokens=24,
        temperature=1.0,
        eos_token_id=[],
        generator=torch.Generator().manual_seed(5),
    )
    rows = found.rows(request)
    engine = found.engine()
    waiting = list(rows)
    for row in rows:
        assert row.shared is not None or count == 1
        row.shared = row.shared if shares else None
    while waiting or engine.rows:
        while waiting and len(engine.rows) < (places or count):
            engine.admit(waiting.pop(0))
        engine.advance()
        if dropped is not None:
            engine.drop(dropped)
    prompt_work = [state.layer_executions[-1] for state in engine.states]
    return [row.tokens for row in rows], prompt_work, rows


@pytest.mark.parametrize("kind", GUARDS)
def test_outputs_are_the_same_to_the_last_bit(kind):
    shared, work, rows = decoded(kind, 6, shares=True)
    alone, apart, _ = decoded(kind, 6, shares=False)
    assert shared == alone
    assert len({tuple(tokens) for tokens in shared}) > 1
    # Every one of the five others saves what it need not read. Padding counts, too, and depends on who decodes at the same time.
    saved = [(before - after) / len(PROMPT) for before, after in zip(apart, work, strict=True)]
    assert max(saved) == pytest.approx(5, abs=0.2)
    assert all(amount == pytest.approx(round(amount), abs=0.2) for amount in saved)
    assert sum(row.reused_tokens for row in rows) in (0, 5 * len(PROMPT))


@pytest.mark.parametrize("kind", ["target alone", "the target scores", "first layers draft"])
def test_in_pieces_with_few_places_and_when_the_reader_goes(kind, monkeypatch):
    monkeypatch.setattr(reading, "piece_of", lambda _: 32)
    alone, _, _ = decoded(kind, 6, shares=False)
    few, _, rows = decoded(kind, 6, shares=True, places=2)
    assert few == alone
    assert sum(row.reused_tokens > 0 for row in rows) >= 4
    # The first row reads, and is dropped after one piece: another one reads from the beginning.
    left, _, rows = decoded(kind, 6, shares=True, dropped=0)
    assert left[1:] == alone[1:]
    assert left[0] == []
    assert sum(row.reused_tokens > 0 for row in rows) >= 3


def test_a_prompt_that_nobody_else_has_is_not_kept():
    found = guard("target alone")
    rows = found.rows(found.request([PROMPT, PROMPT[1:], PROMPT], max_new_tokens=2, eos_token_id=[]))
    assert rows[1].shared is None
    assert rows[0].shared is rows[2].shared is not None
