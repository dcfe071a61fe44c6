"""The chain computes what the unsplit model does, to the last bit: every family, padded or not, tied or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.tiny_models import CONFIGS, tiny_model
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.models.families import parts_of
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.pipeline.causal_lm import DecoderLayers, causal_lm
from telltale.train.pipeline.layers import LayeredModel, sequential
from telltale.train.pipeline.split import split
from train.pipeline.chain_runs import assert_same, gradients_of, run_chain, run_cut


def batch_of(padded: bool, *, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (3, length), generator=generator)
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def unsplit(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Logits, loss and gradients of the family's own forward, its dropout drawn from seed 5."""
    labels = batch["input_ids"].clone()
    if "attention_mask" in batch:
        labels[batch["attention_mask"] == 0] = -100
    torch.manual_seed(5)
    output = model(**batch, labels=labels, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), gradients_of(model)


@pytest.mark.long
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_family_in_train_mode(name: str, tied: bool, padded: bool) -> None:
    model = tiny_model(name, tie_word_embeddings=tied).train()
    batch = batch_of(padded)
    logits, loss, gradients = unsplit(model, batch)
    chain = causal_lm(model)
    torch.manual_seed(5)
    values, given = run_chain(chain, batch)
    given.backward()
    assert torch.equal(values[0], logits)
    assert torch.equal(given, loss)
    assert_same(gradients_of(model), gradients)
    torch.manual_seed(5)
    cut_loss, cut_gradients, crossed = run_cut(chain, batch)
    assert torch.equal(cut_loss, loss)
    assert set(crossed) == {1}
    assert_same(cut_gradients, gradients)


@pytest.mark.long
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_parameter_has_one_layer_unless_it_is_tied(name: str) -> None:
    for tied in (False, True):
        chain = causal_lm(tiny_model(name, tie_word_embeddings=tied))
        owners = {
            key: [i for i, layer in enumerate(chain.layers) if any(p is own for own in layer.module.parameters())]
            for key, p in chain.root.named_parameters()
        }
        shared = chain.shared_parameters()
        assert all(len(found) == (2 if key in shared else 1) for key, found in owners.items())
        assert list(shared.values()) == ([(0, len(chain.layers) - 1)] if tied else [])
        assert len(chain.layers) == 6
        assert [name for name, _ in chain.root.named_modules() if name == chain.layers[1].name]


@pytest.mark.parametrize(
    ("name", "kinds"), [("mistral", "ssss"), ("qwen2-window", "ffss"), ("phi3-partial", "ssss"), ("gemma", "ffff")]
)
def test_the_window_is_the_layers_own(name: str, kinds: str) -> None:
    model = tiny_model(name)
    found = DecoderLayers(model, parts_of(model)).kinds
    assert [kind[0] for kind in found] == list(kinds)


def test_eager_attention_and_a_second_shape_of_minibatch() -> None:
    model = tiny_model("qwen2-window", attention="eager").train()
    chain = causal_lm(model)
    for batch in (batch_of(True), batch_of(False), batch_of(True, length=9), batch_of(True, seed=3)):
        _, loss, gradients = unsplit(model, batch)
        torch.manual_seed(5)
        _, given = run_chain(chain, batch)
        given.backward()
        assert torch.equal(given, loss)
        assert_same(gradients_of(model), gradients)


def test_a_mask_written_to_in_place_is_another_mask() -> None:
    model = tiny_model("llama")
    chain = causal_lm(model)
    batch = batch_of(True)
    before = run_chain(chain, batch)[0][0]
    batch["attention_mask"].fill_(1)
    _, loss, _ = unsplit(model, batch)
    after, given = run_chain(chain, batch)
    assert torch.equal(given, loss)
    assert not torch.equal(after[0], before)


def test_training_after_an_evaluation_in_inference_mode() -> None:
    chain = causal_lm(tiny_model("mistral"))
    batch = batch_of(True)
    with torch.inference_mode():
        before = run_chain(chain, batch)[1].item()
    loss = run_chain(chain, batch)[1]
    loss.backward()
    assert loss.item() == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_weights_put_in_place_by_functional_call_are_read(name: str) -> None:
    model = tiny_model(name)
    chain = causal_lm(model)
    batch = batch_of(True)
    other = tiny_model(name, seed=1)
    wanted = run_chain(causal_lm(other), batch)[1]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layer.module for layer in chain.layers)

        def forward(self) -> Tensor:
            return run_chain(chain, batch)[1]

    whole = Whole()
    by_identity = {id(p): key for key, p in model.named_parameters()}
    values = dict(other.named_parameters())
    weights = {key: values[by_identity[id(p)]] for key, p in whole.named_parameters()}
    assert torch.equal(functional_call(whole, weights, ()), wanted)
    assert not torch.equal(run_chain(chain, batch)[1], wanted)


