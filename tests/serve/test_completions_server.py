"""The server with OpenAI's own client over a real socket: the texts of offline decoding, streamed or not, alone or among others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from serve.small_servers import CONFIGS, NAME, STEPS, offline, running, served, text_of
from serve.small_tokenizers import byte_level
from telltale.decode.step_verified import StepVerifiedConfig

PROMPTS = ["the sum of two", "Grüße aus", "one two three four five", "你好"]
SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.95}
GREEDY = {"temperature": 0.0}


def ids(text):
    return byte_level()(text)["input_ids"]


@pytest.fixture(scope="module", params=list(CONFIGS))
def decode(request):
    return request.param


@pytest.fixture(scope="module")
def server(decode):
    with running(served(decode)) as found:
        yield found


@pytest.fixture(scope="module")
def stepwise():
    with running(served("step-verified")) as found:
        yield found


def streamed(client, **arguments):
    """All texts by choice, and every chunk."""
    chunks = list(client.completions.create(model=NAME, stream=True, **arguments))
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return [texts[index] for index in sorted(texts)], chunks


@pytest.mark.long
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_completion_is_the_offline_text_streamed_or_not(server, decode, sampling):
    client = server.client()
    for prompt in PROMPTS:
        tokens, result = offline(served(decode), [ids(prompt)], max_new_tokens=40, **sampling)
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=40, **sampling)
        texts, chunks = streamed(client, prompt=ids(prompt), max_tokens=40, **sampling)
        assert answer.choices[0].text == text_of(tokens[0])
        assert texts == [text_of(tokens[0])]
        finish = {"eos": "stop", "length": "length"}[result.stop_reason[0]]
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
        assert [reason for reason in reasons if reason is not None] == [answer.choices[0].finish_reason] == [finish]
        assert reasons[-1] == finish
        assert answer.usage.prompt_tokens == len(ids(prompt))
        assert answer.usage.completion_tokens == len(tokens[0])
        details = answer.usage.completion_tokens_details
        stats = result.stats
        assert details.accepted_prediction_tokens == stats.accepted_tokens + stats.speculated_accepted
        assert (
            details.rejected_prediction_tokens == stats.rejected_tokens + stats.speculated - stats.speculated_accepted
        )


def test_something_is_accepted_and_something_is_not(server, decode):
    """Otherwise the test above would compare plain decoding three times."""
    answer = server.client().completions.create(model=NAME, prompt=PROMPTS, max_tokens=40, **SAMPLED)
    details = answer.usage.completion_tokens_details
    drafted = decode != "autoregressive"
    assert (details.accepted_prediction_tokens > 0) == drafted
    assert (details.rejected_prediction_tokens > 0) == drafted


@pytest.mark.long
def test_sixteen_clients_at_once_get_what_each_would_get_alone(server, decode):
    wanted = []
    for seed in range(16):
        prompt = PROMPTS[seed % len(PROMPTS)] + " x" * seed
        sampling = GREEDY if seed % 2 else SAMPLED | {"seed": seed}
        tokens, _ = offline(served(decode), [ids(prompt)], max_new_tokens=24 + seed, **sampling)
        wanted.append((prompt, sampling, 24 + seed, text_of(tokens[0])))
    together = threading.Barrier(16)
    most = []

    def ask(job):
        prompt, sampling, limit, expected = job
        together.wait(20)
        texts, _ = streamed(server.client(), prompt=prompt, max_tokens=limit, **sampling)
        most.append(server.held().rows)
        return texts == [expected]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, wanted))
    assert max(most) > 1, "requests were served one after the other"
    server.settle()


def test_choices_and_prompts_are_those_of_one_offline_call(server, decode):
    rows = [ids(prompt) for prompt in PROMPTS for _ in range(2)]
    tokens, _ = offline(served(decode), rows, max_new_tokens=16, **SAMPLED)
    arguments = {"prompt": PROMPTS, "n": 2, "max_tokens": 16, **SAMPLED}
    answer = server.client().completions.create(model=NAME, **arguments)
    assert [choice.text for choice in answer.choices] == [text_of(row) for row in tokens]
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert answer.usage.prompt_tokens == sum(len(ids(prompt)) for prompt in PROMPTS)
    assert answer.usage.completion_tokens == sum(map(len, tokens))
    texts, chunks = streamed(server.client(), **arguments)
    assert texts == [choice.text for choice in answer.choices]
    finishes = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason is not None]
    assert sorted(finishes) == list(range(8))


def test_forms_of_a_prompt(server):
    client = server.client()

    def texts(prompt):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=6, **GREEDY)
        return [choice.text for choice in answer.choices]

    one, two = PROMPTS[0], PROMPTS[2]
    assert texts(one) == texts([one]) == texts(ids(one)) == texts([ids(one)])
    assert texts([one, two]) == texts([ids(one), ids(two)]) == texts(one) + texts(two)


def test_a_seed_is_told_and_repeats_the_answer(server, decode):
    client = server.client()
    first = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=20)
    seed = first.telltale["seed"]
    again = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=20, seed=seed)
    tokens, _ = offline(served(decode), [ids(PROMPTS[0])], seed=seed, temperature=1.0, max_new_tokens=20)
    assert first.choices[0].text == again.choices[0].text == text_of(tokens[0])
    assert first.system_fingerprint == again.system_fingerprint


@pytest.mark.long
def test_stop_strings_are_cut_and_never_sent(server, decode):
    tokens, _ = offline(served(decode), [ids(PROMPTS[0])], max_new_tokens=40, **SAMPLED)
    reasons = set()
    for stop in (text_of(tokens[0])[12:15], "n", "never there"):
        stops = ["nor there", stop]
        cut, result = offline(served(decode), [ids(PROMPTS[0])], max_new_tokens=40, stop_strings=stops, **SAMPLED)
        reasons |= set(result.stop_reason)
        arguments = {"prompt": PROMPTS[0], "stop": stops, "max_tokens": 40, **SAMPLED}
        answer = server.client().completions.create(model=NAME, **arguments)
        assert answer.choices[0].text == text_of(cut[0]).partition(stop)[0]
        assert answer.choices[0].telltale["stop_reason"] == result.stop_reason[0]
        assert answer.choices[0].finish_reason == {"length": "length"}.get(result.stop_reason[0], "stop")
        texts, _ = streamed(server.client(), **arguments)
        assert texts == [answer.choices[0].text]
    assert reasons == {"stop_string", "length"}


def test_an_echo_goes_before_the_answer(server):
    client = server.client()
    plain = client.completions.create(model=NAME, prompt=PROMPTS[:2], max_tokens=5, **GREEDY)
    echoed = client.completions.create(model=NAME, prompt=PROMPTS[:2], max_tokens=5, echo=True, **GREEDY)
    texts, _ = streamed(client, prompt=PROMPTS[:2], max_tokens=5, echo=True, **GREEDY)
    expected = [prompt + choice.text for prompt, choice in zip(PROMPTS[:2], plain.choices, strict=True)]
    assert [choice.text for choice in echoed.choices] == texts == expected


def test_a_chat_goes_through_the_template(server, decode):
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "two and "}, {"type": "text", "text": "three"}]},
    ]
    prompt = "<turn>system: be short\n<turn>user: two and three\n<turn>assistant: "
    tokens, _ = offline(served(decode), [ids(prompt)], max_new_tokens=20, **SAMPLED)
    client = server.client()
    arguments = {"model": NAME, "messages": messages, "max_completion_tokens": 20, **SAMPLED}
    answer = client.chat.completions.create(**arguments)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text_of(tokens[0])
    assert answer.usage.prompt_tokens == len(ids(prompt))
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text_of(tokens[0])
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    # The second answer need not read the prompt again, and its usage says so.
    first, second = (usage.model_dump(exclude={"prompt_tokens_details"}) for usage in (answer.usage, chunks[-1].usage))
    assert first == second
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=NAME, messages=[messages[1], messages[0]])
    assert refusal.value.param == "messages"


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context():
    import copy

    from serve.small_servers import CONTEXT

    silent = served("autoregressive")
    messages = [{"role": "user", "content": "two"}]
    with running(silent) as server:
        answer = server.client().chat.completions.create(model=NAME, messages=messages, **GREEDY)
        if answer.choices[0].finish_reason == "length":
            assert answer.usage.total_tokens == CONTEXT
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = None
    with running(served("autoregressive", tokenizer=tokenizer)) as server, pytest.raises(openai.BadRequestError) as no:
        server.client().chat.completions.create(model=NAME, messages=messages)
    assert (no.value.param, no.value.code) == ("messages", "no_chat_template")


def test_one_delta_for_each_accepted_step(stepwise):
    tokens, result = offline(served("step-verified"), [ids(PROMPTS[0])], max_new_tokens=60, **SAMPLED)
    texts, chunks = streamed(stepwise.client(), prompt=PROMPTS[0], max_tokens=60, **SAMPLED)
    steps = [choice.telltale["step"] for chunk in chunks for choice in chunk.choices if "step" in choice.telltale]
    assert steps == [step.to_dict() for step in result.steps[0]]
    assert {step["source"] for step in steps} == {"draft", "target"}
    answer = stepwise.client().completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=60, **SAMPLED)
    told = answer.choices[0].telltale
    assert told["steps"] == steps
    assert told["accepted_steps"] == result.stats.accepted_steps
    assert told["accepted_tokens"] + told["target_tokens"] == len(tokens[0])
    assert texts == [text_of(tokens[0])]


OVERRIDES = {
    "threshold": ({"threshold": "inf"}, replace(STEPS, threshold=float("inf"))),
    "lower": ({"threshold": -9, "candidates": 2}, replace(STEPS, threshold=-9, candidates=2)),
    "speculate": ({"speculate": False}, replace(STEPS, policy="target")),
    "policy": ({"policy": "random", "accept_rate": 0.5}, replace(STEPS, policy="random", accept_rate=0.5)),
    "fallback": (
        {"fallback": "spec", "draft_length": 2, "threshold": 0},
        replace(STEPS, fallback="spec", draft_length=2, threshold=0),
    ),
    "speculative": ({"policy": "speculative", "draft_length": 2}, replace(STEPS, policy="speculative", draft_length=2)),
    "score": ({"score": "entropy", "threshold": -3}, replace(STEPS, score="entropy", threshold=-3)),
    "steps": ({"max_step_tokens": 4, "selector": "first"}, replace(STEPS, max_step_tokens=4, selector="first")),
}


@pytest.mark.long
@pytest.mark.parametrize("name", list(OVERRIDES))
def test_an_override_is_the_configuration_of_that_request_alone(stepwise, name):
    override, config = OVERRIDES[name]
    client = stepwise.client()
    usual = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 30, **SAMPLED}
    before = client.completions.create(**usual)
    found = client.completions.create(**usual, extra_body={"telltale": override})
    tokens, result = offline(served("step-verified"), [ids(PROMPTS[0])], config=config, max_new_tokens=30, **SAMPLED)
    assert found.choices[0].text == text_of(tokens[0])
    assert found.choices[0].telltale["rejected_steps"] == result.stats.rejected_steps
    assert found.telltale["policy"] == config.policy
    assert client.completions.create(**usual).choices[0].text == before.choices[0].text


def test_top_k_is_honoured(server, decode):
    tokens, _ = offline(served(decode), [ids(PROMPTS[0])], max_new_tokens=20, top_k=3, **SAMPLED)
    answer = server.client().completions.create(
        model=NAME, prompt=PROMPTS[0], max_tokens=20, extra_body={"top_k": 3}, **SAMPLED
    )
    assert answer.choices[0].text == text_of(tokens[0])


@pytest.mark.long
@pytest.mark.parametrize("policy", ["draft", "target", "speculative"])
def test_a_repeating_output_ends_as_stop_and_says_why_only_where_steps_are_drafted(policy):
    config = StepVerifiedConfig(policy=policy, delimiter="e", repetition_limit=2, max_step_tokens=1)
    drafted = replace(config, policy="draft")
    repeated, _ = offline(served("step-verified"), [ids(PROMPTS[0])], config=drafted, max_new_tokens=300)
    with running(served("step-verified", config)) as server:
        answer = server.client().completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=300, **GREEDY)
    (choice,) = answer.choices
    if policy == "draft":
        assert (choice.finish_reason, choice.telltale["stop_reason"]) == ("stop", "repetition")
        assert repeated[0][-1] == repeated[0][-2]
    else:
        assert choice.telltale["stop_reason"] in ("length", "eos")
        assert answer.usage.completion_tokens > len(repeated[0])


def test_the_model_is_listed(server, decode):
    client = server.client()
    (entry,) = client.models.list().data
    assert entry.id == NAME
    assert entry.telltale["decode"] == decode
    assert client.models.retrieve(NAME) == entry
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as other:
        client.completions.create(model="other", prompt="two")
    assert (other.value.param, other.value.code) == ("model", "model_not_found")
