"""Answers that keep to a grammar, under every way of decoding; what a rejected draft did to it is never seen."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch

from serve.small_servers import CONFIGS, NAME, running, served
from serve.small_tokenizers import byte_level
from telltale.decode.drafting import FixedPlan
from telltale.decode.grammar import GrammarProcessor, Grammars
from telltale.decode.sampling import Sampling
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.errors import ConfigError, MissingExtraError, NumericalError
from telltale.serve.open_model import ServedModel

PROMPT = "the sum of two and three is"
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"enum": [5, 6, 15]}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
PATTERN = "(one|two|three)( (and|is) [a-f]{2,9}){2}"


def with_copies() -> ServedModel:
    """Drafts copied from the text."""
    plain = served("autoregressive").decoder
    config = StepVerifiedConfig(policy="speculative", draft_length=3, repetition_limit=None)
    opened = StepVerified(plain.target, None, byte_level(), config, plan=FixedPlan(0, 3, "ngram"))
    return ServedModel(NAME, opened, "self-speculative")


@pytest.fixture(scope="module")
def grammars():
    pytest.importorskip("llguidance")
    return Grammars(byte_level(), vocabulary=len(byte_level()), eos=[2])


@pytest.mark.long
@pytest.mark.parametrize("decode", [*CONFIGS, "copies"])
def test_every_way_of_decoding_keeps_to_the_grammar(decode):
    pytest.importorskip("llguidance")
    with running(with_copies() if decode == "copies" else served(decode)) as server:
        asks = {"model": NAME, "prompt": PROMPT, "max_tokens": 300, "n": 2}

        def ask(temperature, **format_):
            body = asks | {"temperature": temperature, "seed": 4} | format_
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert all(choice["finish_reason"] == "stop" for choice in answer.json()["choices"])
            return [choice["text"] for choice in answer.json()["choices"]]

        wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
        for temperature in (0, 1):
            for text in ask(temperature, response_format=wanted):
                assert json.loads(text)["sum"] in (5, 6, 15)
            assert all(re.fullmatch(PATTERN, text) for text in ask(temperature, guided_regex=PATTERN))
            texts = ask(temperature, structured_outputs={"choice": ["yes", "no", 'say "no"']})
            assert set(texts) <= {"yes", "no", 'say "no"'}
        assert server.service.metrics.value("telltale_engine_failures_total") == 0
        server.settle()


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_grammar_that_no_token_goes_on_with_is_its_callers_fault(temperature, monkeypatch):
    """At temperature 0 the argmax of nothing was a token like any other."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(GrammarProcessor, "_follow", lambda self, tokens: True)
    with running(served("autoregressive")) as server:
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 9, "guided_choice": ["yes"], "temperature": temperature}
        silent = SimpleNamespace(compute_bitmask=lambda: b"", is_error=lambda: False)
        monkeypatch.setattr(GrammarProcessor, "__init__", lambda self, *_: setattr(self, "_matcher", silent))
        monkeypatch.setattr(GrammarProcessor, "_start", 0, raising=False)
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert "no next token is possible" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "guided_choice"
        server.settle()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_that_forbid_everything_are_refused(temperature):
    sampling = Sampling(temperature, processor=lambda ids, scores: torch.full_like(scores, -torch.inf))
    with pytest.raises(NumericalError, match="no next token is possible"):
        sampling.distribution(torch.zeros(1, 5), [[1]])


