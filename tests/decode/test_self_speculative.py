"""Self-speculation gives what plain decoding gives: token for token when greedy, in law when sampling."""

from __future__ import annotations

import pytest
import torch
from tests.decode.models_that_draft import drafting_model, random_prompt
from tests.models.tiny_models import CONFIGS, tiny_model

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.errors import UnsupportedModelError
from telltale.models import open_decoder

BACKENDS = ("native", "fused", "module")
EXITS = (1, 2, 3)


def opened(backend, *, exact=False, **shape):
    try:
        return open_decoder(drafting_model(**shape), backend=backend, exact=exact)
    except UnsupportedModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=BACKENDS)
def decoder(request):
    return opened(request.param)


@pytest.fixture(scope="module")
def quick():
    return open_decoder(drafting_model())


def new_tokens(result) -> list[list[int]]:
    return [row[:length] for row, length in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("exit_layer", [*EXITS, "auto"])
@pytest.mark.parametrize("drafter", ["exit", "ngram", "both"])
def test_greedy_equals_plain_decoding(decoder, exit_layer, drafter):
    plain = Autoregressive(decoder)
    lengths = range(1, 13) if decoder.backend == "native" else (1, 3, 8)
    for draft_length in (*lengths, "auto"):
        method = SelfSpeculative(decoder, exit_layer, draft_length, drafter=drafter)
        for seed, new in ((1, 1), (2, 2), (3, 3), (4, 17), (5, 40)):
            prompt = random_prompt(seed, 1 if seed == 4 else 5 * seed)
            wanted = plain.generate(prompt, max_new_tokens=new)
            given = method.generate(prompt, max_new_tokens=new)
            assert new_tokens(given) == new_tokens(wanted)
            assert given.stop_reason == ["length"]


@pytest.mark.parametrize("new", range(1, 41))
def test_every_number_of_new_tokens(quick, new):
    prompt = random_prompt(new, 6)
    wanted = Autoregressive(quick).generate(prompt, max_new_tokens=new)
    for exit_layer in EXITS:
        given = SelfSpeculative(quick, exit_layer, 1 + new % 12).generate(prompt, max_new_tokens=new)
        assert new_tokens(given) == new_tokens(wanted)


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["exit", "both"])
def test_ragged_batches_equal_single_rows(decoder, drafter):
    prompts = [random_prompt(seed, length) for seed, length in enumerate((1, 9, 4, 17))]
    plain = Autoregressive(decoder)
    free = [new_tokens(plain.generate(prompt, max_new_tokens=30))[0] for prompt in prompts]
    eos = [free[0][7], free[1][12]]
    alone = [plain.generate(prompt, max_new_tokens=30, eos_token_id=eos) for prompt in prompts]
    assert len({int(result.lengths) for result in alone}) > 1
    for draft_length in (0, 1, 4, "auto"):
        for method in (SelfSpeculative(decoder, 2, draft_length, drafter=drafter), plain):
            given = method.generate(prompts, max_new_tokens=30, eos_token_id=eos, pad_token_id=3)
            assert new_tokens(given) == [new_tokens(result)[0] for result in alone]
            assert given.stop_reason == [result.stop_reason[0] for result in alone]
            for row, length in zip(given.tokens, given.lengths.tolist(), strict=True):
                assert row[length:].eq(3).all()


def test_padding_on_either_side_is_the_same(quick):
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5]]
    wanted = SelfSpeculative(quick, 2, 3).generate(prompts, max_new_tokens=9)
    left = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    right = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]])
    for ids, mask in ((left, [[0, 0, 1, 1, 1], [1] * 5]), (right, [[1, 1, 1, 0, 0], [1] * 5])):
        given = SelfSpeculative(quick, 2, 3).generate(ids, max_new_tokens=9, attention_mask=torch.tensor(mask))
        assert torch.equal(given.tokens, wanted.tokens)


@pytest.mark.parametrize("drafter", ["exit", "ngram"])
@pytest.mark.parametrize("draft_length", [1, 3, 12])
def test_an_end_token_ends_the_output_wherever_it_comes(quick, drafter, draft_length):
    prompt = random_prompt(11, 8)
    free = new_tokens(Autoregressive(quick).generate(prompt, max_new_tokens=24))[0]
    for place, token in enumerate(free):
        first = free.index(token)
        given = SelfSpeculative(quick, 2, draft_length, drafter=drafter).generate(
            prompt, max_new_tokens=24, eos_token_id=token
        )
        assert new_tokens(given) == [free[: first + 1]], place
        assert given.stop_reason == ["eos"]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_family(name):
    model = tiny_model(name)
    prompt = random_prompt(0, 9, 97)
    wanted = Autoregressive(model).generate(prompt, max_new_tokens=20)
    given = SelfSpeculative(model, 2, 4).generate([prompt, prompt[:3]], max_new_tokens=20)
    assert new_tokens(given)[0] == new_tokens(wanted)[0]


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_mode_is_bit_identical_in_bfloat16(backend):
    model = drafting_model().to(torch.bfloat16)
    try:
        decoder = open_decoder(model, backend=backend, exact=True)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    plain = Autoregressive(decoder, exactness="exact")
    for seed in range(4):
        prompt = random_prompt(seed, 7)
        wanted = plain.generate(prompt, max_new_tokens=40)
        for exit_layer, draft_length in ((1, 5), (2, 3), (3, 12)):
            given = SelfSpeculative(decoder, exit_layer, draft_length, exactness="exact", drafter="both").generate(
                prompt, max_new_tokens=40
            )
            assert torch.equal(given.tokens, wanted.tokens)
            assert given.stats.exactness == "exact"


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["exit", "ngram", "both"])
def test_work_is_conserved(decoder, drafter):
    for exit_layer, draft_length in ((1, 4), (2, 3), (3, 7)):
        result = SelfSpeculative(decoder, exit_layer, draft_length, drafter=drafter).generate(
            random_prompt(3, 10), max_new_tokens=33
        )
        stats = result.stats
        passes = stats.rounds + stats.plain_steps
        assert stats.layer_executions == [10 + stats.drafted + passes] * 4
        assert stats.tokens == 33 == 1 + stats.accepted + passes


