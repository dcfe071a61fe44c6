"""Trials: what a policy drafted and what became of it, with the labeler's word; kept in a folder and never reused wrongly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from decode.step_verified.tiny_guards import SHORT, WordLabeler, problems, tiny_guard
from telltale.decode.calibration.trials import SamplingSettings, TrialStore, oracle, prompt_ids, run, with_config
from telltale.errors import ConfigError, DataError
from telltale.tasks import chains
from telltale.tasks.step_labels import StepLabel

PROBLEMS = problems(6)


def trials(guard=None, labeler=None, **options):
    return run(
        guard or tiny_guard(policy="random", accept_rate=0.5),
        PROBLEMS,
        labeler or WordLabeler(),
        **({"sampling": SHORT} | options),
    )


def plain(found):
    return [replace(one, steps=()) for one in found.trials], found.steps


def test_a_trial_does_not_depend_on_its_batch():
    whole = trials(batch=6)
    assert plain(trials(batch=2)) == plain(whole)
    assert plain(trials(batch=6, seed=1)) != plain(whole)


def test_every_drafted_step_is_there_with_the_label_of_its_own_text():
    guard = tiny_guard(policy="random", accept_rate=0.5)
    found = trials(guard)
    result = guard.generate(
        [prompt_ids(guard.tokenizer, problem) for problem in PROBLEMS],
        max_new_tokens=18,
        temperature=1.0,
        top_p=None,
        generator=torch.Generator().manual_seed(0),
    )
    for trial, steps in zip(found.trials, result.steps, strict=True):
        drafted = [(step, step if step.source == "draft" else step.rejected) for step in steps]
        drafted = [(step, record) for step, record in drafted if record is not None]
        assert len(drafted) == len(trial.steps)
        for (step, record), own in zip(drafted, trial.steps, strict=True):
            label = WordLabeler().label(None, (), record.text)
            assert (own.right, own.error, own.length) == (label.right, label.error, len(record.tokens))
            assert own.accepted == (step.source == "draft")
        assert trial.target_tokens == sum(len(step.tokens) for step in steps if step.source == "target")
        assert trial.accepted_tokens == sum(len(step.tokens) for step in steps if step.source == "draft")
        # The text of the whole output: that of single steps lacks the spaces between them.
        whole = guard.tokenizer.decode([token for step in steps for token in step.tokens])
        assert trial.right == (len(whole) % 2 == 0)
    assert 0 < found.acceptance < 1
    assert 0 < found.target_share < 1
    assert {step.accepted for step in found.steps} == {True, False}


def test_what_is_kept_is_not_decoded_again_and_a_stop_loses_only_the_batch_under_way(tmp_path):
    labeler, store = WordLabeler(), TrialStore(tmp_path)

    def stop(done, of):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trials(labeler=labeler, store=store, batch=2, on_problems=stop)
    before = labeler.seen
    assert before > 0
    again = trials(labeler=labeler, store=TrialStore(tmp_path), batch=2)
    assert labeler.seen - before == sum(len(trial.steps) for trial in again.trials[4:])
    fresh = trials()
    assert plain(again) == plain(fresh)
    assert again.cost["tokens"] == fresh.cost["tokens"]
    seen = labeler.seen
    assert plain(trials(labeler=labeler, store=TrialStore(tmp_path))) == plain(fresh)
    assert labeler.seen == seen


@pytest.mark.long
@pytest.mark.parametrize("change", ["seed", "sampling", "config", "models", "labeler", "verifier", "settings"])
def test_nothing_kept_is_reused_for_other_settings(tmp_path, change):
    store = TrialStore(tmp_path)
    first = trials(store=store)
    files = set(tmp_path.iterdir())
    guard = tiny_guard(policy="random", accept_rate=0.5)
    options = {"store": store}
    if change == "seed":
        options["seed"] = 1
    elif change == "sampling":
        options["sampling"] = replace(SHORT, temperature=0.9)
    elif change == "config":
        guard = with_config(guard, replace(guard.config, accept_rate=0.25))
    elif change == "models":
        guard = tiny_guard(policy="random", accept_rate=0.5, draft=2)
    elif change == "verifier":
        guard = with_config(guard, guard.config, verifier=lambda steps: [1.0] * len(steps))
    elif change == "settings":
        options["labeler"] = WordLabeler()
        options["labeler"].settings = "a longer look"
    else:
        options["name"] = "another verifier"
    trials(guard, **options)
    assert len(set(tmp_path.iterdir()) - files) == 1
    assert plain(trials(store=store)) == plain(first)


def test_recorded_signals_survive_the_folder_to_the_last_bit(tmp_path):
    guard = tiny_guard(policy="random", accept_rate=0.5, record_signals=True)
    fresh, store = trials(guard), TrialStore(tmp_path)
    trials(guard, store=store)
    kept = trials(guard, store=store)
    assert kept.steps == fresh.steps
    for step in kept.steps:
        assert len(step.draft.log_probabilities) == len(step.target.groundings) == step.length


def test_an_oracle_accepts_what_the_labeler_finds_right_and_not_what_it_cannot_tell():
    labeler = WordLabeler(knows_all=False)
    guard = tiny_guard()
    verifier = oracle(PROBLEMS, labeler, guard.tokenizer)
    found = trials(
        with_config(guard, replace(guard.config, policy="verifier", threshold=0.5), verifier=verifier), labeler
    )
    scored = [step for step in found.steps if step.score is not None]
    assert {step.right for step in scored} == {True, False, None}
    assert all(step.accepted == (step.right is True) for step in scored)


def test_an_oracle_labels_steps_behind_those_that_were_committed_wherever_these_end():
    """Steps that the target's limit cut have no delimiter, and a token may hold more than that: the texts say where they end."""

    class Counting(WordLabeler):
        def label(self, problem, accepted_steps, step):
            return StepLabel((len(accepted_steps) + len("".join(accepted_steps).split())) % 2 == 0, None)

    labeler = Counting()
    guard = tiny_guard(max_step_tokens=3)
    verifier = oracle(PROBLEMS, labeler, guard.tokenizer)
    found = trials(
        with_config(guard, replace(guard.config, policy="verifier", threshold=0.5), verifier=verifier), labeler
    )
    scored = [step for step in found.steps if step.score is not None]
    assert len(scored) > 10
    assert {step.right for step in scored if step.place} == {True, False}
    assert all(step.accepted == step.right for step in scored)


