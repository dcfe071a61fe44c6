"""Calibration end to end on tiny pairs: what runs, what is fitted, what is promised, and files that fit one pair alone."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from dataclasses import replace

import pytest

from decode.step_verified.tiny_guards import SHORT, WordLabeler, model, problems, tiny_guard
from telltale.decode.calibration import calibrate as calibrating
from telltale.decode.calibration.calibrate import parts, thresholds_at_acceptance, with_normaliser
from telltale.decode.calibration.risk import Descent, Judged, realised_risk
from telltale.decode.calibration.trials import TrialStore, run, with_config
from telltale.decode.step_verified import Calibration, StepVerified, calibrate
from telltale.errors import CalibrationError, ConfigError
from telltale.tasks import chains

PROBLEMS = problems(24)
DEFAULTS = {"alpha": 0.4, "sampling": SHORT, "rounds": 2}


def calibrated(guard=None, labeler=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(guard or tiny_guard(), PROBLEMS, labeler or WordLabeler(), **(DEFAULTS | options))


@pytest.fixture(scope="module")
def found():
    return calibrated()


@pytest.mark.long
def test_the_chosen_threshold_is_the_last_that_passed_on_the_policys_own_runs(found):
    guard = tiny_guard()
    _, calibration, check = parts(PROBLEMS, seed=0)
    assert found.n == len(calibration) == 12
    assert found.feasible
    assert found.threshold == min(one.threshold for one in found.tried if one.passed)
    descent = Descent(alpha=0.4)
    for one in found.tried:
        config = replace(found.config, threshold=one.threshold)
        again = run(with_config(guard, config), calibration, WordLabeler(), sampling=SHORT)
        losses = [problem.loss(one.threshold) for problem in again.judged()]
        assert descent.try_at(one.threshold, losses, acceptance=again.acceptance) == one.passed
        assert descent.tried[-1] == one
        # Deployed as calibrated: the recorded scores are those that the policy itself compared.
        assert all(step.accepted == (step.score >= one.threshold) for step in again.steps if step.score is not None)
    again = run(with_config(guard, found.config), check, WordLabeler(), sampling=SHORT)
    assert found.realised == realised_risk(again.judged(), found.threshold)
    assert found.config.normaliser.fitted
    assert set(found.signals) == {"log-probability", "grounding"}


def test_calibration_problems_have_no_part_in_what_is_fitted(monkeypatch):
    seen = []
    original = calibrating.Runs.run

    def spy(self, stage, config, some):
        seen.append((stage, config.normaliser, {id(problem) for problem in some}))
        return original(self, stage, config, some)

    monkeypatch.setattr(calibrating.Runs, "run", spy)
    calibrated()
    pilot, calibration, check = ({id(one) for one in part} for part in parts(PROBLEMS, seed=0))
    assert not pilot & calibration
    assert not (pilot | calibration) & check
    for stage, _, used in seen:
        assert used == (pilot if stage.startswith("pilot") else check if stage == "check" else calibration)
    fitted = {json.dumps(normaliser.to_dict()) for stage, normaliser, _ in seen if not stage.startswith("pilot")}
    assert len(fitted) == 1


def test_a_calibration_in_pieces_is_the_whole_one(tmp_path, found):
    stops = iter([2, 4])

    for _ in range(2):
        left = next(stops)

        def stop(stage, done, of):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrated(store=TrialStore(tmp_path), batch=5, on_problems=stop)
    assert calibrated(store=TrialStore(tmp_path), batch=8) == found


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "options", "check"),
    [
        ({"signal_model": "target"}, {"beta": "choose"}, lambda c: c.beta in (0.0, 0.3, 0.5, 0.7, 1.0)),
        ({"beta": 1.0}, {"normaliser": "ecdf"}, lambda c: len(c.normaliser.log_probability.quantiles) > 10),
        ({"beta": 0.0}, {"extremes": "exact"}, lambda c: c.normaliser.grounding.low < c.normaliser.grounding.high),
        ({}, {"debias": "position-ecdf"}, lambda c: c.debias == "position-ecdf" and len(c.position_quantiles) > 1),
        ({"score": "log-probability"}, {}, lambda c: c.threshold <= 0),
        ({"score": "agreement", "candidates": 3}, {}, lambda c: c.threshold in (1 / 3, 2 / 3, 1.0)),
        ({"score": "likelihood-ratio"}, {"loss": "any", "alpha": 0.9}, lambda c: True),
        ({}, {"normaliser": "running"}, lambda c: c.normaliser.kind == "running"),
    ],
)
def test_scores_and_normalisers_are_fitted_and_run(settings, options, check, tmp_path):
    found = calibrated(tiny_guard(**settings), split=(0.5, 0.5, 0.0), rounds=1, **options)
    assert check(found.config)
    assert found.realised is None
    assert found.tried
    path = found.save(tmp_path / "guard.json")
    assert Calibration.load(path) == found


def test_one_model_in_both_roles_is_calibrated_for_its_exit(tmp_path):
    found = calibrated(tiny_guard(draft=None, exit_layer=2))
    assert found.config.exit_layer == 2
    assert found.fingerprints["draft"] is None
    again = Calibration.load(found.save(tmp_path / "guard.json"))
    again.guard(model(0), None, chains.tokenizer())
    with pytest.raises(CalibrationError, match="exit_layer=3 was given, exit_layer=2"):
        again.check(tiny_guard(draft=None, exit_layer=3))
    with pytest.raises(CalibrationError, match="first layers drafting"):
        again.check(tiny_guard())


def test_a_callables_threshold_is_calibrated_too():
    guard = tiny_guard(policy="verifier")
    guard.verifier = lambda steps: [len(step.text) / 100 for step in steps]
    found = calibrated(guard)
    assert found.config.policy == "verifier"
    assert found.signals == {}
    assert found.tried


@pytest.mark.long
def test_learn_then_test_of_answers_and_of_steps():
    found = calibrated(method="ltt", alpha=0.6, confidence=0.8)
    assert found.risk == "accuracy-drop"
    assert [one.passed for one in found.tried] == [one.p_value <= 0.2 for one in found.tried]
    assert all(one.passed for one in found.tried[:-1])
    assert found.answers["drop"] == pytest.approx(found.answers["target"] - found.answers["policy"])
    steps = calibrated(method="ltt", risk="steps", alpha=0.5)
    assert steps.risk == "steps"
    assert steps.confidence == 0.9
    assert steps.answers is None


def test_an_alpha_that_cannot_be_shown_accepts_nothing_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"alpha=0.01 cannot be shown with 12 calibration problems \(it takes 99\)"):
        found = calibrate(tiny_guard(), PROBLEMS, WordLabeler(), **(DEFAULTS | {"alpha": 0.01}))
    assert found.threshold == math.inf
    assert not found.feasible
    assert found.realised is None
    path = found.save(tmp_path / "guard.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["threshold"] == "inf"
    assert Calibration.load(path) == found
    result = found.guard(model(0), model(1), chains.tokenizer()).generate([[1, 5, 6]], max_new_tokens=12)
    assert result.stats.accepted_steps == 0


def test_a_signal_that_points_the_wrong_way_is_warned_about():
    recorded = run(tiny_guard(beta=1.0, threshold=-math.inf), PROBLEMS, WordLabeler(), sampling=SHORT)
    middle = statistics.median(min(step.draft.log_probabilities) for step in recorded.steps)
    trials = [
        replace(
            trial,
            steps=tuple(replace(s, right=min(s.draft.log_probabilities) < middle, length=5) for s in trial.steps),
        )
        for trial in recorded.trials
    ]
    signals, notes = calibrating._signals(trials, tiny_guard(beta=1.0).config, seed=0)
    assert signals["log-probability"]["value"] < 0.1
    assert len(notes) == 1
    assert "the draft's log-probability ranks right steps below wrong ones" in notes[0]


def test_a_signal_without_variation_is_degenerate_and_no_nan():
    class Same(StepVerified):
        def generate(self, input_ids, **arguments):
            result = super().generate(input_ids, **arguments)
            for steps in result.steps:
                for step in steps:
                    for record in (step, step.rejected):
                        if record is not None and record.draft is not None:
                            record.draft = replace(
                                record.draft, log_probabilities=(-1.0,) * len(record.draft.log_probabilities)
                            )
            return result

    guard = tiny_guard(beta=1.0)
    guard.__class__ = Same
    pilot = run(guard, PROBLEMS, WordLabeler(), sampling=SHORT)
    with pytest.raises(
        CalibrationError, match=r"degenerate: all \d+ recorded steps have the same log-probability -1.0"
    ):
        with_normaliser([step for step in pilot.steps if step.score is not None], guard.config)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({}, {"alpha": 1.5}, "alpha=1.5"),
        ({}, {"method": "magic"}, "method='magic'"),
        ({}, {"risk": "accuracy-drop"}, "risk='accuracy-drop'"),
        ({}, {"beta": 2}, "beta=2"),
        ({}, {"beta": "chosen"}, "beta='chosen'"),
        ({}, {"unknown": "maybe"}, "unknown='maybe'"),
        ({}, {"loss": "one"}, "loss='one'"),
        ({}, {"method": "ltt", "alpha": 1.0}, "alpha=1.0"),
        ({}, {"seed": 2**64}, "seed="),
        ({}, {"split": (0.5, 0.6, 0.0)}, "three shares that sum to 1"),
        ({}, {"normaliser": "none"}, "normaliser='none'"),
        ({"policy": "target"}, {}, "has no threshold to calibrate"),
        ({"score": "entropy"}, {"beta": "choose"}, "the score 'ensemble'"),
        ({}, {"rounds": 0}, "rounds=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, options, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        calibrated(tiny_guard(**settings), **options)


def test_too_few_problems_and_labels_that_say_nothing_are_refused():
    with pytest.raises(CalibrationError, match="1 problems, split"):
        calibrate(tiny_guard(), PROBLEMS[:1], WordLabeler(), **DEFAULTS)

    class Silent(WordLabeler):
        def label(self, problem, accepted_steps, step):
            return replace(super().label(problem, accepted_steps, step), right=None, error=None)

    with pytest.raises(CalibrationError, match="could judge none"):
        calibrated(labeler=Silent())

    class NoAnswers:
        errors = ()

        def label(self, problem, accepted_steps, step):
            return WordLabeler().label(problem, accepted_steps, step)

    with pytest.raises(CalibrationError, match="NoAnswers does not"):
        calibrated(labeler=NoAnswers(), method="ltt")
    with pytest.raises(CalibrationError, match="no drafted step was scored"):
        thresholds_at_acceptance([Judged((math.nan,), (True,))], [0.5])
