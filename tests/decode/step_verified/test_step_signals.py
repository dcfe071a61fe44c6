"""What a step's signals are, against the definitions computed from whole sequences with eager attention and no cache."""

from __future__ import annotations

import math

import pytest
import torch

from decode.step_verified import pairs
from models.tiny_models import tiny_model
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.errors import NumericalError
from telltale.signals.confidence import entropy, token_log_probabilities
from telltale.signals.grounding import by_row, sparsified_grounding

NEW = 24


@pytest.fixture(scope="module")
def models():
    return pairs.target(attention="eager"), pairs.draft(attention="eager")


def generated(target, draft, **config):
    guard = StepVerified(
        target, draft, pairs.tokenizer(), StepVerifiedConfig(record_signals=True, max_step_tokens=12, **config)
    )
    prompts = pairs.prompts(4, seed=3)
    result = guard.generate(
        prompts, max_new_tokens=NEW, eos_token_id=pairs.EOS, temperature=1.0, generator=pairs.seeded(2)
    )
    return prompts, result


def proposed(prompts, result):
    """(tokens before, step's tokens, record) of every drafted step, accepted or not."""
    for prompt, steps in zip(prompts, result.steps, strict=True):
        before = list(prompt)
        for step in steps:
            drafted = step if step.source == "draft" else step.rejected
            if drafted is not None:
                yield before.copy(), list(drafted.tokens), drafted
            before += step.tokens


@torch.no_grad()
def oracle(model, before, step, *, layers=3, residual=0.0, sinks=0, skip=0, stop=None):
    """Log-probabilities, entropies and grounding by the paper's definitions; ``stop`` reads an exit layer's head."""
    ids = torch.tensor([before + step])
    out = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    logits, attentions = out.logits[0], out.attentions
    if stop is not None:
        logits = model.lm_head(model.model.norm(_entering(model, ids, stop)))[0]
        attentions = attentions[:stop]
    rows = logits[len(before) - 1 : -1]
    product = torch.eye(ids.shape[1])
    for attention in attentions[max(skip, len(attentions) - layers) :]:
        mixed = attention[0].mean(0)
        product = ((1 - residual) * mixed + residual * torch.eye(ids.shape[1])) @ product
    grounding = product[len(before) :, sinks : len(before)].sum(-1)
    return token_log_probabilities(rows, torch.tensor(step)), entropy(rows), grounding


