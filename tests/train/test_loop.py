"""The loop: it learns, resumes to the same curve whatever interrupted it, and refuses what it cannot use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace

import pytest
import torch

from telltale.errors import CheckpointError, ConfigError, DataError, NumericalError
from telltale.models import load_model
from telltale.models.presets import build
from telltale.runs import RunDir
from telltale.train import TrainConfig, train
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.loop import Callback, batch_at


@dataclass
class Pattern:
    """Text in which each token follows from the one before it, but for some noise."""

    train: torch.Tensor
    held_out: torch.Tensor


def pattern(length: int = 4000) -> Pattern:
    generator = torch.Generator().manual_seed(0)
    steps = torch.where(
        torch.rand(length, generator=generator) < 0.1, torch.randint(50, (length,), generator=generator), 3
    )
    tokens = steps.cumsum(0) % 50
    return Pattern(tokens[:-800], tokens[-800:])


CONFIG = TrainConfig(
    steps=12,
    batch_size=4,
    sequence_length=16,
    learning_rate=3e-3,
    evaluate_every=6,
    checkpoint_every=5,
    log_every=1,
    evaluation_tokens=200,
    precision="float32",
)
RECIPE = LayerSkipConfig(p_max=0.3, time_schedule="exp", rotation=2)


def nano():
    return build("nano", vocabulary_size=50, max_positions=64)


def curve(path):
    keep = ("step", "loss", "learning_rate", "exit_losses", "held_out")
    return [{key: record[key] for key in keep if key in record} for record in RunDir.open(path).metrics()]


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.long
def test_it_learns_and_leaves_a_plain_checkpoint(tmp_path):
    config = replace(CONFIG, steps=60, evaluate_every=30)
    result = train(nano(), pattern(), config, run_dir=tmp_path / "run", layerskip=RECIPE)
    records = [
        record["held_out"]["losses"] for record in RunDir.open(result.run_path).metrics() if "held_out" in record
    ]
    assert result.finished
    assert records[-1][-1] < records[0][-1] < 4.0
    model = load_model(result.model_path)
    ids = pattern().held_out[:32].view(1, -1)
    assert model(input_ids=ids, labels=ids).loss.item() < 4.0


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 5, 8])
def test_resume_after_an_interruption_gives_the_same_curve(tmp_path, step):
    train(nano(), pattern(), CONFIG, run_dir=tmp_path / "whole", layerskip=RECIPE)
    with pytest.raises(KeyboardInterrupt):
        train(nano(), pattern(), CONFIG, run_dir=tmp_path / "cut", layerskip=RECIPE, callbacks=[Stop(step)])
    result = train(nano(), pattern(), CONFIG, run_dir=tmp_path / "cut", layerskip=RECIPE, resume=True)
    assert result.finished
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    whole, cut = load_model(tmp_path / "whole" / "model"), load_model(tmp_path / "cut" / "model")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, cut.state_dict()[name]), name


@pytest.mark.long
def test_a_signal_saves_at_the_next_step_and_resumes_to_the_same_curve(tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        torch.set_num_threads(1)
        sys.path.insert(0, sys.argv[2])
        from train.test_loop import CONFIG, RECIPE, nano, pattern
        from dataclasses import replace
        from telltale.train import train
        config = replace(CONFIG, steps=int(sys.argv[3]), checkpoint_every=1000)
        result = train(nano(), pattern(), config, run_dir=sys.argv[1], layerskip=RECIPE, resume=True)
        print(result.finished, result.step)
        """
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "run"), tests, "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 4):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert out.startswith("False"), err
    step = int(out.split()[1])
    saved, _ = RunDir.open(tmp_path / "run").latest_checkpoint()
    assert saved == step
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] <= step


def test_every_setting_has_its_effect(tmp_path):
    base = train(nano(), pattern(), replace(CONFIG, steps=4), run_dir=tmp_path / "a")
    split = train(nano(), pattern(), replace(CONFIG, steps=4, gradient_accumulation=2), run_dir=tmp_path / "b")
    kept = train(nano(), pattern(), replace(CONFIG, steps=4, activation_checkpointing=True), run_dir=tmp_path / "c")
    assert base.quality.losses[-1] == pytest.approx(split.quality.losses[-1], rel=1e-4)
    assert base.quality.losses[-1] == pytest.approx(kept.quality.losses[-1], rel=1e-5)
    other = train(nano(), pattern(), replace(CONFIG, steps=4, seed=1), run_dir=tmp_path / "d")
    assert other.quality.losses != base.quality.losses


