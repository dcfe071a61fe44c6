import numpy as np
import pytest

from telltale.edge.arbitration import Arbiter, CircuitBreaker, fit_arbiter, fit_weight
from telltale.edge.gate import Gate, gated_accuracy
from telltale.errors import ConfigError, DataError, NumericalError


def test_the_gate_at_its_edges():
    gate = Gate()
    assert gate.offloads(np.array([[0.5, 0.5], [1.0, 0.0], [0.51, 0.49]])).tolist() == [True, False, False]
    assert Gate(threshold=0.0).offloads(np.array([[1.0, 0.0], [0.9, 0.1]])).all()
    assert Gate("entropy").uncertainty(np.array([[0.25] * 4]))[0] == pytest.approx(2.0)
    assert Gate("margin").uncertainty(np.array([[0.7, 0.2, 0.1]]))[0] == pytest.approx(0.5)
    assert not Gate("margin").offloads(np.array([[0.9, 0.1]]))[0]


def test_the_gate_refuses_what_it_cannot_use():
    with pytest.raises(ConfigError, match="gate"):
        Gate("doubt")
    with pytest.raises(ConfigError, match="threshold"):
        Gate(threshold=-1)
    with pytest.raises(NumericalError):
        Gate().offloads(np.array([[np.nan, 1.0]]))


def test_overall_accuracy_is_the_sum_of_its_counts():
    generator = np.random.default_rng(0)
    away, edge, after = (generator.random(1000) < p for p in (0.36, 0.72, 0.5))
    found = gated_accuracy(away, edge, after)
    assert found.kept + found.offloaded == 1000
    assert found.overall == (found.kept_right + found.offloaded_right) / 1000
    assert found.overall == np.where(away, after, edge).mean()
    assert found.edge_only == edge.mean()


def test_the_published_table_loses_to_its_edge_below_52_patches():
    """Issue's arithmetic: 35.658% offloaded, 72.13% edge-only, 64.3% overall at 19.2% on the offloaded."""
    share, alone = 0.35658, 72.13
    kept = (64.3 - share * 19.2) / (1 - share)
    at_edge = (alone - (1 - share) * kept) / share
    assert kept == pytest.approx(89.3, abs=0.1)
    assert at_edge == pytest.approx(41.1, abs=0.3)
    assert 48 < 48 + 16 * (at_edge - 38.4) / (50.2 - 38.4) < 52.5


def logs_of(right, labels, classes, sure, generator):
    """Log-probabilities that are right where ``right`` is."""
    target = np.where(right, labels, (labels + 1 + generator.integers(0, classes - 1, len(labels))) % classes)
    values = generator.normal(size=(len(labels), classes))
    values[np.arange(len(labels)), target] += sure
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def test_fusion_is_never_much_worse_than_the_edge_and_helps_where_it_can():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 10, 3000)
    edge = logs_of(generator.random(3000) < 0.4, labels, 10, 4.0, generator)
    useless = logs_of(generator.random(3000) < 0.1, labels, 10, 4.0, generator)
    useful = logs_of(generator.random(3000) < 0.7, labels, 10, 6.0, generator)
    arbiter = fit_arbiter(edge[:1000], {8: useless[:1000], 32: useful[:1000]}, labels[:1000])
    alone = edge[1000:].argmax(1) == labels[1000:]
    for budget, server, least in ((8, useless, -1.0), (32, useful, 20.0)):
        fused, _ = arbiter.decide(edge[1000:], server[1000:], budget)
        assert 100 * ((fused.argmax(1) == labels[1000:]).mean() - alone.mean()) >= least
        np.testing.assert_allclose(np.exp(fused).sum(axis=1), 1.0, atol=1e-9)


def test_weights_between_budgets_and_policies():
    arbiter = Arbiter("fused", {16: 0.5, 32: 2.0})
    assert [arbiter.weight(budget) for budget in (8, 16, 31, 32, 99)] == [0.0, 0.5, 0.5, 2.0, 2.0]
    edge, server = np.log(np.array([0.6, 0.4])), np.log(np.array([0.1, 0.9]))
    assert arbiter.decide(edge, server, 8) == (edge, "edge") or arbiter.decide(edge, server, 8)[1] == "edge"
    assert arbiter.decide(edge, server, 32)[0].argmax() == 1
    assert Arbiter("server").decide(edge, server, 1)[1] == "server"
    assert Arbiter("edge").decide(edge, server, 1)[1] == "edge"
    assert Arbiter("max_confidence").decide(edge, server, 1)[1] == "server"
    impossible = np.array([0.0, -np.inf])
    assert np.isfinite(arbiter.decide(edge, impossible, 32)[0]).all()
    with pytest.raises(DataError, match="same classes"):
        arbiter.decide(edge, np.zeros(3), 32)
    with pytest.raises(ConfigError, match="policy"):
        Arbiter("both")
    with pytest.raises(DataError, match="held-out"):
        fit_weight(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))


def test_the_circuit_opens_probes_and_closes():
    now = [0.0]
    breaker = CircuitBreaker(failures=2, pause=1.0, longest=3.0, clock=lambda: now[0])
    assert breaker.allow()
    breaker.failure()
    assert breaker.allow()
    breaker.failure()
    assert breaker.state == "open"
    assert not breaker.allow()
    now[0] = 1.1
    assert breaker.state == "half-open"
    assert breaker.allow()
    assert not breaker.allow()  # one probe at a time
    breaker.failure()
    now[0] = 2.2
    assert breaker.state == "open"  # the pause has doubled
    now[0] = 3.2
    assert breaker.allow()
    breaker.success()
    assert breaker.state == "closed"
    assert breaker.allow()
