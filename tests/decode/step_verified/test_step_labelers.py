"""Labels from the target itself: roll-outs against the share counted by hand, agreement against its own greedy step."""

from __future__ import annotations

import pytest
import torch

from decode.step_verified.tiny_guards import WordLabeler, model, problems, tiny_guard
from telltale.decode.calibration.labelers import AgreementLabeler, BatchLabeler, Drafted, RolloutLabeler, labels_of
from telltale.decode.calibration.trials import SamplingSettings, TrialStore, prompt_ids, run
from telltale.errors import ConfigError
from telltale.tasks import chains

TOKENIZER = chains.tokenizer()
PROBLEMS = problems(3)


def drafted(tokens, problem=PROBLEMS[0], before=()):
    return Drafted(
        problem=problem,
        prompt=tuple(prompt_ids(TOKENIZER, problem)),
        before=tuple(before),
        accepted=(TOKENIZER.decode(list(before)),) if before else (),
        tokens=tuple(tokens),
        text=TOKENIZER.decode(list(tokens)),
    )


def greedy_step(before=()):
    """What the target writes after the first prompt, up to the first word with an "a"."""
    prompt = prompt_ids(TOKENIZER, PROBLEMS[0])
    ids = torch.tensor([[*prompt, *before]])
    found = model(0).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    tokens = found[0, ids.shape[1] :].tolist()
    for place, token in enumerate(tokens):
        if token == 2 or "a" in TOKENIZER.decode([token]):
            return tokens[: place + 1]
    return tokens


def test_a_step_agrees_if_the_target_writes_the_same_from_the_same_prefix():
    labeler = AgreementLabeler(model(0), TOKENIZER, max_step_tokens=10, delimiter="a")
    for before in ((), (7, 11), (9, 20, 12)):
        step = greedy_step(before)
        changed = [step[0] ^ 1, *step[1:]]
        labels = labeler.label_all([drafted(step, before=before), drafted(changed, before=before)])
        assert [one.right for one in labels] == [True, False]
        assert [one.error for one in labels] == [None, "disagreement"]
    lenient = AgreementLabeler(model(0), TOKENIZER, same=lambda a, b: True, max_step_tokens=10, delimiter="a")
    assert lenient.label_all([drafted([5])])[0].right
    assert labeler.label_all([]) == []


def test_rollouts_count_the_continuations_that_end_well():
    seen = []

    def even(problem, text):
        seen.append((problem, text))
        return len(text.split()) % 2 == 0

    labeler = RolloutLabeler(model(0), TOKENIZER, even, rollouts=6, share=0.5, max_new_tokens=9, temperature=1.0)
    steps = [drafted([7, 11]), drafted([9], before=(8, 12))]
    shares = labeler.shares(steps)
    for place, (step, share) in enumerate(zip(steps, shares, strict=True)):
        own = seen[6 * place : 6 * place + 6]
        assert share == sum(len(text.split()) % 2 == 0 for _, text in own) / 6
        start = TOKENIZER.decode([*step.before, *step.tokens])
        assert all(text.startswith(start) for _, text in own)
        assert len({text for _, text in own}) > 1
    assert [one.right for one in labeler.label_all(steps)] == [share >= 0.5 for share in shares]
    assert labeler.shares(steps) == shares


def test_a_step_that_ends_the_output_is_judged_as_it_stands():
    labeler = RolloutLabeler(model(0), TOKENIZER, lambda _, text: text == "7", rollouts=3, max_new_tokens=5)
    labeler._answer_right = lambda problem, text: "<eos>" in text
    assert labeler.shares([drafted([7, 2])]) == [1.0]


def test_labels_do_not_depend_on_who_else_is_labelled():
    """A long step leaves a short one beside it all its room; one at the model's last position is judged as it stands."""
    limit = model(0).config.max_position_embeddings
    filled = drafted([9] * (limit - len(prompt_ids(TOKENIZER, PROBLEMS[0]))))
    nearly = drafted([9] * (limit - len(prompt_ids(TOKENIZER, PROBLEMS[0])) - 2))
    short = drafted([7, 11])
    lengths = []

    def long(problem, text):
        lengths.append(len(text.split()))
        return lengths[-1] > 8

    rollouts = RolloutLabeler(model(0), TOKENIZER, long, rollouts=4, max_new_tokens=9, temperature=1.0)
    alone = rollouts.shares([short]) + rollouts.shares([nearly]) + rollouts.shares([filled])
    assert rollouts.shares([short, nearly, filled]) == alone
    agreement = AgreementLabeler(model(0), TOKENIZER, max_step_tokens=10, delimiter="a")
    right = drafted(greedy_step())
    late = drafted([5], before=[9] * (limit - len(prompt_ids(TOKENIZER, PROBLEMS[0])) - 1))
    assert agreement.label_all([right, late])[0].right


def test_both_kinds_serve_where_a_checker_does():
    assert not isinstance(WordLabeler(), BatchLabeler)
    labeler = AgreementLabeler(model(0), TOKENIZER, max_step_tokens=10, delimiter="a")
    assert isinstance(labeler, BatchLabeler)
    guard = tiny_guard(policy="random", accept_rate=0.5)
    sampling = SamplingSettings(max_new_tokens=12, temperature=0.0)
    found = run(guard, PROBLEMS, labeler, sampling=sampling)
    assert all(step.right is not None for step in found.steps)
    assert all(trial.right is None for trial in found.trials)
    assert found.accuracy is None
    # A draft that is the target agrees with it, but for a last step that the limit cut short.
    same = run(tiny_guard(draft=0, policy="draft"), PROBLEMS, labeler, sampling=sampling)
    whole = [step for trial in same.trials for step in trial.steps[:-1]]
    assert whole
    assert all(step.right for step in whole)
    assert labels_of(WordLabeler(), [drafted([7, 11])])[0].right in (True, False)


def test_labels_that_are_kept_are_not_taken_for_those_of_other_settings(tmp_path):
    guard = tiny_guard(policy="random", accept_rate=0.5)
    store = TrialStore(tmp_path)
    asked = []

    def right(problem, text):
        asked.append(text)
        return len(text) % 2 == 0

    def labelled(rollouts):
        labeler = RolloutLabeler(model(0), TOKENIZER, right, rollouts=rollouts, max_new_tokens=6, temperature=1.0)
        asked.clear()
        run(guard, PROBLEMS[:1], labeler, sampling=SamplingSettings(max_new_tokens=12), store=store)
        return len(asked)

    assert labelled(2) > 0
    assert labelled(2) == 0
    assert labelled(3) > 0


def test_settings_out_of_range_are_refused():
    for options in ({"rollouts": 0}, {"share": 2.0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError):
            RolloutLabeler(model(0), TOKENIZER, lambda *_: True, **options)
