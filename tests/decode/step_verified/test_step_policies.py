"""Every peer's rule as a configuration of the one loop: rewards, judges, oracles, random acceptance, selectors, encoders."""

from __future__ import annotations

import pytest
import torch

from decode.step_verified import pairs
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.decode.step_verified import Normaliser, register_encoder
from telltale.decode.steps import ENCODERS, encoder_named, hashed
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.diversity import consistency_medoid


def generated(verifier=None, encoder=None, new=40, rows=4, eos=pairs.EOS, **config):
    guard = StepVerified(
        pairs.target(),
        pairs.draft(),
        pairs.tokenizer(),
        StepVerifiedConfig(**({"beta": 1.0} | config)),
        verifier=verifier,
        encoder=encoder,
    )
    arguments = {"eos_token_id": eos, "temperature": 1.0, "generator": pairs.seeded(6)}
    return guard.generate(pairs.prompts(rows), max_new_tokens=new, **arguments)


def drafted(result):
    for steps in result.steps:
        for step in steps:
            found = step if step.source == "draft" else step.rejected
            if found is not None:
                yield found


def test_a_reward_of_the_step_decides():
    """RSD: a callable reward, here the share of even tokens; the verifier sees plain ids and text of what came before."""
    seen = []

    def reward(steps):
        seen.extend(steps)
        return [sum(token % 2 == 0 for token in step.tokens) / len(step.tokens) for step in steps]

    result = generated(reward, policy="verifier", threshold=0.5, candidates=2)
    records = [record for record in drafted(result) if record.score is not None]
    assert len(records) == len(seen) > 10
    for record in records:
        assert record.score == sum(token % 2 == 0 for token in record.tokens) / len(record.tokens)
        assert (record.reason is None) == (record.score >= 0.5)
    tokenizer = pairs.tokenizer()
    by_prompt = {tuple(step.prompt) for step in seen}
    assert by_prompt == {tuple(prompt) for prompt in pairs.prompts(4)}
    for step in seen:
        said = step.tokens[:-1] if step.tokens[-1] == tokenizer.eos_token_id else step.tokens
        assert step.text == tokenizer.decode(said)
        assert step.before_text == tokenizer.decode(step.before)
        assert step.prompt_text == tokenizer.decode(step.prompt)


def test_the_verifier_is_asked_about_the_steps_that_were_really_committed_before():
    before = {}

    def judge(steps):
        for step in steps:
            before[tuple(step.prompt), step.number] = list(step.before)
        return [7.0 if len(step.tokens) % 2 else 3.0 for step in steps]

    result = generated(judge, policy="verifier", threshold=7.0, candidates=1, fallback="plain")
    for prompt, steps in zip(pairs.prompts(4), result.steps, strict=True):
        tokens: list[int] = []
        for number, step in enumerate(steps):
            if (tuple(prompt), number) in before:
                assert before[tuple(prompt), number] == tokens
            tokens += step.tokens


@pytest.mark.parametrize(
    ("verifier", "error", "message"),
    [
        (lambda steps: [float("nan")] * len(steps), NumericalError, "score of step 0 of prompt . is NaN"),
        (lambda steps: [None] * len(steps), DataError, "NoneType for step 0"),
        (lambda steps: [1.0], ConfigError, "1 scores for"),
    ],
)
def test_a_verifier_that_does_not_answer_is_refused(verifier, error, message):
    with pytest.raises(error, match=message):
        generated(verifier, policy="verifier", max_step_tokens=2, new=8)


def test_random_acceptance_keeps_its_rate():
    result = generated(policy="random", accept_rate=0.7, candidates=1, new=100, rows=8, eos=[], repetition_limit=None)
    records = [record for record in drafted(result) if record.score is not None]
    rate = sum(record.reason is None for record in records) / len(records)
    assert len(records) > 60
    assert abs(rate - 0.7) < 4 * (0.21 / len(records)) ** 0.5


@pytest.mark.parametrize("kind", ["running", "group"])
def test_other_readings_of_the_normaliser_give_scores_in_the_unit_interval(kind):
    result = generated(normaliser=Normaliser(kind=kind), beta=0.5, candidates=3)
    scores = [record.score for record in drafted(result) if record.score is not None]
    assert scores
    assert all(0 <= score <= 1 for score in scores)


def test_selectors_choose_what_their_names_say():
    guard_candidates = {}

    def spying(texts):
        guard_candidates["texts"] = texts
        return hashed(texts)

    generated(encoder=spying, candidates=6, threshold=-1.0)
    assert len(set(guard_candidates["texts"])) == len(guard_candidates["texts"]) > 1
    first = generated(selector="first", candidates=6, threshold=-1.0, max_step_tokens=6)
    alone = generated(candidates=1, threshold=-1.0, max_step_tokens=6)
    assert [s.tokens for s in first.steps[0][:1]] == [s.tokens for s in alone.steps[0][:1]]
    surest = generated(selector="log-probability", candidates=6, threshold=-1.0)
    low = [min(record.draft.log_probabilities) for record in drafted(surest)]
    plain = [min(record.draft.log_probabilities) for record in drafted(generated(candidates=1, threshold=-1.0))]
    assert sum(low) / len(low) > sum(plain) / len(plain)
    majority = generated(selector="majority", candidates=8, threshold=-1.0)
    assert all(0 < record.agreement <= 1 for record in drafted(majority))


def test_the_hashed_encoder_tells_numbers_apart_and_is_the_same_everywhere():
    texts = ["so x = 12.", "so x = 13.", "thus x = 12.", "so x = 12.", ""]
    vectors = hashed(texts)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5, dtype=torch.float64))
    similarity = vectors @ vectors.T
    assert similarity[0, 3] == pytest.approx(1.0)
    assert similarity[0, 1] < 0.8
    assert similarity[0, 2] > similarity[1, 2]
    index, alignment = consistency_medoid(vectors[:4])
    assert index == 0
    assert alignment[0] == alignment[3]


def test_encoders_can_be_registered_and_are_held_to_their_contract():
    @register_encoder("lengths")
    def lengths(texts):
        angles = torch.tensor([float(len(text)) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], 1)

    try:
        assert encoder_named("lengths") is lengths
        generated(encoder=None, candidates=3, threshold=-1.0)
        result = StepVerified(
            pairs.target(), pairs.draft(), pairs.tokenizer(), StepVerifiedConfig(encoder="lengths", candidates=3)
        ).generate(pairs.prompts(2), max_new_tokens=12, temperature=1.0, generator=pairs.seeded())
        assert result.lengths.min() > 0
    finally:
        del ENCODERS["lengths"]
    with pytest.raises(DataError, match="the encoder gave"):
        generated(encoder=lambda texts: torch.ones(1, 3), candidates=8)
