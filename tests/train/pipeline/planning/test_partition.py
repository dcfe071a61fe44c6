"""The partitioner against brute force over every partition and replication, with the cost formulas written out again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from telltale.train.pipeline.planning.costs import COST_MODELS, MemoryModel, cost_of_stages
from telltale.train.pipeline.planning.partition import Part, Problem, solve
from telltale.train.pipeline.profile import Profile
from telltale.train.pipeline.topology import Level
from train.pipeline.made_profiles import chain, random_chain

CASES = 200
CLOSE = 1e-9
SYNCHRONISATION = {
    "ring": lambda m, w, b: 2 * (m - 1) / m * w / b,
    "v1": lambda m, w, b: 4 * (m - 1) / m * w / b,
    "sosp-literal": lambda m, w, b: 2 * (m - 1) * w / b,
    "official-code": lambda m, w, b: 4 * (m - 1) / m * w / b,
}


def stage_cost(name: str, inner: float, weights: float, m: int, bandwidth: float) -> float:
    exchange = SYNCHRONISATION[name](m, weights, bandwidth)
    return (inner + exchange) / m if name == "official-code" else max(inner, exchange) / m


def every_plan(n_layers: int, workers: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All (cuts, replicas)."""
    for n_stages in range(1, min(n_layers, workers) + 1):
        for cuts in itertools.combinations(range(1, n_layers), n_stages - 1):
            for replicas in itertools.product(range(1, workers + 1), repeat=n_stages):
                if sum(replicas) <= workers:
                    yield cuts, replicas


def flat_bottleneck(profile: Profile, cuts, replicas, name: str, bandwidth: float, directions: int = 2) -> float:
    bounds = [0, *cuts, len(profile.layers)]
    worst = 0.0
    for index, m in enumerate(replicas):
        layers = profile.layers[bounds[index] : bounds[index + 1]]
        seconds = sum(layer.compute for layer in layers)
        worst = max(worst, stage_cost(name, seconds, sum(layer.parameter_bytes for layer in layers), m, bandwidth))
        if index + 1 < len(replicas):
            worst = max(worst, directions * layers[-1].activation_bytes / bandwidth)
    return worst


