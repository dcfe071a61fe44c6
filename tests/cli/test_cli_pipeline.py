"""The commands around pipelines: plans and their pictures, what is refused and how, and one job under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import telltale
from telltale.cli import run
from telltale.cli.options import run_torchrun, torchrun_arguments
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.simulation.timeline import Timeline
from telltale.train.pipeline.topology import Topology


def official_node(number, description, forward, backward, activation, parameters):
    return (
        f"node{number} -- {description} -- forward_compute_time={forward}, backward_compute_time={backward}, "
        f"activation_size={activation}, parameter_size={parameters}"
    )


OFFICIAL = "\n".join(
    [
        official_node(1, "Input0", 0.0, 0.0, 0.0, 0.0),
        official_node(2, "Conv2d(3, 64)", 4.0, 8.0, 4e6, 7e3),
        official_node(3, "Linear(512, 10)", 2.0, 4.0, 1e3, 9e6),
        "\tnode1 -- node2",
        "\tnode2 -- node3",
    ]
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    layers = [LayerProfile(f"block{i}", 0.004, 0.008, 1e5, 4e7, 1e6, 0.001) for i in range(6)]
    Profile(tuple(layers)).save(path)
    return path


@pytest.fixture(scope="module")
def topology(tmp_path_factory):
    path = tmp_path_factory.mktemp("topology") / "topo.yaml"
    Topology.flat(3, bandwidth="1Gbit/s").save(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"f{index}.py").write_text(f"def function_{index}(x):\n    return x * {index} + 1\n" * 30)
    return folder


def refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    message = captured.err.strip().splitlines()[-1]
    assert message.lower().startswith("error:")
    for word in words:
        assert word in captured.err, captured.err


def document(arguments, capsys):
    assert run([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_from_a_profile_with_its_pictures(profile, topology, tmp_path, capsys):
    out = [tmp_path / name for name in ("plan.json", "run.html", "trace.json")]
    arguments = [
        "plan",
        profile,
        "--topology",
        topology,
        "--simulate",
        "-o",
        out[0],
        "--html",
        out[1],
        "--trace",
        out[2],
    ]
    assert run([str(argument) for argument in arguments]) == 0
    shown = capsys.readouterr().out
    plan = Plan.load(out[0])
    assert f"configuration {plan.describe()}, policy {plan.policy}" in shown
    assert "block0" in shown
    assert "*" in shown
    assert "Runner-up" in shown
    assert f"{plan.stages[0].memory / 1e6:,.1f}" in shown
    assert "rank 2" in shown
    assert "F0" in shown
    assert plan.workers == 3
    assert "Plotly" in out[1].read_text()
    assert json.loads(out[2].read_text())["traceEvents"]


def test_a_number_of_stages_and_a_straight_pipeline_can_be_asked_for(profile, topology, capsys):
    found = document(["plan", profile, "--topology", topology, "--stages", 2, "--straight", "--json"], capsys)
    assert found["configuration"] == "1-1"
    refused(["plan", profile, "--topology", topology, "--stages", 9], capsys, "stages=9")


def test_the_machine_output_is_the_plan_and_the_prediction(profile, capsys):
    base = ["plan", profile, "--workers", 3, "--json", "--simulate", "--policy", "stash"]
    told = document([*base, "--bandwidth", "1Gbps"], capsys)
    assert sum(stage["replicas"] for stage in told["plan"]["stages"]) == 3
    assert told["configuration"] == "-".join(str(stage["replicas"]) for stage in told["plan"]["stages"])
    assert [bool(row["bottleneck"]) for row in told["stages"]].count(True) == 1
    assert told["simulated"]["seconds_per_minibatch"] == pytest.approx(told["plan"]["bottleneck"], rel=0.25)
    assert document([*base, "--bandwidth", "125MB/s"], capsys)["plan"] == told["plan"]
    faster = document([*base, "--bandwidth", "1GBps"], capsys)["plan"]["bottleneck"]
    assert faster <= told["plan"]["bottleneck"]


def test_the_official_text_format_and_every_cost_model(tmp_path, capsys):
    graph = tmp_path / "graph.txt"
    graph.write_text(OFFICIAL)
    for model in ("ring", "v1", "sosp-literal", "official-code"):
        told = document(
            ["plan", graph, "--workers", 4, "--bandwidth", "10Gbps", "--cost-model", model, "--json"], capsys
        )
        assert told["plan"]["cost_model"] == model
    converted = document(["pipeline", "profile", graph, "-o", tmp_path / "p.json", "--json"], capsys)
    assert [layer["forward"] for layer in converted["layers"]] == [0.004, 0.002]
    assert Profile.load(tmp_path / "p.json").layers == Profile.load(graph).layers


def test_a_preset_is_profiled_and_its_tied_head_respected(tmp_path, capsys):
    base = ["plan", "nano", "--workers", 2, "--bandwidth", "1kB/s", "--batch-size", 2, "--sequence-length", 16]
    base += ["--repeats", 1, "--json", "--profile-out", tmp_path / "profile.json"]
    told = document(base, capsys)
    measured = Profile.load(tmp_path / "profile.json")
    assert len(measured.layers) == 6
    assert measured.threads == 1
    assert measured.fingerprint == told["plan"]["fingerprint"]
    slow = ["plan", tmp_path / "profile.json", "--workers", 2, "--bandwidth", "1GB/s", "--json"]
    assert document(slow, capsys)["plan"]["fingerprint"] == measured.fingerprint
    many = ["plan", "nano", "--workers", 2, "--bandwidth", "100MB/s", "--batch-size", 1, "--sequence-length", 8]
    many += ["--repeats", 1, "--json", "--policy", "vertical"]
    assert document(many, capsys)["plan"]["policy"] == "vertical"


def test_a_tied_weight_turns_a_chosen_stash_into_2bw_and_refuses_one_that_was_asked_for(monkeypatch, capsys):
    from telltale.cli import pipeline as room
    from telltale.cli.pipeline import Profiled
    from telltale.models.presets import build
    from telltale.train.pipeline.runtime.collectives import untie
    from telltale.train.pipeline.split import split

    layers = tuple(LayerProfile(f"layer{i}", 0.01, 0.02, 10.0, 1e6) for i in range(6))
    network = build("nano", vocabulary_size=64)
    monkeypatch.setattr(room, "profiled", lambda model, options: Profiled(Profile(layers), split(network)))
    base = ["plan", "nano", "--workers", 2, "--bandwidth", "1MB/s"]
    told = document([*base, "--json"], capsys)["plan"]
    assert told["policy"] == "2bw"
    assert "tied across stages" in told["reasons"][-1]
    refused([*base, "--policy", "stash"], capsys, "tied", "--untie", "2bw")
    untie(network)
    assert document([*base, "--json"], capsys)["plan"]["policy"] == "stash"


def test_a_prediction_is_laid_over_a_recorded_run(profile, topology, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    assert run(["plan", str(profile), "--topology", str(topology), "--policy", "2bw", "-o", str(plan)]) == 0
    loaded = Plan.load(plan)
    timeline = simulate(loaded, Profile.load(profile), Topology.load(topology), minibatches=24, overhead=0.002)
    Timeline.from_events(timeline.events, loaded, label="recorded").save(tmp_path / "timeline.json")
    base = ["pipeline", "simulate", plan, profile, topology]
    capsys.readouterr()
    told = document([*base, "--recorded", tmp_path / "timeline.json", "--json"], capsys)
    assert told["simulated"]["minibatches"] == told["recorded"]["minibatches"] == 24
    assert 0.5 < told["ratio"] < 1.0
    arguments = [*base, "--recorded", tmp_path / "timeline.json", "--html", tmp_path / "both.html"]
    assert run([str(argument) for argument in arguments]) == 0
    assert "predicted over recorded" in capsys.readouterr().out
    assert "recorded" in (tmp_path / "both.html").read_text()
    assert document([*base, "--minibatches", 6, "--json"], capsys)["simulated"]["minibatches"] == 6
    other = Plan.even(6, 3, policy="stash")
    other.save(tmp_path / "other.json")
    refused(
        ["pipeline", "simulate", tmp_path / "other.json", *base[3:], "--recorded", tmp_path / "timeline.json"],
        capsys,
        "2bw",
    )


@pytest.mark.long
def test_bad_input_of_plan_is_one_sentence(profile, topology, tmp_path, capsys):
    base = ["plan", profile]
    refused(base, capsys, "--topology", "--workers")
    refused([*base, "--workers", 2], capsys, "--bandwidth")
    refused([*base, "--topology", topology, "--workers", 2], capsys, "leave out")
    refused([*base, "--topology", tmp_path / "absent.yaml"], capsys, "absent.yaml")
    flat = [*base, "--workers", 2, "--bandwidth", "10Gbps"]
    refused([*base, "--workers", 0, "--bandwidth", "10Gbps"], capsys, "count=0")
    refused([*base, "--workers", 2, "--bandwidth", "fast"], capsys, "bandwidth", "fast")
    refused([*base, "--workers", 2, "--bandwidth", "0"], capsys, "bandwidth")
    refused([*flat, "--policy", "magic"], capsys, "policy", "stash")
    refused([*flat, "--cost-model", "magic"], capsys, "cost_model", "ring")
    refused([*flat, "--memory", "1MB"], capsys, "bytes")
    refused([*flat, "--memory", "much"], capsys, "memory")
    refused([*flat, "--microbatches", 0], capsys, "microbatches")
    refused([*flat, "--policy", "stash", "--synchronous"], capsys, "synchronous")
    refused([*flat, "--recipe", "magic"], capsys, "recipe")
    refused([*flat, "--batch-size", 0], capsys, "batch_size")
    refused(["plan", "nowhere", *flat[2:]], capsys, "nowhere", "presets")
    refused(["plan", "nano", *flat[2:], "--sequence-length", 5000], capsys, "sequence_length=5000")
    (tmp_path / "bad.json").write_text('{"format": "something"}')
    refused(["plan", tmp_path / "bad.json", *flat[2:]], capsys, "profile")


def test_commands_for_several_processes_say_what_to_type(tmp_path, text, capsys):
    Plan.even(6, 2, policy="flush", microbatches=2).save(tmp_path / "plan.json")
    base = [
        "train",
        "--pipeline",
        tmp_path / "plan.json",
        "--preset",
        "nano",
        "--text",
        text,
        "--run-dir",
        tmp_path / "run",
    ]
    refused(base, capsys, f"torchrun --standalone --nproc-per-node 2 -m telltale train --pipeline {tmp_path}/plan.json")
    refused(
        ["pipeline", "probe", "--workers", 4],
        capsys,
        "torchrun --standalone --nproc-per-node 4 -m telltale pipeline probe",
    )
    refused(["pipeline", "probe", "--workers", 1], capsys, "workers=1")
    assert not (tmp_path / "run").exists()
    assert torchrun_arguments(["train", "--launch", "x"], 2)[-2:] == ["train", "x"]


def test_bad_input_of_train_is_refused_before_processes_start(tmp_path, text, capsys):
    def plan(**fields):
        Plan.even(6, 2, **fields).save(tmp_path / "plan.json")
        base = ["train", "--preset", "nano", "--text", text, "--run-dir", tmp_path / "run", "--launch"]
        return [*base, "--pipeline", tmp_path / "plan.json"]

    refused(plan(policy="stash"), capsys, "tied", "--untie", "2bw")
    refused([*plan(policy="flush", microbatches=3), "--set", "batch_size=4"], capsys, "batch_size=4", "multiple of 3")
    refused([*plan(policy="flush")[:-1], tmp_path / "absent.json"], capsys, "absent.json")
    refused([*plan(policy="flush"), "--preset", "tiny"], capsys, "6 layers", "10")
    refused([*plan(policy="flush"), "--set", "stepz=3"], capsys, "stepz")
    refused([*plan(policy="flush"), "--model", tmp_path / "absent"], capsys, "absent")
    refused(["train", "--run-dir", tmp_path / "run", "--launch"], capsys, "--pipeline")
    Plan.even(6, 4, policy="interleaved", microbatches=4, chunks=2).save(tmp_path / "plan.json")
    refused(
        ["train", "--preset", "nano", "--run-dir", tmp_path / "run", "--pipeline", tmp_path / "plan.json"],
        capsys,
        "interleaved",
        "--recipe none",
    )
    base = ["train", "--preset", "nano", "--text", text, "--run-dir", tmp_path / "run"]
    refused([*base, "--stages", 2, "--pipeline", tmp_path / "plan.json"], capsys, "both given")
    refused([*base, "--stages", 7], capsys, "7 stages for 6 layers")
    refused(
        [*base, "--stages", 2, "--recipe", "none"], capsys, "torchrun --standalone --nproc-per-node 2", "--stages 2"
    )
    refused([*base, "--own-stage"], capsys, "--own-stage", "--model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("codes", "expected"), [({0: 2, 1: 2}, 2), ({0: 130, 1: -15}, 130), ({0: 1}, 1), ({0: -9, 1: 2}, 2), ({0: -9}, 1)]
)
def test_a_launched_job_ends_with_the_exit_code_of_its_ranks(monkeypatch, codes, expected):
    def fail(arguments):
        raise ChildFailedError("telltale", {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()})

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torchrun, "run", fail)
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda self: "")
    assert run_torchrun(torchrun_arguments(["list"], 2)) == expected


def test_a_rank_says_which_one_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refused(["train", "--run-dir", tmp_path, "--pipeline", tmp_path / "absent.json"], capsys, "error: rank 1: plan")


def test_a_plan_of_one_worker_trains_in_this_process(tmp_path, text, capsys):
    Plan.even(6, 1, policy="stash").save(tmp_path / "plan.json")
    common = [
        "train",
        "--preset",
        "nano",
        "--text",
        text,
        "--set",
        "steps=3",
        "--set",
        "batch_size=2",
        "--recipe",
        "none",
    ]
    common += ["--set", "sequence_length=16", "--set", "precision=float32", "--json"]
    piped = document([*common, "--run-dir", tmp_path / "piped", "--pipeline", tmp_path / "plan.json"], capsys)
    plain = document([*common, "--run-dir", tmp_path / "plain"], capsys)
    assert piped["held_out_losses"] == pytest.approx(plain["held_out_losses"], rel=1e-6)


@pytest.mark.slow
def test_torchrun_from_probe_to_a_model_that_generates(tmp_path, text, capsys):
    """The four commands of the docs; the middle two in this process, the jobs with --launch in two."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK", "WORLD"))
    }

    def start(*arguments):
        command = [sys.executable, "-m", "telltale", *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=200,
            env=environment | {"OMP_NUM_THREADS": "1"},
            check=False,
        )

    topo, plan = tmp_path / "topo.yaml", tmp_path / "plan.json"
    probed = start("pipeline", "probe", "-o", topo, "--megabytes", 1, "--repeats", 3, "--launch")
    assert probed.returncode == 0, probed.stderr
    assert yaml.safe_load(topo.read_text())["levels"][0]["count"] == 2
    Plan.even(6, 2, policy="stash").save(plan)
    train = [
        "train",
        "--pipeline",
        plan,
        "--preset",
        "nano",
        "--text",
        text,
        "--run-dir",
        tmp_path / "run",
        "--untie",
        "--launch",
    ]
    train += ["--set", "steps=4", "--set", "batch_size=2", "--set", "sequence_length=16", "--set", "p_max=0.2"]
    trained = start(*train, "--json")
    assert trained.returncode == 0, trained.stderr
    told = json.loads(trained.stdout)
    assert told["finished"]
    assert told["step"] == 4
    assert len(told["held_out_losses"]) == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["checkpoints", "config.yaml", "metrics.jsonl", "model", "plan.json", "timeline.html", "timeline.json"]
    )
    network, tokenizer = telltale.load(told["model"])
    assert len(tokenizer) == network.config.vocab_size
    made = document(["generate", told["model"], "--prompt", "def f", "--max-new-tokens", 5, "--json"], capsys)
    assert len(made["tokens"]) == 5


def test_help_has_examples_and_the_catalogue_knows_policies(capsys):
    for command in (["plan"], ["pipeline", "probe"], ["pipeline", "profile"], ["pipeline", "simulate"]):
        assert run([*command, "--help"]) == 0
        assert "Example" in capsys.readouterr().out
    listed = document(["list", "--json"], capsys)
    assert "2bw" in listed["pipeline policies"]
    assert "ring" in listed["pipeline cost models"]
