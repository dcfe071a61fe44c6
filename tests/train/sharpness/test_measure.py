import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.tiny_models import tiny_model
from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.signals.hessian import materialise
from telltale.signals.sharpness_dimension import log_moduli, sharpness_dimension
from telltale.train.sharpness.measure import measure, over_checkpoints, spectrum
from telltale.train.sharpness.persistence import pairwise, persistence_dimension
from telltale.train.sharpness.probe import Probe
from telltale.train.sharpness.result import Sharpness, spectrum_figures

RATE = 2.0


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def trained():
    """A ReLU network past the first steps, with dead inputs: a null space, negative curvature and a contracting bulk."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12, bias=False), nn.ReLU(), nn.Linear(12, 3, bias=False))
    inputs = torch.randn(90, 10) * torch.cat([torch.ones(6), torch.zeros(4)])
    targets = inputs[:, :3].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(60):
        rows = slice(15 * (step % 6), 15 * (step % 6) + 15)
        optimizer.zero_grad()
        loss(model, (inputs[rows], targets[rows])).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, [(inputs[start : start + 15], targets[start : start + 15]) for start in range(0, 90, 15)]


def exact(model, batches, aggregate="mixture"):
    probe = Probe(model, loss, batches)
    values = [torch.linalg.eigvalsh(materialise(operator).double()) for operator in probe.operators]
    return sharpness_dimension([log_moduli(v, rate=RATE) for v in values], aggregate=aggregate)


@pytest.mark.long
@pytest.mark.parametrize("aggregate", ["mixture", "rank"])
def test_the_dense_path_is_the_exact_dimension_and_the_quadrature_is_near_it(trained, aggregate):
    model, batches = trained
    truth = exact(model, batches, aggregate)
    assert 48 < truth < 156, "neither the null space alone nor everything"
    dense = measure(model, loss, batches, rate=RATE, exact=True, aggregate=aggregate)
    assert dense.spectrum.exact
    assert dense.sd == pytest.approx(truth, abs=0.05)
    found = measure(model, loss, batches, rate=RATE, runs=60, steps=20, exact=False, aggregate=aggregate, seed=3)
    assert not found.spectrum.exact
    assert found.spectrum.matvecs <= 60 * 20
    assert found.sd == pytest.approx(truth, abs=0.03 * 156)
    assert found.interval[0] <= found.sd <= found.interval[1]
    assert found.codimension == pytest.approx(156 - found.sd)


@pytest.mark.long
def test_small_models_are_measured_exactly_by_themselves_and_large_budgets_decide(trained):
    model, batches = trained
    assert measure(model, loss, batches, rate=RATE, runs=50, steps=20).spectrum.exact
    assert not measure(model, loss, batches, rate=RATE, runs=6, steps=20).spectrum.exact
    few = measure(model, loss, batches, rate=RATE, runs=2, steps=5)
    assert few.spectrum.runs == 6, "one run for each minibatch at least"


def test_the_result_carries_its_controls_and_survives_a_file(trained, tmp_path):
    model, batches = trained
    found = measure(model, loss, batches, rate=RATE, runs=12, steps=10, seed=1)
    assert found.controls["train_loss"] == pytest.approx(
        sum(float(loss(model, batch).detach()) for batch in batches) / 6, rel=1e-5
    )
    assert found.controls["batch_size"] == 15
    assert {"lambda_max", "trace", "lambda_1", "null_space", "weight_norm"} <= set(found.controls)
    assert found.jacobian == "gd"
    assert found.conditioning == found.breakdown.conditioning > 0
    assert found.breakdown.dimension == pytest.approx(
        measure(model, loss, batches, rate=RATE, runs=12, steps=10, seed=1).sd
    )
    found.save(tmp_path / "sharpness.json")
    loaded = Sharpness.load(tmp_path / "sharpness.json")
    assert (loaded.sd, loaded.interval, loaded.controls) == (found.sd, found.interval, found.controls)
    assert loaded.breakdown == found.breakdown
    assert torch.equal(loaded.exponents, found.exponents)
    assert loaded.spectrum.batch == found.spectrum.batch
    page = found.to_html(tmp_path / "sharpness.html").read_text()
    assert f"{found.sd:,.1f}" in page
    assert "lambda_max" in page
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no saved measurement"):
        Sharpness.load(tmp_path / "other.json")


@pytest.mark.long
@pytest.mark.parametrize("aggregate", ["mixture", "rank"])
def test_several_checkpoints_together(trained, aggregate):
    model, batches = trained
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight.add_(0.05 * torch.randn(12, 10, generator=torch.Generator().manual_seed(0)))
    options = {"rate": RATE, "exact": True, "aggregate": aggregate}
    points = [measure(network, loss, batches, **options) for network in (model, moved)]
    assert over_checkpoints(points[:1]) == pytest.approx(points[0].sd)
    assert over_checkpoints(points) >= max(point.sd for point in points) - 1e-9
    # By hand: of each rank the largest, within each minibatch or over all of them.
    values = [
        [log_moduli(nodes, rate=RATE).sort(descending=True).values for nodes in point.spectrum.nodes]
        for point in points
    ]
    if aggregate == "rank":
        by_rank = torch.stack([torch.maximum(*pair) for pair in zip(*values, strict=True)]).mean(0)
        expected = sharpness_dimension(by_rank)
    else:
        pooled = [torch.cat(minibatches).sort(descending=True).values for minibatches in values]
        expected = sharpness_dimension(torch.maximum(*pooled), torch.full_like(pooled[0], 1 / len(batches)))
    assert over_checkpoints(points) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(DataError, match="2 kinds"):
        over_checkpoints(
            [
                points[0],
                measure(
                    model,
                    loss,
                    batches,
                    rate=RATE,
                    exact=True,
                    aggregate={"mixture": "rank", "rank": "mixture"}[aggregate],
                ),
            ]
        )


@pytest.mark.long
@pytest.mark.parametrize("jacobian", ["gd", "optimizer"])
def test_the_figures_show_every_atom_the_edge_and_where_the_sum_turns(trained, jacobian):
    model, batches = trained
    options = {"jacobian": jacobian, "runs": 12, "steps": 10, "exact": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE / 2, momentum=0.5 if jacobian == "optimizer" else 0.0)
    far = measure(model, loss, batches, optimizer=optimizer, **options)
    assert far.edge_ratio < 0.5
    assert not spectrum_figures(far)[0][0].layout.shapes, "an edge far away would squeeze the picture"
    optimizer.param_groups[0]["lr"] = RATE / 2 / far.edge_ratio
    found = measure(model, loss, batches, optimizer=optimizer, **options)
    (density, _), (atoms, _), (exponents, _) = spectrum_figures(found)
    nodes, mass = found.spectrum.atoms()
    # A bar would have no width where atoms lie close together: each is a line from the foot to its mass.
    stems = list(zip(atoms.data[0].x[::3], atoms.data[0].y[1::3], strict=True))
    assert atoms.data[0].mode == "lines"
    assert stems == list(zip(nodes[mass > 0].tolist(), mass[mass > 0].tolist(), strict=True))
    assert density.layout.shapes[0].x0 == atoms.layout.shapes[0].x0 == found.threshold
    sums = dict(zip(exponents.data[1].x, exponents.data[1].y, strict=True))
    before, after = max(t for t in sums if t <= found.sd), min(t for t in sums if t > found.sd)
    assert sums[before] >= -1e-9
    assert sums[after] < 0
    assert exponents.layout.shapes[0].x0 == found.sd
    assert list(exponents.data[0].y) == sorted(exponents.data[0].y, reverse=True)


def test_a_trajectory_adds_its_persistence_dimension_to_the_controls(trained):
    model, batches = trained
    walk = torch.randn(80, 156, generator=torch.Generator().manual_seed(0)).cumsum(0)
    found = measure(model, loss, batches, rate=RATE, runs=6, steps=4, trajectory=walk, seed=2)
    assert found.controls["persistence_dimension"] == persistence_dimension(pairwise(walk), seed=2).dimension
    assert "persistence_dimension" not in measure(model, loss, batches, rate=RATE, runs=6, steps=4).controls
    with pytest.raises(DataError, match="n >= 2"):
        measure(model, loss, batches, rate=RATE, runs=6, steps=4, trajectory=walk[0])


def test_measuring_changes_nothing_and_seeds_decide(trained):
    model, batches = trained
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = measure(model, loss, batches, rate=RATE, runs=6, steps=8, seed=5)
    again = measure(model, loss, batches, rate=RATE, runs=6, steps=8, seed=5)
    other = measure(model, loss, batches, rate=RATE, runs=6, steps=8, seed=6)
    assert first.sd == again.sd != other.sd
    assert first.interval == again.interval
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(7))

    def forward(self, inputs):
        return (inputs * self.shift).sum()


@pytest.mark.parametrize("exact_path", [True, False])
def test_a_loss_without_curvature_is_n_and_flagged(exact_path):
    found = measure(Shifted(), lambda m, b: m(b), [torch.ones(7), torch.zeros(7)], rate=0.1, exact=exact_path)
    assert found.sd == pytest.approx(7)
    assert found.no_curvature
    assert found.breakdown.null == pytest.approx(7)
    curved = measure(Shifted(), lambda m, b: m(b) ** 2, [torch.ones(7)], rate=0.1, exact=exact_path)
    assert not curved.no_curvature


def test_the_rate_comes_from_the_optimizer_and_has_to_be_positive(trained):
    model, batches = trained
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    assert measure(model, loss, batches, optimizer=optimizer, runs=6, steps=4).rate == 0.3
    for rate in (0.0, -1.0, float("nan"), float("inf"), "0.1", True):
        with pytest.raises(ConfigError, match="rate"):
            measure(model, loss, batches, rate=rate)
    with pytest.raises(ConfigError, match="takes the optimizer's own"):
        measure(model, loss, batches, optimizer=optimizer, rate=0.5, jacobian="optimizer")
    with pytest.raises(ConfigError, match="optimizer is str"):
        measure(model, loss, batches, optimizer="adam")
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ConfigError, match="rate"):
        measure(model, loss, batches, optimizer=optimizer)
    with pytest.raises(ConfigError, match="rate"):
        measure(model, loss, batches)
    grouped = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (0.1, 0.2), strict=True)])
    with pytest.warns(UserWarning, match="rates differ"):
        assert measure(model, loss, batches, optimizer=grouped, runs=6, steps=4).rate == 0.2


class Unheard(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.2})


def test_an_optimizer_of_unknown_jacobian_is_measured_as_gd_with_a_warning(trained):
    model, batches = trained
    with pytest.warns(UserWarning, match="Unheard"):
        found = measure(
            model, loss, batches, optimizer=Unheard(model.parameters()), jacobian="optimizer", runs=6, steps=5
        )
    assert found.jacobian == "gd"
    with pytest.raises(ConfigError, match="needs the optimizer"):
        measure(model, loss, batches, rate=0.1, jacobian="optimizer")


def test_a_hugging_face_causal_lm_is_measured_with_its_own_loss():
    model = tiny_model("gpt2")
    ids = torch.randint(0, 97, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = measure(model, None, list(ids), rate=0.05, runs=2, steps=4)
    assert 0 <= found.sd <= found.size == sum(p.numel() for p in model.parameters())
    assert found.controls["batch_size"] == 2


def test_bad_input_is_refused(trained):
    model, batches = trained
    for bad in ({"runs": 0}, {"steps": 0}, {"jacobian": "adam"}, {"aggregate": "mean"}, {"level": 1.0}):
        with pytest.raises(ConfigError):
            measure(model, loss, batches, rate=0.1, **bad)
    with pytest.raises(DataError, match="no minibatches"):
        measure(model, loss, [], rate=0.1)
    large = nn.Linear(70, 70)
    with pytest.raises(ConfigError, match="exact"):
        measure(large, lambda m, b: m(b).square().mean(), [torch.randn(3, 70)], rate=0.1, exact=True)


def test_the_spectrum_of_any_scalar_loss_over_any_parameters():
    weight = torch.randn(6, requires_grad=True)
    found = spectrum(lambda: (weight**3).sum(), [weight])
    assert found.exact
    assert torch.allclose(found.nodes[0], (6 * weight.detach().double()).sort().values, atol=1e-5)
    several = spectrum(
        [lambda: (weight**2).sum(), lambda: (2 * weight**2).sum()], [weight], exact=False, runs=2, steps=3
    )
    assert several.batch == [0, 1]
    assert torch.allclose(torch.cat(several.nodes), torch.tensor([2.0, 4.0]).double())
    with pytest.raises(ConfigError, match="no loss"):
        spectrum([], [weight])
