"""The online plan, without a model or a clock: on made-up acceptances and costs, and on recordings of real decodes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from tests.decode.models_that_draft import drafting_model

from telltale.decode import SelfSpeculative
from telltale.decode.acceptance import LIFE, PRIOR_OUTCOMES, WINDOW, Acceptance
from telltale.decode.drafting import PLAIN, Choice, FixedPlan
from telltale.decode.pass_costs import PassCosts, costs_of
from telltale.decode.planner import FIRST_TRIALS, LONGEST, STRETCH, TRIALS, OnlinePlan
from telltale.decode.replay import LONGEST_RUN, MeasuredRounds, RecordedText, Recording, replay
from telltale.errors import DataError
from telltale.models import open_decoder

RECORDINGS = sorted((Path(__file__).parents[2] / "benchmarks" / "recordings").glob("*.json.gz"))
LENGTHS = (1, 2, 3, 4, 6, 8, 12)
WIDTHS = (1, 17)


def made_up(alphas, *, slope=0.05, layers=8, tokens=500, texts=3, dearer=1.0, seed=0) -> Recording:
    """Exits that agree with probability ``alphas[E]`` at every place (0 for others), in a model of equal layers of a millisecond;
    a pass of n tokens costs 1 + slope (n - 1) single ones. Rounds take ``dearer`` times what the plan is told."""
    draw = random.Random(seed)
    costs = PassCosts(
        layers, 0.0, layers * 1e-3, 0.0, 0.0, 1e-3, WIDTHS, tuple(1e-3 * (1 + slope * (n - 1)) for n in WIDTHS)
    )
    exits = {layer: {k: dearer * costs.round(layer, k) for k in (1, 16)} for layer in range(1, layers)}
    measured = MeasuredRounds(costs.plain, exits, {k: costs.score(k + 1) for k in (1, 16)})
    found = []
    for _ in range(texts):
        agreed = {E: [draw.random() < alphas.get(E, 0.0) for _ in range(tokens - 1)] for E in range(1, layers)}
        runs = {layer: _runs(own) for layer, own in agreed.items()}
        found.append(RecordedText([0], [draw.randrange(10**6) for _ in range(tokens)], runs))
    return Recording("made up", list(range(1, layers)), costs, measured, found)


def _runs(agreed: list[bool]) -> list[int]:
    """From each place on how many places agree, up to as many as are looked at."""
    run, runs = 0, []
    for one in reversed(agreed):
        run = min(run + 1, LONGEST_RUN) if one else 0
        runs.append(run)
    return runs[::-1]


def online(recording: Recording, drafter: str = "exit") -> OnlinePlan:
    exits = recording.exits if drafter != "ngram" else []
    return OnlinePlan(recording.costs, exits=exits, lengths=range(1, LONGEST + 1), ngrams=drafter != "exit")


def best_fixed(recording: Recording) -> float:
    """Tokens per second of the best exit and draft length, or of plain decoding."""
    plans = [FixedPlan(layer, length, "exit") for layer in recording.exits for length in (0, *LENGTHS)]
    return max(replay(recording, plan).rate for plan in plans)


def trial_share(recording: Recording, plan: OnlinePlan) -> float:
    """The share of the time that a run takes beyond plain decoding, which is the best here."""
    run = replay(recording, plan)
    return 1.0 - recording.measured.plain * run.tokens / run.seconds


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_within_five_percent_of_the_best_fixed_point_on_the_half_that_it_was_not_tuned_on(path):
    recording = Recording.load(path)
    plan = online(recording)
    replay(recording.half(0), plan)
    judged = recording.half(1)
    assert replay(judged, plan).rate > best_fixed(judged) / 1.05


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_ngrams_and_exits_together_are_as_good_as_the_better_of_them(path):
    recording = Recording.load(path)
    plan = online(recording, "both")
    replay(recording.half(0), plan)
    judged = recording.half(1)
    copies = max(replay(judged, FixedPlan(0, length, "ngram")).rate for length in LENGTHS)
    assert replay(judged, plan).rate > max(best_fixed(judged), copies) / 1.05


@pytest.mark.parametrize(
    "alphas",
    [{1: 0.3, 2: 0.7, 4: 0.8, 6: 0.95}, {1: 0.85, 2: 0.87, 4: 0.9, 6: 0.95}, {1: 0.1, 2: 0.2, 4: 0.4, 6: 0.99}],
)
def test_near_the_best_fixed_choice_on_made_up_acceptances(alphas):
    recording = made_up(alphas, texts=12)
    plan = online(recording)
    replay(recording.half(0), plan)
    judged = recording.half(1)
    # That outcomes count for their own text costs some 2% where all texts are alike, as here.
    assert replay(judged, plan).rate > best_fixed(judged) / 1.06


@pytest.mark.parametrize(
    ("slope", "alphas"), [(0.05, {1: 0.02, 2: 0.05, 4: 0.1}), (1.0, {1: 0.5, 2: 0.6, 4: 0.7}), (0.05, {})]
)
def test_trials_keep_to_their_share_where_drafting_never_pays(slope, alphas):
    recording = made_up(alphas, slope=slope)
    seconds = replay(recording, FixedPlan(1, 0, "exit")).seconds
    # The share, what is allowed from the start, and one stretch on which the budget runs out.
    allowed = TRIALS + (FIRST_TRIALS + STRETCH) * recording.measured.plain / seconds
    plan = online(recording)
    assert 0.0 < trial_share(recording, plan) < allowed
    for _ in range(3):
        assert trial_share(recording, plan) < TRIALS + STRETCH * recording.measured.plain / seconds


def test_rounds_that_take_longer_than_predicted_are_given_up():
    recording = made_up({4: 0.8}, dearer=3.0)
    plan = online(recording)
    decisions = replay(recording, plan).decisions
    assert sum(tokens for choice, tokens in decisions if choice == PLAIN) > 0.95 * sum(
        tokens for _, tokens in decisions
    )


def test_a_slow_round_now_and_then_changes_little():
    recording = made_up({2: 0.8})
    draw = random.Random(0)
    interrupted = replay(recording, online(recording), noise=lambda: 10.0 if draw.random() < 0.05 else 1.0)
    calm = replay(recording, online(recording))
    assert _drafted(interrupted.decisions) > 0.9 * _drafted(calm.decisions)


def _drafted(decisions) -> int:
    return sum(tokens for choice, tokens in decisions if choice.source == "exit")


@pytest.mark.parametrize(("before", "after"), [({2: 0.9}, {5: 0.9}), ({2: 0.9}, {}), ({}, {2: 0.9})])
def test_another_kind_of_text_is_noticed(before, after):
    first, second = made_up(before, texts=1), made_up(after, texts=1, seed=1, tokens=3 * int(WINDOW))
    plan = online(first)
    replay(first, plan)
    replay(second, plan)
    # What comes next is what has been learned by now.
    settled = made_up(after, texts=1, seed=2)
    assert replay(settled, plan).rate > 0.92 * best_fixed(settled)


def test_the_same_recording_gives_the_same_decisions():
    recording = made_up({2: 0.7, 3: 0.8})
    runs = [replay(recording, online(recording)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({choice for choice, _ in runs[0].decisions}) > 3


def test_a_fixed_plan_in_replay_is_the_walk_over_runs_of_agreement():
    recording = made_up({3: 0.6}, texts=1, tokens=50)
    [text] = recording.texts
    place, seconds = 0, 0.0
    while place < 49:
        length = min(4, 48 - place)
        stood = 0
        while stood < length and text.runs[3][place + stood]:
            stood += 1
        seconds += recording.costs.round(3, length) if length else recording.costs.plain
        place += stood + 1
    found = replay(recording, FixedPlan(3, 4, "exit"))
    assert found.seconds == pytest.approx(seconds, rel=1e-9)
    assert found.tokens == sum(tokens for _, tokens in found.decisions) == 49


def test_a_replay_of_copies_is_what_the_decoder_does():
    decoder = open_decoder(drafting_model())
    prompt, count = [1, 2, 3, 4, 5, 6] * 2, 40
    run = SelfSpeculative(decoder, draft_length=3, drafter="ngram").generate(
        prompt, max_new_tokens=count, eos_token_id=[]
    )
    text = RecordedText(prompt, run.tokens[0].tolist(), {})
    recording = dataclasses.replace(made_up({}, layers=4, texts=0), texts=[text])
    decisions = replay(recording, FixedPlan(0, 3, "ngram")).decisions
    copied = [tokens for choice, tokens in decisions if choice.source == "ngram"]
    assert (len(copied), sum(copied) - len(copied)) == (run.stats.rounds, run.stats.accepted)
    assert copied


def test_expected_tokens_are_the_geometric_sum_for_equal_acceptance():
    acceptance = Acceptance(5)
    expected = [accepted for accepted, _ in acceptance.expected(5, 0)]
    assert expected == pytest.approx([sum(0.5**j for j in range(1, k + 1)) for k in range(1, 6)])
    for now in range(50):
        acceptance.record(4, 2, now)
    expected = [accepted for accepted, _ in acceptance.expected(4, 50)]
    assert expected[0] > 0.95
    assert expected[3] - expected[1] < 0.1


def test_the_standard_error_is_that_of_drawn_rates():
    acceptance = Acceptance(3)
    for now, accepted in enumerate([3, 1, 0, 2, 3, 3, 1, 3, 0, 3]):
        acceptance.record(3, accepted, 1e-9 * now)
    # Positions: 10 tried, 8 stood; 8 tried, 6 stood; 6 tried, 5 stood, each with what a guess is worth.
    guess = (8 + 0.5 * PRIOR_OUTCOMES) / (10 + PRIOR_OUTCOMES)
    rates, counts = [], []
    for tried, stood in ((10, 8), (8, 6), (6, 5)):
        counts.append(tried + PRIOR_OUTCOMES)
        rates.append((stood + PRIOR_OUTCOMES * guess) / counts[-1])
        guess = rates[-1]

    def accepted(r):
        return r[0] + r[0] * r[1] + r[0] * r[1] * r[2]

    variance, step = 0.0, 1e-6
    for place, (rate, count) in enumerate(zip(rates, counts, strict=True)):
        moved = [*rates[:place], rate + step, *rates[place + 1 :]]
        variance += ((accepted(moved) - accepted(rates)) / step) ** 2 * rate * (1 - rate) / count
    assert acceptance.expected(3, 0)[-1] == pytest.approx((accepted(rates), variance**0.5), rel=1e-4)


def test_outcomes_fade_into_what_the_drafter_did_before_and_that_into_ignorance():
    acceptance = Acceptance(1)
    for now in range(100):
        acceptance.record(1, now % 5 < 4, now)
    found = [acceptance.expected(1, now)[0] for now in (100, 100 + WINDOW, 100 + 10 * WINDOW, 100 + 10 * LIFE)]
    assert [rate for rate, _ in found] == pytest.approx([0.79, 0.79, 0.77, 0.5], abs=0.02)
    assert all(before < after for (_, before), (_, after) in pairwise(found)), "what is long ago is less sure"


def test_a_new_text_begins_with_what_the_drafter_did_before():
    whole, half = Acceptance(1), Acceptance(1)
    for acceptance in (whole, half):
        for now in range(40):
            acceptance.record(1, now % 4 < 3, now)
        assert acceptance.tried == pytest.approx(40, rel=0.02)
    (rate, error), before = whole.expected(1, 40)[0], whole.tried
    whole.begin(1.0)
    half.begin(0.5)
    (begun, unsure), (between, less_sure) = whole.expected(1, 40)[0], half.expected(1, 40)[0]
    assert [rate, between, begun] == pytest.approx([0.73] * 3, abs=0.02)
    assert error < less_sure < unsure
    assert whole.tried == before


def test_a_reliable_ngram_is_used_and_an_unreliable_one_is_not():
    recording = made_up({})
    plan = online(recording, "ngram")
    for _ in range(100):
        for match, stood in ((3, 4), (2, 0)):
            plan.next(match)
            plan.learn(Choice("ngram", 0, 4), match, [4], [stood], recording.costs.score(5))
    assert plan.next(3).source == "ngram"
    assert plan.next(2) == PLAIN


def test_a_recording_is_read_as_it_was_written(tmp_path):
    recording = made_up({2: 0.5}, texts=2, tokens=20)
    recording.save(tmp_path / "a.json.gz")
    assert Recording.load(tmp_path / "a.json.gz") == recording
    recording.save(tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "text").write_text("no")
    with pytest.raises(DataError, match="no recording of a decode"):
        Recording.load(tmp_path / "text")
    made_up({}, texts=1, tokens=5).save(tmp_path / "old")
    document = json.loads(gzip.decompress((tmp_path / "old").read_bytes())) | {"version": 0}
    (tmp_path / "old").write_bytes(gzip.compress(json.dumps(document).encode()))
    with pytest.raises(DataError, match="version 0"):
        Recording.load(tmp_path / "old")


def test_measured_costs_are_positive_kept_and_grow_with_width():
    decoder = open_decoder(drafting_model())
    costs = costs_of(decoder, 1)
    assert costs_of(decoder, 1) is costs
    assert costs.plain > 0
    assert costs.draft(2, 3) > costs.draft(1, 1) > 0
    assert costs.score(17) > costs.score(1) > 0


def test_statistics_of_a_plan_outlive_the_call():
    method = SelfSpeculative(drafting_model())
    for _ in range(2):
        method.generate([1, 2, 3, 4, 5, 6], max_new_tokens=40)
    (plan,) = method.plans.known.values()
    shown = method.generate([1, 2, 3, 4, 5, 6], max_new_tokens=40).stats.planner
    assert shown == plan.describe()
    assert "tokens/round" in shown
    assert plan.describe().splitlines()[2].split()[:2] == ["plain", "decoding"]
