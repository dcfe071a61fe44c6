"""A stage out of a checkpoint on disk: its own tensors and no others, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.tiny_models import tiny_model
from telltale.errors import CheckpointError
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.split import split
from telltale.train.pipeline.stage_weights import parameters_on_meta, read_stage, without_weights
from telltale.train.pipeline.trainer import PipelineTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(path, max_shard_size="20KB")
    return path


def test_a_stage_has_its_own_tensors_and_the_rest_stays_on_meta(folder: Path) -> None:
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    whole = tiny_model("llama").state_dict()
    model = without_weights(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    layered = split(model)
    before = layered.fingerprint
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    read_stage(layered, 1, 3, folder)
    own = {names[id(p)] for layer in layered.layers[1:3] for p in layer.module.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (name not in own)
        if name in own:
            assert torch.equal(parameter, whole[name]), name
    assert layered.fingerprint == before == split(tiny_model("llama")).fingerprint
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_all_stages_together_compute_what_the_whole_model_does(folder: Path) -> None:
    layered, whole = split(without_weights(folder)), split(tiny_model("llama"))
    read_stage(layered, 0, len(layered.layers), folder)
    batch = {"input_ids": torch.arange(14).view(2, 7)}
    found, wanted = layered.inputs(batch), whole.inputs(batch)
    for mine, theirs in zip(layered.layers, whole.layers, strict=True):
        found, wanted = mine.call(found, batch, 0), theirs.call(wanted, batch, 0)
    assert torch.equal(found[0], wanted[0])


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def test_an_own_module_with_persistent_buffers_trains_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = small()
    net[1].running_mean.fill_(0.25)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = small()
    trainers = [
        PipelineTrainer(
            module,
            Plan.even(4, 1, policy="flush", microbatches=2),
            optimizer=lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9),
            loss=nn.functional.cross_entropy,
            weights=weights,
        )
        for module, weights in ((net, None), (empty, tmp_path))
    ]
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(4)]
    losses = [trainer.train(batches, stop=4) for trainer in trainers]
    assert losses[0] == losses[1]
    for name, value in net.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value), name


def test_what_is_absent_or_of_another_shape_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = small().state_dict()

    def read() -> None:
        with parameters_on_meta():
            net = small()
        read_stage(split(net, loss=nn.functional.cross_entropy), 0, 4, tmp_path)

    with pytest.raises(CheckpointError, match=r"cannot be read stage by stage: .*Expected model\.safetensors"):
        read()
    save_file({name: value for name, value in state.items() if name != "3.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor 3\.bias; expected a checkpoint of this model"):
        read()
    save_file(state | {"3.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has 3\.bias of shape \[2\]; expected \[3\]"):
        read()
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is a GGUF file"):
        without_weights(tmp_path / "weights.gguf")
    assert not nn.Linear(2, 2).weight.is_meta


def test_buffers_made_with_real_numbers_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    state = small().state_dict()
    state["1.running_mean"] = torch.full((6,), 0.25)
    save_file(state, tmp_path / "model.safetensors")
    with parameters_on_meta():
        net = small()
    running = net[1].running_mean
    read_stage(split(net, loss=nn.functional.cross_entropy), 0, 4, tmp_path)
    assert net[1].running_mean is running
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_not_read_as_if_they_were_plain(kind: torch.dtype, tmp_path: Path) -> None:
    state = small().state_dict()
    save_file(state | {"0.weight": state["0.weight"].to(kind)}, tmp_path / "model.safetensors")
    with parameters_on_meta():
        net = small()
    with pytest.raises(CheckpointError, match=r"has 0\.weight as (int8|float8_e4m3fn), whose scale stands elsewhere"):
        read_stage(split(net, loss=nn.functional.cross_entropy), 0, 4, tmp_path)


@pytest.mark.parametrize("damage", ["gone", "cut off", "another", "elsewhere"])
def test_a_damaged_shard_is_named(damage: str, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    layered = split(without_weights(copied))
    for shard in copied.glob("model-*.safetensors"):
        if damage == "gone":
            shard.unlink()
        elif damage == "cut off":
            shard.write_bytes(shard.read_bytes()[:100])
        elif damage == "another":
            save_file({"else": torch.ones(1)}, shard)
    if damage == "elsewhere":
        index = copied / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-0", "missing-0"))
    with pytest.raises(CheckpointError, match=r"-0000\d-of-.*cannot be read"):
        read_stage(layered, 1, 3, copied)
