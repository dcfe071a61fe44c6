"""The official layout without its code: by name and shape, bit by bit, and look-alikes by what gives them away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, LlamaModel

import telltale.align.judge.model  # noqa: F401  (registers the Auto classes)
from align.judge.tiny_judges import tiny_tokenizer
from align.judge.tiny_official import PATTERN, llama_config, official_tensors, write_official
from telltale.align.judge.head import Head
from telltale.align.judge.layouts import OFFICIAL_OBJECTIVES, load_judge_model, save
from telltale.align.judge.model import JudgeModel
from telltale.align.judge.templating import encode
from telltale.errors import CheckpointError, ConfigError, UnsupportedModelError

MESSAGES = [{"role": "user", "content": "add two and three"}, {"role": "assistant", "content": "the answer is five ."}]


def by_hand(tensors: dict[str, torch.Tensor], ids: list[int], gating: int) -> torch.Tensor:
    """The official forward, written out: score of one conversation."""
    backbone = LlamaModel(llama_config()).eval()
    backbone.load_state_dict({name[6:]: value.float() for name, value in tensors.items() if name.startswith("model.")})
    head = {name: value.float() for name, value in tensors.items()}
    with torch.no_grad():
        states = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
    rewards = head["regression_layer.weight"] @ states[-1]
    hidden = states[gating]
    for index in range(4):
        hidden = functional.linear(hidden, head[f"gating.layers.{index}.weight"], head[f"gating.layers.{index}.bias"])
        hidden = functional.relu(hidden) if index < 3 else hidden
    weights = head["gating.logit_scale"] * (hidden / 10).softmax(-1)
    return (weights * (rewards @ head["reward_transform_matrix"])).sum()


@pytest.mark.parametrize("shards", [1, 3])
def test_it_scores_as_the_official_forward_and_runs_no_code(tmp_path: Path, shards: int, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = official_tensors()
    folder = write_official(tmp_path / "armo", tensors, shards=shards)
    model = load_judge_model(folder)
    assert not (tmp_path / "ran").exists()
    row = encode(tiny_tokenizer(), MESSAGES, model.config)
    assert row.ids[row.gating_index : row.gating_index + 2] == PATTERN
    with torch.no_grad():
        hidden, prompts = model.features([row])
        found = model.head(hidden, prompts)
        output = model(torch.tensor([row.ids]))
    wanted = by_hand(tensors, row.ids, row.gating_index)
    assert float(found.score) == pytest.approx(float(wanted), rel=1e-5)
    assert output.logits.shape == (1, 1)
    assert float(output.logits) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.allclose(output.gating_output.sum(-1), torch.tensor([1.7]))
    assert model.head.nuisances == ("objective-2",)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_official_in_official_out_bit_by_bit(tmp_path: Path, dtypes) -> None:
    tensors = official_tensors(dtypes=dtypes)
    model = load_judge_model(write_official(tmp_path / "armo", tensors))
    assert all(parameter.dtype == torch.float32 for parameter in model.head.parameters())
    save(model, tmp_path / "again", layout="official")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    again = load_judge_model(tmp_path / "again")
    ids = torch.tensor([[2, 4, 9, 10, 3, 5, 11, 12, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_our_own_layout_and_the_auto_class(tmp_path: Path) -> None:
    model = load_judge_model(write_official(tmp_path / "armo", official_tensors()))
    save(model, tmp_path / "own")
    ids = torch.tensor([[2, 4, 9, 10, 3, 5, 11, 12, 3]])
    with torch.no_grad():
        wanted = model(ids).logits
    own = load_judge_model(tmp_path / "own")
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "own", num_labels=1).eval()
    assert type(auto) is JudgeModel
    for found in (own, auto):
        with torch.no_grad():
            assert torch.equal(found(ids).logits, wanted)
        assert found.config.objectives == model.config.objectives
        assert found.config.num_labels == 1
    save(own, tmp_path / "back", layout="official")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in official_tensors().items())


def test_the_tokenizer_of_the_folder_stays(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "armo", official_tensors())
    tiny_tokenizer().save_pretrained(folder)
    save(load_judge_model(folder), folder, layout="official")
    assert (folder / "tokenizer.json").is_file()
    load_judge_model(folder)


def test_half_precision_backbones_keep_a_whole_head(tmp_path: Path) -> None:
    model = load_judge_model(write_official(tmp_path / "armo", official_tensors()), dtype="bfloat16")
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    assert model.head.regression_layer.weight.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.tensor([[2, 4, 9, 3, 5, 11, 3]])).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop("regression_layer.weight"), UnsupportedModelError, "lacks regression_layer.weight"),
        (lambda t: t.pop("reward_transform_matrix"), UnsupportedModelError, "lacks reward_transform_matrix"),
        (
            lambda t: t.update({"reward_transform_matrix": torch.eye(4)}),
            CheckpointError,
            "reward_transform_matrix has shape",
        ),
        (lambda t: t.update({"regression_layer.weight": torch.zeros(19, 32)}), CheckpointError, "has 19 rows"),
        (
            lambda t: t.update({"gating.layers.1.weight": torch.zeros(16, 8)}),
            CheckpointError,
            r"gating\.layers\.1\.weight has shape",
        ),
        (lambda t: t.update({"gating.layers.1.running_mean": torch.zeros(16)}), UnsupportedModelError, "batch norm"),
        (lambda t: t.update({"gating.extra": torch.zeros(1)}), UnsupportedModelError, r"holds gating\.extra"),
        (lambda t: t.pop("model.norm.weight"), CheckpointError, r"lacks model\.norm\.weight"),
        (
            lambda t: t.update({"gating.logit_scale": torch.tensor([-1.0])}),
            CheckpointError,
            "logit_scale is not above 0",
        ),
    ],
)
def test_look_alikes_and_damage_are_named(tmp_path: Path, change, error, words: str) -> None:
    tensors = official_tensors()
    change(tensors)
    with pytest.raises(error, match=words):
        load_judge_model(write_official(tmp_path / "armo", tensors))


def test_quantile_heads_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="num_quantiles"):
        load_judge_model(write_official(tmp_path / "qrm", official_tensors(), num_quantiles=19))
    with pytest.raises(CheckpointError, match="is no judge"):
        load_judge_model(write_official(tmp_path / "llama", official_tensors(), architectures=["LlamaForCausalLM"]))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_judge_model(tmp_path / "nothing")
    cut = write_official(tmp_path / "cut", official_tensors())
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_judge_model(cut)
    with pytest.raises(ConfigError, match="dtype='half'"):
        load_judge_model(cut, dtype="half")


def test_what_the_official_layout_cannot_hold_is_said(tmp_path: Path) -> None:
    head = Head(("good", "verbosity"), 32, nuisances=("verbosity",))
    model = JudgeModel.assembled(LlamaModel(llama_config()), head, gating_pattern=PATTERN)
    with pytest.raises(ConfigError, match="no mask in its gate"):
        save(model, tmp_path / "out", layout="official")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="layout='armo'"):
        save(model, tmp_path / "out", layout="armo")
    save(model, tmp_path / "out")
    assert load_judge_model(tmp_path / "out").head.gating.masked.tolist() == [False, True]


def test_the_official_names_are_nineteen() -> None:
    assert len(OFFICIAL_OBJECTIVES) == 19
    assert OFFICIAL_OBJECTIVES[4] == "helpsteer-verbosity"
    assert OFFICIAL_OBJECTIVES[10] == "beavertails-is_safe"
    assert json.dumps(OFFICIAL_OBJECTIVES[14:]).count("code-") == 5
