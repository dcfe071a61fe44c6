"""Bodies that nobody would send: every answer is a 2xx or an OpenAI-shaped 4xx, none takes long, and the server lives on."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.small_servers import NAME, STEPS, running, served
from telltale.serve.openai_schema import ChatRequest, CompletionRequest
from telltale.serve.overrides import ACTS

SECONDS = 20.0
OWN = {"model", "max_tokens", "prompt", "messages"}
FIELDS = {*CompletionRequest.model_fields, *ChatRequest.model_fields} - OWN
EXAMPLES = int(os.environ.get("TELLTALE_FUZZ_EXAMPLES", "60"))
"""Bodies for each test; set the variable for a longer hunt, which draws new ones each time.

Even the derandomized bodies depend on the process: Hypothesis draws some of its values from the constants in the modules that
are loaded. So the tests count answers of both kinds only to see that there are some.
"""
HUNT = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="TELLTALE_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ATTENTIVE = replace(STEPS, score="ensemble", beta=0.5, threshold=0.4)


@pytest.fixture(scope="module", params=[STEPS, ATTENTIVE], ids=["log-probability", "attention"])
def server(request):
    with running(served("step-verified", request.param), max_rows=4, queue=8) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=SECONDS) as found:
        yield found


numbers = st.one_of(
    st.integers(-3, 6),
    st.integers(),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 5e-5, 1e308, 2**63, -(2**63), 10**400, 0.7, 1.0, 2.0]),
)
texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "two", "</s>", "<turn>", "\ud800", "\x00", "e", "inf", "-inf"])
)
atoms = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    atoms, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)), max_leaves=6
)
odd_prompts = st.one_of(
    texts, st.lists(texts, max_size=3), st.lists(numbers, max_size=4), st.lists(st.lists(numbers, max_size=3))
)
odd_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(["system", "user", "assistant", "developer", "tool"]), anything)},
        optional={"content": st.one_of(texts, anything), "name": anything, "tool_calls": anything},
    ),
    max_size=3,
)
good = {
    "n": st.integers(1, 3),
    "temperature": st.sampled_from([0, 1e-4, 0.7, 1.0, 2.0]),
    "top_p": st.sampled_from([1e-300, 0.1, 0.9, 1, 1.0]),
    "top_k": st.sampled_from([0, 1, 5, 10**6]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(
        st.sampled_from(["e", "</s>", "\n\n", "\ufffd", "\x00"]), st.lists(st.text(min_size=1), max_size=3)
    ),
    "stream": st.booleans(),
    "user": st.text(max_size=3),
}
good_overrides = {
    "policy": st.sampled_from(["specguard", "target", "draft", "speculative", "random"]),
    "threshold": st.sampled_from(["inf", "-inf", -1e308, -6, 0, 0.5]),
    "candidates": st.integers(1, 4),
    "selector": st.sampled_from(["medoid", "majority", "first", "log-probability"]),
    "max_step_tokens": st.integers(1, 9),
    "beta": st.sampled_from([0, 0.3, 1]),
    "score": st.sampled_from(["ensemble", "log-probability", "grounding", "agreement", "entropy", "likelihood-ratio"]),
    "signal_model": st.sampled_from(["draft", "target"]),
    "fallback": st.sampled_from(["k-sample", "plain", "spec"]),
    "accept_rate": st.sampled_from([0, 0.5, 1]),
    "draft_length": st.integers(1, 5),
    "repetition_limit": st.integers(2, 3),
    "speculate": st.booleans(),
}
odd = dict.fromkeys({*good, *FIELDS, "unheard_of"}, anything)


def base(endpoint):
    """The smallest body that is answered."""
    asks = {"prompt": "two"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "two"}]}
    return {"model": NAME, "max_tokens": 5} | asks


@st.composite
def nearly_good(draw, endpoint):
    """A good body with a field or two that are not, so that what is behind the first check is reached as well."""
    body = base(endpoint)
    for name in draw(st.sets(st.sampled_from(sorted(good)), max_size=3)):
        body[name] = draw(good[name])
    own = {"model": anything, "max_tokens": anything.filter(lambda value: value is not None)}
    asks = {"prompt": st.one_of(odd_prompts, anything)} if endpoint == "completions" else {}
    asks |= {"messages": st.one_of(odd_messages, anything)} if endpoint == "chat" else {}
    for name in draw(st.lists(st.sampled_from(sorted([*odd, *own, *asks, *asks, *asks])), min_size=1, max_size=2)):
        body[name] = draw((odd | own | asks)[name])
    return body


@st.composite
def overridden(draw):
    """Good values of overrides; only their combination may be wrong, and for every other body it hardly ever is."""
    body = base("completions")
    for name in draw(st.sets(st.sampled_from(sorted(good)), max_size=3)):
        body[name] = draw(good[name])
    values = {}
    names = sorted(good_overrides)
    if draw(st.booleans()):
        policy = values["policy"] = draw(good_overrides["policy"])
        names = [name for name, policies in ACTS.items() if policy in policies and name not in ("beta", "draft_length")]
        if policy == "random":
            values["accept_rate"] = draw(good_overrides["accept_rate"])
    for name in draw(st.sets(st.sampled_from(names), min_size=1, max_size=3)) if names else ():
        values[name] = draw(good_overrides[name])
    return body | {"max_tokens": draw(st.integers(1, 12)), "telltale": values}


def check(client, path, content):
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, (content, answer.text)
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert events.pop() == "[DONE]", (content, answer.text)
            for event in events:
                json.loads(event)
        else:
            assert answer.json()["choices"]
    else:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["code"]
    return answer


def alive(server, client):
    server.settle()
    assert client.get("/health").json()["status"] == "ok"
    assert server.service.metrics.value("telltale_engine_failures_total") == 0
    held = server.held()
    assert (held.slots_in_use, held.branches_in_use) == (0, 0)


@pytest.mark.long
@pytest.mark.parametrize("endpoint", list(PATHS))
def test_no_body_is_a_500(endpoint, client, server):
    found = Counter()

    @given(nearly_good(endpoint))
    @HUNT
    def run(body):
        found[check(client, PATHS[endpoint], json.dumps(body).encode()).status_code] += 1

    run()
    assert found[200] > 0
    assert found[400] > 5
    alive(server, client)


@pytest.mark.long
def test_no_override_is_a_500(client, server):
    found = Counter()

    @given(overridden())
    @HUNT
    def run(body):
        answer = check(client, PATHS["completions"], json.dumps(body).encode())
        found[answer.status_code] += 1
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert (error["param"] or "").startswith("telltale"), (body, error)

    run()
    assert found[200] > 2
    assert found[400] > 2
    alive(server, client)


@given(st.binary(max_size=40))
@HUNT
def test_no_bytes_are_a_500(client, content):
    assert check(client, "/v1/completions", content).status_code == 400


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "small", "prompt": NaN}',
        b'{"model": "small", "prompt": "two", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "small", "prompt": "two", "temperature": 1e999}',
        b'{"model": "small", "prompt": [1e2]}',
        b'{"model": "small", "prompt": [true]}',
        b'{"model": "small", "prompt": "\\ud800"}',
        b'{"\\ud800": 1, "model": "small", "prompt": "two"}',
        b"\xff\xfe{\x00}\x00",
        b"",
        b"null",
        b"[]",
    ],
)
def test_crooked_bodies_are_refused(client, content):
    for path in PATHS.values():
        assert check(client, path, content).status_code == 400


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'{"model": "small", "prompt": "two", "max_tokens": 1, "max_tokens": 2}', "max_tokens"),
        (b'{"model": "small", "model": "small", "prompt": "two"}', "model"),
        (b'{"model": "small", "prompt": "two", "telltale": {"beta": 0, "beta": 1}}', "beta"),
        (b'{"model": "small", "prompt": "two", "user": 1, "us\\u0065r": 2}', "user"),
        (b"{" + b",".join(b'"%d": 1' % place for place in range(50_000)) + b', "49999": 1}', "49999"),
    ],
    ids=["number", "same", "inner", "escaped", "many"],
)
def test_a_field_that_is_given_twice_is_named(client, content, name):
    """Which of the two counts depends on who reads it."""
    answer = check(client, PATHS["completions"], content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "duplicate_parameter")
