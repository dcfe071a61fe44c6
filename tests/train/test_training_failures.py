"""What goes wrong around training: a full disk, a kill in the middle of a write, damaged files, nothing to train on, two ranks.

Each ends in one sentence, and the run goes on from its last whole checkpoint to the curve that it would have had.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from telltale.errors import CheckpointError, DataError
from telltale.models import load_model
from telltale.runs import RunDir
from telltale.train import train
from train.test_hf_trainer_contract import torchrun
from train.test_loop import CONFIG, RECIPE, Pattern, Stop, curve, nano, pattern

BEGIN = """
import os, resource, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from telltale.errors import TelltaleError
from telltale.train import train
from train.test_loop import CONFIG, RECIPE, nano, pattern
"""


def ran(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    tests = os.path.dirname(os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(script), str(tmp_path / "run"), tests],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )


def goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Resume ``run`` and compare it with a run that nothing happened to."""
    result = train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", layerskip=RECIPE, resume=True)
    assert result.finished
    train(nano(), pattern(), CONFIG, run_dir=tmp_path / "whole", layerskip=RECIPE)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))
    ours, theirs = load_model(tmp_path / "run" / "model"), load_model(tmp_path / "whole" / "model")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a Unix thing")
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_when_there_is_room(tmp_path):
    result = ran(
        tmp_path,
        """
        from telltale.train.loop import Callback

        class Fill(Callback):
            def on_step_end(self, state):
                if state.step == 7:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

        try:
            train(nano(), pattern(), CONFIG, run_dir=sys.argv[1], layerskip=RECIPE, callbacks=[Fill()])
        except TelltaleError as error:
            print("refused:", error)
        """,
    )
    assert "refused: could not write" in result.stdout, result.stdout + result.stderr
    assert "step-000010" in result.stdout
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000005"]
    assert not (tmp_path / "run" / "model").exists()
    goes_on_as_if_nothing_had_been(tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are a Unix thing")
@pytest.mark.parametrize("written", [pytest.param("the model", marks=pytest.mark.slow), "the optimizer"])
def test_a_kill_in_the_middle_of_a_checkpoint_costs_the_steps_since_the_one_before(written, tmp_path):
    result = ran(
        tmp_path,
        f"""
        saved, count = torch.save, 0

        def killed(state, path):
            global count
            count += 1
            if count == 2:
                if {written == "the optimizer"}:
                    saved(state, path)
                    with open(path, "r+b") as stream:
                        stream.truncate(1000)
                os.kill(os.getpid(), signal.SIGKILL)
            saved(state, path)

        torch.save = killed
        train(nano(), pattern(), CONFIG, run_dir=sys.argv[1], layerskip=RECIPE)
        """,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    names = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[-1] == "step-000005"
    assert names[0].startswith(".partial")
    assert (tmp_path / "run" / "checkpoints" / names[0] / "model.safetensors").exists()
    goes_on_as_if_nothing_had_been(tmp_path)


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [halved, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_half_a_checkpoint_is_refused_by_name_and_the_one_before_serves(damage, name, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", layerskip=RECIPE, callbacks=[Stop(11)])
    damage(tmp_path / "run" / "checkpoints" / "step-000010" / name)
    with pytest.raises(CheckpointError, match=r"step-000010") as refused:
        train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", layerskip=RECIPE, resume=True)
    assert "\n" not in str(refused.value)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000010")
    again = train(nano(), pattern(), CONFIG, run_dir=tmp_path / "run", layerskip=RECIPE, resume=True)
    assert again.finished


@pytest.mark.parametrize(
    ("part", "tokens"), [("train", torch.empty(0, dtype=torch.int64)), ("held_out", torch.zeros(1, dtype=torch.int64))]
)
def test_an_empty_corpus_is_refused_before_anything_is_written(part, tokens, tmp_path):
    whole = pattern()
    corpus = Pattern(**{"train": whole.train, "held_out": whole.held_out} | {part: tokens})
    with pytest.raises(DataError, match=f"corpus's {part} part has {len(tokens)} tokens"):
        train(nano(), corpus, CONFIG, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def two_ranks(folder: str) -> None:
    """What each of two processes runs: layers dropped for whole batches, with and without activation checkpointing."""
    torch.set_num_threads(1)
    recipe = replace(RECIPE, p_max=0.9, time_schedule="const")
    for name, kept in (("kept", False), ("recomputed", True)):
        config = replace(CONFIG, steps=6, activation_checkpointing=kept)
        train(nano(), pattern(), config, run_dir=Path(folder) / name, layerskip=recipe)
    with pytest.raises(DataError, match="10 tokens"):
        train(nano(), Pattern(torch.arange(10), torch.arange(50)), CONFIG, run_dir=Path(folder) / "empty")


@pytest.mark.slow
def test_two_ranks_with_activation_checkpointing_and_with_nothing_to_train_on(tmp_path):
    torchrun(tmp_path, "train.test_training_failures", "two_ranks")
    kept, recomputed = curve(tmp_path / "kept"), curve(tmp_path / "recomputed")
    assert kept == recomputed
    assert RunDir.open(tmp_path / "kept").metrics()[-1]["step"] == 6
    assert not (tmp_path / "empty").exists()
