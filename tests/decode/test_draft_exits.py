"""Draft exits change the speed alone: the same drafts from every backend, plain decoding's output, and its law when sampling."""

from __future__ import annotations

import pytest
import torch
from tests.decode.models_that_draft import LATE, drafting_model, exits_for, random_prompt

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.decode.costs_report import best_draft, draft_bound, exit_acceptance, tune
from telltale.decode.pass_costs import costs_of
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.draft_exits import MATRICES, READS, attached, draft_states
from telltale.models.exits import draft_acceptance, exit_quality
from telltale.models.int8_weights import quantize

BACKENDS = ("native", "fused", "module")


def opened(backend, *, dtype=torch.float32, int8=False, **shape):
    model = drafting_model(**shape).to(dtype)
    if int8:
        quantize(model, dtype)
    try:
        decoder = open_decoder(model, backend=backend)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    with attached(model, exits_for(model)):
        decoder.open_draft_exits()
    return decoder


def new_tokens(result) -> list[list[int]]:
    return [row[:length] for row, length in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)]


def draft(decoder, exit_layer, prompts, length=5):
    """Greedy drafts behind prompts of several lengths, the exit's states, and the cache they lie in."""
    cache, longest = decoder.new_cache(len(prompts), 64), max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    decoder.forward(ids, cache, [0] * len(prompts))
    since = [len(prompt) - 1 for prompt in prompts]
    last = [prompt[-1] for prompt in prompts]
    return *decoder.draft_greedy(last, since, exit_layer=exit_layer, length=length, cache=cache), cache, since


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("backend", ["native", "fused"])
def test_every_backend_drafts_what_the_module_backend_does(backend, int8):
    prompts = [random_prompt(seed, length) for seed, length in enumerate((9, 4, 1))]
    for exit_layer in (1, 2):
        reference, given = opened("module", int8=int8), opened(backend, int8=int8)
        wanted, states, cache, since = draft(reference, exit_layer, prompts)
        drafts, own_states, own_cache, _ = draft(given, exit_layer, prompts)
        assert drafts == wanted
        assert len({token for row in drafts for token in row}) > 2
        for step in (0, 2, 4):
            places = [first + step for first in since]
            one = slice(step, step + 1)
            mine = given.exit_logits(own_states[:, one], exit_layer, own_cache, places, since=since)
            theirs = reference.exit_logits(states[:, one], exit_layer, cache, places, since=since)
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        seen = given.exit_greedy(own_states, exit_layer, own_cache, since)
        assert seen.tolist() == reference.exit_greedy(states, exit_layer, cache, since).tolist()


def test_native_drafts_in_bfloat16_are_near_pytorchs():
    prompts = [random_prompt(1, 7), random_prompt(2, 12)]
    native, fused = opened("native", dtype=torch.bfloat16), opened("fused", dtype=torch.bfloat16)
    _, states, cache, since = draft(fused, 2, prompts)
    wanted = fused.exit_logits(states[:, :1], 2, cache, since, since=since)
    given = native.exit_logits(states[:, :1], 2, cache, since, since=since)
    torch.testing.assert_close(given, wanted, atol=0.03 * float(wanted[wanted.isfinite()].abs().max()), rtol=0)


def test_the_first_maps_are_for_the_first_steps():
    model = drafting_model()
    decoder, exits = opened("fused"), exits_for(model)
    prompt = random_prompt(3, 8)
    _, states, cache, since = draft(decoder, 2, [prompt])
    weights = exits.exits[2].weights
    values = torch.cat([cache.read(layer, 20)[1][0, :, since[0] - 1].flatten() for layer in LATE])
    for step in range(4):
        given = decoder.exit_logits(states[:, step : step + 1], 2, cache, [since[0] + step], since=since)[0, 0]
        normed = draft_states(weights, states[0, step], values, step)
        wanted = torch.full((64,), -torch.inf)
        wanted[exits.shortlist] = decoder.parts.head.weight[exits.shortlist] @ normed
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
def test_greedy_output_is_plain_decodings(backend, draft_length):
    decoder = opened(backend)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((1, 9, 4))]
    wanted = Autoregressive(decoder).generate(prompts, max_new_tokens=40, eos_token_id=[])
    for drafter in ("exit", "both"):
        method = SelfSpeculative(decoder, "auto" if draft_length == "auto" else 2, draft_length, drafter=drafter)
        given = method.generate(prompts, max_new_tokens=40, eos_token_id=[])
        assert new_tokens(given) == new_tokens(wanted)
        if draft_length != "auto" and drafter == "exit":
            assert 0 < given.stats.accepted < given.stats.drafted
            assert set(given.stats.rounds_by_exit) == {2}


