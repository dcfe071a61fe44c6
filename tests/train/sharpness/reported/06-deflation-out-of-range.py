# fmt: off
# ruff: noqa
# SD lies in [0, N] by definition; with deflation (the balance atom has negative mass) it leaves that range.
import sys, torch
from telltale.signals.spectrum import slq
from telltale.signals.hessian import MatrixOperator
from telltale.signals.sharpness_dimension import dimension_of, gradient_descent, interval
torch.manual_seed(0); N = 200
def ops(ev):
    out = []
    for _ in range(3):
        Q = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]; H = Q @ torch.diag(ev) @ Q.T; out.append(MatrixOperator((H + H.T) / 2))
    return out
f, bad = gradient_descent(0.9), []
for name, ev, agg, true in (("all expanding", -torch.linspace(.1, 9, N, dtype=torch.float64), "rank", 200.0), ("all contracting", torch.linspace(.2, 1.5, N, dtype=torch.float64), "mixture", 0.0)):
    s = slq(ops(ev), runs=6, steps=20, seed=1, deflation=60)
    d, i = dimension_of(s, f, aggregate=agg), interval(s, f, aggregate=agg)
    if not (0 <= i[0] <= i[1] <= N and 0 <= d <= N and abs(d - true) < 1): bad.append(f"{name} ({agg}): true {true}, got {d:.2f}, interval ({i[0]:.2f}, {i[1]:.2f}) of N={N}")
print("; ".join(bad) or "inside [0, N]"); sys.exit(bool(bad))
