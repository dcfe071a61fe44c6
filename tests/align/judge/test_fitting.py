"""Training the gate: it finds what depends on the prompt, stops by held-out prompts, and is compared with what it has to beat."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from telltale.align.judge import fitting
from telltale.align.judge.feature_store import Features, FeatureStore
from telltale.align.judge.fitting import JudgeFit, fit, gate_accuracy
from telltale.align.judge.gate_fit import PairFeatures, accuracy, bradley_terry, held_out_rows, train_gate
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.prompt_split import COMPARE, TRAIN, split_prompts
from telltale.errors import ConfigError, DataError

NAMES = ("helpful", "safe", "correct", "verbosity")
SIZE, PROMPT_SIZE, PROMPTS = 16, 6, 200
CONFIG = GateConfig(hidden=32, layers=2, temperature=1.0, learning_rate=3e-3, steps=400, batch_size=256)


def weights_of_objectives() -> Tensor:
    return torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1)) / SIZE**0.5


def preferences(count: int = 1200, *, by_prompt: bool = True, seed: int = 0) -> PairFeatures:
    """Which of two objectives decides is told by the first number of the prompt's state."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(PROMPTS, PROMPT_SIZE, generator=generator)
    first, second = torch.randn(2, count, SIZE, generator=generator)
    groups = torch.randint(PROMPTS, (count,), generator=generator)
    difference = (first - second) @ weights_of_objectives().T
    turn = prompts[groups, 0] > 0 if by_prompt else torch.ones(count, dtype=torch.bool)
    chosen_first = torch.where(turn, difference[:, 0], difference[:, 1]) > 0
    chosen = torch.where(chosen_first[:, None], first, second)
    rejected = torch.where(chosen_first[:, None], second, first)
    return PairFeatures(chosen, rejected, prompts[groups], groups)


def ready(gate: GateConfig = CONFIG) -> Head:
    head = Head(NAMES, SIZE, prompt_size=PROMPT_SIZE, gate=gate, nuisances=("verbosity",))
    head.set_regression(weights_of_objectives())
    transform = torch.eye(4)
    transform[3, 3] = 0.0
    head.set_transform(transform)
    return head


