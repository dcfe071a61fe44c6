"""Faults that were found in use, as they were reported: each of these once failed."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.utils.chat_template_utils as utils
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from telltale.align.judge import fit
from telltale.align.judge.decorrelation import fit_transform
from telltale.align.judge.feature_store import Features
from telltale.align.judge.features import mean_of, tokenizer_fingerprint
from telltale.align.judge.gate_fit import PairFeatures
from telltale.align.judge.gram import GramStatistics
from telltale.align.judge.head import GateConfig
from telltale.align.judge.importing import read_preferences
from telltale.align.judge.templates import rendered


@pytest.mark.long
def test_a_report_does_not_compare_on_prompts_whose_ratings_were_fitted_on():
    """Labels are pure noise: every honest figure is .5."""
    told, pairs_seen = 0.0, 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        P, d = 150, 256
        resp = torch.cat([torch.randn(2 * P, d - 1, generator=g), torch.full((2 * P, 1), 30.0)], 1)
        prompts = torch.randn(P, 32, generator=g)
        groups = torch.arange(P).repeat_interleave(2)
        labels = torch.rand(2 * P, 2, generator=g, dtype=torch.float64)
        a, b = resp[0::2], resp[1::2]
        better = (labels[0::2, 0] > labels[1::2, 0])[:, None]
        pairs = PairFeatures(torch.where(better, a, b), torch.where(better, b, a), prompts, torch.arange(P))
        found = fit(
            Features.of(resp, prompts.repeat_interleave(2, 0), groups),
            labels,
            ["quality", "other"],
            preferences=pairs,
            nuisances=(),
            gate=GateConfig(hidden=32, steps=100, held_out=0.3),
            seed=seed,
        ).report
        told += found.accuracies["signed weights"] * found.compared_pairs
        pairs_seen += found.compared_pairs
    assert told / pairs_seen <= 0.58


def test_a_prompt_that_stands_in_both_sides_as_well_is_read_once(tmp_path: Path):
    row = {
        "prompt": "Name a fruit.",
        "prompt_id": "7",
        "chosen": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Pear."}],
        "rejected": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Stone."}],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert len(read_preferences(path)[0][0].prompt) == 1


def test_kendall_over_many_rows_finds_its_lambdas():
    rewards = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(fit_transform(rewards, [2], method="kendall")).all())


def test_tables_do_not_grow_with_the_patterns_of_missing_labels():
    g = torch.Generator().manual_seed(0)
    n, d, K, folds = 3000, 128, 12, 5
    x, y = torch.randn(n, d, generator=g), torch.rand(n, K, generator=g, dtype=torch.float64)
    y[torch.rand(n, K, generator=g) < 0.5] = float("nan")
    s = GramStatistics(d, K, folds)
    s.add(x, y)
    kept = sum(part.table.numel() * 8 for part in s.parts.values())
    assert kept <= 2 * K * folds * (d + K) ** 2 * 8


@pytest.mark.long
def test_loading_the_official_layout_warns_of_no_vocabulary(tmp_path: Path):
    d, K, V = 16, 3, 64
    r = torch.randn
    T = {
        "model.embed_tokens.weight": r(V, d),
        "model.norm.weight": torch.ones(d),
        "regression_layer.weight": r(K, d),
        "reward_transform_matrix": torch.eye(K),
        "gating.logit_scale": torch.ones(1),
    }
    p = "model.layers.0."
    T |= {p + f"self_attn.{n}_proj.weight": r(d, d) for n in "qkvo"}
    T |= {p + f"{n}_layernorm.weight": torch.ones(d) for n in ("input", "post_attention")}
    T |= {
        p + "mlp.gate_proj.weight": r(24, d),
        p + "mlp.up_proj.weight": r(24, d),
        p + "mlp.down_proj.weight": r(d, 24),
    }
    for i, (a, b) in enumerate([(d, 8), (8, 8), (8, 8), (8, K)]):
        T |= {f"gating.layers.{i}.weight": r(b, a), f"gating.layers.{i}.bias": r(b)}
    save_file(T, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"pad_token_id": 63, "bos_token_id": 60, "eos_token_id": 61}
    gate = {"num_objectives": K, "gating_hidden_dim": 8, "gating_n_hidden": 3, "gating_temperature": 10}
    kind = {"architectures": ["LlamaForRewardModelWithGating"], "model_type": "llama", "intermediate_size": 24}
    (tmp_path / "config.json").write_text(json.dumps(kind | sizes | gate | ids | {"vocab_size": V}))
    code = "import sys; from telltale.align.judge.official_checkpoint import load_judge_model; load_judge_model(sys.argv[1])"
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stderr
    assert "between 0 and" not in told


def dated_tokenizer(template: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hi": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = template
    return tokenizer


class Later(datetime.datetime):
    """A clock that has run on."""

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2031, 5, 6)


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        ("Today Date: {{ strftime_now('%d %b %Y') }}\n" + TURNS, "Today Date: 26 Jul 2024"),
        (
            "{% if not date_string is defined %}{% if strftime_now is defined %}"
            "{% set date_string = strftime_now('%-d.%-m.%y, %A %H:%M') %}{% endif %}{% endif %}{{ date_string }}\n"
            + TURNS,
            "26.7.24, Friday 00:00",
        ),
        (TURNS, "user: hi"),
    ],
)
def test_a_template_that_asks_for_the_date_reads_the_same_tomorrow(monkeypatch, template: str, begins: str):
    tokenizer = dated_tokenizer(template)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    one, mark = rendered(tokenizer, chat), tokenizer_fingerprint(tokenizer)
    monkeypatch.setattr(utils, "datetime", Later)
    assert rendered(tokenizer, chat) == one
    assert tokenizer_fingerprint(tokenizer) == mark
    assert one.splitlines()[0] == begins


@pytest.mark.long
def test_preferences_alone_are_not_refused(tmp_path: Path):
    rows = [json.dumps({"prompt": f"q{i}", "chosen": "a b", "rejected": "c"}) + "\n" for i in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    command = [
        sys.executable,
        "-m",
        "telltale",
        "judge",
        "fit",
        "--backbone",
        tmp_path,
        "--preferences",
        tmp_path / "p.jsonl",
    ]
    got = subprocess.run([*command, "--out", tmp_path / "j"], capture_output=True, text=True, check=False)
    assert "--ratings" not in got.stderr + got.stdout
    assert got.returncode == 2  # the folder is no backbone


@pytest.mark.parametrize(
    ("dtype", "value", "tokens", "wanted"),
    [(torch.float16, 30.0, 4000, 30.0), (torch.bfloat16, 1.0, 3000, 1.0), (torch.float16, 0.1, 5000, 0.0999755859375)],
)
def test_means_of_half_precision_states_are_summed_in_float32(dtype, value, tokens, wanted):
    states = torch.full((1, tokens, 1), value, dtype=dtype)
    assert float(mean_of(states, torch.ones(1, tokens))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.long
def test_an_objective_that_is_worse_than_its_mean_is_told():
    g = torch.Generator().manual_seed(0)
    P, d = 300, 64
    resp = torch.randn(2 * P, d, generator=g)
    prompts, groups = torch.randn(P, 16, generator=g), torch.arange(P).repeat_interleave(2)
    labels = torch.rand(2 * P, 2, generator=g, dtype=torch.float64)
    pairs = PairFeatures(resp[0::2], resp[1::2], prompts, torch.arange(P))
    report = fit(
        Features.of(resp, prompts.repeat_interleave(2, 0), groups),
        labels,
        ["correct", "verbosity"],
        preferences=pairs,
        nuisances=["verbosity"],
        gate=GateConfig(hidden=16, steps=50),
        seed=0,
    ).report
    assert bool((report.ridge.validation_mse.min(0).values > labels.var(0)).all())
    assert any("correct" in text and "worse than by its mean" in text for text in report.warnings)
