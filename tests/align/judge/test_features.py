"""Pooling under any padding, and features on disk: killed, resumed, shared out over processes, always the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaModel

from align.judge.extract_run import ROWS, SHARD_ROWS, backbone, conversations
from align.judge.tiny_judges import tiny_tokenizer
from telltale.align.judge import features as extraction
from telltale.align.judge.data import Conversation, Pair
from telltale.align.judge.feature_store import Features, FeatureStore, group_id, prompt_id
from telltale.align.judge.features import (
    batch_features,
    extract,
    last_token,
    mean_of,
    padded,
    pair_conversations,
    pair_features,
)
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.model import JudgeConfig, JudgeModel, pattern_positions
from telltale.align.judge.templates import encode
from telltale.errors import CheckpointError, ConfigError, DataError

TESTS = Path(__file__).parents[2]


def encoded(config=None):
    tokenizer = tiny_tokenizer()
    return [encode(tokenizer, row.messages, config or JudgeConfig()) for row in conversations(12)]


def one_by_one(model, rows, pooling="last"):
    found = [batch_features(model, [row], pooling=pooling, pad=0) for row in rows]
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pad", [0, 3])
def test_padding_changes_nothing_on_either_side_nor_with_the_end_token_as_pad(left: bool, pad: int) -> None:
    model, rows = backbone(), encoded()
    with torch.no_grad():
        hidden, prompts = batch_features(model, rows, pooling="last", pad=pad, left=left)
        alone = one_by_one(model, rows)
    assert float((hidden - alone[0]).abs().max()) <= 1e-6
    assert float((prompts - alone[1]).abs().max()) <= 1e-6


def test_an_encoder_reads_response_and_prompt_in_two_passes() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    model, rows = BertModel(config).eval(), encoded(JudgeConfig(pooling="mean"))
    passed: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: passed.append(len(given["input_ids"])), with_kwargs=True)
    with torch.no_grad():
        hidden, prompts = batch_features(model, rows, pooling="mean", pad=0)
        assert passed == [12, 3], "four responses to a prompt share its pass"
        alone = one_by_one(model, rows, "mean")
        by_hand = model(input_ids=torch.tensor([rows[5].prompt_ids])).last_hidden_state[0].mean(0)
    assert float((hidden - alone[0]).abs().max()) <= 1e-6
    assert float((prompts[5] - by_hand).abs().max()) <= 1e-6


@pytest.mark.parametrize("family", [BertModel, LlamaModel])
def test_the_model_takes_ids_padded_on_either_side(family) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = family(family.config_class(**size, intermediate_size=48, max_position_embeddings=64)).eval()
    pooling = "mean" if family is BertModel else "last"
    head = Head(["a", "b"], 32, gate=GateConfig(hidden=8, layers=1))
    head.set_regression(torch.randn(2, 32))
    judge, rows = JudgeModel.assembled(model, head, pooling=pooling), encoded(JudgeConfig(pooling=pooling))
    with torch.no_grad():
        wanted = head(*one_by_one(model, rows, pooling)).score.float()[:, None]
        for left in (False, True):
            ids, mask = padded([row.ids for row in rows], pad=0, device="cpu", left=left)
            prompts, prompt_mask = padded([row.prompt_ids for row in rows], pad=0, device="cpu", left=left)
            places = torch.tensor([row.gating_index for row in rows]) + (mask.shape[1] - mask.sum(1)) * left
            options = (
                {"gating_index": places}
                if pooling == "last"
                else {"prompt_input_ids": prompts, "prompt_attention_mask": prompt_mask}
            )
            torch.testing.assert_close(judge(ids, mask, **options).logits, wanted, atol=2e-6, rtol=0)


def test_pooling_goes_by_the_mask() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert last_token(states, mask).tolist() == [[2.0, 3.0], [10.0, 11.0]]
    assert mean_of(states, mask).tolist() == [[1.0, 2.0], [9.0, 10.0]]
    with pytest.raises(DataError, match="row 1 has no token"):
        last_token(states, torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_raw_ids_find_their_gating_token() -> None:
    ids = torch.tensor([[2, 3, 5, 9, 3, 5, 8, 3], [0, 0, 2, 3, 5, 8, 8, 3]])
    mask = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]])
    assert pattern_positions(ids, mask, [3, 5]).tolist() == [4, 3]
    with pytest.raises(DataError, match="row 0 does not hold"):
        pattern_positions(ids, mask, [9, 9])
    with pytest.raises(ConfigError, match="gating_pattern"):
        pattern_positions(ids, mask, None)


def store_of(path: Path, **options) -> FeatureStore:
    settings = {"batch_size": 4, "shard_rows": SHARD_ROWS} | options
    return extract(backbone(), tiny_tokenizer(), conversations(), path, JudgeConfig(), **settings)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def run(path: Path, pause: float, *launch: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(Path(__file__).with_name("extract_run.py")), str(path), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_rows_come_back_in_their_order_with_prompts_that_repeat(tmp_path: Path) -> None:
    features = store_of(tmp_path / "f").load()
    rows = conversations()
    assert features.rows == [row.id for row in rows]
    with torch.no_grad():
        wanted = one_by_one(backbone(), [encode(tiny_tokenizer(), row.messages, JudgeConfig()) for row in rows])
    assert float((features.responses - wanted[0]).abs().max()) <= 1e-6
    assert float((features.prompts - wanted[1]).abs().max()) <= 1e-6
    prompts = [row.messages[0]["content"] for row in rows]
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    assert torch.equal(features.groups[:, None] == features.groups, same)
    assert group_id("a") != group_id("b")


@pytest.mark.long
def test_a_killed_extraction_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    wanted = contents(store_of(tmp_path / "whole").path)
    cut = tmp_path / "cut"
    process = run(cut, 0.1)
    deadline = time.time() + 60
    while len(list(cut.glob("shard-*"))) < 3 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file.name: file.stat().st_mtime_ns for file in cut.glob("shard-*")}
    assert 3 <= len(done) < -(-ROWS // SHARD_ROWS)
    with pytest.raises(CheckpointError, match="it resumes"):
        FeatureStore.open(cut).load()
    store_of(cut)
    assert contents(cut) == wanted
    assert all((cut / name).stat().st_mtime_ns == when for name, when in done.items())


@pytest.mark.slow
def test_two_processes_share_the_work_to_the_same_bytes(tmp_path: Path) -> None:
    wanted = contents(store_of(tmp_path / "one").path)
    process = run(tmp_path / "two", 0.0, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert out.count("done") == 2
    assert contents(tmp_path / "two") == wanted


def test_a_run_that_fails_computes_no_row_twice(tmp_path: Path, monkeypatch) -> None:
    """It stops inside of a shard; what it had of that shard is kept, and the bytes come out the same."""
    wanted = contents(store_of(tmp_path / "whole").path)
    passed: list[int] = []

    def counted(backbone, rows, **options):
        passed.extend(len(row.ids) for row in rows)
        if len(passed) == 24:
            raise KeyboardInterrupt
        return batch_features(backbone, rows, **options)

    monkeypatch.setattr(extraction, "batch_features", counted)
    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path / "cut", shard_rows=40)
    assert [file.name for file in (tmp_path / "cut").glob("part-*")] == ["part-00000-00000.safetensors"]
    before = len(passed) - 4
    store_of(tmp_path / "cut", shard_rows=40)
    assert len(passed) == ROWS + 4, "only the batch that failed is computed again"
    assert before == 20
    assert contents(tmp_path / "cut") == contents(store_of(tmp_path / "other", shard_rows=40).path)
    assert wanted.keys() != contents(tmp_path / "cut").keys()


def test_rows_are_kept_every_few_seconds(tmp_path: Path, monkeypatch) -> None:
    """A kill gives no warning: parts are written while a shard is computed, and go when it is whole."""
    seen = []

    def watched(backbone, rows, **options):
        seen.append(len(list(tmp_path.glob("part-*"))))
        return batch_features(backbone, rows, **options)

    monkeypatch.setattr(extraction, "batch_features", watched)
    monkeypatch.setattr(extraction, "SECONDS_BETWEEN_PARTS", 0.0)
    store_of(tmp_path, shard_rows=40)
    assert seen == list(range(10))
    assert not list(tmp_path.glob("part-*"))
    (tmp_path / "shard-00000.safetensors").unlink()
    (tmp_path / "part-00000-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="Remove it"):
        store_of(tmp_path, shard_rows=40)


def test_whole_features_serve_other_batches_and_shards(tmp_path: Path) -> None:
    store_of(tmp_path)
    before = contents(tmp_path)
    assert len(store_of(tmp_path, batch_size=8, shard_rows=5).load()) == ROWS
    assert contents(tmp_path) == before


def test_features_of_something_else_are_not_continued(tmp_path: Path) -> None:
    store_of(tmp_path / "f")
    (tmp_path / "f" / "shard-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="batch_size=4, not 8"):
        store_of(tmp_path / "f", batch_size=8)
    tokenizer, half = tiny_tokenizer(), backbone().bfloat16()
    tokenizer.chat_template = tokenizer.chat_template.replace("<s>", "")
    for words, options in (
        ("another tokenizer", {"tokenizer": tokenizer}),
        ("another backbone", {"backbone": half}),
        ("context_length=None, not 30", {"config": JudgeConfig(context_length=30)}),
    ):
        given = {"backbone": backbone(), "tokenizer": tiny_tokenizer(), "config": JudgeConfig()} | options
        with pytest.raises(ConfigError, match=words):
            extract(
                given["backbone"],
                given["tokenizer"],
                conversations(),
                tmp_path / "f",
                given["config"],
                batch_size=4,
                shard_rows=SHARD_ROWS,
            )
    with pytest.raises(ConfigError, match="holds features with"):
        extract(
            backbone(), tiny_tokenizer(), conversations(39), tmp_path / "f", JudgeConfig(), batch_size=4, shard_rows=6
        )
    with pytest.raises(CheckpointError, match="holds no features"):
        FeatureStore.open(tmp_path)


def test_pairs_are_two_rows_each(tmp_path: Path) -> None:
    pairs = [
        Pair(f"pair {i}", [{"role": "user", "content": prompt}], "five", "six a b")
        for i, prompt in enumerate(["add two", "add three", "add two"])
    ]
    store = extract(backbone(), tiny_tokenizer(), pair_conversations(pairs), tmp_path, JudgeConfig())
    found = pair_features(store.load())
    assert len(found) == 3
    assert found.groups[0] == found.groups[2]
    assert found.groups[0] != found.groups[1]
    assert torch.equal(found.prompts[0], found.prompts[2])
    assert not torch.equal(found.chosen[0], found.rejected[0])
    features = store.load()
    with pytest.raises(DataError, match="no pairs"):
        pair_features(Features.of(features.responses[:3], features.prompts[:3], features.groups[:3]))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 7: .* the last message"):
        extract(
            backbone(),
            tiny_tokenizer(),
            [Conversation("row 7", [{"role": "user", "content": "a"}] * 2)],
            tmp_path,
            JudgeConfig(),
        )
    broken = backbone()
    with torch.no_grad():
        broken.norm.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"row \d+ has a feature that is NaN or infinite"):
        extract(broken, tiny_tokenizer(), conversations(), tmp_path / "broken", JudgeConfig())
    assert not list((tmp_path / "broken").glob("part-*"))
    with pytest.raises(DataError, match="no conversations"):
        extract(backbone(), tiny_tokenizer(), [], tmp_path, JudgeConfig())
    broken = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(DataError, match="row 1 has a feature that is NaN or infinite in prompts"):
        Features.of(torch.ones(2, 1), broken, torch.arange(2))
    with pytest.raises(DataError, match="do not fit together"):
        Features.of(torch.ones(2, 1), torch.ones(3, 1), torch.arange(2))


def test_copies_of_a_prompt_have_one_id_whatever_their_normal_form():
    """In two parts of the split they would leak."""
    texts = ("Caf\u00e9, please?", "Cafe\u0301,  please?\r\n", "caf\u00e9,\u00a0please?", "CAF\u00c9, please?")
    assert len({prompt_id([{"role": "user", "content": text}]) for text in texts}) == 1
    assert prompt_id([{"role": "user", "content": "a"}]) != prompt_id([{"role": "user", "content": "b"}])
    assert prompt_id([{"role": "user", "content": "a"}]) != prompt_id([{"role": "system", "content": "a"}])
