"""``telltale serve MODEL``: a process that OpenAI's client can talk to, that ends on Ctrl-C, and refuses in a sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest

from serve.small_servers import models
from serve.small_tokenizers import byte_level
from telltale.cli import run
from telltale.cli.serve import listen
from telltale.errors import ConfigError

SECRET = "the-secret-of-this-prompt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    models().save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.mark.long
def test_a_served_model_answers_until_it_is_interrupted(checkpoint):
    arguments = ["--decode", "self-speculative", "--exit-layer", "2", "--draft-length", "3"]
    arguments += ["--port", "0", "--json", "--grace", "60"]
    server = subprocess.Popen(
        [sys.executable, "-m", "telltale", "serve", str(checkpoint), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TELLTALE_API_KEY": "the-key"},
    )
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(server.stdout.readline())
            assert lines[-1], server.stderr.read()
        told = json.loads("".join(lines))
        assert told["model"] == "small"
        assert (told["decode"], told["exit_layer"], told["draft_length"]) == ("self-speculative", 2, 3)
        assert told["url"].startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=f"{told['url']}/v1", api_key="the-key", max_retries=5)
        answer = client.completions.create(model="small", prompt=SECRET, max_tokens=8, temperature=0)
        plain = client.completions.create(
            model="small", prompt=SECRET, max_tokens=8, temperature=0, extra_body={"telltale": {"speculate": False}}
        )
        assert answer.choices[0].text == plain.choices[0].text
        assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 0
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{told['url']}/v1", api_key="other").models.list()
        long = {"model": "small", "prompt": SECRET, "max_tokens": 480, "n": 16}
        stream = iter(client.completions.create(stream=True, **long))
        next(stream)
        server.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.send_signal(signal.SIGINT)  # who asks twice does not want to wait
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    except BaseException:
        server.kill()
        raise
    out, err = server.communicate(timeout=60)
    assert server.returncode == 130, err
    assert SECRET not in out + err
    assert "the-key" not in out + err
    assert "Traceback" not in err, err


def refused(arguments, capsys, *words):
    assert run(["serve", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    for word in ("error:", *words):
        assert word in message, message
    assert "Traceback" not in message


@pytest.mark.long
def test_what_cannot_be_served_is_told_in_a_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TELLTALE_API_KEY", raising=False)
    refused([], capsys, "MODEL", "--judge")
    refused([tmp_path / "none"], capsys, "none")
    refused([checkpoint, "--judge", tmp_path], capsys, "--judge")
    refused([checkpoint, "--port", 70000], capsys, "port=70000")
    refused([checkpoint, "--max-rows", 0], capsys, "max_rows=0")
    refused([checkpoint, "--queue", -1], capsys, "queue=-1")
    refused([checkpoint, "--max-body", 0], capsys, "max_body=0")
    refused([checkpoint, "--exit-layer", "two"], capsys, "exit_layer='two'")
    refused([checkpoint, "--decode", "medusa"], capsys, "medusa")
    refused([checkpoint, "--batch-size", 4], capsys, "--batch-size")
    refused([checkpoint, "--api-key", ""], capsys, "API key")
    refused([checkpoint, "--host", "0.0.0.0", "--port", 0], capsys, "0.0.0.0", "--api-key", "--allow-anonymous")
    refused([checkpoint, "--draft", checkpoint, "--set", "threshold"], capsys, "key=value")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused([checkpoint, "--port", port], capsys, f"port={port}")
    # A key that a judge would not ask for must not be dropped silently.
    refused(["--judge", tmp_path, "--api-key", "key"], capsys, "--api-key does nothing with --judge")
    refused(["--judge", tmp_path, "--set", "beta=1"], capsys, "--set does nothing with --judge")
    monkeypatch.setenv("TELLTALE_API_KEY", "key")
    refused(["--judge", tmp_path], capsys, "TELLTALE_API_KEY", "judge")


def test_a_port_is_taken_while_its_model_is_still_opened():
    """Two that are started at once: a port that is only bound can be bound again."""
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}"):
            listen("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass  # who comes early waits


def test_a_missing_package_is_told_with_the_line_that_installs_it(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused([checkpoint], capsys, "pip install 'telltale[serve]'")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [
        name for name in sys.modules if name.startswith(("telltale.serve.openai_app", "telltale.serve.http_json"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    refused([checkpoint, "--port", 0], capsys, "pip install 'telltale[serve]'")
