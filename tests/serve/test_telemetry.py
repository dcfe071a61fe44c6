"""What an operator's OpenTelemetry collector gets to see of an accident: nothing of what was asked."""

from __future__ import annotations

import httpx
import pytest

from serve.small_servers import NAME, running, served

logs = pytest.importorskip("opentelemetry._logs")
pytest.importorskip("fastapi.telemetry", reason="this FastAPI has no telemetry of its own")
SECRET = "the-secret-of-this-prompt"


class Collected(logs.LoggerProvider, logs.Logger):
    """Everything that is logged; provider and logger in one."""

    def __init__(self) -> None:
        self.records = []

    def get_logger(self, *_, **__):
        return self

    def enabled(self, *_, **__):
        return True

    def emit(self, record=None, **fields):
        self.records.append((record, fields))


def test_an_accidents_message_is_not_handed_to_telemetry(monkeypatch):
    collected = Collected()
    monkeypatch.setattr(logs, "get_logger_provider", lambda: collected)
    monkeypatch.setattr(logs, "get_logger", lambda *_, **__: collected)
    with running(served("autoregressive")) as server:

        async def fails(asked):
            raise RuntimeError(f"an accident with {asked.prompts}")

        server.service.begin = fails
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": SECRET})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert SECRET not in answer.text
    assert SECRET not in repr(collected.records)
    assert collected.records == []
