"""Antichain states of graphs, and the order of layers that the planner derives from them, against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from telltale.errors import DataError
from telltale.train.pipeline.graph import antichain_states, crossing_bytes, topological_order
from telltale.train.pipeline.planning.costs import COST_MODELS, cost_of_stages
from telltale.train.pipeline.planning.ordering import best_order
from telltale.train.pipeline.planning.partition import Problem, solve
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.topology import Level


def random_graph(generator: random.Random, n_nodes: int) -> tuple[tuple[int, int], ...]:
    """A graph with one source, node 0: every other node reads one to three earlier ones."""
    edges = set()
    for target in range(1, n_nodes):
        for source in generator.sample(range(target), min(target, generator.randint(1, 3))):
            edges.add((source, target))
    return tuple(sorted(edges))


def ideals(n_nodes: int, edges: tuple[tuple[int, int], ...]) -> set[int]:
    """Every non-empty set of nodes that holds what its nodes read."""
    return {
        state
        for state in range(1, 2**n_nodes)
        if all(state >> source & 1 for source, target in edges if state >> target & 1)
    }


def crossing(state: int, edges: tuple[tuple[int, int], ...], sizes: list[float]) -> float:
    """Outputs in the state that a node outside reads, each once."""
    return sum(sizes[node] for node in {a for a, b in edges if state >> a & 1 and not state >> b & 1})


def test_states_are_all_ideals_in_an_order_that_respects_containment() -> None:
    generator = random.Random(1)
    for _ in range(60):
        n_nodes = generator.randint(1, 9)
        edges = random_graph(generator, n_nodes)
        states = antichain_states(n_nodes, edges)
        assert states is not None
        assert set(states) == ideals(n_nodes, edges)
        assert len(states) == len(set(states))
        assert all(states[i] & ~states[j] for i, j in itertools.combinations(range(len(states)), 2) if i > j)
        sizes = [state.bit_count() for state in states]
        assert sizes == sorted(sizes)


def test_a_second_source_comes_in_with_its_first_reader() -> None:
    """0 -> 2 <- 1: as in the official optimizer there is no state with node 1 alone."""
    assert antichain_states(3, ((0, 2), (1, 2))) == [0b001, 0b111]


def test_too_many_states_are_given_up() -> None:
    edges = tuple((0, branch) for branch in range(1, 12))
    assert antichain_states(12, edges, limit=100) is None
    assert len(antichain_states(12, edges) or []) == 2**11


def test_chain_of_a_graph_carries_what_crosses_each_cut() -> None:
    generator = random.Random(2)
    for _ in range(40):
        n_nodes = generator.randint(2, 9)
        edges = random_graph(generator, n_nodes)
        sizes = [float(generator.randint(1, 9)) for _ in range(n_nodes)]
        found = crossing_bytes(range(n_nodes), edges, sizes)
        for cut in range(1, n_nodes):
            assert found[cut - 1] == crossing(2**cut - 1, edges, sizes)


def test_cycles_are_named() -> None:
    with pytest.raises(DataError, match="b, c form or follow a cycle"):
        topological_order(3, [(0, 1), (1, 2), (2, 1)], ["a", "b", "c"])


def graph_profile(generator: random.Random, n_nodes: int) -> Profile:
    layers = tuple(
        LayerProfile(
            f"n{index}",
            generator.uniform(0.1, 2.0),
            generator.uniform(0.1, 2.0) * generator.choice((0, 1)),
            generator.uniform(0.1, 0.8),
            generator.uniform(0.0, 9.0) * generator.choice((0, 1)),
        )
        for index in range(n_nodes)
    )
    return Profile(layers, edges=random_graph(generator, n_nodes))


def bottleneck(profile: Profile, levels: tuple[Level, ...], name: str) -> float:
    parts = solve(Problem(profile, levels, COST_MODELS[name]))
    assert parts is not None
    bounds = [0, *(part.stop for part in parts)]
    return cost_of_stages(profile, bounds, [part.replicas for part in parts], levels, COST_MODELS[name]).bottleneck


@pytest.mark.long
@pytest.mark.parametrize("name", ["ring", "official-code"])
@pytest.mark.parametrize("levels", [(Level(3, 0.6),), (Level(2, 5.0), Level(2, 1.0))])
def test_the_order_is_as_good_as_the_best_of_all_orders(name: str, levels: tuple[Level, ...]) -> None:
    generator = random.Random(3)
    better = 0
    for _ in range(12):
        profile = graph_profile(generator, generator.randint(4, 5))
        names = [layer.name for layer in profile.layers]
        orders = []
        for order in itertools.permutations(range(len(names))):
            place = {node: rank for rank, node in enumerate(order)}
            if all(place[a] < place[b] for a, b in profile.edges or ()):
                orders.append([names[node] for node in order])
        best = min(bottleneck(profile.chain(order), levels, name) for order in orders)
        own = bottleneck(profile.chain(), levels, name)
        order = best_order(profile, levels, COST_MODELS[name], directions=2, upper=own)
        found = own if order is None else bottleneck(profile.chain(order), levels, name)
        assert found == pytest.approx(best, rel=1e-9)
        better += best < own * (1 - 1e-6)
    assert better


def test_orders_that_break_the_graph_are_refused() -> None:
    profile = graph_profile(random.Random(4), 4)
    with pytest.raises(DataError, match="whose output it reads"):
        profile.chain(["n3", "n2", "n1", "n0"])
    with pytest.raises(DataError, match="each of the profile's 4 once"):
        profile.chain(["n0", "n1"])
    plain = profile.chain()
    with pytest.raises(DataError, match="moves layers of a chain"):
        plain.chain(["n3", "n2", "n1", "n0"])
