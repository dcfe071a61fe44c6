"""Where step verification must equal something known: the target alone, the draft alone, the target's law."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from decode.step_verified import pairs
from models.tiny_models import tiny_model
from telltale.decode import Autoregressive, StepVerified, StepVerifiedConfig

NEW = 30
FOREVER = {"repetition_limit": None}


def greedy(model, prompts):
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=whole, do_sample=False, max_new_tokens=NEW, eos_token_id=pairs.EOS, pad_token_id=0
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def run(target, draft, prompts, verifier=None, backend="auto", **config):
    guard = StepVerified(
        target, draft, pairs.tokenizer(), StepVerifiedConfig(**(FOREVER | config)), verifier=verifier, backend=backend
    )
    return guard.generate(prompts, max_new_tokens=NEW, eos_token_id=pairs.EOS)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("fallback", ["plain", "spec", "k-sample"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*")
def test_a_threshold_of_infinity_is_the_targets_greedy_decoding(name, fallback):
    target, prompts = pairs.target(name), pairs.prompts(5)
    result = run(target, pairs.draft(), prompts, threshold=math.inf, fallback=fallback)
    assert pairs.rows_of(result) == greedy(target, prompts)
    assert result.stats.accepted_steps == 0
    assert result.stats.target_share == 1.0


@pytest.mark.long
@pytest.mark.parametrize("signal_model", ["draft", "target"])
@pytest.mark.parametrize("fallback", ["plain", "spec"])
@pytest.mark.parametrize("exit_layer", [1, 3])
def test_one_model_in_both_roles_has_the_same_limit(signal_model, fallback, exit_layer):
    target, prompts = pairs.target(), pairs.prompts(4)
    with pytest.warns(UserWarning, match="layers"):
        result = run(
            target,
            None,
            prompts,
            threshold=math.inf,
            fallback=fallback,
            exit_layer=exit_layer,
            signal_model=signal_model,
            record_signals=True,
        )
    assert pairs.rows_of(result) == greedy(target, prompts)


@pytest.mark.parametrize("backend", ["module", "fused", "native"])
def test_the_limit_holds_for_every_backend(backend):
    target, prompts = pairs.target(), pairs.prompts(3)
    result = run(target, pairs.draft(), prompts, threshold=math.inf, signal_model="target", backend=backend)
    assert pairs.rows_of(result) == greedy(target, prompts)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["target", "speculative"])
def test_policies_of_the_target_alone_are_its_greedy_decoding(policy):
    target, prompts = pairs.target(), pairs.prompts(6)
    result = run(target, pairs.draft(), prompts, policy=policy)
    assert pairs.rows_of(result) == greedy(target, prompts)
    own = run(target, None, prompts, policy=policy, exit_layer=2)
    assert pairs.rows_of(own) == greedy(target, prompts)


def test_a_threshold_of_minus_infinity_is_the_drafts_greedy_decoding():
    draft, prompts = pairs.draft(), pairs.prompts(5)
    accepting = {"threshold": -math.inf, "max_step_tokens": NEW}
    # Steps that repeat the one before are the target's by rule, whatever the threshold.
    expected = greedy(draft, prompts)
    result = run(pairs.target(), draft, prompts, **accepting)
    for found, wanted, steps in zip(pairs.rows_of(result), expected, result.steps, strict=True):
        first = next((i for i, step in enumerate(steps) if step.source == "target"), None)
        if first is None:
            assert found == wanted
        else:
            assert steps[first].rejected.reason == "repeated"
            length = sum(len(step.tokens) for step in steps[:first])
            assert found[:length] == wanted[:length]
    assert pairs.rows_of(run(pairs.target(), draft, prompts, policy="draft")) == expected


@pytest.mark.long
@pytest.mark.parametrize("threshold", [-math.inf, 0.2, 0.5, 0.8, math.inf])
@pytest.mark.parametrize("signal_model", ["draft", "target"])
def test_a_draft_that_is_the_target_gives_the_targets_output(threshold, signal_model):
    target, prompts = pairs.target(), pairs.prompts(4)
    result = run(target, target, prompts, threshold=threshold, signal_model=signal_model)
    assert pairs.rows_of(result) == greedy(target, prompts)


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        {"policy": "target"},
        {"threshold": math.inf, "fallback": "plain", "candidates": 3},
        {"threshold": math.inf, "fallback": "spec", "candidates": 2, "draft_length": 2},
        {"policy": "speculative", "draft_length": 3},
    ],
    ids=["target", "plain", "spec", "speculative"],
)
@pytest.mark.parametrize("both", ["two models", "one model"])
def test_at_temperature_one_the_fallback_has_the_targets_law(config, both):
    """Every sequence of three tokens over a vocabulary of three against probabilities multiplied out.

    Two thousand draws; benchmarks/specguard_limits.py makes twenty thousand.
    """
    shape = {"vocab_size": 3, "num_hidden_layers": 3}
    target = tiny_model("llama", seed=4, **shape)
    if both == "one model":
        draft, config = None, config | {"exit_layer": 1}
    else:
        draft = tiny_model("llama", seed=5, **shape)
    expected = _law(target, [1], 3)
    text = _Letters()
    guard = StepVerified(
        target, draft, text, StepVerifiedConfig(beta=1.0, selector="first", repetition_limit=None, **config)
    )
    counts = torch.zeros(27)
    generator = pairs.seeded(11)
    for _ in range(2):
        result = guard.generate([[1]] * 1000, max_new_tokens=3, eos_token_id=[], temperature=1.0, generator=generator)
        codes = result.tokens @ torch.tensor([9, 3, 1])
        counts += torch.bincount(codes, minlength=27)
    assert chisquare(counts.numpy(), (expected * counts.sum()).numpy()).pvalue > 1e-3


def _law(model, prompt, length):
    with torch.no_grad():
        law = {(): 1.0}
        for _ in range(length):
            grown = {}
            for tokens, weight in law.items():
                logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1]
                for token, share in enumerate(logits.double().softmax(-1).tolist()):
                    grown[(*tokens, token)] = weight * share
            law = grown
    return torch.tensor([law[key] for key in sorted(law)], dtype=torch.float64)


class _Letters:
    """Three tokens, one of which ends a step."""

    def get_vocab(self):
        return {"a": 0, "b": 1, ".\n\n": 2}

    def decode(self, tokens, **_):
        return "".join(("a", "b", ".\n\n")[token] for token in tokens)


def test_a_changed_number_of_candidates_leaves_the_targets_random_numbers_alone():
    target, prompts = pairs.target(), pairs.prompts(4)
    found = []
    for candidates in (1, 5):
        config = StepVerifiedConfig(threshold=math.inf, fallback="plain", candidates=candidates, repetition_limit=None)
        guard = StepVerified(target, pairs.draft(), pairs.tokenizer(), config)
        result = guard.generate(
            prompts, max_new_tokens=NEW, eos_token_id=pairs.EOS, temperature=1.0, generator=pairs.seeded(5)
        )
        found.append(pairs.rows_of(result))
    assert found[0] == found[1]


def test_sampling_from_the_target_alone_agrees_with_the_plain_loop_when_greedy_and_batched():
    target, prompts = pairs.target(), pairs.prompts(8)
    plain = Autoregressive(target).generate(torch.tensor([prompts[2]]), max_new_tokens=NEW, eos_token_id=pairs.EOS)
    result = run(target, None, prompts, policy="target")
    assert pairs.rows_of(result)[2] == pairs.rows_of(plain)[0]
