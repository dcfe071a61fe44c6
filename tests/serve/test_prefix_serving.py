"""Over HTTP: what was read is not read again and says so, browsers may ask where they are let, a slash too many does no harm."""

from __future__ import annotations

import httpx
import pytest

from serve.small_servers import CONFIGS, NAME, running, served
from telltale.cli.serve import ServeOptions
from telltale.errors import ConfigError

SYSTEM = "the sum of two and three is five. " * 6
FIRST = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "one and two?"}]


def talk(server) -> tuple[list[str], list[dict], list[float]]:
    """Texts, usages, and the tokens of prompts that were read for each of four requests."""
    texts, usages, read = [], [], []

    def ask(messages, **options):
        metrics = server.service.metrics
        before = [metrics.value(f"telltale_prompt_tokens_{name}") for name in ("total", "reused_total")]
        body = {"model": NAME, "messages": messages, "max_tokens": 12, "seed": 3, "temperature": 0.9} | options
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        server.settle()
        after = [metrics.value(f"telltale_prompt_tokens_{name}") for name in ("total", "reused_total")]
        read.append(after[0] - before[0] - (after[1] - before[1]))
        texts.extend(choice["message"]["content"] for choice in answer.json()["choices"])
        usages.append(answer.json()["usage"])

    ask(FIRST)
    ask([*FIRST, {"role": "assistant", "content": texts[0]}, {"role": "user", "content": "and three?"}])
    ask([{"role": "user", "content": SYSTEM}], n=8)
    ask(FIRST, logprobs=True)
    return texts, usages, read


@pytest.mark.long
@pytest.mark.parametrize("decode", CONFIGS)
def test_texts_do_not_depend_on_it_and_less_is_read(decode):
    with running(served(decode)) as server:
        texts, usages, read = talk(server)
        scraped = httpx.get(f"{server.url}/metrics").text
        cached = server.service.metrics.value("telltale_prompt_tokens_cached_total")
        assert f"telltale_prompt_tokens_cached_total {cached}" in scraped
        assert server.held().prefix_bytes > 0
        exact = server.service.scheduler._engine.prefixes.exact
        piece = server.service.scheduler._engine.prefixes.piece
    with running(served(decode), prefix_cache=None) as server:
        plain, without, all_read = talk(server)
        assert server.held().prefix_bytes == 0
    assert texts == plain
    prompts = [usage["prompt_tokens"] for usage in usages]
    details = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in without] == [0] * 4
    # A guard's draft reads and the target, where it scores nothing, does not: then its own count is nought.
    if all_read[1]:
        assert read[1] <= prompts[1] - prompts[0] + (12 if exact else 12 + piece)
        assert details[1] >= prompts[0] - (1 if exact else piece)
        # A prompt counts once in a usage, and for each of its choices in the server's numbers.
        assert sum(details) <= cached <= sum(details) + 8
    assert read[2] <= 1.2 * prompts[2]
    assert all_read[2] <= 1.2 * prompts[2]


def test_pages_of_an_allowed_origin_may_ask_without_a_key_first():
    with running(served("autoregressive"), api_key="secret", cors=["https://a.example"]) as server:
        asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(f"{server.url}/v1/completions", headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(f"{server.url}/v1/completions", headers=asks | {"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})
        assert answer.status_code == 401
    with running(served("autoregressive")) as server:
        answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_a_slash_at_the_end_does_no_harm():
    with running(served("autoregressive")) as server:
        body = {"model": NAME, "prompt": "two", "max_tokens": 2}
        for path in ("/v1/completions/", "/v1/completions//"):
            assert httpx.post(server.url + path, json=body).status_code == 200
        assert httpx.get(f"{server.url}/v1/models/").json()["data"][0]["id"] == NAME
        assert httpx.get(f"{server.url}/health/").status_code == 200
        assert httpx.post(f"{server.url}/v1/other/", json=body).status_code == 404


def test_the_entry_says_what_is_promised_and_what_is_not():
    for decode in CONFIGS:
        told = served(decode).entry()["telltale"]
        assert any("does not depend" in one for one in told["promised"])
        assert "that an answer is right" in told["not_promised"]
        assert any("nothing is calibrated" in one for one in told["not_promised"]) == (decode == "step-verified")
        assert any("the model's own" in one for one in told["promised"]) == (decode != "step-verified")


@pytest.mark.parametrize(
    ("given", "found"), [("off", None), ("0", None), ("1000", 1000), ("2K", 2048), ("3m", 3 << 20), ("1GiB", 1 << 30)]
)
def test_the_limit_is_bytes_or_off(given, found):
    assert ServeOptions(prefix_cache=given).prefix_bytes == found


@pytest.mark.parametrize("given", ["", "-1", "much", "1.5G", "G", "1T", "9" * 16])
def test_what_is_no_limit_is_refused(given):
    with pytest.raises(ConfigError, match="expected bytes, such as 512M, or off"):
        _ = ServeOptions(prefix_cache=given).prefix_bytes
