import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpness_paper_forms import smoothed_dimension
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.hessian import MatrixOperator
from telltale.signals.sharpness_dimension import (
    breakdown,
    dimension_of,
    gradient_descent,
    interval,
    log_moduli,
    sharpness_dimension,
)
from telltale.signals.spectrum import Spectrum, dense, joined, slq


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_definition(exponents):
    """Definition 4.2 word for word, for unit masses."""
    ordered = sorted(exponents, reverse=True)
    if ordered[0] < 0:
        return 0.0
    sums = [sum(ordered[:count]) for count in range(1, len(ordered) + 1)]
    last = max(count for count, value in enumerate(sums, 1) if value >= 0)
    if last == len(ordered):
        return float(last)
    return last + sums[last - 1] / abs(ordered[last])


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ((-1.0, -2.0), 0.0),
        ((1.0, -2.0), 1.5),
        ((1.0, 1.0, -1.0, -4.0), 3.25),
        ((0.0, 0.0, 0.0, -1.0), 3.0),
        ((2.0, 0.0, 0.0, -1.0, -0.5, -3.0), 5.0 + 0.5 / 3),
        ((1.0, 0.5, -1.0), 3.0),
        ((0.0, 0.0), 2.0),
        ((0.4, -math.inf, -math.inf), 1.0),
        ((math.log(3), -math.log(3) / 2, -math.log(3)), 2.5),
    ],
)
def test_each_branch_of_the_formula_on_spectra_done_by_hand(exponents, expected):
    assert sharpness_dimension(tensor(*exponents)) == pytest.approx(expected, abs=1e-12)


exponent_lists = st.lists(st.integers(-40, 40).map(lambda value: value / 8), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(exponent_lists, st.randoms(use_true_random=False))
def test_it_is_the_definition_and_has_its_symmetries(exponents, order):
    values = tensor(*exponents)
    found = sharpness_dimension(values)
    assert found == pytest.approx(by_definition(exponents), abs=1e-9)
    shuffled = list(exponents)
    order.shuffle(shuffled)
    assert sharpness_dimension(tensor(*shuffled)) == pytest.approx(found, abs=1e-9)
    assert sharpness_dimension(values * 3.5) == pytest.approx(found, abs=1e-9)
    assert sharpness_dimension(values.repeat(2)) == pytest.approx(2 * found, abs=1e-9)
    with_null = sharpness_dimension(torch.cat([values, tensor(0.0)]))
    if found > 0 and found < len(exponents):
        assert with_null == pytest.approx(found + 1, abs=1e-9)
    assert sharpness_dimension(
        values.unique(), torch.tensor([float((values == value).sum()) for value in values.unique()])
    ) == pytest.approx(found, abs=1e-9)


def test_diagonal_jacobians_have_their_kaplan_yorke_dimension():
    # Baker's map of ratio 1/3: exponents ln 2 and ln 1/3, dimension 1 + ln 2 / ln 3.
    assert sharpness_dimension(tensor(2.0, 1 / 3).log()) == pytest.approx(1 + math.log(2) / math.log(3), abs=1e-12)
    assert sharpness_dimension(tensor(4.0, 1.0, 0.5, 0.1).log()) == pytest.approx(
        3 + math.log(2) / math.log(10), abs=1e-12
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-40, 40).map(lambda v: v / 8), min_size=6, max_size=6), min_size=2, max_size=4))
def test_the_mixture_is_never_below_the_rank_average(rows):
    members = [tensor(*row) for row in rows]
    rank = sharpness_dimension(members, aggregate="rank")
    mean = torch.stack([member.sort(descending=True).values for member in members]).mean(0)
    assert rank == pytest.approx(by_definition(mean.tolist()), abs=1e-9)
    assert sharpness_dimension(members, aggregate="mixture") >= rank - 1e-9


def test_the_two_aggregates_differ():
    members = [tensor(1.0, -1.0, -1.0), tensor(-1.0, -2.0, -3.0)]
    assert sharpness_dimension(members, aggregate="rank") == pytest.approx(1.0)
    assert sharpness_dimension(members, aggregate="mixture") == pytest.approx(1.0)
    members = [tensor(2.0, -1.0, -1.0), tensor(-1.0, -2.0, -3.0)]
    assert sharpness_dimension(members, aggregate="rank") == pytest.approx(1 + 1 / 3)
    assert sharpness_dimension(members, aggregate="mixture") == pytest.approx(0.5 + 2 * 0.5)


