"""Both applications against their own OpenAPI documents: what the document rules out is refused, and nothing is an accident."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection

from align.judge.tiny_judges import tiny_judge
from serve.small_servers import NAME, listening, running, served
from telltale.serve.judge_app import create_app

FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def completions():
    with running(served("autoregressive"), max_rows=4, queue=8) as found:
        yield schemathesis.openapi.from_url(f"{found.url}/openapi.json")


@pytest.fixture(scope="module")
def judge():
    with listening(create_app(tiny_judge())) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def hunt(schema, path, mode):
    """Ask ``path`` with bodies that the document allows, or rules out."""
    answered = Counter()

    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    @FEW
    def ask(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # another model is refused before anything else is looked at
        answer = case.call_and_validate(checks=[not_a_server_error, negative_data_rejection], timeout=30)
        answered[answer.status_code] += 1
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    return answered


@pytest.mark.long
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_language_models_server(completions, path, mode):
    answered = hunt(completions, path, mode)
    assert set(answered) <= {200, 400, 404}
    assert answered[400] > 0


@pytest.mark.long
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/score", "/get_reward"])
def test_a_judges_server(judge, path, mode):
    answered = hunt(judge, path, mode)
    assert set(answered) <= {200, 400, 422}
    assert answered[422] > 0
