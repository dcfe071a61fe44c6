"""The loop itself: what is in the caches, who waits for whom, whether seeds and company matter, and whether the books balance."""

from __future__ import annotations

import pytest
import torch

from decode.step_verified import pairs
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.decode.reading import piece_of

POLICIES = {
    "random": {"policy": "random", "accept_rate": 0.5, "candidates": 3, "fallback": "plain"},
    "k-sample": {"threshold": 0.7, "candidates": 3},
    "spec": {"threshold": 0.8, "candidates": 2, "fallback": "spec", "draft_length": 3},
    "target-scored": {"threshold": 0.7, "candidates": 3, "signal_model": "target", "fallback": "plain"},
    "one candidate": {"threshold": 0.7, "candidates": 1, "signal_model": "target", "fallback": "spec"},
    "speculative": {"policy": "speculative"},
    "target": {"policy": "target"},
    "draft": {"policy": "draft", "candidates": 2},
}


@pytest.fixture(scope="module")
def models():
    return pairs.target(), pairs.draft()


def guarded(models, *, own=False, **config):
    if own:
        return StepVerified(models[0], None, pairs.tokenizer(), StepVerifiedConfig(exit_layer=2, **config))
    return StepVerified(*models, pairs.tokenizer(), StepVerifiedConfig(**config))


def sampled(guard, prompts, *, seed=4, new=40, stream=False):
    arguments = {"max_new_tokens": new, "eos_token_id": pairs.EOS, "temperature": 0.9, "top_p": 0.95}
    arguments["generator"] = pairs.seeded(seed)
    return guard.stream(prompts, **arguments) if stream else guard.generate(prompts, **arguments)


