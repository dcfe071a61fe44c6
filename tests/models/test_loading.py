"""Checkpoints that are whole load; every way of being broken has its own sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from telltale.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from telltale.models import load, load_model, load_tokenizer
from telltale.models.presets import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build("nano", vocabulary_size=64).save_pretrained(folder)
    save_tokenizer(folder, 60)
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy to break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def save_tokenizer(folder, size: int) -> None:
    words = {f"w{index}": index for index in range(size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def edit_config(folder, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_whole_checkpoint(checkpoint):
    model, tokenizer = load(checkpoint)
    assert not model.training
    assert model.dtype == torch.float32
    assert len(tokenizer.get_vocab()) == 60
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, build("nano", vocabulary_size=64)(ids).logits)
    assert load_tokenizer(checkpoint).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_asked_for(checkpoint, dtype):
    assert load_model(checkpoint, dtype=dtype).dtype == torch.bfloat16


def test_the_checkpoints_own_dtype_is_kept(tmp_path):
    build("nano").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_a_sharded_checkpoint(tmp_path):
    model = build("nano")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shards[1].name}"):
        load_model(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_shard_index(tmp_path, index):
    build("nano").save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="shard index"):
        load_model(tmp_path)


def test_no_folder_and_a_hub_name(tmp_path):
    for path in (tmp_path / "absent", "meta-llama/Llama-3.2-1B"):
        with pytest.raises(CheckpointError, match="is not a folder; expected a local"):
            load(path)


def test_no_config(broken):
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(broken)


@pytest.mark.parametrize("text", ['{"model_type": "lla', "", "\udce4"])
def test_a_config_that_is_no_json(broken, text):
    (broken / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(broken)


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_config_that_names_no_model(broken, text):
    (broken / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="model_type"):
        load(broken)


def test_a_config_with_impossible_values(broken):
    edit_config(broken, hidden_size="sixty-four")
    with pytest.raises(CheckpointError):
        load(broken)


def test_a_family_that_transformers_does_not_know_is_named(broken):
    edit_config(broken, model_type="not-a-model")
    with pytest.raises(CheckpointError, match="not-a-model"):
        load(broken)


def test_an_encoder_decoder(broken):
    edit_config(broken, model_type="t5", is_encoder_decoder=True)
    with pytest.raises(UnsupportedModelError, match=r"t5.*encoder-decoder"):
        load(broken)


def test_no_weights(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        load(broken)
    (broken / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        load(broken)


@pytest.mark.parametrize("kept", [0, 5, 700, -1])
def test_half_written_weights(broken, kept):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load(broken)


def test_weights_that_lack_a_tensor(broken):
    file = broken / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(broken)


def test_weights_of_another_shape(broken):
    edit_config(broken, intermediate_size=200)
    with pytest.raises(CheckpointError):
        load(broken)


def test_a_tokenizer_larger_than_the_embedding(broken):
    save_tokenizer(broken, 65)
    with pytest.raises(DataError, match="ids up to 64, the model embeds 64 tokens"):
        load(broken)


def test_no_tokenizer_and_a_damaged_one(broken):
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        load(broken)
    assert load_model(broken) is not None


def test_unknown_dtype_and_device(checkpoint):
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        load_model(checkpoint, dtype="int3")
    with pytest.raises(ConfigError, match="device='nowhere'"):
        load_model(checkpoint, device="nowhere")


def test_code_in_the_folder_does_not_run(broken):
    (broken / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit_config(broken, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert type(load_model(broken)).__name__ == "LlamaForCausalLM"
