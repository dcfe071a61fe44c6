"""The official layout without its code: by name and shape, bit by bit, and look-alikes by what gives them away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, LlamaModel

import telltale.align.judge.model  # noqa: F401  (registers the Auto classes)
from align.judge.tiny_judges import tiny_tokenizer
from align.judge.tiny_official import PATTERN, llama_config, official_tensors, write_official
from telltale.align.judge.data import Scale
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.model import JudgeModel
from telltale.align.judge.official_checkpoint import OFFICIAL_OBJECTIVES, check_target, load_judge_model, save
from telltale.align.judge.templates import encode
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


def masked(objectives=("good", "verbosity"), **options) -> JudgeModel:
    torch.manual_seed(2)
    head = Head(objectives, 32, gate=GateConfig(hidden=16, layers=2), nuisances=("verbosity",))
    head.set_regression(torch.randn(len(objectives), 32))
    transform = torch.eye(len(objectives))
    transform[objectives.index("verbosity")] -= 0.3
    transform[:, objectives.index("verbosity")] = 0.0
    head.set_transform(transform)
    return JudgeModel.assembled(LlamaModel(llama_config()), head, gating_pattern=PATTERN, **options)


@pytest.mark.parametrize("count", [3, 19])
def test_a_masked_gate_is_written_without_a_mask_and_weighs_alike(tmp_path: Path, count: int) -> None:
    names = ("good", "verbosity", *(f"more-{index}" for index in range(count - 2)))
    model = masked(names, scales={"good": Scale(1, 5, 5)}, context_length=99)
    save(model, tmp_path / "out", layout="official")
    again = load_judge_model(tmp_path / "out")
    ids = torch.tensor([[2, 4, 9, 10, 3, 5, 11, 12, 3]])
    with torch.no_grad():
        wanted, found = model(ids), again(ids)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.gating_output, wanted.gating_output)
    assert not bool(found.gating_output[:, 1].any())
    assert torch.isfinite(load_file(tmp_path / "out" / "model.safetensors")["gating.layers.2.bias"]).all()
    assert again.head.objectives == names
    assert again.config.scale("good") == Scale(1, 5, 5)
    assert again.config.context_length == 99
    save(again, tmp_path / "again", layout="official")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_what_the_official_layout_cannot_hold_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    head = Head(("good", "verbosity"), 32, nuisances=("verbosity",))
    model = JudgeModel.assembled(BertModel(BertConfig(**size, intermediate_size=48)), head, pooling="mean")
    with pytest.raises(ConfigError, match="this judge has a bert backbone and pooling 'mean'"):
        save(model, tmp_path / "out", layout="official")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="layout='armo'"):
        save(model, tmp_path / "out", layout="armo")
    save(model, tmp_path / "out")
    assert load_judge_model(tmp_path / "out").head.gating.masked.tolist() == [False, True]


def test_saving_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    model, tokenizer = masked(), tiny_tokenizer()
    (tmp_path / "runs" / "other").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds something that is no judge"):
        save(model, tmp_path / "runs")
    assert (tmp_path / "runs" / "other").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        check_target(tmp_path / "file")
    save(model, tmp_path / "judge", tokenizer=tokenizer)
    (tmp_path / "judge" / "notes").mkdir()
    (tmp_path / "judge" / "notes" / "why.txt").write_text("because")
    (tmp_path / "judge" / "fit.json").write_text("{}")
    assert (tmp_path / "judge" / "chat_template.jinja").is_file()
    tokenizer.chat_template = None
    save(model, tmp_path / "judge", tokenizer=tokenizer)
    assert (tmp_path / "judge" / "notes" / "why.txt").read_text() == "because"
    assert (tmp_path / "judge" / "fit.json").is_file()
    assert not (tmp_path / "judge" / "chat_template.jinja").exists(), "no template of an earlier tokenizer"


def test_a_save_that_fails_leaves_the_old_judge(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, path: Path) -> None:
            raise OSError("no space left on device")

    save(masked(), tmp_path / "judge", tokenizer=tiny_tokenizer())
    before = {file.name: file.read_bytes() for file in (tmp_path / "judge").iterdir()}
    with pytest.raises(CheckpointError, match="no space left"):
        save(masked(("better", "verbosity")), tmp_path / "judge", tokenizer=Broken())
    assert {file.name: file.read_bytes() for file in (tmp_path / "judge").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]


def damaged(tmp_path: Path, change=None, **config) -> Path:
    folder = tmp_path / "own"
    save(masked(), folder)
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: t.pop("head.regression_layer.weight"), {}, r"lacks head\.regression_layer\.weight"),
        (lambda t: t.pop("backbone.norm.weight"), {}, r"lacks backbone\.norm\.weight"),
        (lambda t: t.update({"head.more": torch.zeros(1)}), {}, r"holds the unknown head\.more"),
        (
            lambda t: t.update({"head.regression_layer.weight": torch.zeros(9, 32)}),
            {},
            r"head\.regression_layer\.weight has shape \(9, 32\); expected \(2, 32\)",
        ),
        (None, {"objectives": ["good"]}, "nuisance 'verbosity' is no objective"),
        (None, {"gate": {"hiden": 3}}, "hiden"),
        (None, {"scales": {"good": {"low": "a"}}}, "low='a'"),
        (None, {"context_length": 3}, "context_length=3"),
        (None, {"gating_pattern": "abc"}, "gating_pattern='abc'"),
        (None, {"backbone_config": {"model_type": "nothing"}}, "nothing"),
    ],
)
def test_a_damaged_judge_of_ours_is_named(tmp_path: Path, capfd, change, config, words: str) -> None:
    folder = damaged(tmp_path, change, **config)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_judge_model(folder)
    assert len(str(caught.value)) < 400
    assert "MISSING" not in capfd.readouterr().err, "one sentence, not Transformers' report too"


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"num_objectives": "x"}, CheckpointError, "num_objectives='x'"),
        ({"hidden_size": "x"}, CheckpointError, r"config\.json cannot be understood: .*hidden_size"),
        ({"hidden_act": "nope"}, CheckpointError, r"config\.json cannot be understood: .*nope"),
        ({"model_type": "gemma2"}, UnsupportedModelError, "model_type='gemma2'"),
        (
            {"architectures": ["Gemma2ForRewardModelWithGating"], "model_type": "gemma2"},
            UnsupportedModelError,
            "gemma2",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_named(tmp_path: Path, config, error, words: str) -> None:
    with pytest.raises(error, match=words):
        load_judge_model(write_official(tmp_path / "armo", official_tensors(), **config))


def test_tensors_of_other_kinds_and_files_from_elsewhere_are_refused(tmp_path: Path) -> None:
    tensors = official_tensors()
    key = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight is of int8"):
        load_judge_model(write_official(tmp_path / "quantised", tensors | {key: tensors[key].to(torch.int8)}))
    folder = write_official(tmp_path / "index", tensors)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected files of the folder itself"):
        load_judge_model(folder)


def test_two_half_precisions_meet_in_float32(tmp_path: Path) -> None:
    tensors = official_tensors(dtypes=(torch.float16, torch.float32))
    tensors = {k: v.bfloat16() if "layers.1" in k and k.startswith("model") else v for k, v in tensors.items()}
    model = load_judge_model(write_official(tmp_path / "armo", tensors))
    save(model, tmp_path / "again", layout="official")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_the_official_names_are_nineteen() -> None:
    assert len(OFFICIAL_OBJECTIVES) == 19
    assert OFFICIAL_OBJECTIVES[4] == "helpsteer-verbosity"
    assert OFFICIAL_OBJECTIVES[10] == "beavertails-is_safe"
    assert json.dumps(OFFICIAL_OBJECTIVES[14:]).count("code-") == 5
