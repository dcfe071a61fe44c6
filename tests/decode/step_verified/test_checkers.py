"""What a calibration is bound to, what a labeler with blind spots is called, and what is told before hours are spent."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest

from decode.step_verified.tiny_guards import SHORT, WordLabeler, problems, tiny_guard
from serve.small_tokenizers import byte_level
from telltale.cli.specguard import ProblemOptions, _fitted, _gsm8k, open_task
from telltale.decode.calibration.calibrate import calibrate
from telltale.decode.calibration.calibration_report import Protocol, measure
from telltale.decode.calibration.prompts import PromptForm, Prompts
from telltale.decode.calibration.trials import StepTrial, Trial, Trials
from telltale.errors import CalibrationError, ConfigError
from telltale.models.loading import tokenizer_fingerprint
from telltale.tasks.gsm8k import Problem, read
from telltale.tasks.gsm8k_checker import Gsm8kLabeler
from telltale.tasks.step_labels import StepLabel

PENS = Problem("Ann has 8 pens. Then Ann loses 5. How many now?", "8 - 5 = <<8-5=3>>3\n#### 3")
SHOP = Problem("Eve buys 3 pens of $4 and pays with $20.", "<<3*4=12>>12\n<<20-12=8>>8\n#### 8")
SMALL = Protocol(
    scores=("draft log-probability",), acceptances=(0.6,), random_rates=(0.0, 1.0), draws=20, sampling=SHORT
)


def test_a_template_is_part_of_a_tokenizers_fingerprint():
    tokenizer = byte_level()
    other, named = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template + " "
    named.chat_template = {"default": tokenizer.chat_template}
    assert len({tokenizer_fingerprint(one) for one in (tokenizer, other, named)}) == 3


@pytest.mark.parametrize(
    ("problem", "accepted", "step", "right"),
    [
        (PENS, [], "8 - 5 = <<8-5=3>>3", True),
        (PENS, [], "8 + 4 = <<8+4=12>>12\n\n", None),
        (PENS, [], "8 + 4 = <<8+4=13>>13\n\n", False),
        (PENS, ["8 + 4 = <<8+4=12>>12"], "#### 12", None),
        (PENS, [], "#### 3", True),
        (SHOP, [], "<<20/4=5>>5", None),
        (SHOP, [], "<<3*4=12>>12", True),
        (SHOP, ["<<3*4=12>>12"], "<<20-12=8>>8 <<8*8=64>>64", None),
    ],
)
def test_a_step_is_right_only_as_far_as_the_reference_confirms_it(problem, accepted, step, right):
    assert Gsm8kLabeler().label(problem, accepted, step).right is right
    if right is None:
        assert Gsm8kLabeler(unconfirmed="right").label(problem, accepted, step).right is True
        assert Gsm8kLabeler(unconfirmed="wrong").label(problem, accepted, step) == StepLabel(False, "grounding")


def write(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "p.jsonl"
    rows = [
        {"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_shots_are_shown_in_either_form_and_are_no_problems(tmp_path, form):
    rest, _, encode = _gsm8k(write(tmp_path, 8), None, 0, 2, form)
    assert next(problem.question for problem in rest) == "What is 2 + 1?"
    assert len(rest) == 6
    text = byte_level().decode(encode(byte_level(), rest[0]))
    assert [f"What is {n}" in text for n in range(4)] == [True, True, True, False]
    assert text.index("#### 1") < text.index("What is 1") < text.index("#### 2") < text.index("What is 2")
    assert ("<turn>assistant" in text) == (form == "chat")


def test_without_shots_a_chat_loses_no_problem_and_text_has_four(tmp_path):
    from serve.small_servers import served

    path = write(tmp_path, 8)
    decoder = served("step-verified").decoder
    for form, left in (("auto", 8), ("chat", 8), ("plain", 4)):
        options = ProblemOptions(data=path, prompt_form=form, max_new_tokens=4)
        assert len(open_task(decoder, options, seed=0).problems) == left
    with pytest.raises(ConfigError, match="--rollouts does nothing with --labeler checker"):
        open_task(decoder, ProblemOptions(data=path, rollouts=3), seed=0)
    with pytest.raises(ConfigError, match="--shots is for"):
        open_task(decoder, ProblemOptions(shots=3), seed=0)


def test_a_form_is_known_by_what_its_prompts_begin_and_end_with(tmp_path):
    tokenizer, found = byte_level(), read(write(tmp_path, 9))
    shown, asked = tuple(found[:2]), found[2:]

    def made(encode):
        prompts = [encode(tokenizer, problem) for problem in asked]
        return PromptForm.of(encode, tokenizer, prompts), prompts

    kinds = {
        "chat": Prompts(),
        "plain": Prompts("plain"),
        "few shots": Prompts("plain", examples=shown),
        "chat with shots": Prompts(examples=shown),
        "told": Prompts(instruction="Think."),
    }
    forms = {name: made(encode) for name, encode in kinds.items()}
    for name, (form, prompts) in forms.items():
        assert all(map(form.covers, prompts))
        assert PromptForm.from_dict(json.loads(json.dumps(form.__dict__))) == form
        for other, (_, foreign) in forms.items():
            if other != name:
                assert not any(map(form.covers, foreign)), (name, other)
            if other != name:
                with pytest.raises(CalibrationError, match="the prompts'"):
                    form.check(forms[other][0])
    with pytest.raises(CalibrationError, match="worked examples are others"):
        forms["few shots"][0].check(made(Prompts("plain", examples=tuple(found[3:5])))[0])


def test_a_report_refuses_a_calibration_of_another_form():
    guard = tiny_guard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = calibrate(guard, problems(8), WordLabeler(), alpha=0.9, loss="any", sampling=SHORT, rounds=1)
        assert found.prompts.form == "chat"
        assert found.labeler == "WordLabeler"
        assert set(found.coverage) >= {"wrong", "unflagged", "unknown", "missed"}
        shots = Prompts(examples=tuple(problems(2, seed=9)))
        with pytest.raises(CalibrationError, match="number of worked examples is 2"):
            measure(guard, problems(8), WordLabeler(), SMALL, calibration=found, encode=shots)


class Blind(WordLabeler):
    """Finds every step right, so it passes every mistake."""

    exact = False

    def label(self, problem, accepted_steps, step):
        return StepLabel(True, None)


class Never(WordLabeler):
    def answer_right(self, problem, text):
        return False


class TargetOnly(Blind):
    """An answer is right unless it has the words that the draft's outputs have."""

    drafts: frozenset[str] = frozenset()

    def answer_right(self, problem, text):
        return text not in self.drafts


