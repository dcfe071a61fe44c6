"""Where rotary frequencies depend on the length of the text, a row's output is what it is alone, and what its family gives."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.utils import logging

from models.tiny_models import tiny_model
from telltale.decode import Autoregressive, SelfSpeculative, StepVerified, StepVerifiedConfig
from telltale.errors import ConfigError
from telltale.tasks import chains

BOUNDARY = 20
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": BOUNDARY,
}
MODELS = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": BOUNDARY}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "qwen3-dynamic": (
        "qwen3",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": BOUNDARY,
        },
    ),
}
DECODERS = {
    "plain": Autoregressive,
    "exit": lambda model: SelfSpeculative(model, 2, 3),
    "ngram": lambda model: SelfSpeculative(model, draft_length=4, drafter="ngram"),
}
LENGTHS = (3, 14, 19, 20, 21, 27)


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def prompt(length: int) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def own(model, ids: list[int], count: int) -> list[int]:
    """The family's own greedy tokens, by a copy whose rotary module has not seen another text."""
    ids = torch.tensor([ids])
    found = copy.deepcopy(model).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.long
@pytest.mark.parametrize("name", list(MODELS))
def test_ragged_rows_are_what_the_family_gives_each(name, subtests):
    family, fields = MODELS[name]
    model = tiny_model(family, **fields)
    prompts = [prompt(length) for length in LENGTHS]
    wanted = [own(model, ids, 15) for ids in prompts]
    for kind, decoder in DECODERS.items():
        with subtests.test(kind):
            result = decoder(model).generate(prompts, max_new_tokens=15)
            assert result.tokens.tolist() == wanted
            assert decoder(model).generate(prompts[2], max_new_tokens=15).tokens.tolist() == [wanted[2]]


def test_what_left_the_batch_changes_nothing():
    family, fields = MODELS["phi3-longrope"]
    model = tiny_model(family, **fields)
    prompts = [prompt(length) for length in (27, 17, 4)]
    [_, wanted, _] = [own(model, ids, 15) for ids in prompts]
    first = own(model, prompts[0], 2)[-1]
    result = Autoregressive(model).generate(prompts, max_new_tokens=15, eos_token_id=[first])
    assert result.lengths[0] == 2
    assert result.tokens[1].tolist()[: result.lengths[1]] == wanted[: result.lengths[1]]


def test_a_draft_of_steps_across_the_boundary_is_refused_before_any_compute():
    tokenizer = chains.tokenizer()
    family, fields = MODELS["phi3-longrope"]
    model = tiny_model(family, vocab_size=len(tokenizer), **fields)
    decoder = StepVerified(model, None, tokenizer, StepVerifiedConfig(exit_layer=2))
    with pytest.raises(ConfigError, match="anew at 21 tokens"):
        decoder.generate([3] * 15, max_new_tokens=10)
    assert decoder.generate([3] * 15, max_new_tokens=5).tokens.shape[1] <= 5