def test_steps_without_a_label_are_skipped_or_count_as_asked():
    found = trials(labeler=WordLabeler(knows_all=False))
    unknown = sum(step.right is None for step in found.steps)
    assert unknown
    sizes = {kind: sum(len(one.scores) for one in found.judged(unknown=kind)) for kind in ("skip", "wrong", "right")}
    assert sizes == {"skip": len(found.steps) - unknown, "wrong": len(found.steps), "right": len(found.steps)}
    wrong = {kind: sum(sum(one.wrong) for one in found.judged(unknown=kind)) for kind in sizes}
    assert wrong["wrong"] == wrong["skip"] + unknown
    assert wrong["right"] == wrong["skip"]
    unscored = [step for step in found.steps if step.score is None]
    assert unscored
    nans = sum(math.isnan(score) for one in found.judged(unknown="right") for score in one.scores)
    assert nans == len(unscored)


def test_prompts_go_through_a_template_if_there_is_one():
    tokenizer = chains.tokenizer()
    problem = PROBLEMS[0]
    ids = prompt_ids(tokenizer, problem)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]).split() == problem.prompt.split()
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, problem) == ids[1:]


def test_one_model_in_both_roles_makes_trials_too():
    guard = tiny_guard(draft=None, exit_layer=2, policy="random", accept_rate=0.5)
    found = trials(guard, batch=3)
    assert plain(found) == plain(trials(with_config(guard, replace(guard.config, exit_layer=None)), batch=6))
    assert 0 < found.target_share < 1


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match="no problems"):
        run(tiny_guard(), [], WordLabeler())
    with pytest.raises(ConfigError, match="batch"):
        trials(batch=0)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        SamplingSettings(max_new_tokens=0)


def test_an_end_token_of_any_name_is_no_text_of_a_step_or_a_solution(monkeypatch):
    """A tokenizer that somebody else made calls it <|im_end|>; "answer 3<|im_end|>" is an answer all the same."""
    guard = tiny_guard(policy="random", accept_rate=0.5)
    guard.tokenizer.eos_token = "Leo"
    monkeypatch.setattr(guard.target.model.generation_config, "eos_token_id", guard.tokenizer.eos_token_id)
    read = []

    class Reads(WordLabeler):
        def label(self, problem, accepted_steps, step):
            read.extend([*accepted_steps, step])
            return super().label(problem, accepted_steps, step)

        def answer_right(self, problem, text):
            read.append(text)
            return True

    found = trials(guard, Reads())
    assert "eos" in {one.stop_reason for one in found.trials}
    assert read
    assert not any(guard.tokenizer.eos_token in text.split() for text in read)