@torch.no_grad()
def fresh(decoder, tokens, stop):
    hidden = decoder.run(decoder.embed(torch.tensor([tokens])), 0, stop, decoder.new_cache(1, 4), [0], prefill=True)
    return hidden[0, -1]


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["two models", "one model"])
@pytest.mark.parametrize("name", ["random", "spec", "target-scored", "one candidate"])
@pytest.mark.filterwarnings("ignore:the (draft|target) has")
def test_after_every_turn_the_caches_hold_committed_tokens_and_their_states(models, own, name):
    """Over hundreds of accepted and rejected steps: lengths, and the state after the last token as without a cache."""
    guard = guarded(models, own=own, **POLICIES[name], repetition_limit=None, max_step_tokens=10)
    engine = guard.engine(slots=2)
    request = guard.request(
        pairs.prompts(5), max_new_tokens=60, eos_token_id=[], temperature=1.0, generator=pairs.seeded(9)
    )
    rows = [engine.rows[engine.admit(row)] for row in guard.rows(request)]
    checked = 0
    while engine.rows:
        engine.advance()
        for row in list(engine.rows.values()):
            if row.number in engine.proposals or row.open_step:
                continue
            whole = row.prompt + row.tokens
            for state in engine.states:
                known = state.rows[row.slot]
                assert known.length <= row.length
                assert state.cache.lengths[row.slot] <= row.length
                if known.length and known.last_hidden is not None:
                    wanted = fresh(state.decoder, whole[: known.length], state.stop)
                    torch.testing.assert_close(known.last_hidden, wanted, atol=1e-4, rtol=1e-3)
                    checked += 1
    steps = sum(row.stats.accepted_steps + row.stats.rejected_steps for row in rows)
    assert steps > 20
    assert checked > 20
    assert all(state.branches_in_use == 0 for state in engine.states)
    assert all(row.length == 0 for state in engine.states for row in state.rows)


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["two models", "one model"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore:the (draft|target) has")
def test_a_row_is_the_same_alone_in_company_reordered_and_streamed(models, name, own):
    guard = guarded(models, own=own, **POLICIES[name])
    prompts = pairs.prompts(8)
    together = pairs.rows_of(sampled(guard, prompts))
    assert len({tuple(row) for row in together}) > 4
    assert pairs.rows_of(sampled(guard, [prompts[3]]))[0] == together[3]
    reordered = [5, 2, 7, 0]
    assert pairs.rows_of(sampled(guard, [prompts[i] for i in reordered])) == [together[i] for i in reordered]
    streamed: list[list[int]] = [[] for _ in prompts]
    for committed in sampled(guard, prompts, stream=True):
        for row, tokens in zip(streamed, committed, strict=True):
            row += tokens
    assert streamed == together
    assert pairs.rows_of(sampled(guard, prompts)) == together
    assert pairs.rows_of(sampled(guard, prompts, seed=5)) != together


def test_equal_prompts_in_a_batch_get_different_samples(models):
    rows = pairs.rows_of(sampled(guarded(models, policy="target"), [[3, 4, 5]] * 6))
    assert len({tuple(row) for row in rows}) > 1


@pytest.mark.long
@pytest.mark.parametrize("name", POLICIES)
def test_the_books_balance(models, name):
    result = sampled(guarded(models, **POLICIES[name]), pairs.prompts(6), new=50)
    stats = result.stats
    assert stats.tokens == int(result.lengths.sum()) == stats.accepted_tokens + stats.target_tokens
    assert stats.drafted_tokens == stats.accepted_tokens + stats.rejected_tokens + stats.discarded_tokens
    records = [step for steps in result.steps for step in steps]
    assert stats.steps == len(records) == stats.accepted_steps + stats.target_steps
    assert stats.accepted_tokens == sum(len(step.tokens) for step in records if step.source == "draft")
    assert stats.target_tokens == sum(len(step.tokens) for step in records if step.source == "target")
    rejected = [step.rejected for step in records if step.rejected is not None]
    assert stats.rejected_steps == len(rejected)
    assert stats.rejected_tokens == sum(len(step.tokens) for step in rejected)
    for steps, row in zip(result.steps, pairs.rows_of(result), strict=True):
        assert [token for step in steps for token in step.tokens] == row
    assert 0 <= stats.speculated_accepted <= stats.speculated
    if name in ("speculative", "target"):
        assert stats.drafted_tokens == 0
    if name == "draft":
        assert stats.target_tokens == 0 == stats.target_passes


def test_the_target_reads_nothing_until_it_is_needed(models):
    """The paper's cost model: with the draft's own signals the target runs only to redo a step, and then catches up at once."""
    result = sampled(guarded(models, threshold=-1.0, candidates=2, repetition_limit=None), pairs.prompts(1), new=20)
    redone = result.stats.target_steps
    assert (result.stats.target_passes == 0) == (redone == 0)
    result = sampled(guarded(models, policy="random", accept_rate=0.0, fallback="plain"), pairs.prompts(1), new=20)
    read = result.stats.target_tokens + len(pairs.prompts(1)[0])
    assert result.stats.layer_executions == [read - 1] * 4


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["two models", "one model"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore:the (draft|target) has")
def test_the_target_scores_or_catches_up_on_each_of_the_drafts_tokens_once(models, name, own):
    """Its own tokens are no part of it, nor the prompt: alone it scores nothing, however many steps it writes."""
    result = sampled(guarded(models, own=own, **POLICIES[name]), pairs.prompts(6), new=50)
    stats = result.stats
    scores = "signal_model" in POLICIES[name]
    for steps in result.steps:
        if steps and steps[-1].source == "draft" and not scores:
            # What the draft wrote last, the target never had to read.
            written = [step.source for step in steps]
            last = len(written) - written[::-1].index("target") if "target" in written else 0
            stats.scored_tokens += sum(len(step.tokens) for step in steps[last:])
    read = stats.accepted_tokens + (_scored_and_rejected(result) if scores else 0)
    assert stats.scored_tokens == read
    if name in ("target", "speculative"):
        assert stats.scored_tokens == 0 < stats.target_tokens


def _scored_and_rejected(result):
    rejected = [step.rejected for steps in result.steps for step in steps if step.rejected is not None]
    return sum(len(step.tokens) for step in rejected if step.target is not None)


def test_a_slow_row_holds_up_nobody(models):
    """Turns until a short job is done are the same alone and beside a job with endless steps."""

    def turns(prompts, limits):
        guard = guarded(models, policy="random", accept_rate=0.5, candidates=2, max_step_tokens=200)
        engine = guard.engine(slots=1)
        numbers = []
        for prompt, limit in zip(prompts, limits, strict=True):
            request = guard.request([prompt], max_new_tokens=limit, eos_token_id=[], temperature=1.0)
            [row] = guard.rows(request)
            row.seed = 1
            numbers.append(engine.admit(row))
        count, ended = 0, {}
        while numbers[-1] not in ended:
            count += 1
            ended |= {one.number: count for one in engine.advance() if one.reason}
        return count, engine.rows[numbers[0]].tokens if numbers[0] in engine.rows else None

    alone, _ = turns([[5, 6]], [12])
    beside, slow = turns([[9, 1, 2], [5, 6]], [110, 12])
    assert beside == alone
    assert slow is not None


def test_long_prompts_are_read_in_pieces_between_turns(models):
    target = pairs.target(max_position_embeddings=2048)
    guard = StepVerified(target, None, pairs.tokenizer(), StepVerifiedConfig(policy="target", repetition_limit=None))
    engine = guard.engine(slots=2)

    def admit(prompt, limit):
        [row] = guard.rows(guard.request([prompt], max_new_tokens=limit, eos_token_id=[]))
        return engine.admit(row)

    short = admit([1, 2, 3], 30)
    engine.advance()
    long = admit(pairs.prompts(1, lengths=(1300,))[0], 2)
    lengths, tokens = [], 1
    while long in engine.rows and engine.target.rows[engine.rows[long].slot].length < 1300:
        tokens += sum(len(one.tokens) for one in engine.advance() if one.number == short)
        lengths.append(engine.target.rows[engine.rows[long].slot].length if long in engine.rows else 1300)
    piece = piece_of(guard.target)
    assert lengths[:3] == [piece, 2 * piece, 3 * piece]
    assert piece <= 512
    assert tokens >= 3


@pytest.mark.parametrize("busy", [False, True], ids=["nobody is answered", "somebody is answered"])
def test_a_short_prompt_does_not_queue_behind_a_long_one(busy):
    target = pairs.target(max_position_embeddings=4096)
    guard = StepVerified(target, None, pairs.tokenizer(), StepVerifiedConfig(policy="target", repetition_limit=None))
    engine = guard.engine(slots=3)

    def admit(prompt, limit):
        [row] = guard.rows(guard.request([prompt], max_new_tokens=limit, eos_token_id=[]))
        return engine.admit(row)

    if busy:
        admit([1, 2, 3], 60)
        engine.advance()
    long = admit(pairs.prompts(1, lengths=(3500,))[0], 2)
    engine.advance()
    assert engine.target.rows[engine.rows[long].slot].length == piece_of(guard.target)
    short = admit([4, 5], 3)
    turns = 0
    while short in engine.rows:
        engine.advance()
        turns += 1
    assert turns <= 4
    assert engine.target.rows[engine.rows[long].slot].length < 3500


def test_rows_come_and_go_and_leave_nothing_behind(models):
    guard = guarded(models, threshold=0.7, candidates=3)
    alone = {tuple(prompt): pairs.rows_of(sampled(guard, [prompt], new=25))[0] for prompt in pairs.prompts(6)}
    engine = guard.engine(slots=1)
    waiting, found, dropped = pairs.prompts(6), {}, 0
    numbers: dict[int, list[int]] = {}
    turn = 0
    while waiting or engine.rows:
        if waiting and turn % 3 == 0:
            prompt = waiting.pop()
            request = guard.request(
                [prompt],
                max_new_tokens=25,
                eos_token_id=pairs.EOS,
                temperature=0.9,
                top_p=0.95,
                generator=pairs.seeded(4),
            )
            number = engine.admit(guard.rows(request)[0])
            numbers[number], found[number] = prompt, []
        for one in engine.advance():
            found[one.number] += one.tokens
        turn += 1
        if turn == 8:
            victim = min(engine.rows)
            engine.drop(victim)
            engine.drop(victim)
            numbers.pop(victim)
            dropped += 1
    assert dropped == 1
    for number, prompt in numbers.items():
        assert found[number] == alone[tuple(prompt)]
    for state in engine.states:
        assert state.branches_in_use == 0
        assert state.cache.capacity == 64
        assert not any(state.cache.lengths)


def test_dropping_everything_at_any_moment_frees_every_branch_and_seat(models):
    guard = guarded(models, threshold=0.7, candidates=4)
    for turns in range(12):
        engine = guard.engine(slots=1)
        request = guard.request(pairs.prompts(3), max_new_tokens=20, temperature=1.0, generator=pairs.seeded(turns))
        numbers = [engine.admit(row) for row in guard.rows(request)]
        for _ in range(turns):
            engine.advance()
        for number in numbers:
            engine.drop(number)
        assert not engine.rows
        assert all(state.branches_in_use == 0 for state in engine.states)
        assert all(row.length == 0 and row.last_hidden is None for state in engine.states for row in state.rows)


def test_padding_on_either_side_changes_nothing(models):
    guard = guarded(models, threshold=0.7, candidates=2)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    wanted = pairs.rows_of(sampled(guard, prompts))
    for rows, mask in (
        ([[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]], [[1] * 5, [0, 0, 1, 1, 1]]),
        ([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]], [[1] * 5, [1, 1, 1, 0, 0]]),
    ):
        result = guard.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=40,
            eos_token_id=pairs.EOS,
            temperature=0.9,
            top_p=0.95,
            generator=pairs.seeded(4),
        )
        assert pairs.rows_of(result) == wanted


def test_a_logits_processor_is_obeyed_by_every_source(models):
    def only_even(ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores

    for name in ("k-sample", "spec", "speculative", "target"):
        guard = guarded(models, **POLICIES[name])
        for temperature in (0.0, 1.0):
            result = guard.generate(
                pairs.prompts(3),
                max_new_tokens=12,
                eos_token_id=[],
                temperature=temperature,
                logits_processor=only_even,
                generator=pairs.seeded(),
            )
            assert not any(token % 2 for row in pairs.rows_of(result) for token in row)
