"""The frontier: random acceptance at equal share is a mixture, points add up, and a report says what its figures say."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from decode.step_verified.tiny_guards import SHORT, WordLabeler, model, problems, tiny_guard
from telltale.decode.calibration.calibration_report import (
    PolicyRuns,
    Protocol,
    Sizes,
    compute,
    findings,
    measure,
    point,
    random_at,
    sizes,
)
from telltale.decode.calibration.page import write_page
from telltale.decode.calibration.trials import StepTrial, Trial, Trials, TrialStore
from telltale.decode.step_verified import calibrate
from telltale.errors import ConfigError, DataError

SMALL = Protocol(
    scores=("draft log-probability", "target ensemble"),
    acceptances=(0.6,),
    random_rates=(0.0, 1.0),
    draws=50,
    sampling=SHORT,
)
STAGES = {"record", "target alone", "draft alone", "random 0", "random 1", "oracle", *SMALL.scores}


def policy(name, right, share, cost=None):
    """Runs of ten tokens a problem, ``share`` of them the target's."""
    target = round(10 * share)
    trials = [Trial(place, bool(one), "eos", 10 - target, target, ()) for place, one in enumerate(right)]
    return PolicyRuns(name, [Trials(trials, cost or {})])


def test_random_acceptance_at_a_share_mixes_the_two_rates_around_it():
    ends = [policy("all", [0, 0, 1, 1], 0.0), policy("half", [0, 1, 1, 1], 0.4), policy("none", [1, 1, 1, 1], 1.0)]
    right, share = random_at(ends, 0.7)
    assert share == pytest.approx(0.7)
    assert right.tolist() == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert random_at(ends, 0.4)[0].tolist() == [0, 1, 1, 1]
    for outside in (-0.1, 0.0):
        assert random_at(ends, outside)[0].tolist() == [0, 0, 1, 1]
    assert random_at(ends, 1.0)[0].tolist() == [1, 1, 1, 1]


def test_a_point_compares_with_target_and_random_problem_by_problem():
    target, draft = policy("target", [1, 1, 1, 0] * 10, 1.0), policy("draft", [0, 0, 1, 0] * 10, 0.0)
    own = policy("own", [1, 1, 1, 0] * 10, 0.5)
    found = point(own, target=target, random=[target, draft], sizes=Sizes(1, 4))
    assert found["accuracy"]["value"] == 0.75
    assert found["over_target"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["over_random"]["value"] == pytest.approx(0.25)
    assert found["over_random"]["random_share"] == pytest.approx(0.5)
    assert found["mcnemar_target"] == {"only_first": 0, "only_second": 0, "p_value": 1.0}


def test_risk_and_wrong_among_accepted_are_counted_over_problems_and_steps():
    def step(accepted, right):
        return StepTrial(0, 3, accepted, right)

    trials = [
        Trial(0, True, "eos", 5, 5, (step(True, False), step(False, False), step(True, True), step(True, None))),
        Trial(1, True, "eos", 5, 5, (step(True, True),)),
        Trial(2, True, "eos", 5, 5, ()),
    ]
    found = PolicyRuns("own", [Trials(trials)])
    assert found.risk == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert found.wrong_among_accepted == pytest.approx(1 / 3)


def test_compute_counts_every_token_that_passes_weights():
    own = policy("own", [1], 0.4, {"tokens": 100.0, "target_layers_passed": 60.0, "draft_layers_passed": 200.0})
    alone = policy("target", [1], 1.0, {"tokens": 50.0, "target_layers_passed": 60.0})
    assert compute(own, alone, Sizes(1, 4)) == pytest.approx((0.6 + 2.0 / 4) / 1.2)
    assert compute(alone, alone, Sizes(1, 4)) == 1.0
    both, one = sizes(tiny_guard()), sizes(tiny_guard(draft=None, exit_layer=1))
    body = sum(p.numel() for p in model(0).parameters()) - model(0).get_input_embeddings().weight.numel()
    assert both.target == both.draft == one.target == body
    assert one.draft == round(body / 4)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    store = TrialStore(tmp_path_factory.mktemp("trials"))
    stages = []
    guard = tiny_guard()
    calibration = calibrate(guard, problems(12, seed=5), WordLabeler(), alpha=0.9, loss="any", sampling=SHORT, rounds=1)
    found = measure(
        guard,
        problems(10),
        WordLabeler(),
        SMALL,
        calibration=calibration,
        store=store,
        on_problems=lambda stage, done, of: stages.append(stage),
    )
    return found, stages, calibration, store


def test_a_report_runs_every_policy_once_and_is_plain_json(document):
    found, stages, calibration, _ = document
    assert set(stages) - {"calibrated"} == STAGES
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    frontier = found["frontier"]
    assert frontier["target"]["target_share"] == 1.0
    assert frontier["draft"]["target_share"] == 0.0
    assert frontier["oracle"]["wrong_among_accepted"] in (0.0, None)
    assert [one["policy"] for one in frontier["random"]] == ["random 0", "random 1"]
    assert {name: len(points) for name, points in frontier["scores"].items()} == dict.fromkeys(SMALL.scores, 1)
    assert ("calibrated" in frontier) == calibration.feasible
    names = [one["name"] for one in found["signals"]]
    assert names[0] == "length alone"
    assert {"draft log-probability", "target grounding", "target grounding by place", "likelihood ratio"} <= set(names)
    assert set(found["recorded"]["errors"]) <= {"odd", "short"}
    assert sum(found["recorded"]["lengths"].values()) == found["recorded"]["steps"]


def test_a_report_that_was_kept_decodes_nothing_again(document):
    found, _, calibration, store = document
    stages = []
    guard, labeler = tiny_guard(), WordLabeler()
    again = measure(
        guard, problems(10), labeler, SMALL, calibration=calibration, store=store, on_problems=stages.append
    )
    assert stages == []
    assert labeler.seen == 0
    assert again == found


def test_every_sentence_of_the_findings_follows_its_figures(document):
    found = document[0]
    sentences = found["findings"]
    assert findings(found) == sentences
    assert all(sentence.endswith(".") and "nan" not in sentence.lower() for sentence in sentences)
    turned = json.loads(json.dumps(found))
    for one in turned["signals"]:
        if one["name"] == "draft grounding":
            one["fixed_length"] |= {"value": 0.3, "low": 0.2, "high": 0.4}
        if one["name"] == "target log-probability":
            one["fixed_length"] |= {"value": 0.9, "low": 0.8, "high": 0.95}
        if one["name"] == "length alone":
            one["raw"]["value"] = 0.2
    turned["frontier"]["scores"]["target ensemble"][0]["over_random"] |= {"value": 0.1, "low": 0.05, "high": 0.15}
    turned["frontier"]["scores"]["draft log-probability"][0]["over_random"] |= {"value": 0, "low": -0.1, "high": 0.1}
    text = " ".join(findings(turned))
    assert "The draft grounding points the wrong way" in text
    assert "The target log-probability ranks right steps above wrong ones" in text
    assert "Longer steps are more often right here: length alone has an AUROC of 0.80" in text
    assert "Accepting by target ensemble beats random acceptance at the same target share: +10.0 points" in text
    assert "Accepting by draft log-probability is not shown to beat random acceptance" in text


def test_the_page_holds_its_figures_and_needs_no_network(document, tmp_path):
    found = document[0]
    page = write_page(found, tmp_path / "report.html").read_text()
    for sentence in found["findings"]:
        assert sentence.replace("'", "&#x27;") in page
    assert page.count("Plotly.newPlot") == 3
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)


