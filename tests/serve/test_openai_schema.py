"""Every field of a body: honoured, harmless, or refused by its name; nothing is ignored that would change the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.small_servers import CONFIGS, NAME, STEPS, served
from telltale.decode.step_config import Normaliser
from telltale.decode.step_verified import StepVerified
from telltale.serve.http_errors import ApiError
from telltale.serve.openai_schema import chat_body, completion_body
from telltale.serve.overrides import Overrides, configured

ASKS = {"model": NAME, "prompt": "two"}
TALKS = {"model": NAME, "messages": [{"role": "user", "content": "two"}]}

REFUSED = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": ["two", ""]}, "prompt", "invalid_value"),
    ({"prompt": ["two", 5]}, "prompt", "invalid_type"),
    ({"prompt": [5, "two"]}, "prompt", "invalid_type"),
    ({"prompt": [[5], "two"]}, "prompt", "invalid_type"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 2.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": 1e-5}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": 10**400}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": "1"}, "seed", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": "x" * 257}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
    ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
    ({"echo": 1}, "echo", "invalid_type"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": False}, "frequency_penalty", "invalid_type"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
    ({"guided_json": 5}, "guided_json", "invalid_type"),
    ({"guided_json": "{"}, "guided_json", "invalid_value"),
    ({"guided_choice": []}, "guided_choice", "invalid_value"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "invalid_value"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown_parameter"),
    ({"min_p": 0.1}, "min_p", "unsupported_parameter"),
    ({"ignore_eos": True}, "ignore_eos", "unsupported_parameter"),
    ({"min_q": 0.1}, "min_q", "unknown_parameter"),
    ({"x" * 200: 1}, "x" * 80, "unknown_parameter"),
    ({"telltale": 5}, "telltale", "invalid_type"),
    ({"telltale": {"tau": 1}}, "telltale.tau", "unknown_parameter"),
    ({"telltale": {"threshold": "high"}}, "telltale.threshold", "invalid_type"),
    ({"telltale": {"candidates": 0}}, "telltale.candidates", "invalid_value"),
    ({"telltale": {"beta": 2}}, "telltale.beta", "invalid_value"),
    ({"telltale": {"policy": "oracle"}}, "telltale.policy", "invalid_value"),
    ({"telltale": {"policy": "target", "speculate": False}}, "telltale.speculate", "invalid_value"),
]


@pytest.mark.parametrize(("change", "param", "code"), REFUSED, ids=[str(case[0])[:50] for case in REFUSED])
def test_a_field_that_is_wrong_is_named(change, param, code):
    with pytest.raises(ApiError) as refusal:
        completion_body(ASKS | change)
    assert (refusal.value.status, refusal.value.param, refusal.value.code) == (400, param, code)
    assert refusal.value.message.startswith(param)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT_REFUSED = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "two"}, "messages"),
    ({"messages": ["two"]}, "messages[0]"),
    ({"messages": [{"content": "two"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "two"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "two", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["two"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "two", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "two", "colour": 1}]}, "messages[0].colour"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"prediction": {"type": "content", "content": "two"}}, "prediction"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"echo": True}, "echo"),
    ({"prompt": "two"}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), CHAT_REFUSED, ids=[case[1] for case in CHAT_REFUSED])
def test_a_chats_field_that_is_wrong_is_named(change, param):
    with pytest.raises(ApiError) as refusal:
        chat_body(TALKS | change)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_what_means_the_same_as_leaving_it_out_is_taken():
    plain = completion_body(ASKS)
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": None,
        "suffix": "",
        "best_of": 1,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "skip_special_tokens": True,
        "stop_token_ids": [],
        "response_format": {"type": "text"},
        "structured_outputs": {},
    }
    harmless = {
        "user": "x",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "seed": None,
        "stop": [],
        "cache_prompt": True,
    }
    assert completion_body(ASKS | neutral | harmless) == plain
    assert (plain.max_tokens, plain.temperature, plain.n, plain.top_p, plain.stop) == (16, 1.0, 1, None, ())
    talk = chat_body(TALKS)
    neutral = {
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
    }
    assert chat_body(TALKS | neutral) == talk
    assert talk.max_tokens is None
    assert (
        chat_body(TALKS | {"max_tokens": 5}).max_tokens
        == chat_body(TALKS | {"max_completion_tokens": 5}).max_tokens
        == 5
    )
    said = {"role": "assistant", "content": "five", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat_body(TALKS | {"messages": [said]}).messages == [{"role": "assistant", "content": "five"}]


UNFIT = [
    ("autoregressive", {"threshold": 1}, "threshold"),
    ("autoregressive", {"policy": "draft"}, "policy"),
    ("autoregressive", {"speculate": True}, "speculate"),
    ("self-speculative", {"candidates": 2}, "candidates"),
    ("self-speculative", {"policy": "verifier"}, "policy"),
    ("self-speculative", {"policy": "specguard"}, "policy"),
    ("self-speculative", {"speculate": False, "draft_length": 2}, "draft_length"),
    ("step-verified", {"accept_rate": 0.5}, "accept_rate"),
    ("step-verified", {"policy": "random"}, "policy"),
    ("step-verified", {"score": "agreement", "candidates": 1}, "candidates"),
    ("step-verified", {"beta": 1}, "beta"),
    ("step-verified", {"score": "grounding"}, "score"),
    ("step-verified", {"score": "ensemble", "beta": 0.5}, "beta"),
    ("step-verified", {"draft_length": 2}, "draft_length"),
    ("step-verified", {"policy": "target", "threshold": 1}, "threshold"),
    ("step-verified", {"candidates": 17}, "candidates"),
    ("step-verified", {"max_step_tokens": 513}, "max_step_tokens"),
]


@pytest.mark.parametrize(("decode", "override", "name"), UNFIT)
def test_an_override_that_would_do_nothing_is_refused(decode, override, name):
    opened = served(decode).decoder
    with pytest.raises(ApiError) as refusal:
        configured(opened, Overrides.model_validate(override))
    assert (refusal.value.status, refusal.value.param) == (400, f"telltale.{name}")


def test_speculation_is_switched_off_and_on():
    drafting = served("self-speculative").decoder
    assert configured(drafting, Overrides.model_validate({})) is drafting.config
    assert configured(drafting, Overrides.model_validate({"speculate": True})) is drafting.config
    off = configured(drafting, Overrides.model_validate({"speculate": False}))
    assert off.policy == "target"
    resting = StepVerified(drafting.target, None, drafting.tokenizer, off)
    assert configured(resting, Overrides.model_validate({"speculate": True})) == CONFIGS["self-speculative"]
    assert configured(served("step-verified").decoder, Overrides.model_validate({"speculate": True})) == STEPS


def test_a_combination_that_the_temperature_forbids_names_its_field():
    opened = served("step-verified").decoder
    for override, name in (({"score": "agreement"}, "score"), ({"score": "agreement", "policy": "specguard"}, "score")):
        assert configured(opened, Overrides.model_validate(override), temperature=0.7).score == "agreement"
        with pytest.raises(ApiError) as refusal:
            configured(opened, Overrides.model_validate(override), temperature=0)
        assert (refusal.value.status, refusal.value.param) == (400, f"telltale.{name}")
    group = replace(STEPS, score="ensemble", beta=1.0, normaliser=Normaliser(kind="group"))
    for override, name in (({}, "temperature"), ({"threshold": -1.0}, "telltale.threshold")):
        with pytest.raises(ApiError) as refusal:
            configured(served("step-verified", group).decoder, Overrides.model_validate(override), temperature=0)
        assert (refusal.value.status, refusal.value.param) == (400, name)


def test_content_may_be_null_and_developers_are_the_system():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add"}}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "c"},
        {"role": "assistant", "content": None},
    ]
    found = chat_body(TALKS | {"messages": messages}).messages
    assert [one["role"] for one in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert [one["content"] for one in found] == ["be brief", "add", "", "5", ""]
    assert found[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {}}