def test_ranks_are_averaged_by_mass_where_atoms_differ_in_number():
    one, other = tensor(1.0, -2.0), tensor(0.5, -1.0, -3.0)
    found = sharpness_dimension([one, other], [tensor(1.0, 3.0), tensor(2.0, 1.0, 1.0)], aggregate="rank")
    spread = sharpness_dimension([tensor(1, -2, -2, -2), tensor(0.5, 0.5, -1, -3)], aggregate="rank")
    assert found == pytest.approx(spread, abs=1e-12)


def henon_jacobians(steps):
    a, b = 1.4, 0.3
    x, y = 0.1, 0.1
    found = []
    for step in range(steps + 200):
        if step >= 200:
            found.append([[-2 * a * x, 1.0], [b, 0.0]])
        x, y = 1 - a * x * x + y, b * x
    return torch.tensor(found, dtype=torch.float64)


def block_exponents(jacobians, length):
    """Mean log singular values of products of ``length`` Jacobians, per step; sigma_2 by the determinant."""
    products = torch.eye(2, dtype=torch.float64).expand(len(jacobians) // length, 2, 2)
    scale = torch.zeros(len(products), dtype=torch.float64)
    for offset in range(length):
        products = jacobians[offset : len(products) * length : length] @ products
        norm = products.flatten(1).norm(dim=1)
        products, scale = products / norm[:, None, None], scale + norm.log()
    first = torch.linalg.matrix_norm(products, 2).log() + scale
    total = length * math.log(0.3)
    return tensor(float(first.mean()) / length, (total - float(first.mean())) / length)


@pytest.mark.long
def test_the_henon_map_falls_monotonically_to_its_kaplan_yorke_dimension():
    jacobians = henon_jacobians(128_000)
    expected = {1: 1.3773, 2: 1.3399, 4: 1.3011, 8: 1.2806, 16: 1.2696, 32: 1.2637, 64: 1.2608}
    found = {}
    for length in expected:
        exponents = block_exponents(jacobians, length)
        assert float(exponents.sum()) == pytest.approx(math.log(0.3), abs=1e-9)
        found[length] = sharpness_dimension(exponents)
        assert found[length] == pytest.approx(expected[length], abs=0.005)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    long = block_exponents(jacobians, 4000)
    assert long.tolist() == pytest.approx([0.4209, -1.6248], abs=0.005)
    assert sharpness_dimension(long) == pytest.approx(1.2590, abs=0.005)


def test_log_moduli_keep_digits_signs_and_an_exact_null():
    nodes = tensor(0.0, 1e-18, -1e-18, 1.0, 3.0, 5.0, 2.0, 2.5)
    found = log_moduli(nodes, rate=0.4)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(-4e-19, rel=1e-12)
    assert found[2].item() == pytest.approx(4e-19, rel=1e-12)
    assert found[3:7].tolist() == pytest.approx([math.log(0.6), math.log(0.2), 0.0, math.log(0.2)], abs=1e-12)
    assert found[7].item() == pytest.approx(math.log(1e-12))
    assert log_moduli(tensor(2.5), rate=0.4, floor=0.0).item() == -math.inf
    assert log_moduli(nodes.float(), rate=0.4).dtype == torch.float64


def null_heavy():
    values = torch.cat([torch.zeros(300), torch.linspace(-0.02, 0.4, 120), torch.tensor([1.0, 3, 10, 20.5])]).double()
    return dense(MatrixOperator(torch.diag(values)))


def test_the_dimension_does_not_feel_the_clamp_but_does_feel_an_added_epsilon():
    spectrum = null_heavy()
    nodes, mass = spectrum.atoms()
    exact = [sharpness_dimension(log_moduli(nodes, rate=0.1, floor=floor), mass) for floor in (0.0, 1e-12, 1e-8)]
    assert max(exact) - min(exact) < 1e-9
    shifted = (log_moduli(nodes, rate=0.1).exp() + 1e-4).log()
    assert sharpness_dimension(shifted, mass) > exact[0] + 1


def test_the_papers_forms_miss_what_raw_atoms_find():
    spectrum = null_heavy()
    exact = dimension_of(spectrum, gradient_descent(0.1))
    assert 300 < exact < spectrum.size
    few = smoothed_dimension(spectrum, rate=0.1, form="histogram", bins=100)
    assert abs(few - exact) > 0.02 * spectrum.size
    assert smoothed_dimension(spectrum, rate=0.1, form="histogram", bins=1_000_000) == pytest.approx(exact, rel=0.02)
    narrow = smoothed_dimension(spectrum, rate=0.1, form="kde", bandwidth=1e-6)
    assert narrow == pytest.approx(exact, abs=0.01)
    assert smoothed_dimension(spectrum, rate=0.1, form="kde", bandwidth=0.05) > exact + 1
    fine = smoothed_dimension(spectrum, rate=0.1, form="ps", bandwidth=1e-6, quantiles=424)
    assert fine == pytest.approx(exact, abs=1.0)
    with pytest.raises(ConfigError, match="form"):
        smoothed_dimension(spectrum, rate=0.1, form="spline")


def test_the_breakdown_adds_up():
    spectrum = joined([null_heavy(), dense(MatrixOperator(torch.diag(torch.linspace(-1, 25, 424).double())))])
    parts = breakdown(spectrum, gradient_descent(0.1))
    assert parts.dimension == pytest.approx(dimension_of(spectrum, gradient_descent(0.1)), abs=1e-9)
    inside = parts.negative + parts.null + parts.weak + parts.over_edge + parts.cut_fraction * parts.cut_mass
    assert parts.dimension == pytest.approx(inside, abs=1e-9)
    everything = parts.negative + parts.null + parts.weak + parts.over_edge + parts.cut_mass + parts.strong
    assert everything == pytest.approx(424, abs=1e-9)
    assert parts.null == pytest.approx(150)
    assert parts.over_edge == pytest.approx((1 + sum(1 for k in range(424) if -1 + 26 * k / 423 > 20)) / 2)
    assert parts.conditioning > 0


def test_conditioning_is_the_slope_of_the_dimension():
    values = log_moduli(null_heavy().nodes[0], rate=0.1)
    parts = breakdown(null_heavy(), gradient_descent(0.1))
    nudged = values.clone()
    nudged[values.argmax()] += 1e-7
    moved = sharpness_dimension(nudged) - sharpness_dimension(values)
    assert moved == pytest.approx(1e-7 / parts.conditioning, rel=1e-4)


def two_roots(nodes):
    """Heavy-ball of momentum 0: one root 1 - rate alpha, one root 0."""
    return torch.stack([log_moduli(nodes, rate=0.1), torch.full_like(nodes, -math.inf)], dim=-1)


def test_maps_with_two_exponents_for_each_direction_count_twice_the_directions():
    spectrum = null_heavy()
    assert dimension_of(spectrum, two_roots) == pytest.approx(dimension_of(spectrum, gradient_descent(0.1)), abs=1e-9)
    assert breakdown(spectrum, two_roots).strong > spectrum.size / 2


def random_operators(count, size=60):
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
        values = torch.cat([torch.zeros(size // 2), torch.linspace(-0.3, 3, size - size // 2)]).double()
        values[-1] = 15 + 10 * torch.rand((), generator=generator)
        found.append(MatrixOperator(rotation @ torch.diag(values) @ rotation.T))
    return found


def test_intervals_cover_the_dimension_of_the_population_from_four_minibatches_on():
    """A population of minibatch Hessians that is known whole; nominal 95%."""
    exponents, generator, population = gradient_descent(0.9), torch.Generator().manual_seed(5), []
    for _ in range(60):
        factor = torch.randn(40, 16, generator=generator).double() * torch.logspace(0, -2.5, 16)
        signs = torch.where(torch.rand(16, generator=generator) < 0.85, 1.0, -0.3)
        population.append(dense(MatrixOperator((factor * signs) @ factor.T / 40 * 0.7)))
    exact = dimension_of(joined(population), exponents)
    draws, covered, widths = torch.Generator().manual_seed(0), 0, []
    for _ in range(100):
        picked = [population[index] for index in torch.randperm(60, generator=draws)[:4]]
        low, high = interval(joined(picked), exponents)
        covered += low <= exact <= high
        widths.append(high - low)
    assert covered >= 90
    assert 0 < sorted(widths)[50] < 20


@pytest.mark.parametrize("aggregate", ["mixture", "rank"])
def test_an_interval_is_the_jackknife_with_students_quantile(aggregate):
    exponents, parts = gradient_descent(0.1), [dense(operator) for operator in random_operators(5)]
    point = dimension_of(joined(parts), exponents, aggregate=aggregate)
    without = [
        dimension_of(joined(parts[:index] + parts[index + 1 :]), exponents, aggregate=aggregate) for index in range(5)
    ]
    error = (4 / 5 * sum((one - sum(without) / 5) ** 2 for one in without)) ** 0.5
    reach = 2.7764451051977987 * error
    low, high = interval(joined(parts), exponents, aggregate=aggregate)
    assert (low, high) == (pytest.approx(max(point - reach, 0)), pytest.approx(min(point + reach, 60)))
    assert interval(joined(parts), exponents, aggregate=aggregate, level=0.5)[0] > low


def test_intervals_shrink_with_the_number_of_minibatches_and_hold_every_run_of_one():
    exponents = gradient_descent(0.1)
    few = joined([dense(operator) for operator in random_operators(4)])
    many = joined([dense(operator) for operator in random_operators(30)])
    spans = [high - low for low, high in (interval(few, exponents), interval(many, exponents))]
    assert spans[0] > spans[1] > 0
    shared = slq(random_operators(4), runs=12, steps=15, seed=0)
    low, high = interval(shared, exponents)
    assert low <= dimension_of(shared, exponents) <= high


def test_an_interval_stays_within_the_number_of_directions():
    values = {200.0: -torch.linspace(0.1, 9, 200), 0.0: torch.linspace(0.2, 1.5, 200)}
    for true, eigenvalues in values.items():
        operators = [MatrixOperator(torch.diag(eigenvalues.double())) for _ in range(4)]
        spectrum, exponents = slq(operators, runs=8, steps=20, seed=1), gradient_descent(0.9)
        assert dimension_of(spectrum, exponents) == pytest.approx(true)
        assert interval(spectrum, exponents) == (pytest.approx(true), pytest.approx(true))


@pytest.mark.parametrize("given", [{"seed": 1}, {"resamples": 200}])
def test_options_that_have_no_effect_say_so(given):
    spectrum, exponents = slq(random_operators(4), runs=4, steps=10, seed=0), gradient_descent(0.1)
    with pytest.warns(FutureWarning, match="draws nothing"):
        assert interval(spectrum, exponents, **given) == interval(spectrum, exponents)


@pytest.mark.parametrize("count", [1, 3])
def test_an_interval_over_fewer_than_four_minibatches_is_refused(count):
    spectrum = slq(random_operators(count), runs=6, steps=10, seed=0)
    with pytest.raises(DataError, match=f"{count} minibatch.* at least 4"):
        interval(spectrum, gradient_descent(0.1))


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="rate"):
        log_moduli(tensor(1.0), rate=0.0)
    with pytest.raises(ConfigError, match="rate"):
        log_moduli(tensor(1.0), rate=-0.1)
    with pytest.raises(ConfigError, match="rate"):
        log_moduli(tensor(1.0), rate=math.nan)
    with pytest.raises(NumericalError):
        sharpness_dimension(tensor(1.0, math.nan))
    with pytest.raises(DataError, match="no exponents"):
        sharpness_dimension(tensor())
    with pytest.raises(DataError, match="masses"):
        sharpness_dimension([tensor(1.0), tensor(1.0, 2.0)])
    with pytest.raises(DataError, match="weights"):
        sharpness_dimension(tensor(1.0, 2.0), tensor(1.0))
    with pytest.raises(ConfigError, match="aggregate"):
        sharpness_dimension(tensor(1.0), aggregate="mean")
    with pytest.raises(NumericalError):
        Spectrum(1, [tensor(math.nan)], [tensor(1.0)], [0], 1, True, [tensor(0.0)])
