"""Families outside the table are found by structure, and decoded as their own ``generate`` does, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.utils import logging

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.errors import UnsupportedModelError
from telltale.models import open_decoder
from telltale.models.families import parts_of

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "Gemma2": {"head_dim": 8, "sliding_window": 6},
    "Mixtral": {"num_local_experts": 4, "sliding_window": 6},
    "Olmo2": {},
    "Granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "StableLm": {},
    "Phi": {},
    "Cohere": {"logit_scale": 0.3},
    "Glm4": {"head_dim": 8},
}


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def family(name: str, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | FAMILIES.get(name, {}) | more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.long
@pytest.mark.parametrize("name", list(FAMILIES))
def test_ragged_rows_are_what_the_family_gives(name):
    model = family(name)
    prompts = [
        torch.randint(97, (count,), generator=torch.Generator().manual_seed(count)).tolist() for count in (4, 11, 7)
    ]
    wanted = [
        model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]
    for decoder in (Autoregressive(model), SelfSpeculative(model, 2, 3)):
        assert decoder.decoder.backend == "module"
        assert decoder.generate(prompts, max_new_tokens=20, eos_token_id=[]).tokens.tolist() == wanted


def test_a_recurrent_family_is_refused_with_the_reason():
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="mamba"):
        open_decoder(transformers.MambaForCausalLM(config).eval())


def test_rotary_embeddings_by_length_are_refused_by_name():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match=r"'olmo2' depend on the length of the text \(dynamic\)"):
        open_decoder(family("Olmo2", rope_parameters=rope))


def test_training_takes_the_families_of_the_table_only():
    with pytest.raises(UnsupportedModelError, match="'mixtral' is not supported"):
        parts_of(family("Mixtral"))