def test_a_pair_that_is_never_right_has_no_axis_without_data_and_no_equal_lines(document, tmp_path):
    """As a report was that was looked at in a browser: empty bars, nine curves on each other, five equal sentences."""
    found = json.loads(json.dumps(document[0]))
    for one in found["signals"]:
        one["raw"] = one["fixed_length"] = dict.fromkeys(one["raw"], None)
        one["by_error"] = {name: dict.fromkeys(error, None) for name, error in one["by_error"].items()}
    found["recorded"]["right"], found["increments"] = 0.0, []
    frontier = found["frontier"]
    every = [frontier[name] for name in ("target", "draft", "oracle", "calibrated") if name in frontier]
    every += frontier["random"]
    for one in every + [one for several in frontier["scores"].values() for one in several]:
        one["accuracy"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    found["findings"] = findings(found)
    assert len(set(found["findings"])) == len(found["findings"])
    assert sum("judged" in sentence or "compared" in sentence for sentence in found["findings"]) == 2
    page = write_page(found, tmp_path / "report.html").read_text()
    assert page.count("Plotly.newPlot") == 0
    assert "<td>-</td><td>-</td><td>-</td>" not in page.split("Accuracy against target tokens")[0]


def test_curves_that_are_the_same_are_drawn_once_and_unknown_errors_have_no_column(document, tmp_path):
    found = json.loads(json.dumps(document[0]))
    first, *others = found["acceptance"]
    for name in others:
        found["acceptance"][name] = found["acceptance"][first]
    for one in found["signals"]:
        one["by_error"] = {"never": dict.fromkeys(one["raw"], None)}
    page = write_page(found, tmp_path / "report.html").read_text()
    assert page.count(f'"name":"{first}, {others[0]}') == 1
    assert "against never" not in page


def test_seeds_are_averaged_within_problems():
    runs = [policy("a", [1, 0], 0.5).runs[0], policy("a", [1, 1], 0.5).runs[0]]
    assert np.array_equal(PolicyRuns("own", runs).right, [1.0, 0.5])
    unknown = replace(runs[0].trials[0], right=None)
    with pytest.raises(DataError, match="whether answers are right"):
        PolicyRuns("own", [Trials([unknown])]).right  # noqa: B018


def test_settings_out_of_range_are_refused():
    for options, words in (
        ({"scores": ("magic",)}, "score 'magic'"),
        ({"acceptances": (2.0,)}, "acceptances=2.0"),
        ({"random_rates": (0.5,)}, "random_rates"),
        ({"seeds": ()}, "seeds"),
        ({"draws": 0}, "draws"),
    ):
        with pytest.raises(ConfigError, match=words):
            Protocol(**options)

    class NoAnswers:
        errors = ()

    with pytest.raises(DataError, match="which answers are right"):
        measure(tiny_guard(), problems(2), NoAnswers())
