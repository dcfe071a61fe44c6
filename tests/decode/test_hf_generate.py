"""``model.generate(custom_generate=...)`` equals ``model.generate`` when greedy, and honours its settings."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.decode.models_that_draft import drafting_model
from transformers import StoppingCriteria, StoppingCriteriaList, SynthIDTextWatermarkingConfig

from telltale.decode import custom_generate
from telltale.errors import ConfigError


@pytest.fixture(scope="module")
def model():
    return drafting_model()


PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def both(model, ids=PROMPT, **options):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, **options), model.generate(ids, **options, custom_generate=custom_generate)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 30},
        {"max_length": 20},
        {"max_new_tokens": 30, "repetition_penalty": 1.5},
        {"max_new_tokens": 30, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 30, "eos_token_id": [7, 11, 30, 50], "min_new_tokens": 6},
    ],
)
def test_greedy_equals_generate(model, options):
    wanted, given = both(model, **options)
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("settings", [{"exit_layer": 1, "draft_length": 5}, {"drafter": "both"}, {"backend": "module"}])
def test_settings_go_through_generate(model, settings):
    wanted = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=20, pad_token_id=0)
    given = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=20,
        pad_token_id=0,
        custom_generate=custom_generate,
        **settings,
    )
    assert torch.equal(given, wanted)
    with pytest.raises(ConfigError, match="exit_layer"):
        model.generate(PROMPT, max_new_tokens=3, custom_generate=custom_generate, exit_layer=9)


def test_left_padded_batches_and_dictionaries(model):
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 15, "min_new_tokens": 4, "eos_token_id": [7, 11, 30, 50]}
    wanted, given = both(model, ids, **options, return_dict_in_generate=True)
    assert torch.equal(given.sequences, wanted.sequences)


def test_sampling_several_sequences(model):
    given = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=12,
        do_sample=True,
        top_k=5,
        num_return_sequences=3,
        pad_token_id=0,
        custom_generate=custom_generate,
    )
    assert given.shape == (3, 20)
    assert torch.equal(given[:, :8], PROMPT.expand(3, -1))


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)


def test_other_criteria_and_a_streamer(model):
    wanted, given = both(model, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([AfterFive()]))
    assert torch.equal(given, wanted)

    class Streamer:
        tokens: list[int] = []  # noqa: RUF012
        ended = False

        def put(self, value):
            self.tokens += value.tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    whole = model.generate(
        PROMPT, max_new_tokens=9, pad_token_id=0, custom_generate=custom_generate, token_streamer=streamer
    )
    assert streamer.tokens == whole[0, 8:].tolist()
    assert streamer.ended


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"guidance_scale": 2.0}, {"return_dict_in_generate": True, "output_scores": True}]
)
def test_what_this_loop_cannot_do_is_refused(model, options):
    with pytest.raises(ConfigError):
        model.generate(PROMPT, max_new_tokens=3, pad_token_id=0, custom_generate=custom_generate, **options)


def test_changed_weights_are_noticed_and_copies_do_not_carry_the_decoder():
    model = drafting_model()
    both(model, max_new_tokens=5)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for other in (model, twin):
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    for other in (model, twin):
        wanted, given = both(other, max_new_tokens=20)
        assert torch.equal(given, wanted)


PADDED = torch.tensor([[0, 0, 0, 3, 1, 4], [0, 9, 2, 6, 5, 3], [7, 7, 1, 2, 8, 8]])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"encoder_repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 1, "min_new_tokens": 5},
        {"prefix_allowed_tokens_fn": lambda row, sentence: [row + 10, row + 20, row + 30, int(sentence[-1]) % 50]},
        {"bad_words_ids": [[3], [5, 6]], "sequence_bias": {(4,): 2.0}},
    ],
)
def test_processors_that_hold_something_for_each_row_get_their_row(model, options):
    mask = (PADDED != 0).long()
    wanted, given = both(model, PADDED, attention_mask=mask, max_new_tokens=12, **options)
    assert torch.equal(given, wanted)


def test_a_processor_with_a_state_of_its_own_is_refused_by_name(model):
    watermark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])
    with pytest.raises(ConfigError, match="SynthIDTextWatermarkLogitsProcessor cannot be used here"):
        model.generate(
            PROMPT, max_new_tokens=3, do_sample=True, watermarking_config=watermark, custom_generate=custom_generate
        )


def test_a_model_that_has_changed_gets_a_new_decoder(model):
    model = copy.deepcopy(model)
    both(model, max_new_tokens=4)
    model.to(torch.bfloat16)
    wanted, given = both(model, max_new_tokens=4)
    assert given.shape == wanted.shape