def _entering(model, ids, layer):
    found = []

    def keep(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = model.model.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    model(input_ids=ids)
    handle.remove()
    return found[0]


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(torch.tensor(found), wanted.float(), atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize(("signal_model", "threshold"), [("draft", 0.75), ("target", 0.4)])
def test_both_models_signals_of_every_step_are_those_of_whole_sequences(models, candidates, signal_model, threshold):
    prompts, result = generated(*models, candidates=candidates, threshold=threshold, signal_model=signal_model)
    count = 0
    for before, step, record in proposed(prompts, result):
        for model, reading in zip(models, (record.target, record.draft), strict=True):
            wanted = oracle(model, before, step)
            close(reading.log_probabilities, wanted[0])
            close(reading.entropies, wanted[1])
            close(reading.groundings, wanted[2], 1e-6)
        reading = record.target if signal_model == "target" else record.draft
        low, g = min(reading.log_probabilities), min(reading.groundings)
        score = 0.3 * min(1, max(0, (low + 5) / 5)) + 0.7 * g
        if record.score is not None:
            assert record.score == pytest.approx(score, abs=1e-9)
            assert (record.reason is None) == (record.score >= threshold)
        count += 1
    assert count > 8
    assert {step.source for steps in result.steps for step in steps} == {"draft", "target"}


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_grounding_equals_the_dense_rollout_for_any_number_of_key_heads(heads):
    target = pairs.target(attention="eager", num_key_value_heads=heads)
    draft = pairs.draft(attention="eager", num_key_value_heads=heads)
    prompts, result = generated(target, draft, candidates=2, threshold=0.8)
    for before, step, record in proposed(prompts, result):
        close(record.target.groundings, oracle(target, before, step)[2], 1e-6)
        close(record.draft.groundings, oracle(draft, before, step)[2], 1e-6)


def test_rows_that_are_renormalised_do_not_answer_for_the_padding_beside_them():
    """Each of these prompts has a weight of 0.05 in every row; what fills up a shorter one in a common pass has not."""
    settings = {"signal_model": "target", "threshold": 0.5, "candidates": 2, "max_step_tokens": 12}
    config = StepVerifiedConfig(sparsify=0.05, renormalise=True, **settings)
    guard = StepVerified(pairs.target(), pairs.draft(), pairs.tokenizer(), config)
    prompts = pairs.prompts(8, lengths=(2, 9, 3, 12, 1, 5, 7, 4))

    def rows(chosen):
        arguments = {"max_new_tokens": 8, "eos_token_id": [], "temperature": 1.0, "generator": pairs.seeded(1)}
        return pairs.rows_of(guard.generate(chosen, **arguments))

    assert rows(prompts) == [row for prompt in prompts for row in rows([prompt])]


@pytest.mark.long
@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "qwen3", "phi3-partial", "gpt2"])
def test_grounding_equals_the_dense_rollout_in_every_family_windows_included(name):
    target, draft = pairs.target(name, attention="eager"), tiny_model(name, seed=2, attention="eager")
    prompts, result = generated(target, draft, candidates=2, threshold=0.5)
    for before, step, record in proposed(prompts, result):
        for model, reading in ((target, record.target), (draft, record.draft)):
            wanted = oracle(model, before, step)
            close(reading.log_probabilities, wanted[0])
            close(reading.groundings, wanted[2], 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("fallback", ["plain", "k-sample", "spec"])
@pytest.mark.filterwarnings("ignore:the (draft|target) has")
def test_one_model_in_both_roles_reads_its_exit_and_its_last_layers(models, candidates, fallback):
    target = models[0]
    prompts, result = generated(target, None, exit_layer=2, candidates=candidates, threshold=0.8, fallback=fallback)
    count = 0
    for before, step, record in proposed(prompts, result):
        wanted = oracle(target, before, step, skip=2)
        close(record.target.log_probabilities, wanted[0])
        close(record.target.groundings, wanted[2], 1e-6)
        wanted = oracle(target, before, step, stop=2)
        close(record.draft.log_probabilities, wanted[0])
        close(record.draft.groundings, wanted[2], 1e-6)
        count += 1
    assert count > 8


def test_the_residual_and_all_layers(models):
    prompts, result = generated(*models, candidates=2, residual=0.5, grounding_layers=None, threshold=0.8)
    for before, step, record in proposed(prompts, result):
        close(record.target.groundings, oracle(models[0], before, step, layers=4, residual=0.5)[2], 1e-6)
        close(record.draft.groundings, oracle(models[1], before, step, layers=3, residual=0.5)[2], 1e-6)


@pytest.mark.parametrize("candidates", [1, 2])
def test_the_predictors_row_is_the_one_before(models, candidates):
    prompts, result = generated(*models, candidates=candidates, row="predictor", threshold=0.8)
    for before, step, record in proposed(prompts, result):
        close(record.draft.groundings, by_row(oracle(models[1], before, step)[2], "predictor"), 1e-6)
        assert record.draft.groundings[0] == 1.0
        assert len(record.draft.groundings) == len(step)


@pytest.mark.long
@pytest.mark.parametrize("exit_layer", [None, 3])
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.filterwarnings("ignore:the (draft|target) has")
def test_dropped_weights_are_those_of_the_dense_definition(models, candidates, exit_layer):
    """The target's grounding with weights below 0.05 dropped; prefix rows lose mass as well, prompts included."""
    target, draft = models
    prompts, result = generated(
        target,
        draft if exit_layer is None else None,
        exit_layer=exit_layer,
        candidates=candidates,
        sparsify=0.05,
        residual=0.25,
        threshold=0.8,
    )
    count = 0
    for before, step, record in proposed(prompts, result):
        ids = torch.tensor([before + step])
        with torch.no_grad():
            rows = [layer[0] for layer in target(input_ids=ids, output_attentions=True).attentions]
        own = rows[-3:] if exit_layer is None else rows[exit_layer:]
        wanted = sparsified_grounding(own, len(before), threshold=0.05, residual=0.25)
        close(record.target.groundings, wanted, 1e-6)
        if exit_layer is not None:
            wanted = sparsified_grounding(rows[:exit_layer], len(before), threshold=0.05, residual=0.25)
            close(record.draft.groundings, wanted, 1e-6)
        count += 1
    assert count > 8


def test_first_tokens_that_do_not_count_as_ground(models):
    prompts, result = generated(*models, candidates=2, exclude_sinks=2, threshold=0.5)
    for before, step, record in proposed(prompts, result):
        close(record.target.groundings, oracle(models[0], before, step, sinks=2)[2], 1e-6)
        close(record.draft.groundings, oracle(models[1], before, step, sinks=2)[2], 1e-6)


def test_beta_one_never_looks_at_attention_and_beta_zero_never_at_logits(models):
    for beta in (1.0, 0.0):
        for signal_model in ("draft", "target"):
            guard = StepVerified(
                *models, pairs.tokenizer(), StepVerifiedConfig(beta=beta, signal_model=signal_model, candidates=2)
            )
            result = guard.generate(
                pairs.prompts(3), max_new_tokens=16, eos_token_id=[], temperature=1.0, generator=pairs.seeded()
            )
            for steps in result.steps:
                for step in steps:
                    drafted = step if step.source == "draft" else step.rejected
                    reading = drafted.draft if signal_model == "draft" else drafted.target
                    if reading is not None:
                        assert bool(reading.log_probabilities) == (beta == 1.0)
                        assert bool(reading.groundings) == (beta == 0.0)


@pytest.mark.parametrize(
    ("score", "low", "high"),
    [("agreement", 0, 1), ("entropy", -math.log(97), 0), ("log-probability", -50, 0), ("grounding", 0, 1)],
)
@pytest.mark.parametrize("signal_model", ["draft", "target"])
def test_single_signals_decide_in_their_own_units(models, score, low, high, signal_model):
    guard = StepVerified(
        *models,
        pairs.tokenizer(),
        StepVerifiedConfig(score=score, signal_model=signal_model, candidates=4, threshold=(low + high) / 2),
    )
    result = guard.generate(
        pairs.prompts(3), max_new_tokens=16, eos_token_id=[], temperature=1.0, generator=pairs.seeded()
    )
    scores = [
        (step if step.source == "draft" else step.rejected).score
        for steps in result.steps
        for step in steps
        if step.source == "draft" or step.rejected
    ]
    assert any(score is not None for score in scores)
    assert all(low <= score <= high for score in scores if score is not None)


def test_the_likelihood_ratio_is_the_difference_of_both_models(models):
    prompts, result = generated(*models, score="likelihood-ratio", candidates=2, threshold=-1.0)
    for before, step, record in proposed(prompts, result):
        if record.score is not None:
            wanted = oracle(models[0], before, step)[0].sum() - oracle(models[1], before, step)[0].sum()
            assert record.score == pytest.approx(float(wanted), abs=1e-4)


def test_logits_that_are_not_numbers_are_refused_with_the_place(models):
    broken = pairs.draft()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    guard = StepVerified(models[0], broken, pairs.tokenizer(), StepVerifiedConfig())
    with pytest.raises(NumericalError, match="draft's logits are NaN in step 0 of prompt 0"):
        guard.generate(pairs.prompts(2), max_new_tokens=8)


@pytest.mark.parametrize("own", ["draft", "target"])
@pytest.mark.parametrize("extra", [{}, {"exclude_sinks": 1}])
def test_attention_that_is_no_number_is_refused_with_the_place(own, extra):
    """Where logits are never read, nothing else would tell."""
    pair = {"target": pairs.target(), "draft": pairs.draft()}
    with torch.no_grad():
        pair["target"].model.layers[-1].self_attn.q_proj.weight.fill_(math.nan)
    models = (pair["target"], pair["target"] if own == "draft" else pair["draft"])
    config = StepVerifiedConfig(beta=0.0, signal_model="target", threshold=0.5, **extra)
    with pytest.raises(NumericalError, match="in step 0 of prompt 0"):
        StepVerified(*models, pairs.tokenizer(), config).generate(pairs.prompts(1), max_new_tokens=8, eos_token_id=[])