@pytest.mark.long
@pytest.mark.parametrize("decode", [*CONFIGS, "copies"])
def test_rejected_drafts_never_advance_the_grammar(decode, grammars):
    """Against a grammar that is begun anew at every position, and so knows of no draft."""

    class Anew:
        def __init__(self, grammar, start):
            self.grammar, self.start = grammar, start

        def __call__(self, ids, scores):
            return self.grammar.processor(self.start)(ids, scores)

    found = with_copies() if decode == "copies" else served(decode)
    ids = byte_level()(PROMPT)["input_ids"]
    for temperature in (0.0, 1.0):
        outputs = []
        for make in (grammars.regex(PATTERN).processor, lambda start: Anew(grammars.regex(PATTERN), start)):
            result = found.decoder.generate(
                [ids],
                max_new_tokens=60,
                temperature=temperature if decode != "step-verified" else 1.0,
                logits_processor=make(len(ids)),
                eos_token_id=found.eos,
                generator=torch.Generator().manual_seed(7),
            )
            outputs.append(result.tokens.tolist())
        assert outputs[0] == outputs[1]
        text = byte_level().decode(outputs[0][0], skip_special_tokens=True)
        assert re.fullmatch(PATTERN, text)


def test_a_position_behind_a_forbidden_token_is_left_as_it_is(grammars):
    processor = grammars.regex("ab").processor(1)
    a, b = (byte_level().convert_tokens_to_ids(one) for one in "ab")
    scores = torch.zeros(1, len(byte_level()))
    assert processor(torch.tensor([[9]]), scores).isfinite().sum() == 1
    assert processor(torch.tensor([[9, b, a]]), scores).isfinite().all()
    allowed = processor(torch.tensor([[9, a]]), scores)
    assert allowed.isfinite().nonzero().tolist() == [[0, b]]
    assert processor(torch.tensor([[9, a, b]]), scores).isfinite().nonzero().tolist() == [[0, 2]]
    assert processor(torch.tensor([[9]]), scores).isfinite().nonzero().tolist() == [[0, a]]


def test_what_is_no_grammar_is_refused(grammars):
    unwritable = "\ud800"
    wrong = (
        (grammars.regex, "[ab"),
        (grammars.regex, unwritable),
        (grammars.json, {"type": "foo"}),
        (grammars.json, {"const": unwritable}),
        (grammars.choices, [unwritable]),
        (grammars.lark, "start: nothing"),
    )
    for make, given in wrong:
        with pytest.raises(ConfigError, match="cannot be used"):
            make(given)
    with pytest.raises(ConfigError, match="a token that ends it"):
        Grammars(byte_level(), vocabulary=len(byte_level()), eos=[])
    with running(served("autoregressive")) as server:
        with pytest.raises(openai.BadRequestError) as refusal:
            server.client().completions.create(model=NAME, prompt="two", extra_body={"guided_regex": "[ab"})
        assert refusal.value.body["param"] == "guided_regex"
        server.settle()


def test_without_the_extra_one_sentence_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"telltale\[grammar\]"):
        Grammars(byte_level(), vocabulary=300, eos=[2])
    with running(served("autoregressive")) as server:
        with pytest.raises(openai.BadRequestError) as refusal:
            server.client().chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "two"}], response_format={"type": "json_object"}
            )
        assert refusal.value.body["param"] == "response_format"
        assert "telltale[grammar]" in refusal.value.body["message"]
        server.settle()


@pytest.mark.parametrize("decode", CONFIGS)
def test_biases_and_penalties_are_of_each_position(decode):
    with running(served(decode)) as server:
        asks = {"model": NAME, "prompt": PROMPT, "max_tokens": 20, "seed": 1}
        a = byte_level().convert_tokens_to_ids("a")
        ask = server.client().completions.create
        assert ask(**asks, logit_bias={str(a): 100}).choices[0].text == "a" * 20
        assert "a" not in ask(**asks, logit_bias={str(a): -100}, n=4).choices[0].text
        repeated = ask(**asks, temperature=0, logit_bias={str(a): 30}).choices[0].text
        varied = ask(**asks, temperature=0, logit_bias={str(a): 30}, frequency_penalty=2).choices[0].text
        assert repeated == "a" * 20
        # Thirty less two for every "a" so far: others win after some fifteen.
        assert 5 < varied.count("a") < 20
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(**asks, logit_bias={"300": 1})
        assert refusal.value.body["param"] == "logit_bias"
        server.settle()
