"""``telltale serve``: a process that answers on loopback, ends on Ctrl-C, and refuses in a sentence."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from telltale.cli import run
from telltale.cli.serve import ended_by_signals

CHAT = [{"role": "user", "content": "add two and three"}, {"role": "assistant", "content": "five the-secret"}]


@pytest.mark.long
def test_a_served_judge_answers_until_it_is_interrupted(judge_folder):
    command = [sys.executable, "-m", "telltale", "serve", "--judge", str(judge_folder), "--port", "0", "--json"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(server.stdout.readline())
            assert lines[-1], server.stderr.read()
        told = json.loads("".join(lines))
        assert told["url"].startswith("http://127.0.0.1:")
        with httpx.Client(transport=httpx.HTTPTransport(retries=50)) as client:
            found = client.post(f"{told['url']}/score", json={"messages": CHAT}, timeout=30).json()
            assert client.post(f"{told['url']}/score", content=b"{").status_code == 400
        assert found["score"] == math.fsum(found["contributions"].values())
        assert list(found["objectives"]) == told["objectives"]
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 130
    assert "the-secret" not in out + err
    assert "Traceback" not in err


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_server_ends_by_a_signal_that_it_was_started_without(judge_folder, number, code):
    """Shells start ``command &`` with SIGINT ignored."""
    command = [sys.executable, "-m", "telltale", "serve", "--judge", str(judge_folder), "--port", "0", "--json"]
    server = subprocess.Popen(
        ["sh", "-c", "trap '' INT TERM; exec \"$@\"", "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while (line := server.stdout.readline()) != "}\n":
            assert line, server.stderr.read()
        server.send_signal(number)
        _, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == code
    assert "Traceback" not in err


def test_signals_are_ignored_again_behind_the_server():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, own := lambda *_: None)
        with ended_by_signals():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    for word in ("error:", *words):
        assert word in message, message
    assert "Traceback" not in message


def test_what_cannot_be_served_is_told_in_a_sentence(judge_folder, tmp_path, capsys):
    refused(["serve"], capsys, "--judge PATH")
    refused(["serve", "--judge", tmp_path / "none"], capsys, "none")
    refused(["serve", "--judge", judge_folder, "--port", 70000], capsys, "port=70000")
    refused(["serve", "--judge", judge_folder, "--batch-size", 0], capsys, "batch_size=0")
    refused(["serve", "--judge", judge_folder, "--patience", -1], capsys, "patience=-1")
    refused(["serve", "--judge", judge_folder, "--host", "256.1.1.1"], capsys, "256.1.1.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(["serve", "--judge", judge_folder, "--port", port], capsys, f"port={port}")


def test_a_missing_package_is_told_with_the_line_that_installs_it(judge_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(["serve", "--judge", judge_folder], capsys, "pip install 'telltale[serve]'")