def test_statistics(quick):
    stats = SelfSpeculative(quick, 2, 5, drafter="both").generate(random_prompt(5, 12), max_new_tokens=120).stats
    assert 0 < stats.acceptance_rate < 1
    assert stats.accepted_by_position == sorted(stats.accepted_by_position, reverse=True)
    assert sum(stats.drafted_by_position) == stats.drafted == sum(stats.drafted_by_source.values())
    assert sum(stats.accepted_by_position) == stats.accepted == sum(stats.accepted_by_source.values())
    assert stats.tokens_per_verify == pytest.approx(119 / (stats.rounds + stats.plain_steps))
    nothing = SelfSpeculative(quick, 2, 0).generate([1, 2], max_new_tokens=5).stats
    assert nothing.acceptance_rate == 0.0
    assert nothing.rounds == 0


@pytest.mark.parametrize("backend", ["native", "fused"])
def test_drafting_with_all_layers_is_always_accepted(backend):
    method = SelfSpeculative(opened(backend), 3, 5)
    method.plans.exit_layer = 4
    stats = method.generate(random_prompt(2, 9), max_new_tokens=31).stats
    assert stats.acceptance_rate == 1.0
    assert stats.tokens_per_verify == 6.0


@pytest.mark.parametrize("drafter", ["exit", "ngram", "both"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_stream_is_the_output(quick, drafter, temperature):
    options = {"max_new_tokens": 25, "temperature": temperature}
    for method in (Autoregressive(quick), SelfSpeculative(quick, 2, 3, drafter=drafter)):
        whole = method.generate([4, 5, 6], **options, generator=torch.Generator().manual_seed(3))
        pieces = list(method.stream([4, 5, 6], **options, generator=torch.Generator().manual_seed(3)))
        assert [token for piece in pieces for token in piece] == whole.tokens[0].tolist()
        rows = list(method.stream([[4, 5, 6], [7]], **options))
        assert [sum(len(step[row]) for step in rows) for row in (0, 1)] == [25, 25]


def test_streaming_leaves_the_consumer_out_of_inference_mode(quick):
    for _ in SelfSpeculative(quick, 2, 3).stream([1, 2], max_new_tokens=4):
        assert not torch.is_inference_mode_enabled()


def test_confidence_shortens_drafts_and_keeps_the_output(quick):
    wanted = Autoregressive(quick).generate([9, 8, 7], max_new_tokens=40)
    bold = SelfSpeculative(quick, 2, 6).generate([9, 8, 7], max_new_tokens=40)
    shy = SelfSpeculative(quick, 2, 6, confidence=0.9).generate([9, 8, 7], max_new_tokens=40)
    assert torch.equal(shy.tokens, wanted.tokens)
    assert shy.stats.drafted < bold.stats.drafted


def test_sampling_without_drafts_draws_as_plain_sampling(quick):
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4]]):
        options = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 10, "top_p": 0.9}
        wanted = Autoregressive(quick).generate(prompts, **options, generator=torch.Generator().manual_seed(5))
        given = SelfSpeculative(quick, 2, 0).generate(prompts, **options, generator=torch.Generator().manual_seed(5))
        assert torch.equal(given.tokens, wanted.tokens)


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["exit", "ngram"])
def test_sampled_output_has_the_law_of_plain_sampling(drafter):
    """The joint law of three sampled tokens over a vocabulary of four, computed exactly, against 6,000 rows."""
    model = drafting_model(2, vocabulary_size=4, late=1.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    prompt, temperature = [1, 2, 3, 1, 2], 1.3
    law = torch.ones(1)
    with torch.inference_mode():
        for depth in range(3):
            tails = (
                torch.cartesian_prod(*[torch.arange(4)] * depth).view(4**depth, depth) if depth else torch.empty(1, 0)
            )
            ids = torch.cat([torch.tensor(prompt).expand(4**depth, -1), tails.long()], 1)
            step = (model(ids).logits[:, -1] / temperature).softmax(-1)
            law = (law.view(-1, 1) * step).view(-1)
    method = SelfSpeculative(open_decoder(model, backend="fused"), 2, 2, drafter=drafter)
    generator = torch.Generator().manual_seed(0)
    result = method.generate([prompt] * 6_000, max_new_tokens=3, temperature=temperature, generator=generator)
    codes = (result.tokens * torch.tensor([16, 4, 1])).sum(-1)
    share = torch.bincount(codes, minlength=64).double() / 6_000
    error = (law.double() * (1 - law.double()) / 6_000).sqrt()
    assert ((share - law).abs() <= 4 * error + 1e-9).all()
    assert 0 < result.stats.acceptance_rate < 1
