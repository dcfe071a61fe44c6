"""Log-probabilities over HTTP against Transformers' own, in both forms, for every decode, echoes included."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from serve.small_servers import CONFIGS, models, running, served
from serve.small_tokenizers import byte_level

TEXT = "the sum of two and three is five.\n\nGrüße"


def reference(tokens, start):
    """ln p of each token from ``start`` on, by Transformers."""
    with torch.no_grad():
        logits = models()(torch.tensor([tokens])).logits[0].double()
    values = logits.log_softmax(-1)
    return [float(values[place - 1, tokens[place]]) for place in range(start, len(tokens))], values


@pytest.mark.parametrize("decode", CONFIGS)
def test_an_answers_log_probabilities_are_the_models_own(decode):
    with running(served(decode)) as server:
        ids = byte_level()(TEXT)["input_ids"]
        answer = server.client().completions.create(
            model="small", prompt=ids, max_tokens=12, temperature=1.0, seed=3, logprobs=4, n=2
        )
        for choice in answer.choices:
            found = choice.logprobs
            shown = [text for text in found.tokens if text not in byte_level().all_special_tokens]
            assert "".join(shown) == choice.text
            assert len(found.token_logprobs) == answer.usage.completion_tokens / 2
            assert found.text_offset[0] == len(byte_level().decode(ids))
            for text, value, likely in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
                assert likely[text] == value
                assert len(likely) <= 5
                assert list(likely.values()) == sorted(likely.values(), reverse=True)
        server.settle()


def test_an_echo_has_the_log_likelihoods_of_the_prompt_and_a_null_first():
    ids = [byte_level()(text)["input_ids"] for text in (TEXT, "one two three four")]
    with running(served("step-verified")) as server:
        for tokens in (0, 1):
            answer = server.client().completions.create(
                model="small", prompt=ids, max_tokens=tokens, temperature=0, logprobs=1, echo=True
            )
            assert answer.usage.completion_tokens == 2 * tokens
            for prompt, choice in zip(ids, answer.choices, strict=True):
                found = choice.logprobs
                assert found.token_logprobs[0] is None
                assert found.top_logprobs[0] is None
                wanted, values = reference(prompt, 1)
                assert found.token_logprobs[1 : len(prompt)] == pytest.approx(wanted, abs=1e-5)
                greedy = [max(one.values()) for one in found.top_logprobs[1 : len(prompt)]]
                assert greedy == pytest.approx(values[: len(prompt) - 1].max(-1).values.tolist(), abs=1e-5)
                # Special tokens are tokens without a place in the text.
                shown = [text for text in found.tokens if text not in byte_level().all_special_tokens]
                assert "".join(shown) == choice.text
                assert len(found.tokens) == len(prompt) + tokens
                assert choice.text[: len(byte_level().decode(prompt))] == byte_level().decode(prompt)
        # Nothing asked about log-probabilities, and nothing to decode.
        empty = server.client().completions.create(model="small", prompt="one", max_tokens=0)
        assert (empty.choices[0].text, empty.choices[0].finish_reason) == ("", "length")
        server.settle()


def test_chats_have_their_own_form():
    with running(served("autoregressive")) as server:
        ask = server.client().chat.completions.create
        messages = [{"role": "user", "content": "two and three"}]
        answer = ask(model="small", messages=messages, max_tokens=8, seed=1, logprobs=True, top_logprobs=3)
        choice = answer.choices[0]
        content = choice.logprobs.content
        shown = [one.token for one in content if one.token not in byte_level().all_special_tokens]
        assert "".join(shown) == choice.message.content
        for one in content:
            assert bytes(one.bytes).decode() == one.token
            assert one.logprob in [other.logprob for other in one.top_logprobs if other.token == one.token]
            assert 3 <= len(one.top_logprobs) <= 4
        plain = ask(model="small", messages=messages, max_tokens=8, seed=1, logprobs=True)
        assert [one.logprob for one in plain.choices[0].logprobs.content] == [one.logprob for one in content]
        for wrong in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(model="small", messages=messages, max_tokens=2, **wrong)
            assert "logprobs" in json.dumps(caught.value.body)


def joined(parts, name):
    return [entry for one in parts for entry in getattr(one, name)]


@pytest.mark.long
@pytest.mark.parametrize("decode", CONFIGS)
def test_a_stream_has_the_same_log_probabilities_as_an_answer_at_once(decode):
    """Read beside the decoding, token by token; equal up to the rounding of passes of another width."""
    asks = {"model": "small", "prompt": [TEXT, "one two"], "max_tokens": 10, "temperature": 1.0, "seed": 3, "n": 2}
    with running(served(decode)) as server:
        for echo in (False, True):
            body = asks | {"logprobs": 2, "echo": echo}
            whole = server.client().completions.create(**body)
            parts = [[] for _ in whole.choices]
            texts = ["" for _ in whole.choices]
            for chunk in server.client().completions.create(**body, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                    if choice.logprobs is not None:
                        parts[choice.index].append(choice.logprobs)
            for choice, own, text in zip(whole.choices, parts, texts, strict=True):
                assert text == choice.text
                assert len(own) > 1 or decode == "step-verified"
                for name in ("tokens", "text_offset"):
                    assert joined(own, name) == getattr(choice.logprobs, name)
                values = joined(own, "token_logprobs")
                likely = joined(own, "top_logprobs")
                wanted = choice.logprobs.token_logprobs
                assert values[echo:] == pytest.approx(wanted[echo:], abs=1e-5)
                assert not echo or values[0] is wanted[0] is None
                for token, value, some in list(zip(choice.logprobs.tokens, values, likely, strict=True))[echo:]:
                    assert some[token] == value
        assert server.service.metrics.value("telltale_engine_failures_total") == 0
        server.settle()


def test_a_chats_stream_has_them_as_well():
    asks = {"model": "small", "messages": [{"role": "user", "content": "two"}], "max_tokens": 9, "seed": 5, "stop": "e"}
    with running(served("step-verified")) as server:
        ask = server.client().chat.completions.create
        whole = ask(**asks, logprobs=True, top_logprobs=2).choices[0]
        found = []
        for chunk in ask(**asks, logprobs=True, top_logprobs=2, stream=True):
            logprobs = chunk.choices[0].logprobs
            found += logprobs.content if logprobs is not None else []
        wanted = whole.logprobs.content
        assert [one.token for one in found] == [one.token for one in wanted]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-5)


def test_a_long_prompt_is_scored_in_pieces(monkeypatch):
    from telltale.decode import reading

    monkeypatch.setattr(reading, "piece_of", lambda _: 32)
    monkeypatch.setattr(reading, "SCORED", 7)
    ids = [5 + place * 13 % 280 for place in range(101)]
    with running(served("self-speculative")) as server:
        answer = server.client().completions.create(
            model="small", prompt=ids, max_tokens=0, temperature=0, logprobs=0, echo=True
        )
    wanted, _ = reference(ids, 1)
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-5)
