# fmt: off
# ruff: noqa
# Own simulation: a population of minibatch Hessians; how often does the nominal 95% interval hold the population's SD?
import sys, torch
from telltale.signals.hessian import MatrixOperator
from telltale.signals.spectrum import slq, dense, joined
from telltale.signals.sharpness_dimension import dimension_of, gradient_descent, interval
torch.set_default_dtype(torch.float64); torch.set_num_threads(1)
N, K, f = 80, 32, gradient_descent(0.9)  # 60% null mass
g = torch.Generator().manual_seed(5)
def hessian():
    J = torch.randn(N, K, generator=g) * torch.logspace(0, -2.5, K); s = torch.where(torch.rand(K, generator=g) < .85, 1., -.3)
    return MatrixOperator((J * s) @ J.T / N * .7)
pool = [hessian() for _ in range(200)]
truth = dimension_of(joined([dense(h) for h in pool]), f)
out, bad = [], False
for b, reps in ((2, 80), (4, 80), (10, 50)):
    hit = 0
    for r in range(reps):
        picked = [pool[i] for i in torch.randperm(200, generator=g)[:b]]
        low, high = interval(slq(picked, runs=30, steps=25, seed=r), f, seed=r, resamples=200); hit += low - 1e-6 <= truth <= high + 1e-6
    out.append(f"{b} minibatches {hit / reps:.0%}"); bad |= hit / reps < .85
print("coverage of the 95% interval (30 probes x 25 steps): " + ", ".join(out) + "; the command's default is 4"); sys.exit(bad)