@pytest.mark.parametrize("processed", [False, True])
def test_sampled_output_has_the_law_of_plain_sampling(processed):
    """As in test_self_speculative, with drafts from half of the vocabulary; the processor forbids this half in every second row."""
    model = drafting_model(2, vocabulary_size=4, late=1.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    prompt, temperature, allowed = [1, 2, 3, 1, 2], 1.3, torch.tensor([True, not processed, not processed, True])
    law = torch.ones(1)
    with torch.inference_mode():
        for depth in range(3):
            parts = [torch.arange(4)] * depth
            tails = torch.cartesian_prod(*parts).view(4**depth, depth) if depth else torch.empty(1, 0)
            ids = torch.cat([torch.tensor(prompt).expand(4**depth, -1), tails.long()], 1)
            logits = model(ids).logits[:, -1].masked_fill(~allowed, -torch.inf)
            law = (law.view(-1, 1) * (logits / temperature).softmax(-1)).view(-1)
    decoder = open_decoder(model, backend="fused")
    with attached(model, exits_for(model)):
        decoder.open_draft_exits()
    assert decoder.draft_heads.shortlist.tolist() == [1, 2]
    method = SelfSpeculative(decoder, 2, 2)
    count = 400 if processed else 6_000
    result = method.generate(
        [prompt] * count,
        max_new_tokens=3,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
        logits_processor=(lambda ids, scores: scores.masked_fill(~allowed, -torch.inf)) if processed else None,
    )
    codes = (result.tokens * torch.tensor([16, 4, 1])).sum(-1)
    share = torch.bincount(codes, minlength=64).double() / count
    error = (law.double() * (1 - law.double()) / count).sqrt()
    assert ((share - law).abs() <= 4 * error + 1e-9).all()
    assert 0 < result.stats.acceptance_rate < 1


def test_the_planner_takes_draft_exits_alone_and_knows_what_they_cost():
    decoder = opened("fused")
    plain = open_decoder(drafting_model(), backend="fused")
    assert (decoder.drafting_exits, plain.drafting_exits) == ([1, 2], [1, 2, 3])
    hidden, shortlist = 64, 42
    assert decoder.hidden_size == hidden
    late = 2 * decoder.kv_heads * decoder.head_dim
    weighed = shortlist * hidden + hidden * hidden + hidden * late + 3 * 24 * hidden
    assert decoder.draft_head_weight(2) == weighed
    assert decoder.draft_head_weight(3) == plain.draft_head_weight(2) == 64 * hidden
    costs = costs_of(decoder, 1)
    step = (costs.draft(2, 2) - costs.draft(2, 1)) / costs.step
    layer = sum(parameter.numel() for parameter in decoder.parts.layers[0].parameters())
    assert step == pytest.approx(2 + weighed / layer)
    result = SelfSpeculative(decoder).generate(random_prompt(4, 20), max_new_tokens=60, eos_token_id=[])
    assert set(result.stats.rounds_by_exit) <= {1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_exit_drafts_at_each_step_is_known_for_all_places_of_a_text(backend):
    decoder = opened(backend)
    prompt = random_prompt(5, 6)
    written = Autoregressive(decoder).generate(prompt, max_new_tokens=30, eos_token_id=[]).tokens[0].tolist()
    text = torch.tensor([prompt + written])
    cache = decoder.new_cache(1, 64)
    states = decoder.run(decoder.embed(text), 0, 2, cache, [0])
    decoder.run(states, 2, decoder.layers, cache, [0])
    known = [decoder.draft_heads.drafts(states, 2, cache, step)[0].tolist() for step in range(5)]
    compared, right = 0, torch.zeros(5)
    # From the end on: drafts write into the early layers' cache behind their beginning.
    for place in range(len(text[0]) - 6, 0, -1):
        [drafts], _ = decoder.draft_greedy([int(text[0, place])], [place], exit_layer=2, length=5, cache=cache)
        for step, draft in enumerate(drafts):
            assert draft == known[step][place + step]
            compared += 1
            if draft != int(text[0, place + step + 1]):
                break
            right[step] += 1
    assert compared > 40
    assert right[2] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_loop_goes_beyond_the_models_positions(backend):
    decoder = opened(backend, max_positions=24)
    prompt = random_prompt(6, 20)
    cache = decoder.new_cache(1, 24)
    decoder.forward(torch.tensor([prompt]), cache, [0])
    assert len(decoder.decode_greedy(1, 20, count=4, cache=cache)) == 4
    assert len(decoder.draft_greedy([1], [20], exit_layer=2, length=3, cache=cache)[0][0]) == 3
    for exit_layer in (2, 3):
        with pytest.raises(ConfigError, match="make 25 positions; the model has 24"):
            decoder.draft_greedy([1], [20], exit_layer=exit_layer, length=4, cache=cache)
    with pytest.raises(ConfigError, match="25 positions"):
        decoder.decode_greedy(1, 20, count=5, cache=cache)
    with pytest.raises(ConfigError, match="25 positions"):
        decoder.score_greedy([1] * 5, 20, cache=cache)
    wanted = Autoregressive(decoder).generate([prompt, prompt[:4]], max_new_tokens=4, eos_token_id=[])
    for drafter, length in (("exit", 6), ("both", 6), ("both", "auto")):
        method = SelfSpeculative(decoder, 2, length, drafter=drafter)
        assert new_tokens(method.generate([prompt, prompt[:4]], max_new_tokens=4, eos_token_id=[])) == new_tokens(
            wanted
        )
        with pytest.raises(ConfigError, match="25 positions"):
            method.generate([prompt, prompt[:4]], max_new_tokens=5)


def test_acceptance_is_told_by_draft_step():
    model = drafting_model()
    exits = exits_for(model)
    # Maps that are no good: of the second draft, and of all later ones.
    for name in READS[1:]:
        exits.exits[2].weights[name].mul_(100.0)
    decoder = open_decoder(model, backend="fused")
    assert draft_acceptance(decoder, []) == {}
    with attached(model, exits):
        decoder.open_draft_exits()
    text = torch.tensor([random_prompt(seed, 40) for seed in range(4)])
    quality = exit_quality(model, [text])
    found = exit_acceptance(decoder, quality, [text])
    assert found[3] == [quality.agreement[2]]
    assert [len(found[layer]) for layer in (1, 2)] == [3, 3]
    first, second, third = found[2]
    assert first > second + 0.1 > third
    assert found[1][0] == pytest.approx(found[1][1], abs=0.1)


def test_a_server_chooses_among_draft_exits(monkeypatch):
    class Tokenizer:
        bos_token_id = None
        all_special_ids = ()

        def get_vocab(self):
            return {str(token): token for token in range(64)}

    decoder = opened("fused")
    assert tune(decoder, Tokenizer()).exit_layer in (1, 2)


def test_the_bound_is_the_acceptance_that_gives_the_goal():
    class Costs:
        """A draft costs a tenth of a token, wide passes nothing more."""

        plain = 1.0

        def draft(self, exit_layer, length):
            return 0.1 * length

        def speedup(self, exit_layer, length, rate):
            return (1 + rate * length) / (1.0 + self.draft(exit_layer, length))

    bound = draft_bound(Costs(), 2)
    assert bound.cost == pytest.approx(0.1)
    assert best_draft(Costs(), 2, [bound.needed])[0] >= 1.3 > best_draft(Costs(), 2, [bound.needed - 0.01])[0]
    assert best_draft(Costs(), 2, [0.8, 0.0]) == (pytest.approx(1.8 / 1.1), 1)


@pytest.mark.parametrize("name", MATRICES)
def test_exits_of_another_shape_are_refused(name):
    from telltale.errors import CheckpointError

    model = drafting_model()
    exits = exits_for(model)
    exits.exits[1].weights[name] = exits.exits[1].weights[name][:, :-1]
    decoder = open_decoder(model, backend="fused")
    with attached(model, exits), pytest.raises(CheckpointError, match="for another model"):
        decoder.open_draft_exits()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_draft_what_one_does_to_the_bit(dtype):
    model = drafting_model().to(dtype)
    prompts = [random_prompt(seed, length) for seed, length in enumerate((9, 4, 6))]
    found = []
    for threads in (1, 2):
        try:
            decoder = open_decoder(model, backend="native", threads=threads)
        except UnsupportedModelError as error:
            pytest.skip(str(error))
        with attached(model, exits_for(model)):
            decoder.open_draft_exits()
        drafts, states, cache, since = draft(decoder, 2, prompts)
        places = [first + 1 for first in since]
        found.append((drafts, decoder.exit_logits(states[:, 1:2], 2, cache, places, since=since)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_an_adapter_on_the_head_is_refused_when_the_exits_are_opened():
    peft = pytest.importorskip("peft")
    model = drafting_model()
    exits = exits_for(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)).eval()
    prompt = random_prompt(7, 6)
    with attached(model, exits):
        plain = Autoregressive(tuned).generate(prompt, max_new_tokens=12, eos_token_id=[])
        copied = SelfSpeculative(tuned, drafter="ngram").generate(prompt, max_new_tokens=12, eos_token_id=[])
        assert new_tokens(copied) == new_tokens(plain)
        with pytest.raises(UnsupportedModelError, match="Merge the adapter into the head"):
            SelfSpeculative(tuned)
        merged = tuned.merge_and_unload()
    with attached(merged, exits):
        drafted = SelfSpeculative(merged, 2, 3).generate(prompt, max_new_tokens=12, eos_token_id=[])
    assert new_tokens(drafted) == new_tokens(
        Autoregressive(merged).generate(prompt, max_new_tokens=12, eos_token_id=[])
    )
    assert drafted.stats.drafted > 0