def test_batches_are_a_function_of_seed_and_step():
    tokens = pattern().train
    assert torch.equal(batch_at(tokens, CONFIG, 7), batch_at(tokens, CONFIG, 7))
    assert not torch.equal(batch_at(tokens, CONFIG, 7), batch_at(tokens, CONFIG, 8))
    assert not torch.equal(batch_at(tokens, CONFIG, 7), batch_at(tokens, replace(CONFIG, seed=1), 7))
    assert torch.equal(batch_at(tokens, CONFIG, 7), batch_at(tokens, replace(CONFIG, seed=1, data_seed=0), 7))


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(steps=100, warmup_steps=50, learning_rate=1.0)
    assert config.learning_rate_at(0) == pytest.approx(0.1)
    assert config.learning_rate_at(9) == pytest.approx(1.0)
    assert config.learning_rate_at(99) == pytest.approx(0.1, abs=1e-3)


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path):
    train(nano(), pattern(), replace(CONFIG, steps=2), run_dir=tmp_path, layerskip=RECIPE)
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(nano(), pattern(), replace(CONFIG, steps=2), run_dir=tmp_path, layerskip=RECIPE)
    with pytest.raises(ConfigError, match="learning_rate"):
        train(
            nano(),
            pattern(),
            replace(CONFIG, steps=2, learning_rate=1e-4),
            run_dir=tmp_path,
            resume=True,
            layerskip=RECIPE,
        )
    with pytest.raises(ConfigError, match="layerskip"):
        train(nano(), pattern(), replace(CONFIG, steps=2), run_dir=tmp_path, resume=True)


def test_another_model_or_a_damaged_checkpoint_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(nano(), pattern(), CONFIG, run_dir=tmp_path, callbacks=[Stop(6)])
    other = build("nano", vocabulary_size=50, max_positions=64, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="model_and_text"):
        train(other, pattern(), CONFIG, run_dir=tmp_path, resume=True)
    state = tmp_path / "checkpoints" / "step-000005" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(nano(), pattern(), CONFIG, run_dir=tmp_path, resume=True)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    model = nano()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="step 0"):
        train(model, pattern(), CONFIG, run_dir=tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_corpus_too_short_is_refused(tmp_path):
    short = Pattern(torch.arange(10), torch.arange(50))
    with pytest.raises(DataError, match="10 tokens"):
        train(nano(), short, CONFIG, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 3, "gradient_accumulation": 2}, "gradient_accumulation"),
        ({"precision": "int8"}, "precision"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"schedule": "step"}, "schedule"),
    ],
)
def test_bad_settings_are_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**fields)


@pytest.mark.slow
def test_data_parallel_training_equals_one_process(tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        torch.set_num_threads(1)
        sys.path.insert(0, sys.argv[2])
        from train.test_loop import CONFIG, nano, pattern
        from dataclasses import replace
        from telltale.train import train
        from telltale.train.layerskip import LayerSkipConfig
        # Half of the layers' whole batches are dropped: with two rows per rank this often leaves a layer without work.
        recipe = LayerSkipConfig(p_max=float(sys.argv[3]), rotation=2)
        train(nano(), pattern(), replace(CONFIG, steps=6, gradient_accumulation=1), run_dir=sys.argv[1], layerskip=recipe)
        """
    )
    path = tmp_path / "job.py"
    path.write_text(script)
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    for rate, name in (("0.0", "plain"), ("0.9", "dropping")):
        result = subprocess.run(
            [*launch, str(tmp_path / name), tests, rate], capture_output=True, text=True, env=environment, timeout=200
        )
        assert result.returncode == 0, result.stderr[-2000:]
    train(
        nano(),
        pattern(),
        replace(CONFIG, steps=6),
        run_dir=tmp_path / "one",
        layerskip=LayerSkipConfig(p_max=0.0, rotation=2),
    )
    one, two = (
        [record["loss"] for record in RunDir.open(tmp_path / name).metrics() if "loss" in record]
        for name in ("one", "plain")
    )
    assert two == pytest.approx(one, rel=1e-4)
    assert load_model(tmp_path / "dropping" / "model") is not None
