"""What has a known answer: the dimension of known spectra, both aggregates, the Henon map, Lanczos moments, exact products.

Each row of the result is a check: what was found, what is known, the difference and what it may be at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from measurement import write_result
from telltale.signals.hessian import HessianOperator, MatrixOperator, materialise
from telltale.signals.lanczos import lanczos
from telltale.signals.sharpness_dimension import log_moduli, sharpness_dimension
from telltale.signals.spectrum import dense, slq

HENON = {1: 1.3773, 2: 1.3399, 4: 1.3011, 8: 1.2806, 16: 1.2696, 32: 1.2637, 64: 1.2608}
"""Dimension from m-step exponents of the Henon map (1.4, 0.3), falling to Kaplan-Yorke's 1.2590."""


class Checks:
    """Collects rows; a row fails if the difference is above its tolerance."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | str | bool]] = []

    def add(self, name: str, found: float, known: float, tolerance: float) -> None:
        error = abs(found - known)
        passed = error <= tolerance
        self.rows.append(
            {"check": name, "found": found, "known": known, "error": error, "tolerance": tolerance, "passed": passed}
        )
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {found:.10g} (known {known:.10g}, error {error:.2e})")


def known_spectra(checks: Checks) -> None:
    for name, exponents, known in (
        ("contracting", (-1.0, -2.0), 0.0),
        ("interior", (1.0, 1.0, -1.0, -4.0), 3.25),
        ("null directions count one each", (2.0, 0.0, 0.0, -1.0, -0.5, -3.0), 5 + 0.5 / 3),
        ("expanding as a whole", (1.0, 0.5, -1.0), 3.0),
        ("baker's map of ratio 1/3", (math.log(2), -math.log(3)), 1 + math.log(2) / math.log(3)),
    ):
        checks.add(
            f"dimension, {name}", sharpness_dimension(torch.tensor(exponents, dtype=torch.float64)), known, 1e-12
        )
    members = [torch.tensor(values, dtype=torch.float64) for values in ((2.0, -1.0, -1.0), (-1.0, -2.0, -3.0))]
    checks.add("aggregate, rank", sharpness_dimension(members, aggregate="rank"), 4 / 3, 1e-12)
    checks.add("aggregate, mixture", sharpness_dimension(members, aggregate="mixture"), 1.5, 1e-12)


def clamp(checks: Checks) -> None:
    values = torch.cat([torch.zeros(900), torch.linspace(-0.02, 0.4, 500), torch.tensor([3.0, 10, 20.5])]).double()
    known = sharpness_dimension(log_moduli(values, rate=0.1, floor=0.0))
    for floor in (1e-12, 1e-8):
        found = sharpness_dimension(log_moduli(values, rate=0.1, floor=floor))
        checks.add(f"clamp from below at {floor:g} moves nothing", found, known, 1e-9)


def henon(checks: Checks, points: int = 256_000) -> None:
    x, y = 0.1, 0.1
    found = []
    for step in range(points + 200):
        if step >= 200:
            found.append([[-2.8 * x, 1.0], [0.3, 0.0]])
        x, y = 1 - 1.4 * x * x + y, 0.3 * x
    jacobians = torch.tensor(found, dtype=torch.float64)
    for length, known in HENON.items():
        checks.add(f"Henon map, m={length}", sharpness_dimension(block_exponents(jacobians, length)), known, 0.005)
    exponents = block_exponents(jacobians, 4000)
    checks.add("Henon map, first exponent", float(exponents[0]), 0.4209, 0.005)
    checks.add("Henon map, second exponent", float(exponents[1]), -1.6248, 0.005)
    checks.add("Henon map, Kaplan-Yorke", sharpness_dimension(exponents), 1.2590, 0.005)


def block_exponents(jacobians: Tensor, length: int) -> Tensor:
    """Mean ln singular values per step of products of ``length`` Jacobians; the second from the determinant."""
    count = len(jacobians) // length
    products = torch.eye(2, dtype=torch.float64).expand(count, 2, 2)
    scale = torch.zeros(count, dtype=torch.float64)
    for offset in range(length):
        products = jacobians[offset : count * length : length] @ products
        norm = products.flatten(1).norm(dim=1)
        products, scale = products / norm[:, None, None], scale + norm.log()
    first = float((torch.linalg.matrix_norm(products, 2).log() + scale).mean()) / length
    return torch.tensor([first, math.log(0.3) - first], dtype=torch.float64)


def moments(checks: Checks) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 60, dtype=torch.float64, generator=generator)
    matrix = (matrix + matrix.T) / 20
    start = torch.randn(60, dtype=torch.float64, generator=generator)
    run, unit = lanczos(MatrixOperator(matrix), start, 8), start / start.norm()
    checks.add("Lanczos weights sum", float(run.weights.sum()), 1.0, 1e-12)
    power, error = unit, 0.0
    for degree in range(16):
        error = max(error, abs(float(run.weights @ run.nodes**degree) - float(unit @ power)))
        power = matrix @ power
    checks.add("Lanczos moments 0 to 2m-1, worst", error, 0.0, 1e-12)
    values = torch.tensor([-1.0, -1, 0, 0, 2, 2, 5, 9], dtype=torch.float64)
    stopped = lanczos(MatrixOperator(torch.diag(values)), torch.ones(8, dtype=torch.float64), 8)
    checks.add("nodes at breakdown = distinct eigenvalues", float(len(stopped.nodes)), 5.0, 0.0)
    spectrum = slq([MatrixOperator(torch.diag(values))], runs=1, steps=3, seed=0)
    checks.add("trace of a diagonal from one probe", spectrum.trace()[0], float(values.sum()), 1e-11)


def products(checks: Checks) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5)).double()
    inputs, targets = torch.randn(30, 9, dtype=torch.float64), torch.randint(0, 5, (30,))
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, parameters, inputs), targets)

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    reference = torch.autograd.functional.hessian(value, flat)
    operator = HessianOperator(lambda: functional.cross_entropy(model(inputs), targets), list(model.parameters()))
    found = materialise(operator)
    checks.add("product against dense column, worst entry", float((found - reference).abs().max()), 0.0, 1e-10)
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    checks.add("symmetry u'Hv - v'Hu", float(u @ operator.matvec(v) - v @ operator.matvec(u)), 0.0, 1e-12)
    repeated = float(torch.equal(operator.matvec(v), operator.matvec(v)))
    checks.add("repeated products are bit-equal", repeated, 1.0, 0.0)
    basis = lanczos(operator, v, 100).basis
    assert basis is not None
    overlap = float((basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max())
    checks.add(f"orthonormality after {len(basis)} steps, float64", overlap, 0.0, 1e-12)
    exact = dense(operator).nodes[0]
    gap = float((exact - torch.linalg.eigvalsh(reference)).abs().max())
    checks.add("dense spectrum", gap, 0.0, 1e-10)


def main() -> None:
    torch.set_num_threads(1)
    checks = Checks()
    for study in (known_spectra, clamp, henon, moments, products):
        study(checks)
    failed = [row["check"] for row in checks.rows if not row["passed"]]
    write_result("sharpness_analytic", checks=checks.rows, failed=failed)
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    main()
