"""Bad input is refused before any compute and leaves the model as it was; processors, stop strings, end tokens."""

from __future__ import annotations

import pytest
import torch
from tests.decode.models_that_draft import drafting_model
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.models import open_decoder


@pytest.fixture(scope="module")
def decoder():
    return open_decoder(drafting_model())


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    def decode(self, tokens, **_):
        return "".join(chr(97 + token % 26) for token in tokens)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": []},
        {"input_ids": [[1, 2], []]},
        {"input_ids": torch.empty(1, 0, dtype=torch.int64)},
        {"input_ids": torch.zeros(1, 3)},
        {"input_ids": torch.ones(1, 3, dtype=torch.bool)},
        {"input_ids": torch.zeros(1, 1, 3, dtype=torch.int64)},
        {"input_ids": [1, 64]},
        {"input_ids": [-1]},
        {"input_ids": [True]},
        {"input_ids": [1.0]},
        {"input_ids": "text"},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"max_new_tokens": 5000},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": True},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": True},
        {"generator": 3},
        {"eos_token_id": 1.5},
        {"eos_token_id": [True]},
        {"pad_token_id": -1},
        {"logits_processor": 5},
        {"stop_strings": "x"},
        {"stop_strings": [""], "tokenizer": Letters()},
        {"attention_mask": torch.tensor([[1, 1]])},
        {"attention_mask": torch.tensor([[0, 0, 0]])},
        {"attention_mask": torch.tensor([[1, 0, 1]])},
    ],
)
def test_a_request_that_cannot_be_served(decoder, arguments, monkeypatch):
    monkeypatch.setattr(decoder, "run", lambda *args, **kwargs: pytest.fail("computed something"))
    options = {"input_ids": [1, 2, 3], "max_new_tokens": 4} | arguments
    for method in (Autoregressive(decoder), SelfSpeculative(decoder, 2, 3)):
        with pytest.raises(ConfigError):
            method.generate(**options)
        with pytest.raises(ValueError):
            method.stream(**options)


@pytest.mark.parametrize("exit_layer", [0, 4, -1, 100, 2.0, True, None, "early"])
def test_an_exit_layer_outside_the_model(decoder, exit_layer):
    with pytest.raises(ConfigError, match="exit_layer"):
        SelfSpeculative(decoder, exit_layer, 3)


def test_the_range_of_exit_layers_is_named(decoder):
    with pytest.raises(ConfigError, match="1 to 3"):
        SelfSpeculative(decoder, 4, 3)


@pytest.mark.parametrize("draft_length", [-1, 2.0, True, None, "long"])
def test_a_draft_length_that_is_none(decoder, draft_length):
    with pytest.raises(ConfigError, match="draft_length"):
        SelfSpeculative(decoder, 2, draft_length)


@pytest.mark.parametrize("options", [{"drafter": "medusa"}, {"confidence": 2}, {"exactness": "very"}])
def test_other_settings(decoder, options):
    with pytest.raises(ConfigError):
        SelfSpeculative(decoder, 2, 3, **options)


def test_an_encoder_decoder_model_is_refused_by_name():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="t5"):
        SelfSpeculative(model)


def test_nan_logits_raise_and_the_model_stays_as_it_was():
    model = drafting_model()
    before = model.config.to_dict()
    method = SelfSpeculative(model, 2, 3)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
        model.lm_head.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericalError):
            method.generate([1, 2, 3], max_new_tokens=5, temperature=temperature)
    assert model.config.to_dict() == before
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_train_mode_warns_and_is_kept():
    model = drafting_model().train()
    with pytest.warns(UserWarning, match="train mode"):
        method = SelfSpeculative(model, 2, 3)
    method.generate([1, 2, 3], max_new_tokens=5)
    assert model.training


@pytest.mark.parametrize("drafter", ["exit", "both"])
@pytest.mark.parametrize(
    "processors",
    [[RepetitionPenaltyLogitsProcessor(1.8)], [NoRepeatNGramLogitsProcessor(2)], []],
    ids=["repetition", "no-repeat", "none"],
)
def test_processors_as_in_transformers(decoder, drafter, processors):
    model, prompt = decoder.model, [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
    )
    for method in (Autoregressive(decoder), SelfSpeculative(decoder, 2, 5, drafter=drafter), SelfSpeculative(decoder)):
        given = method.generate(prompt, max_new_tokens=40, logits_processor=LogitsProcessorList(processors))
        assert given.tokens[0].tolist() == wanted[0, len(prompt) :].tolist()


def test_a_stop_string_ends_the_row_with_the_token_that_completes_it(decoder):
    free = Autoregressive(decoder).generate([7, 8], max_new_tokens=30).tokens[0].tolist()
    text = Letters().decode(free)
    stop = text[9:12]
    wanted = free[: text.index(stop) + 3]
    for method in (Autoregressive(decoder), SelfSpeculative(decoder, 2, 6), SelfSpeculative(decoder, drafter="both")):
        given = method.generate([7, 8], max_new_tokens=30, stop_strings=[stop, "never"], tokenizer=Letters())
        assert given.tokens[0].tolist() == wanted
        assert given.stop_reason == ["stop_string"]


def test_end_tokens_come_from_the_generation_config_unless_given(decoder):
    model = drafting_model()
    free = Autoregressive(decoder).generate([7, 8], max_new_tokens=12).tokens[0].tolist()
    model.generation_config.eos_token_id = free[4]
    method = SelfSpeculative(model, 2, 3)
    assert method.generate([7, 8], max_new_tokens=12).tokens[0].tolist() == free[: free.index(free[4]) + 1]
    assert method.generate([7, 8], max_new_tokens=12, eos_token_id=[]).tokens[0].tolist() == free


def test_the_whole_context_can_be_used():
    model = drafting_model(max_positions=24)
    wanted = Autoregressive(model).generate([1, 2, 3, 4], max_new_tokens=20)
    for method in (SelfSpeculative(model, 2, 12), SelfSpeculative(model, drafter="both")):
        assert torch.equal(method.generate([1, 2, 3, 4], max_new_tokens=20).tokens, wanted.tokens)
        both = method.generate([[1, 2, 3, 4], [5]], max_new_tokens=20)
        assert torch.equal(both.tokens[0], wanted.tokens[0])
