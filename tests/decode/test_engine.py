"""One engine for rows of every method: the same tokens in any company, blocks that are cut at a stop, plans that are shared."""

from __future__ import annotations

import math

import pytest
import torch
from tests.decode.models_that_draft import drafting_model, random_prompt
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from telltale.decode import Autoregressive, SelfSpeculative, StepVerified, StepVerifiedConfig, reading
from telltale.decode.planner import Plans
from telltale.decode.stopping import StepText, StopConditions, TextReader
from telltale.models.open import open_decoder

POLICIES = ("target", "speculative", "draft", "random")


class Letters:
    """Token i is the i-th letter; the text of step decoding ends with "e"."""

    def decode(self, tokens, **_):
        return "".join(chr(97 + token % 26) for token in tokens)

    def get_vocab(self):
        return {str(token): token for token in range(64)}


@pytest.fixture(scope="module")
def decoder():
    return open_decoder(drafting_model())


def new_tokens(result) -> list[list[int]]:
    return [row[:length] for row, length in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def guarded(decoder, policy="target", **options):
    settings = {"delimiter": "e", "max_step_tokens": 9, "exit_layer": 2, "draft_length": 3, "candidates": 2}
    extra = {"accept_rate": 0.5} if policy == "random" else {}
    return StepVerified(decoder, None, Letters(), StepVerifiedConfig(policy=policy, **settings, **extra), **options)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_of_every_method_share_an_engine_and_are_what_each_is_alone(decoder, temperature):
    served = guarded(decoder, "random")
    sampling = {"max_new_tokens": 40, "eos_token_id": [7], "temperature": temperature}
    alone, rows = [], []
    for place, policy in enumerate(POLICIES * 2):
        one = guarded(decoder, policy)
        prompt = random_prompt(place, 3 + 4 * place)
        alone.append(new_tokens(one.generate(prompt, generator=seeded(place), **sampling))[0])
        rows += served.rows(served.request(prompt, generator=seeded(place), **sampling), one.config)
    engine = served.engine(slots=3)
    found: dict[int, list[int]] = {}
    waiting = list(rows)
    while waiting or engine.rows:
        if waiting:
            found[engine.admit(waiting.pop(0))] = []
        for committed in engine.advance():
            found[committed.number] += committed.tokens
    assert list(found.values()) == alone == [row.tokens for row in rows]
    assert not any(engine.target.cache.lengths)
    assert engine.target.branches_in_use == engine.draft.branches_in_use == 0


@pytest.mark.parametrize("draft_length", [0, 3])
@pytest.mark.parametrize("drafter", ["exit", "ngram"])
def test_sampled_rows_are_the_same_alone_in_company_reordered_and_streamed(decoder, drafter, draft_length):
    method = SelfSpeculative(decoder, 2, draft_length, drafter=drafter)
    prompts = [random_prompt(seed, length) * 2 for seed, length in enumerate((3, 9, 5, 12, 4))]
    options = {"max_new_tokens": 30, "temperature": 0.9, "top_p": 0.95, "eos_token_id": [7, 11]}
    together = new_tokens(method.generate(prompts, **options, generator=seeded()))
    assert len({len(row) for row in together}) > 1
    for prompt, row in zip(prompts, together, strict=True):
        assert new_tokens(method.generate(prompt, **options, generator=seeded())) == [row]
    order = [3, 1, 4]
    reordered = method.generate([prompts[place] for place in order], **options, generator=seeded())
    assert new_tokens(reordered) == [together[place] for place in order]
    pieces = list(method.stream(prompts, **options, generator=seeded()))
    assert [[token for piece in pieces for token in piece[row]] for row in range(5)] == together
    assert new_tokens(method.generate(prompts, **options, generator=seeded(4))) != together


@pytest.mark.parametrize("second_model", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_that_nears_the_last_position_shortens_nobody_elses_drafts(second_model, temperature):
    target = open_decoder(drafting_model(max_position_embeddings=64))
    draft = open_decoder(drafting_model(late=0.1, max_position_embeddings=64)) if second_model else None
    settings = {} if second_model else {"exit_layer": 2}
    config = StepVerifiedConfig(policy="speculative", draft_length=7, delimiter="e", **settings)
    method = StepVerified(target, draft, Letters(), config)
    options = {"eos_token_id": [], "temperature": temperature}
    asked = [(random_prompt(1, 56), 8), (random_prompt(2, 4), 60), (random_prompt(3, 60), 3), (random_prompt(4, 9), 31)]
    alone, rows = [], []
    engine = method.engine(slots=4)
    for place, (prompt, count) in enumerate(asked):
        one = method.generate(prompt, max_new_tokens=count, generator=seeded(place), **options)
        alone.append((new_tokens(one)[0], one.stats.speculated))
        rows += method.rows(method.request(prompt, max_new_tokens=count, generator=seeded(place), **options))
        engine.admit(rows[-1])
    while engine.rows:
        engine.advance()
    assert [(row.tokens, row.stats.speculated) for row in rows] == alone


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_passes_of_early_layers_that_speculate_are_counted_as_the_drafts(decoder, temperature):
    method = guarded(decoder, "speculative")
    options = {"max_new_tokens": 20, "eos_token_id": [], "temperature": temperature}
    stats = method.generate(random_prompt(6, 5), generator=seeded(), **options).stats
    # The prompt's pass, one for each draft, and one more in each round that drafts, which the target's pass goes on from.
    rounds = stats.target_passes - 1
    assert stats.speculated + 1 < stats.draft_passes <= 1 + stats.speculated + rounds


@pytest.mark.parametrize("block", [1, 5, 16])
def test_a_block_is_cut_at_a_stop_string_and_the_caches_with_it(decoder, block):
    free = new_tokens(Autoregressive(decoder).generate([7, 8], max_new_tokens=60))[0]
    text = Letters().decode(free)
    for method in (guarded(decoder), guarded(decoder, "speculative")):
        for place in (2, 9, 17, 33):
            stop = text[place : place + 4]
            request = method.request([7, 8], max_new_tokens=60, eos_token_id=[], stop_strings=[stop])
            [row] = method.rows(request)
            engine = method.engine()
            engine.admit(row)
            while engine.rows:
                engine.advance(block)
                assert engine.target.cache.lengths[0] == (row.length - 1 if engine.rows else 0)
            assert row.tokens == free[: text.index(stop) + 4]
            assert row.reason == "stop_string"
            assert [token for step in row.steps for token in step.tokens] == row.tokens


def test_a_waiting_row_gets_its_turn_after_one_block(decoder):
    method = guarded(decoder)
    first, second = (method.rows(method.request([token], max_new_tokens=200, eos_token_id=[]))[0] for token in (7, 9))
    engine = method.engine()
    engine.admit(first)
    while len(first.tokens) < 30:
        before = len(first.tokens)
        engine.advance()
        assert len(first.tokens) - before <= 16
    engine.admit(second)
    before = len(first.tokens)
    engine.advance()
    assert len(second.tokens) == 1
    assert len(first.tokens) == before + 1, "beside another row a greedy row gets a token a turn"


def test_a_long_prompt_is_read_in_short_pieces_beside_others_and_no_bit_depends_on_them(decoder, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE", 0.0)
    method, prompts = guarded(decoder), (random_prompt(1, 5), random_prompt(2, 150))
    alone = [new_tokens(method.generate(prompt, max_new_tokens=24, eos_token_id=[]))[0] for prompt in prompts]
    first, second = (method.rows(method.request(p, max_new_tokens=24, eos_token_id=[]))[0] for p in prompts)
    engine, waited = method.engine(slots=2), []
    engine.admit(first)
    while not first.tokens:
        engine.advance()
    engine.admit(second)
    while engine.rows:
        engine.advance()
        if not second.tokens:
            waited.append(len(first.tokens))
    assert [first.tokens, second.tokens] == alone
    # After the first piece, which tells how long a token takes, a turn reads sixteen tokens.
    assert len(waited) >= 6
    assert waited == list(range(waited[0], waited[0] + len(waited)))


@pytest.mark.parametrize("drafter", ["exit", "ngram", "both"])
@pytest.mark.parametrize("numbers", [(2, 3), ("auto", "auto")])
def test_a_plan_is_shared_by_the_rows_that_come_and_go(decoder, drafter, numbers):
    plans = Plans(decoder, *numbers, drafter)
    plan = plans.plan(1) if plans.fixed else plans.by_size((1, 4))
    method = guarded(decoder, "speculative", plan=plan)
    prompts = [random_prompt(seed, 6) * 2 for seed in range(7)]
    wanted = [new_tokens(Autoregressive(decoder).generate(p, max_new_tokens=50, eos_token_id=[]))[0] for p in prompts]
    assert new_tokens(method.generate(prompts, max_new_tokens=50, eos_token_id=[])) == wanted
    for prompt, row in zip(prompts, wanted, strict=True):
        assert new_tokens(method.generate(prompt, max_new_tokens=50, eos_token_id=[])) == [row]
    sampled = {"max_new_tokens": 20, "eos_token_id": [], "temperature": 0.9}
    own = guarded(decoder, "speculative").generate(prompts, **sampled, generator=seeded())
    assert torch.equal(method.generate(prompts, **sampled, generator=seeded()).tokens, own.tokens)


@pytest.mark.parametrize("fallback", ["k-sample", "plain", "spec"])
@pytest.mark.parametrize("config", [{"threshold": math.inf}, {"policy": "random", "accept_rate": 0.0}])
def test_where_nothing_can_pass_the_output_is_the_targets_and_nothing_is_drafted(decoder, fallback, config):
    settings = {"delimiter": "e", "candidates": 4, "fallback": fallback, "beta": 1.0} | config
    method = StepVerified(decoder, open_decoder(drafting_model(late=0.1)), Letters(), StepVerifiedConfig(**settings))
    target = StepVerified(decoder, None, Letters(), StepVerifiedConfig(policy="target", delimiter="e"))
    options = {"max_new_tokens": 40, "eos_token_id": [], "temperature": 0.8}
    prompts = [random_prompt(seed, 5) for seed in range(4)]
    given = method.generate(prompts, **options, generator=seeded())
    assert new_tokens(given) == new_tokens(target.generate(prompts, **options, generator=seeded()))
    stats = given.stats
    assert stats.draft_passes == stats.drafted_tokens == stats.target_discarded_tokens == stats.speculated == 0
    assert stats.steps == stats.target_steps == sum(len(steps) for steps in given.steps) > 4


def test_a_delimiter_or_stop_string_that_ends_in_a_space_is_seen_with_sentencepiece():
    pieces = {"<unk>": 0, "</s>": 1, "\N{LOWER ONE EIGHTH BLOCK}One": 2, ".": 3, "\N{LOWER ONE EIGHTH BLOCK}Two": 4}
    whole = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>"))
    replaced = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    whole.decoder = decoders.Sequence([replaced, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>", unk_token="<unk>")
    steps = StepText(tokenizer, ". ")
    assert [steps.ends([2, 3, 4][:count]) for count in (1, 2, 3)] == [False, False, True]
    stopping = StopConditions(50, stop_strings=(". ",), reader=TextReader(tokenizer))
    assert stopping.first_end([], 0, [2, 3, 4, 2]) == (3, "stop_string")