def ratings() -> tuple[SimpleNamespace, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(600, SIZE, generator=generator)
    labels = 0.5 + 0.1 * (hidden @ weights_of_objectives().T + 0.1 * torch.randn(600, 4, generator=generator)).double()
    labels[torch.rand(600, 4, generator=generator) < 0.2] = math.nan
    return SimpleNamespace(responses=hidden, groups=torch.arange(600) // 4), labels


@pytest.fixture(scope="module")
def fitted() -> JudgeFit:
    features, labels = ratings()
    return fit(features, labels, NAMES, preferences=preferences(1500), gate=CONFIG, intercept=True, seed=0)


def test_the_gate_learns_which_objective_a_prompt_calls_for() -> None:
    head = ready()
    told = train_gate(head, preferences(), CONFIG, seed=0)
    unseen = preferences(400, seed=9)
    assert gate_accuracy(head, unseen) > 0.85
    with torch.no_grad():
        weights = head.weights(unseen.prompts)
    calls = unseen.prompts[:, 0]
    assert float(weights[calls > 0.7, 0].mean()) > 5 * float(weights[calls > 0.7, 1].mean())
    assert float(weights[calls < -0.7, 1].mean()) > 5 * float(weights[calls < -0.7, 0].mean())
    assert told.scale > 0
    assert float(head.gating.logit_scale.detach()) == pytest.approx(told.scale)
    assert told.mean_weights["verbosity"] == 0.0
    assert told.entropy < 0.7
    assert told.training.held_out_accuracy > 0.85


def test_the_same_seed_gives_the_same_gate_whatever_it_was_before() -> None:
    found = []
    for noise in (0.0, 1.0):
        head = ready()
        with torch.no_grad():
            head.gating.layers[0].weight.add_(noise)
        state = torch.get_rng_state()
        train_gate(head, preferences(300), GateConfig(hidden=8, layers=1, steps=30), seed=3)
        assert torch.equal(state, torch.get_rng_state())
        found.append(head.gating.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_training_stops_by_prompts_that_it_never_sees() -> None:
    pairs = preferences(100)
    mask = held_out_rows(pairs.groups, 0.3, seed=1)
    assert not set(pairs.groups[mask].tolist()) & set(pairs.groups[~mask].tolist())
    assert 0 < int(mask.sum()) < 100
    train, held_out = pairs.split(0.3, seed=1)
    assert len(train) + len(held_out) == 100
    with pytest.raises(DataError, match="one prompt"):
        held_out_rows(torch.zeros(5).long(), 0.5, seed=0)


def test_noise_is_not_learned() -> None:
    """Labels that nothing explains: the best held-out loss is near the start, and the gate stays there."""
    generator = torch.Generator().manual_seed(2)
    groups = torch.arange(150).repeat_interleave(2)
    pairs = PairFeatures(
        torch.randn(300, SIZE, generator=generator),
        torch.randn(300, SIZE, generator=generator),
        torch.randn(150, PROMPT_SIZE, generator=generator).repeat_interleave(2, 0),
        groups,
    )
    told = train_gate(ready(), pairs, GateConfig(hidden=64, layers=2, steps=600, patience=5), seed=0)
    assert told.training.best_step < 200
    assert told.training.steps < 600


def test_the_loss_is_ln_2_at_a_tie_and_knows_only_differences() -> None:
    assert float(bradley_terry(torch.zeros(5))) == pytest.approx(math.log(2))
    margins = torch.tensor([0.3, -1.0], requires_grad=True)
    bradley_terry(margins).backward()
    swapped = (-margins).detach().requires_grad_()
    bradley_terry(-swapped).backward()
    assert torch.allclose(margins.grad, -swapped.grad)
    assert accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == 0.625


@pytest.mark.long
def test_a_fit_says_how_every_stage_went(fitted: JudgeFit, tmp_path: Path) -> None:
    report = fitted.report
    assert report.ships
    assert report.differences["fixed weights"].low > 0.0
    assert report.quality["helpful"].r2.value > 0.9
    assert report.quality["helpful"].ceiling is None
    assert report.accuracies["gate"] > report.accuracies["fixed weights"] + 0.07
    assert set(report.accuracies) == {
        "gate",
        "fixed weights",
        "signed weights",
        "Bradley-Terry, linear",
        "Bradley-Terry, MLP",
    }
    assert report.decorrelation is not None
    assert report.decorrelation.worst_within < 0.2
    assert int(report.ridge.rows.min()) > 200  # of the training part
    assert not bool(fitted.head.transformed(torch.randn(5, 4))[:, 3].any())
    report.save(tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["accuracies"] == report.accuracies
    assert kept["ridge"]["helpful"]["rows"] == int(report.ridge.rows[0])
    gate = report.interval("gate")
    assert gate.low < gate.value < gate.high
    assert gate.value == pytest.approx(report.accuracies["gate"])
    assert report.compared_pairs == kept["compared_pairs"]
    assert gate.count == report.compared_prompts == kept["compared_prompts"] < report.compared_pairs


def test_no_stage_sees_a_prompt_that_models_are_compared_on(monkeypatch) -> None:
    """Every stage is asked for the prompts that it was given; ratings, reference and preferences share one split."""
    seen: dict[str, Tensor] = {}

    def spied(name, function, groups_of):
        def call(*args, **options):
            seen.setdefault(name, groups_of(*args, **options))
            return function(*args, **options)

        monkeypatch.setattr(fitting, name, call)

    spied("train_gate", fitting.train_gate, lambda head, pairs, *a, **k: pairs.groups)
    spied("fit_baselines", fitting.fit_baselines, lambda head, pairs, *a, **k: pairs.groups)
    spied("fit_transform", fitting.fit_transform, lambda rewards, columns, *, groups, **k: groups)
    spied("gate_margins", fitting.gate_margins, lambda head, pairs: pairs.groups)
    used = []
    whole = fitting.fit_from_statistics
    monkeypatch.setattr(
        fitting, "fit_from_statistics", lambda *a, folds, **k: (used.append(folds), whole(*a, folds=folds, **k))[1]
    )
    features, labels = ratings()
    quick = GateConfig(hidden=8, layers=1, steps=20, batch_size=64, held_out=0.4)
    found = fit(features, labels, NAMES, preferences=preferences(300), gate=quick)
    compared = set(found.compared.split.compare.tolist())
    assert found.report.compared_pairs == len(seen["gate_margins"])
    assert set(seen["gate_margins"].tolist()) <= compared
    for stage in ("train_gate", "fit_baselines", "fit_transform"):
        assert not set(seen[stage].tolist()) & compared, stage
    assert list(used[0]) == [0, 1, 2, 3, 4]  # the other two folds are the parts to stop by and to compare on
    few = preferences(3000)
    few = few.take(few.groups < 3)
    assert len(fit(features, labels, NAMES, preferences=few, gate=quick).report.accuracies) == 5
    with pytest.raises(DataError, match="belong to 2 prompts; expected at least three"):
        fit(features, labels, NAMES, preferences=few.take(few.groups < 2), gate=quick)


def test_the_judge_that_is_kept_was_fitted_on_everything() -> None:
    """Changing labels of the prompts to compare on changes the judge, and not what its report compares."""
    features, labels = ratings()
    quick = GateConfig(hidden=8, layers=1, steps=40, batch_size=64)
    first = fit(features, labels, NAMES, preferences=preferences(300), gate=quick, intercept=True)
    part = first.compared.split.part_of(features.groups)
    turned = labels.clone()
    turned[part == COMPARE] = 1.0 - turned[part == COMPARE]
    other = fit(features, turned, NAMES, preferences=preferences(300), gate=quick, intercept=True)
    assert torch.equal(first.compared.head.regression_layer.weight, other.compared.head.regression_layer.weight)
    assert first.report.accuracies == other.report.accuracies
    assert not torch.equal(first.head.regression_layer.weight, other.head.regression_layer.weight)
    assert first.report.quality["helpful"].r2.value > other.report.quality["helpful"].r2.value


def test_an_intercept_is_fitted_on_request() -> None:
    """Without a constant direction an objective away from 0 is worse than its mean; the report says so, and what to do."""
    features, labels = ratings()
    quick = GateConfig(hidden=8, layers=1, steps=20, batch_size=64)
    plain = fit(features, labels + 2.0, NAMES, preferences=preferences(300), gate=quick).report
    assert [name for name in NAMES if plain.quality[name].r2.value < 0] == list(NAMES)
    assert sum("worse than by its mean" in told for told in plain.warnings) == len(NAMES)
    shifted = fit(features, labels + 2.0, NAMES, preferences=preferences(300), gate=quick, intercept=True)
    assert min(quality.r2.value for quality in shifted.report.quality.values()) > 0.8
    assert not any("worse than by its mean" in told for told in shifted.report.warnings)
    assert float((shifted.head.regression_layer.bias - 2.5).abs().max()) < 0.1


def test_rows_on_disk_are_fitted_without_being_loaded(tmp_path: Path, monkeypatch) -> None:
    features, labels = ratings()
    store = FeatureStore.create(tmp_path, {"rows": 600, "shard_rows": 128})
    whole = Features.of(features.responses, features.responses[:, :2], features.groups)
    for shard in range(store.shards):
        part = slice(store.rows_of(shard).start, store.rows_of(shard).stop)
        store.write(
            shard, Features.of(whole.responses[part], whole.prompts[part], whole.groups[part], whole.rows[part])
        )
    monkeypatch.setattr(FeatureStore, "load", None)
    monkeypatch.setattr(fitting, "BLOCK", 200)
    quick = GateConfig(hidden=8, layers=1, steps=20, batch_size=64)
    on_disk, in_memory = (
        fit(given, labels, NAMES, preferences=preferences(300), gate=quick) for given in (store, features)
    )
    torch.testing.assert_close(on_disk.report.ridge.weights, in_memory.report.ridge.weights, rtol=1e-10, atol=1e-14)
    assert torch.equal(on_disk.report.ridge.alpha, in_memory.report.ridge.alpha)
    assert on_disk.report.decorrelation.worst_within == pytest.approx(
        in_memory.report.decorrelation.worst_within, abs=1e-6
    )
    with pytest.raises(DataError, match="599 rows of labels for 600 rows"):
        fit(store, labels[:-1], NAMES, preferences=preferences(300), gate=quick)


def test_dropout_follows_the_seed() -> None:
    found, config = [], GateConfig(hidden=8, layers=1, steps=30, dropout=0.5)
    for noise in range(2):
        torch.manual_seed(noise)
        head, state = ready(config), torch.get_rng_state()
        train_gate(head, preferences(300), config, seed=3)
        assert torch.equal(state, torch.get_rng_state())
        found.append(head.gating.layers[0].weight)
    assert torch.equal(*found)


def test_what_is_not_defined_is_null_in_the_report(tmp_path: Path) -> None:
    """One response to a prompt: nothing is within prompts."""
    features, labels = ratings()
    alone = SimpleNamespace(responses=features.responses, groups=torch.arange(600))
    quick = GateConfig(hidden=8, layers=1, steps=20, batch_size=64)
    report = fit(alone, labels, NAMES, preferences=preferences(300), scope="pooled", gate=quick).report
    report.save(tmp_path / "fit.json")
    row = json.loads((tmp_path / "fit.json").read_text(), parse_constant=pytest.fail)["decorrelation"]["rows"][0]
    assert row["within_after"] == {"value": None, "low": None, "high": None}
    with pytest.raises(DataError, match="take the pooled form"):
        fit(alone, labels, NAMES, preferences=preferences(300), gate=quick)


@pytest.mark.long
def test_where_prompts_do_not_matter_the_gate_is_told_not_to_ship() -> None:
    """Fixed weights are the truth here; the report must be able to say so."""
    features, labels = ratings()
    found = [
        fit(features, labels, NAMES, preferences=preferences(by_prompt=False, seed=seed), gate=CONFIG, seed=seed)
        for seed in range(2)
    ]
    for one in found:
        difference = one.report.accuracies["gate"] - one.report.accuracies["fixed weights"]
        assert difference < 0.03
        assert not one.report.ships
        assert one.report.ships != any("does not beat fixed weights" in told for told in one.report.warnings)


@pytest.mark.long
def test_the_scope_decides_where_correlation_is_zero() -> None:
    features, labels = ratings()
    hidden = torch.randn(4000, SIZE, generator=torch.Generator().manual_seed(6))
    offsets = torch.randn(1000, generator=torch.Generator().manual_seed(3)).repeat_interleave(4)
    # A direction shared by all responses to a prompt moves helpfulness down and verbosity up.
    direction = torch.linalg.pinv(weights_of_objectives()) @ torch.tensor([-1.0, 0.0, 0.0, 1.0])
    own = torch.randn(4000, generator=torch.Generator().manual_seed(4))
    along = torch.linalg.pinv(weights_of_objectives()) @ torch.tensor([1.0, 0.0, 0.0, 1.0])
    reference = SimpleNamespace(
        responses=hidden * 0.3 + offsets[:, None] * direction + own[:, None] * along, groups=torch.arange(4000) // 4
    )
    reports = {
        scope: fit(
            features, labels, NAMES, preferences=preferences(300), reference=reference, scope=scope, gate=CONFIG, seed=0
        ).report
        for scope in ("pooled", "within-prompt")
    }
    within = {
        scope: next(r for r in report.decorrelation.rows if r.objective == "helpful").within_after.value
        for scope, report in reports.items()
    }
    assert abs(within["within-prompt"]) < 0.15 < 0.4 < within["pooled"]


def test_pairs_of_the_same_text_are_dropped_and_counted() -> None:
    pairs = preferences(50)
    chosen = pairs.chosen.clone()
    chosen[[3, 7]] = pairs.rejected[[3, 7]]
    kept = PairFeatures(chosen, pairs.rejected, pairs.prompts, pairs.groups).distinct()
    assert (len(kept), kept.dropped) == (48, 2)
    with pytest.raises(DataError, match="the same in every pair"):
        PairFeatures(pairs.rejected, pairs.rejected, pairs.prompts, pairs.groups).distinct()


def test_ties_alone_and_ratings_of_one_prompt_are_refused_by_name() -> None:
    features, labels = ratings()
    pairs = preferences(300)
    tied = torch.full((300, 2), 0.5)
    with pytest.raises(DataError, match="all preferences are ties"):
        fit(features, labels, NAMES, preferences=replace(pairs, votes=tied), gate=CONFIG)
    for part, word in ((TRAIN, "train"), (COMPARE, "compare")):
        split = split_prompts(pairs.groups, [features.groups], CONFIG.held_out, seed=0)
        votes = torch.tensor([[1.0, 0.0]]).repeat(300, 1)
        votes[split.part_of(pairs.groups) == part] = 0.5
        with pytest.raises(DataError, match=f"all preferences of the prompts to {word} on are ties"):
            fit(features, labels, NAMES, preferences=replace(pairs, votes=votes), gate=CONFIG, seed=0)
    labels[features.groups != 3, 2] = math.nan
    with pytest.raises(DataError, match="the ratings of 'correct' that are to train on belong to 1 prompt;"):
        fit(features, labels, NAMES, preferences=pairs, gate=CONFIG, seed=0)


def test_an_objective_with_one_and_the_same_rating_is_told(fitted: JudgeFit) -> None:
    features, labels = ratings()
    labels[:, 1] = 0.5
    found = fit(features, labels, NAMES, preferences=preferences(300), gate=replace(CONFIG, steps=5), seed=0)
    assert "all ratings of safe are the same, which says nothing; leave it out." in found.report.warnings
    assert not any("are the same" in warning for warning in fitted.report.warnings)


def test_bad_input() -> None:
    pairs = preferences(20)
    broken = pairs.prompts.clone()
    broken[4, 0] = math.nan
    with pytest.raises(DataError, match="pair 4 has a feature that is NaN or infinite in prompts"):
        PairFeatures(pairs.chosen, pairs.rejected, broken, pairs.groups)
    with pytest.raises(DataError, match="are no pairs"):
        PairFeatures(pairs.chosen, pairs.rejected[:, :3], pairs.prompts, pairs.groups)
    with pytest.raises(DataError, match="expected equal"):
        PairFeatures(pairs.chosen, pairs.rejected, pairs.prompts[:3], pairs.groups)
    features, labels = ratings()
    with pytest.raises(ConfigError, match="scope='prompt'"):
        fit(features, labels, NAMES, preferences=pairs, scope="prompt")
    with pytest.raises(DataError, match="for 3 objectives"):
        fit(features, labels, NAMES[:3], preferences=pairs)
    with pytest.raises(ConfigError, match="all 4 objectives are nuisances"):
        fit(features, labels, NAMES, preferences=pairs, nuisances=NAMES)