def peak_memories(profile: Profile, cuts, replicas, policy: str, m: int | None, recompute: bool) -> list[float]:
    """Spec section 1.6, stage by stage."""
    bounds, workers = [0, *cuts, len(profile.layers)], sum(replicas)
    result = []
    for index, r in enumerate(replicas):
        layers = profile.layers[bounds[index] : bounds[index + 1]]
        weights = sum(layer.parameter_bytes for layer in layers)
        saved = sum(layer.saved_bytes for layer in layers)
        inputs = profile.layers[bounds[index] - 1].activation_bytes if index else 0.0
        flying = (workers - 1 - sum(replicas[:index])) // r + 1
        versions = {"stash": flying, "2bw": 2, "flush": 1, "gpipe": 1}[policy]
        if policy == "gpipe":
            flying = -(-m // r)
        if policy == "flush" and m is not None:
            flying = min(flying, -(-m // r))
        activations = flying * inputs + saved if recompute else flying * saved
        result.append((versions + 3) * weights + activations)
    return result


def shape(parts: list[Part]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(part.start for part in parts[1:]), tuple(part.replicas for part in parts)


def interleaved_key(cuts, replicas) -> tuple:
    """The documented order of ties in the same number of stages and workers."""
    return tuple(itertools.chain.from_iterable(itertools.zip_longest(cuts, (-r for r in replicas), fillvalue=0)))


@pytest.mark.long
@pytest.mark.parametrize("name", COST_MODELS)
def test_equals_brute_force_with_its_tie_rules(name: str) -> None:
    generator = random.Random(f"flat {name}")
    for case in range(CASES):
        profile = random_chain(generator, generator.randint(1, 7), whole=case % 2 == 0)
        workers = generator.randint(1, 5)
        bandwidth = generator.choice((0.3, 1.0, 3.0, 10.0))
        directions = generator.choice((1, 2))
        most = case % 4 < 2
        scored = [
            (flat_bottleneck(profile, cuts, replicas, name, bandwidth, directions), cuts, replicas)
            for cuts, replicas in every_plan(len(profile.layers), workers)
        ]
        least = min(score for score, _, _ in scored)
        ties = [(cuts, replicas) for score, cuts, replicas in scored if score <= least * (1 + CLOSE)]
        sign = -1 if most else 1
        expected = min(ties, key=lambda tie: (len(tie[1]), sign * sum(tie[1]), interleaved_key(*tie)))
        problem = Problem(
            profile, (Level(workers, bandwidth),), COST_MODELS[name], directions=directions, use_all_workers=most
        )
        parts = solve(problem)
        assert parts is not None
        assert flat_bottleneck(profile, *shape(parts), name, bandwidth, directions) == pytest.approx(least, rel=CLOSE)
        assert shape(parts) == expected, (case, profile, workers, bandwidth)


def two_level_bottleneck(profile: Profile, name: str, levels: tuple[Level, Level]) -> float:
    """The least over every outer plan whose stages each run the least inner plan."""
    inner_level, outer_level = levels
    layers = profile.layers

    def inner(start: int, stop: int) -> float:
        part = Profile(layers[start:stop])
        return min(
            flat_bottleneck(part, cuts, replicas, name, inner_level.bandwidth)
            for cuts, replicas in every_plan(stop - start, inner_level.count)
        )

    known = {(i, j): inner(i, j) for i in range(len(layers)) for j in range(i + 1, len(layers) + 1)}
    best = float("inf")
    for cuts, replicas in every_plan(len(layers), outer_level.count):
        bounds = [0, *cuts, len(layers)]
        worst = 0.0
        for index, m in enumerate(replicas):
            low, high = bounds[index], bounds[index + 1]
            weights = sum(layer.parameter_bytes for layer in layers[low:high])
            worst = max(worst, stage_cost(name, known[low, high], weights, m, outer_level.bandwidth))
            if index + 1 < len(replicas):
                worst = max(worst, 2 * layers[high - 1].activation_bytes / outer_level.bandwidth)
        best = min(best, worst)
    return best


@pytest.mark.long
@pytest.mark.parametrize("name", COST_MODELS)
def test_equals_brute_force_on_two_levels(name: str) -> None:
    generator = random.Random(f"levels {name}")
    for case in range(30):
        profile = random_chain(generator, generator.randint(1, 5), whole=case % 2 == 0)
        levels = (
            Level(generator.randint(1, 3), generator.choice((1.0, 5.0, 20.0))),
            Level(generator.randint(1, 3), generator.choice((0.5, 1.0, 4.0))),
        )
        parts = solve(Problem(profile, levels, COST_MODELS[name]))
        assert parts is not None
        bounds = [0, *(part.stop for part in parts)]
        found = cost_of_stages(profile, bounds, [part.replicas for part in parts], levels, COST_MODELS[name])
        assert found.bottleneck == pytest.approx(two_level_bottleneck(profile, name, levels), rel=CLOSE), case


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("policy", "m"), [("stash", None), ("2bw", None), ("flush", None), ("flush", 3), ("gpipe", 4)])
def test_memory_limit_is_exact_on_flat_machines(policy: str, m: int | None, recompute: bool) -> None:
    generator = random.Random(f"{policy} {m} {recompute}")
    infeasible = tight = 0
    for _ in range(25):
        profile = random_chain(generator, generator.randint(1, 6))
        workers, bandwidth = generator.randint(1, 4), generator.choice((0.5, 2.0))
        plans = []
        for cuts, replicas in every_plan(len(profile.layers), workers):
            peak = max(peak_memories(profile, cuts, replicas, policy, m, recompute))
            plans.append((flat_bottleneck(profile, cuts, replicas, "ring", bandwidth), peak))
        limit = generator.uniform(0.9, 1.6) * min(peak for _, peak in plans)
        within = [score for score, peak in plans if peak <= limit]
        memory = MemoryModel(policy, 2.0, m, recompute=recompute)
        parts = solve(
            Problem(profile, (Level(workers, bandwidth),), COST_MODELS["ring"], memory=memory, memory_limit=limit)
        )
        if not within:
            assert parts is None
            infeasible += 1
            continue
        assert parts is not None
        assert max(peak_memories(profile, *shape(parts), policy, m, recompute)) <= limit
        assert flat_bottleneck(profile, *shape(parts), "ring", bandwidth) == pytest.approx(min(within), rel=CLOSE)
        tight += min(within) > min(score for score, _ in plans)
    assert infeasible
    assert tight or workers == 1


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_limit_is_kept_on_two_levels(recompute: bool) -> None:
    generator = random.Random(5)
    found = 0
    for _ in range(40):
        profile = random_chain(generator, generator.randint(2, 8))
        levels = (Level(generator.randint(1, 3), 5.0), Level(generator.randint(1, 3), 1.0))
        limit = generator.uniform(15.0, 60.0)
        memory = MemoryModel("stash", recompute=recompute)
        parts = solve(Problem(profile, levels, COST_MODELS["ring"], memory=memory, memory_limit=limit))
        if parts is not None:
            found += 1
            assert max(peak_memories(profile, *shape(parts), "stash", None, recompute)) <= limit
    assert found > 5


@pytest.mark.parametrize("max_stages", [1, 2, 3])
def test_max_stages_and_straight_pipelines_equal_brute_force(max_stages: int) -> None:
    generator = random.Random(max_stages)
    for _ in range(30):
        profile = random_chain(generator, generator.randint(1, 6))
        workers = generator.randint(1, 5)
        plans = list(every_plan(len(profile.layers), workers))
        for straight in (False, True):
            allowed = [
                flat_bottleneck(profile, cuts, replicas, "ring", 1.0)
                for cuts, replicas in plans
                if len(replicas) <= max_stages and (not straight or max(replicas) == 1)
            ]
            parts = solve(
                Problem(
                    profile,
                    (Level(workers, 1.0),),
                    COST_MODELS["ring"],
                    max_stages=max_stages,
                    max_replicas=1 if straight else None,
                )
            )
            assert parts is not None
            assert len(parts) <= max_stages
            assert flat_bottleneck(profile, *shape(parts), "ring", 1.0) == pytest.approx(min(allowed), rel=CLOSE)


def test_one_update_per_batch_averages_gradients_once() -> None:
    """Two replicas whose exchange takes 3 s per round: with m = 12 a sixth of that counts per round."""
    profile = chain([4.0], [0.0], [3.0])
    rare = solve(Problem(profile, (Level(2, 0.5),), COST_MODELS["ring"], microbatches=12))
    often = solve(Problem(profile, (Level(2, 0.5),), COST_MODELS["ring"]))
    assert rare is not None
    assert often is not None
    assert rare[0].replicas == 2
    assert (
        cost_of_stages(profile, [0, 1], [2], (Level(2, 0.5),), COST_MODELS["ring"], microbatches=12).bottleneck == 2.0
    )
    assert cost_of_stages(profile, [0, 1], [2], (Level(2, 0.5),), COST_MODELS["ring"]).bottleneck == 3.0


@pytest.mark.long
def test_many_layers_on_many_machines() -> None:
    """In a second, not hours; the exact time is the benchmark's business."""
    profile = random_chain(random.Random(0), 1000)
    levels = (Level(8, 50.0), Level(16, 5.0))
    parts = solve(Problem(profile, levels, COST_MODELS["ring"]))
    assert parts is not None
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    bounds = [0, *(part.stop for part in parts)]
    found = cost_of_stages(profile, bounds, [part.replicas for part in parts], levels, COST_MODELS["ring"]).bottleneck
    assert profile.compute / 128 <= found < profile.compute / 64