def test_coverage_counts_wrong_answers_without_a_flagged_step():
    def trial(right, *labels):
        return Trial(0, right, "eos", 1, 0, tuple(StepTrial(i, 1, True, label) for i, label in enumerate(labels)))

    found = Trials([trial(False, True, None), trial(False, True, False), trial(True, False), trial(False)]).coverage
    assert (found.answers, found.wrong, found.unflagged, found.steps, found.unknown) == (4, 3, 2, 5, 1)
    assert found.missed == pytest.approx(2 / 3)
    assert Trials([trial(None, True)]).coverage is None


def test_a_labeler_with_blind_spots_is_called_a_checker_and_alarms_where_it_loses_answers():
    guard, some = tiny_guard(), problems(8)
    labeler = TargetOnly()
    from telltale.decode.calibration import trials as kept

    wrong: set[str] = set()
    original = kept._whole_text

    def noted(decoder, steps):
        text = original(decoder, steps)
        if decoder.config.policy == "draft" or (steps and all(step.source == "draft" for step in steps)):
            wrong.add(text)
        return text

    labeler.drafts = wrong
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.setattr(kept, "_whole_text", noted)
        found = measure(guard, some, labeler, SMALL)
    assert found["checker"]["called"] == found["frontier"]["oracle"]["policy"] == "checker"
    assert found["checker"]["missed"] == 1.0
    assert any("blind spots" in alarm for alarm in found["alarms"])
    assert any("loses answers" in alarm for alarm in found["alarms"])
    text = " ".join(found["findings"])
    assert found["findings"][0].startswith("Alarm: ")
    assert "It is no oracle" in text
    assert "an oracle" not in text.lower().replace("no oracle", "")


def test_a_pair_that_answers_nothing_right_is_told_before_anything_else():
    stages = []
    with pytest.warns(UserWarning, match="degenerate pair: the target answers none of the first 8 problems right"):
        found = measure(tiny_guard(), problems(8), Never(), SMALL, on_problems=lambda stage, *_: stages.append(stage))
    assert stages[:2] == ["target alone", "draft alone"]
    assert any("degenerate pair" in alarm for alarm in found["alarms"])
    with pytest.warns(UserWarning, match="degenerate pair"):
        made = calibrate(tiny_guard(), problems(12), Never(), alpha=0.9, loss="any", sampling=SHORT, rounds=1)
    assert any("degenerate pair" in note for note in made.warnings)


@pytest.mark.parametrize(
    ("score", "method", "given", "words"),
    [
        (None, "crc", {"confidence": 0.8}, "--confidence does nothing with --method crc"),
        ("log-probability", "crc", {"normaliser": "ecdf"}, "--normaliser does nothing with --score log-probability"),
        ("agreement", "crc", {"extremes": "exact"}, "--extremes does nothing with --score agreement"),
        (None, "crc", {"normaliser": "ecdf", "extremes": "exact"}, "--extremes does nothing with --normaliser ecdf"),
        ("entropy", "crc", {"debias": "position-ecdf"}, "--debias does nothing with --score entropy"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(score, method, given, words):
    nothing = dict.fromkeys(("confidence", "normaliser", "extremes", "debias"))
    with pytest.raises(ConfigError, match=words):
        _fitted(score, method, **(nothing | given))
    defaults = {"confidence": 0.9, "normaliser": "minmax", "extremes": "robust", "debias": None}
    assert _fitted(None, "ltt", **nothing) == defaults
