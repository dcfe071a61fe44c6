"""Laws: what they accept and reject, projections, units, calibration on the engine, and files."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import ConfigError
from telltale.world import make
from telltale.world.collection import episodes
from telltale.world.laws import contracts, library
from telltale.world.laws.law import Law, calibrate, checked_laws, project
from telltale.world.laws.reading import read_laws
from telltale.world.laws.units import DimensionalityError, check_dimensions, conserved_expression
from telltale.world.plugs import UserCodeError
from telltale.world.transitions import Transitions


def oscillator(symplectic, steps=1000, h=0.1):
    x, v, path = 1.0, 0.0, [(1.0, 0.0)]
    for _ in range(steps):
        if symplectic:
            v = v - h * x
            x = x + h * v
        else:
            x, v = x + h * v, v - h * x
        path.append((x, v))
    return torch.tensor(path, dtype=torch.float64)


def energy(state):
    return 0.5 * (state[..., 0] ** 2 + state[..., 1] ** 2)


def test_the_energy_law_flags_explicit_euler_and_passes_symplectic_euler():
    law = library.energy(energy, tolerance=0.15, reference=0.5)
    explicit, symplectic = oscillator(False), oscillator(True)
    assert float(energy(explicit[-1])) == pytest.approx(0.5 * 1.01**1000, rel=1e-10)
    assert not bool(law.holds(explicit[:-1], None, explicit[1:]).all())
    assert bool(law.holds(symplectic[:-1], None, symplectic[1:]).all())


@pytest.mark.parametrize(
    "law",
    [
        library.unit_circle(0, 1),
        library.limits(2, -1.0, 1.0),
        library.positivity((0, 3)),
        library.total((0, 1, 2), 1.0, tolerance=0.01),
        library.fixed((1,), tolerance=0.0),
        library.kinematics(0, 1, 0.1, tolerance=0.01),
        library.angle_kinematics(0, 1, 2, 0.05, tolerance=0.01),
    ],
    ids=lambda law: law.name,
)
def test_a_projection_obeys_its_law_and_is_idempotent(law):
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(200, 4, generator=generator), 3 * torch.randn(200, 4, generator=generator)
    once = project([law], before, None, after)
    assert not bool(law.holds(before, None, after).all())
    assert float(law.severity(before, None, once).max()) <= 1e-5
    assert torch.equal(project([law], before, None, once), once)


def test_the_zero_vector_projects_to_the_circle():
    assert project([library.unit_circle(0, 1)], None, None, torch.zeros(1, 2)).tolist() == [[1.0, 0.0]]


def test_contact_symmetry_and_conservation():
    above = library.contact(lambda z: z[..., 0], tolerance=0.001)
    assert above.holds(None, None, torch.tensor([[0.0], [-0.0005], [-0.1]])).tolist() == [True, True, False]
    odd = library.symmetry(lambda z, a: z**3 + a, lambda z: -z, lambda a: -a, tolerance=1e-6)
    before, action = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert bool(odd.holds(before, action, before**3 + action))
    lopsided = library.symmetry(lambda z, a: z**2 + a, lambda z: -z, lambda a: -a, tolerance=1e-6)
    assert not bool(lopsided.holds(before, action, before**2 + action))
    mass = library.conservation(lambda z: z.sum(-1), source=lambda b, a, c: a[..., 0], tolerance=1e-6)
    assert mass.holds(torch.ones(1, 2), torch.ones(1, 1), torch.tensor([[1.0, 2.0]])).tolist() == [True]


def test_a_nan_breaks_every_law():
    assert not bool(library.limits(0, -1, 1).holds(None, None, torch.tensor([[float("nan")]])))


@pytest.mark.parametrize(
    "name",
    ["physical/Pendulum-v1", "physical/CartPole-v1", "physical/Reacher-v5", "scientific/sir", "scientific/enzyme"],
)
def test_no_law_objects_to_the_engine(name):
    world = make(name)
    found = Transitions.from_episodes(world, episodes(world, steps=400, seed=5))
    for law in world.laws:
        assert bool(law.holds(found.before, found.actions, found.after).all()), law.name


def test_calibration_takes_the_tolerance_from_the_engine():
    law = library.limits(0, -1.0, 1.0)
    after = torch.tensor([[0.0], [1.25], [-1.1]])
    tuned = calibrate(law, (after, None, after))
    assert tuned.tolerance == pytest.approx(0.25 * 1.05)
    assert bool(tuned.holds(after, None, after).all())


class TestContracts:
    def test_schema(self):
        law = contracts.schema([(0, 3), (0, 1)])
        assert bool(law.holds(None, 0, (3, 1)))
        for wrong in ((4, 0), (0,), [0, 0], (0, 1.0), (True, 0)):
            assert not bool(law.holds(None, 0, wrong)), wrong

    def test_stage_graph_conserved_sum_idempotence(self):
        stages = contracts.stage_graph(0, {0: (1,), 1: (2, 0)})
        assert [bool(stages.holds((a,), 0, (b,))) for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 1))] == [
            True,
            True,
            False,
            False,
            True,
        ]
        kept = contracts.conserved_sum({0: 1, 1: 2})
        assert bool(kept.holds((4, 0), 0, (2, 1)))
        assert not bool(kept.holds((4, 0), 0, (3, 1)))
        put = contracts.idempotence([0], lambda state, action: (state[0] + 1,) if action else (5,))
        assert bool(put.holds((0,), 0, (5,)))
        assert not bool(contracts.idempotence([1], lambda state, action: (state[0] + 1,)).holds((0,), 1, (1,)))

    def test_zero_sum_and_individual_rationality(self):
        assert not bool(contracts.zero_sum(lambda s: s).holds(None, 0, (1.0, -2.0)))
        rational = contracts.individual_rationality(lambda value, bid: value - bid)
        assert bool(rational.holds(5, 4, None))
        assert not bool(rational.holds(5, 6, None))


class TestUnits:
    UNITS = {"m": "kg", "v": "m/s", "k": "N/m", "x": "m"}  # noqa: RUF012

    def test_terms_that_match(self):
        assert check_dimensions("0.5*m*v**2 + 0.5*k*x**2", self.UNITS, "joule")

    @pytest.mark.parametrize(("expression", "expected"), [("m*v**2 + k*x", None), ("m*v", "joule")])
    def test_wrong_units_are_refused_at_definition(self, expression, expected):
        with pytest.raises(DimensionalityError, match="units"):
            check_dimensions(expression, self.UNITS, expected)

    def test_a_law_with_units(self):
        with pytest.raises(DimensionalityError):
            conserved_expression("x + v", ["x", "v"], tolerance=0.1, units=self.UNITS)


class TestFiles:
    def test_laws_from_yaml_by_column_name(self, tmp_path):
        path = tmp_path / "laws.yaml"
        path.write_text(
            "laws:\n- {kind: limits, column: speed, low: -8, high: 8, name: speed limit}\n"
            "- {kind: conservation, expression: 'position**2 + speed**2', tolerance: 0.01}\n"
        )
        limit, kept = read_laws(path, ("position", "speed"))
        assert limit.holds(None, None, torch.tensor([[0.0, 9.0], [0.0, 7.0]])).tolist() == [False, True]
        assert kept.holds(torch.tensor([[3.0, 4.0]]), None, torch.tensor([[5.0, 0.0]])).tolist() == [True]

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("laws: [{kind: limit, column: 0, low: 0, high: 1}]", "limits"),
            ("laws: [{kind: limits, colum: 0, low: 0, high: 1}]", "column"),
            ("laws: [{kind: limits, column: speeed, low: 0, high: 1}]", "speeed"),
            ("laws: [{kind: conservation, expression: '__import__(1)', tolerance: 1}]", "understood"),
            ("laws: [{kind: conservation, expression: 'zz', tolerance: 1}]", "zz"),
            ("law: []", "laws"),
            ("laws: [{kind: limits, column: 0, low: 2, high: 1}]", "low"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, text, word):
        path = tmp_path / "laws.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=word):
            read_laws(path, ("speed",))


def rows(law, before, after):
    return law.holds(before, None, after).tolist()


class TestLawsOfUsers:
    STATE = torch.zeros(4, 2)

    def test_a_law_that_raises_is_named_with_what_it_raised(self):
        for plain, state in ((False, self.STATE), (True, (0, 0))):
            law = Law("typo", lambda before, action, after: {}["speed"], plain=plain)
            with pytest.raises(UserCodeError, match=r"law 'typo' raised KeyError.*test_laws\.py"):
                law.excess(state, None, state)

    @pytest.mark.parametrize("severity", [lambda b, a, c: c.sum(), lambda b, a, c: 0.0, lambda b, a, c: c])
    def test_a_severity_is_one_number_per_transition(self, severity):
        with pytest.raises(ConfigError, match=r"'flat'.*\(4,\)"):
            Law("flat", severity).excess(self.STATE, None, self.STATE)

    def test_a_projection_keeps_the_shape(self):
        law = Law("short", lambda b, a, c: c[..., 0], projection=lambda b, a, c: c[..., :1])
        with pytest.raises(ConfigError, match=r"'short'.*\(4, 1\)"):
            project([law], self.STATE, None, self.STATE)

    @pytest.mark.parametrize("name", ["", "  ", None, 3])
    def test_a_law_has_a_name(self, name):
        with pytest.raises(ConfigError, match="name"):
            Law(name, lambda b, a, c: 0.0)

    @pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "1"])
    def test_and_a_tolerance_that_is_a_number(self, tolerance):
        with pytest.raises(ConfigError, match="tolerance of law"):
            Law("n", lambda b, a, c: 0.0, tolerance)

    def test_lists_of_laws_are_checked_for_the_world(self):
        limit, stages = library.limits(0, 0, 1), contracts.stage_graph(0, {})
        with pytest.raises(ConfigError, match="two laws are named"):
            checked_laws([limit, limit])
        with pytest.raises(ConfigError, match="rows of numbers"):
            checked_laws([stages, limit], plain=True)
        with pytest.raises(ConfigError, match="plain states"):
            checked_laws([stages], plain=False)
        with pytest.raises(ConfigError, match="function"):
            checked_laws([lambda b, a, c: 0.0])
        with pytest.raises(ConfigError, match="a list"):
            checked_laws(limit)


class TestMoreFiles:
    def read(self, tmp_path, text, columns=("speed", "stage")):
        path = tmp_path / "laws.yaml"
        path.write_text(text)
        return read_laws(path, columns)

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("laws: [5]", "mapping"),
            ("laws: [limits]", "mapping"),
            ("laws: [{kind: stage_graph, field: stage, edges: [1, 2]}]", "edges"),
            ("laws: [{kind: schema, ranges: [0, 1]}]", "ranges"),
            ("laws: [{kind: schema, ranges: 3}]", "ranges"),
            ("laws: [{kind: conserved_sum, weights: {money: 1}}]", "money"),
            ("laws: [{kind: conserved_sum, weights: {speed: much}}]", "weight"),
            ("laws: [{kind: limits, column: 7, low: 0, high: 1}]", "column 7"),
            ("laws: [{kind: limits, column: -1, low: 0, high: 1}]", "column -1"),
            ("laws: [{kind: limits, column: 0, low: a, high: 1}]", "limits"),
            ("laws: [{kind: positivity, columns: speed}]", "columns"),
            ("laws: [{kind: conservation, expression: 3, tolerance: 1}]", "expression"),
            ("laws: [{kind: conservation, expression: speed}]", "tolerance"),
            ("laws: [{kind: conservation, expression: speed, units: {stage: m}, tolerance: 1}]", "speed"),
            ("laws: [{kind: conservation, expression: exp(speed), units: {speed: m}, tolerance: 1}]", "units"),
            ("laws: [{kind: conservation, expression: speed, units: {speed: 5}, tolerance: 1}]", "units"),
            ("laws: [{kind: limits, column: 0, low: 0, high: 1, name: a}, {kind: limits, column: 1, low: 0, high: 1, name: a}]",
             "two laws"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named(self, tmp_path, text, word):
        with pytest.raises(ConfigError, match=word):
            self.read(tmp_path, text)

    def test_contracts_by_field_name(self, tmp_path):
        stages, kept = self.read(
            tmp_path,
            "laws:\n- {kind: stage_graph, field: stage, edges: {0: [1]}}\n"
            "- {kind: conserved_sum, weights: {speed: 1, stage: 2}}\n",
        )
        assert bool(stages.holds((0, 0), 0, (0, 1)))
        assert not bool(stages.holds((0, 1), 0, (0, 0)))
        assert bool(kept.holds((4, 0), 0, (2, 1)))

    def test_contact_from_an_expression(self, tmp_path):
        (law,) = self.read(tmp_path, "laws: [{kind: contact, expression: 'speed - 1', tolerance: 0.1}]")
        assert rows(law, None, torch.tensor([[1.0, 0.0], [0.95, 0.0], [0.5, 0.0]])) == [True, True, False]