def test_activation_checkpointing_inside_of_the_layers() -> None:
    model = tiny_model("llama").train()
    batch = batch_of(True)
    _, loss, gradients = unsplit(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        given = run_chain(causal_lm(model), batch)[1]
    given.backward()
    assert torch.equal(given, loss)
    assert_same(gradients_of(model), gradients)
    assert saved < 40


def test_labels_may_differ_from_the_inputs() -> None:
    model = tiny_model("qwen3")
    ids = batch_of(False)["input_ids"]
    labels = ids.roll(2, 1)
    labels[0, :4] = -100
    loss = run_chain(causal_lm(model), {"input_ids": ids, "labels": labels})[1]
    assert torch.equal(loss, model(ids, labels=labels, use_cache=False).loss)


def test_a_loss_of_ones_own_gets_logits_and_unshifted_labels() -> None:
    model = tiny_model("llama")
    batch = batch_of(False)
    chain = split(model, loss=lambda logits, labels: logits.float().mean() * labels.shape[1])
    logits = model(**batch, use_cache=False).logits
    assert torch.equal(run_chain(chain, batch)[1], logits.mean() * 11)


def test_half_precision() -> None:
    model = tiny_model("gemma", dtype=torch.bfloat16).train()
    batch = batch_of(True)
    logits, loss, gradients = unsplit(model, batch)
    values, given = run_chain(causal_lm(model), batch)
    given.backward()
    assert torch.equal(values[0], logits)
    assert torch.equal(given, loss)
    assert given.dtype == torch.float32
    assert_same(gradients_of(model), gradients)


class _Adapter(nn.Module):
    """Wraps a model as PEFT does."""

    def __init__(self, model: nn.Module, *, prompt: bool) -> None:
        super().__init__()
        self.model = model
        if prompt:
            self.prompt = nn.Parameter(torch.zeros(4))

    def get_base_model(self) -> nn.Module:
        return self.model


def test_wrappers_are_looked_through_unless_they_have_weights_of_their_own() -> None:
    model = tiny_model("llama")
    assert causal_lm(_Adapter(model, prompt=False)).root is model
    with pytest.raises(UnsupportedModelError, match="prompt"):
        causal_lm(_Adapter(model, prompt=True))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([1, 2], "list"),
        ({"labels": torch.ones(1, 2)}, "input_ids"),
        ({"input_ids": torch.ones(2, 3)}, "float32"),
        ({"input_ids": torch.ones(2, dtype=torch.long)}, r"\(2,\)"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "at least one"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "position_ids": torch.ones(2, 3)}, "position_ids"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 2)}, "labels"),
        ({"input_ids": torch.ones(2, 1, dtype=torch.long)}, "token to predict"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 0]])}, "to predict"),
        ({"input_ids": torch.ones(1, 200, dtype=torch.long)}, "128 positions"),
    ],
)
def test_what_is_wrong_with_a_minibatch_is_said(batch: Any, said: str) -> None:
    chain = causal_lm(tiny_model("gpt2"))
    with pytest.raises(DataError, match=said):
        run_chain(chain, batch)


def test_split_chooses_by_type() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    loss = nn.functional.cross_entropy
    chain = split(net, loss=loss)
    assert [layer.name for layer in chain.layers] == ["0", "1"]
    assert split(chain) is chain
    assert isinstance(split(tiny_model("llama")), LayeredModel)
    assert isinstance(
        split(copy.deepcopy(net[0]), loss=loss, example=(torch.ones(2, 4), torch.ones(2).long())), LayeredModel
    )
    assert sequential(net, loss).fingerprint == chain.fingerprint


def test_split_refuses_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match=r"int is not a module.*gpt_neox"):
        split(3)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="Linear cannot be split without an example"):
        split(net[0], loss=nn.functional.mse_loss)
    with pytest.raises(ConfigError, match="needs a loss"):
        split(net)
    with pytest.raises(ConfigError, match="layerskip needs a Hugging Face"):
        split(net, loss=nn.functional.mse_loss, layerskip=LayerSkipConfig())
    with pytest.raises(ConfigError, match="own loss"):
        split(tiny_model("llama"), loss=nn.functional.mse_loss, layerskip=LayerSkipConfig())
    with pytest.raises(ConfigError, match="its loss already"):
        split(split(net, loss=nn.functional.mse_loss), loss=nn.functional.mse_loss)
    from transformers import T5Config, T5ForConditionalGeneration

    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="t5"):
        split(seq2seq)
