"""What was read before is not read again, within a limit in bytes, and no output changes by a bit: under every way of decoding."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from decode.step_verified.test_shared_prompts import GUARDS, STEPS
from decode.step_verified.tiny_guards import model
from telltale.decode import reading
from telltale.decode.model_state import Part
from telltale.decode.prefix_cache import PrefixCache
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.errors import ConfigError
from telltale.models.weights import contents_of
from telltale.tasks import chains

KINDS = GUARDS | {
    "copies of the text": (False, {"policy": "speculative", "draft_length": 3}),
}
FIRST = [3 + place * 7 % 29 for place in range(150)]
OTHER = FIRST[:140] + [5 + place * 3 % 23 for place in range(30)]


@cache
def guard(kind: str, backend: str) -> StepVerified:
    from telltale.decode.drafting import FixedPlan

    drafted, changes = KINDS[kind]
    plan = FixedPlan(0, 3, "ngram") if kind == "copies of the text" else None
    config = StepVerifiedConfig(**STEPS | changes)
    return StepVerified(model(0), model(1) if drafted else None, chains.tokenizer(), config, backend=backend, plan=plan)


def talk(found: StepVerified, engine, *, temperature: float) -> list[list[int]]:
    """Two turns of a chat, another text with the same beginning, and the first text again: one after the other, then together."""
    outputs: list[list[int]] = []

    def ask(prompts):
        rows = []
        for prompt in prompts:
            request = found.request(
                [prompt],
                max_new_tokens=20,
                temperature=temperature,
                eos_token_id=[],
                generator=torch.Generator().manual_seed(len(prompt)),
            )
            rows += found.rows(request)
        for row in rows:
            engine.admit(row)
        while engine.rows:
            engine.advance()
        outputs.extend(row.tokens for row in rows)
        return rows

    [one] = ask([FIRST])
    [two] = ask([FIRST + one.tokens + [7, 8, 9]])
    three = ask([OTHER, FIRST, FIRST[:130]])
    ask([FIRST + one.tokens + [7, 8, 9] + two.tokens[:9]])
    assert all(0 <= row.cached_tokens < len(row.prompt) or not engine.prefixes.exact for row in (one, two, *three))
    return outputs


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "temperature"),
    [
        ("auto", 1.0),
        pytest.param("auto", 0.0, marks=pytest.mark.slow),
        ("fused", 0.0),
        pytest.param("fused", 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_same_to_the_last_bit(kind, backend, temperature):
    found = guard(kind, backend)
    off, on = (found.engine(prefix_cache=limit) for limit in (1, 1 << 30))
    expected = talk(found, off, temperature=temperature)
    assert talk(found, on, temperature=temperature) == expected
    # Room for the first whole piece of the texts, and not for all that follows.
    small = found.engine(prefix_cache=on.prefixes.nbytes // 2)
    assert talk(found, small, temperature=temperature) == expected
    assert off.prefixes.nbytes == 0
    assert 0 < small.prefixes.nbytes <= on.prefixes.nbytes // 2
    assert small.prefixes.evicted > 0
    assert on.prefixes.evicted == 0
    read = [[state.layer_executions[0] for state in engine.states] for engine in (off, on)]
    assert max(before - after for before, after in zip(*read, strict=True)) > 200


def test_a_second_turn_reads_only_what_is_new():
    """On the native backend to the token; elsewhere from the last whole piece of the first prompt on."""
    for backend, most in (("auto", 3 + 2), ("fused", 150 % 128 + 20 + 3 + 1)):
        found = guard("target alone", backend)
        engine = found.engine(prefix_cache=1 << 30)
        if backend == "auto" and not engine.prefixes.exact:
            pytest.skip("no native backend here")
        rows = []
        for prompt in (FIRST, None):
            prompt = FIRST + rows[0].tokens + [7, 8, 9] if prompt is None else prompt
            [row] = found.rows(found.request([prompt], max_new_tokens=20, eos_token_id=[]))
            before = engine.target.layer_executions[-1]
            engine.admit(row)
            while engine.rows:
                engine.advance()
            rows.append(row)
        work = engine.target.layer_executions[-1] - before
        assert work - 19 <= most
        assert rows[1].cached_tokens == len(rows[1].prompt) - (work - 19)


@pytest.mark.parametrize("through_data", [True, False])
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_what_was_read_with_other_weights_is_forgotten(backend, through_data):
    own = copy.deepcopy(model(0))
    config = StepVerifiedConfig(**STEPS | KINDS["target alone"][1])
    found = StepVerified(own, None, chains.tokenizer(), config, backend=backend)
    engine = found.engine(prefix_cache=1 << 30)

    def ask(engine):
        [row] = found.rows(found.request([FIRST], max_new_tokens=20, eos_token_id=[]))
        engine.admit(row)
        while engine.rows:
            engine.advance()
        return row

    before = ask(engine)
    assert ask(engine).cached_tokens > 0
    with torch.no_grad():
        for weight in own.parameters():
            (weight.data if through_data else weight).neg_()
    after, expected = ask(engine), ask(found.engine())
    assert after.cached_tokens == 0
    assert after.tokens == expected.tokens != before.tokens
    assert ask(engine).cached_tokens > 0


def test_one_who_is_alone_with_the_weights_need_not_read_them(monkeypatch):
    """Versions and places show what is written as PyTorch counts it; what goes round them is not looked for then."""
    own = copy.deepcopy(model(0))
    whole, counted = contents_of(own), contents_of(own, shared=False)
    own.lm_head.weight.data[0, 0] += 1
    assert contents_of(own) != whole
    assert contents_of(own, shared=False) == counted
    with torch.no_grad():
        own.lm_head.weight[0, 0] += 1
    assert contents_of(own, shared=False) != counted
    counted = contents_of(own, shared=False)
    own.lm_head.weight.data = own.lm_head.weight.data.clone()
    assert contents_of(own, shared=False) != counted
    with torch.inference_mode():
        uncounted = nn.Linear(2, 2)
        before = contents_of(uncounted, shared=False)
        uncounted.weight[0, 0] += 1
    assert contents_of(uncounted, shared=False) != before
    found = StepVerified(own, None, chains.tokenizer(), StepVerifiedConfig(**STEPS | KINDS["target alone"][1]))
    for shared in (True, False):
        asked = []
        monkeypatch.setattr(
            reading, "contents_of", lambda model, *, shared, asked=asked, **_: asked.append(shared) or []
        )
        found.engine(prefix_cache=1 << 20, shared=shared).admit(found.rows(found.request([FIRST], max_new_tokens=1))[0])
        assert asked == [shared]


def part(start: int, stop: int) -> Part:
    keys = torch.zeros(1, stop - start, 4)
    return Part(start, stop, [(keys, keys.clone())], torch.zeros(4))


def test_the_least_recently_used_pieces_leave_first():
    size = part(0, 4).nbytes
    kept = PrefixCache(3 * size, piece=4, exact=True)
    texts = [[text] * 8 for text in range(4)]
    for text in texts[:3]:
        kept.put(0, text, part(0, 4))
    assert kept.find(0, texts[0], 0, 8) is not None
    kept.put(0, texts[0], part(4, 8))
    assert kept.nbytes == 3 * size
    assert [kept.find(0, text, 0, 8) is not None for text in texts] == [True, False, True, False]
    assert kept.find(0, texts[0], 4, 8)[1] == 4
    assert kept.find(0, texts[0], 4, 7)[1] == 3
    assert kept.find(1, texts[0], 0, 8) is None
    kept.put(0, texts[1], part(4, 8))
    assert kept.find(0, texts[1], 4, 8) is None, "its beginning is not here"
    kept.put(0, texts[3], part(0, 4))
    assert kept.find(0, texts[0], 0, 8) is not None, "what others lie behind leaves last"


def test_where_passes_round_by_their_width_only_the_same_piece_is_served():
    kept = PrefixCache(1 << 20, piece=4, exact=False)
    kept.put(0, [1, 2, 3, 4], part(0, 4))
    kept.put(0, [1, 2, 3, 4, 5, 6], part(4, 6))
    assert kept.find(0, [1, 2, 3, 4, 5], 0, 5)[1] == 4
    assert kept.find(0, [1, 2, 3], 0, 3) is None
    assert kept.find(0, [1, 2, 3, 4, 5, 6, 7], 4, 7) is None
    assert kept.find(0, [1, 2, 3, 4, 5, 6], 4, 6)[1] == 2
    with pytest.raises(ConfigError, match="prefix_cache"):
        PrefixCache(0, piece=4, exact=True)


def test_a_longer_piece_takes_the_place_of_its_beginning():
    kept = PrefixCache(1 << 20, piece=4, exact=True)
    kept.put(0, [1, 2], part(0, 2))
    kept.put(0, [1, 2, 3], part(0, 3))
    assert len(kept) == 1
    assert kept.find(0, [1, 2, 9, 9], 0, 4)[1] == 2
