"""The edge commands as a user calls them, on a pair trained for seconds; and what they refuse in one sentence."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from cli.commands import called, refused


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from telltale.edge.training import SMALL_EDGE, train_pair

    folder = tmp_path_factory.mktemp("pair")
    small = replace(SMALL_EDGE, steps=30)
    return train_pair(folder, edge=small, server=replace(small, seed=7))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from telltale.tasks.scenes import write_folder

    return write_folder(tmp_path_factory.mktemp("data") / "scenes", 60, seed=3)


class running:
    """A command in its own process; yields its first line of JSON and ends it as Ctrl-C does."""

    def __init__(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "telltale", *map(str, arguments), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self):
        text = ""
        while not text.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, "the command ended early"
            text += line
        return json.loads(text)

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.rest = self.process.communicate(timeout=20)[0]
        assert self.process.returncode == 0


@pytest.mark.long
def test_four_commands_from_two_checkpoints_to_a_running_edge(pair, photos, tmp_path, capsys):
    edge, server = pair
    both = ["edge", "audit", "--edge", edge, "--server", server, "--data", photos]
    options = ["--gate", 0.1, "--shares", "0.3", "--swap", "--coverage", "--json"]
    audited = json.loads(
        called(
            [*both, "--limit", 30, "--json", "--out", tmp_path / "audit.json"],
            capsys,
        ).out
    )
    assert {row["importance"] for row in audited["deletions"]} == {"cls_last", "cls_first", "rollout", "gradient"}
    swept = json.loads(
        called(
            ["edge", "sweep", *both[2:], "--run-dir", tmp_path / "sweep", *options],
            capsys,
        ).out
    )
    assert (tmp_path / "sweep" / "sweep.html").exists()
    assert any(row["name"].startswith("whole image") for row in swept["rows"])
    assert len({(row["name"], row["budget"]) for row in swept["rows"]}) == len(swept["rows"])
    with running("edge", "serve", "--model", server, "--port", 0) as served:
        address = served["url"].removeprefix("ws://")
        proxy = running("edge", "link", "--to", address, "--port", 0, "--kbps", 4000)
        with proxy as linked:
            one = sorted(photos.glob("*/*.png"))[0]
            send = ["edge", "send", one, photos, "--model", edge, "--bytes", 400, "--gate", 0]
            send += ["--deadline", 2000, "--arbitration", "server", "--json"]
            sent = json.loads(
                called(
                    [*send, "--server", linked["url"], "--profile", swept["profile"]],
                    capsys,
                ).out
            )
        counted = json.loads(proxy.rest)
    answers = sent["answers"]
    assert len(answers) == 61
    assert all(0 < answer["bytes_up"] <= 400 for answer in answers)
    assert {answer["source"] for answer in answers} == {"server"}
    # Beside the requests: one ping of 6 bytes, and a closing frame of 8.
    assert counted["bytes_up"] == sum(answer["bytes_up"] for answer in answers) + 6 + 8


@pytest.mark.long
def test_sending_without_a_server_and_to_one_that_is_away(pair, photos, capsys):
    edge, _ = pair
    one = sorted(photos.glob("*/*.png"))[0]
    told = called(["edge", "send", one, "--model", edge], capsys)
    assert "edge" in told.out
    away = ["edge", "send", one, "--model", edge, "--server", "ws://127.0.0.1:9", "--gate", 0, "--deadline", 100]
    told = called(away, capsys)
    assert "the server's weight was not fitted" in told.err
    told = called([*away, "--arbitration", "server"], capsys)
    assert "warning: no server answered" in told.err


@pytest.mark.long
def test_refusals_are_one_sentence(pair, photos, tmp_path, capsys):
    edge, server = pair
    empty, broken, strange = tmp_path / "empty", tmp_path / "broken", tmp_path / "strange"
    for folder in (empty, broken / "3", strange / "elephant"):
        folder.mkdir(parents=True)
    (broken / "3" / "x.png").write_bytes(b"no picture")
    (strange / "elephant" / "x.png").write_bytes((sorted(photos.glob("*/*.png"))[0]).read_bytes())
    audit = ["edge", "audit", "--edge", edge, "--data"]
    refused([*audit, empty], capsys, "holds no images")
    refused([*audit, tmp_path / "nowhere"], capsys, "no folder")
    refused([*audit, broken], capsys, "cannot be read as an image")
    refused([*audit, strange], capsys, "none of the model's labels")
    refused([*audit, photos, "--share", 2], capsys, "share=2.0")
    send = ["edge", "send", photos, "--model", edge]
    refused([*send, "--bytes", 20], capsys, "below the header")
    refused([*send, "--deadline", 0], capsys, "deadline=0.0")
    refused([*send, "--profile", tmp_path / "none.json"], capsys, "cannot be read")
    refused([*send, "--server", "http://127.0.0.1"], capsys, "ws://")
    refused(["edge", "send", photos, "--model", tmp_path], capsys, "config.json cannot be read")
    refused(["edge", "serve", "--model", server, "--host", "0.0.0.0"], capsys, "token")
    refused(["edge", "serve", "--model", server, "--certificate", "x.pem"], capsys, "both")
    for nowhere in ("nowhere", "h:99999", ":80", "h:0"):
        refused(["edge", "link", "--to", nowhere], capsys, "host:port")
    refused(["edge", "link", "--to", "h:1", "--loss", 3], capsys, "loss=3.0")
    sweep = ["edge", "sweep", "--run-dir", tmp_path / "run"]
    refused([*sweep, "--edge", edge], capsys, "all of them")
    refused([*sweep, "--shares", "a"], capsys, "shares='a'")
    for option, value, words in (
        ("--selectors", "sage,nosuch", "'nosuch' is unknown"),
        ("--codec", "png", "'png' is unknown"),
        ("--gate", "-1", "threshold"),
        ("--limit", 0, "limit=0"),
        ("--seed", -1, "seed=-1"),
    ):
        refused([*sweep, option, value], capsys, words)  # before anything is trained
    refused([*audit, photos, "--limit", 0], capsys, "limit=0")
    refused([*audit, photos, "--seed", -1], capsys, "seed=-1")
    beside = tmp_path / "beside"
    _copied(photos, beside)
    refused([*audit, beside], capsys, "beside class folders")
    other = tmp_path / "other"
    _with_other_labels(server, other)
    refused([*sweep, "--edge", edge, "--server", other, "--data", photos], capsys, "labels that differ")
    assert not (tmp_path / "run").exists()


def _copied(photos, target):
    one = sorted(photos.glob("*/*.png"))[0]
    (target / one.parent.name).mkdir(parents=True)
    for path in (target / "loose.png", target / one.parent.name / one.name):
        path.write_bytes(one.read_bytes())


def _with_other_labels(source, target):
    import shutil

    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["id2label"] = {str(number): f"class {number}" for number in range(10)}
    config["label2id"] = {f"class {number}": number for number in range(10)}
    (target / "config.json").write_text(json.dumps(config))
