# fmt: off
# ruff: noqa
# monitor.step() / measure() called inside the loop's own `with torch.autocast(...)`: products are not covered by the promised float32.
import sys, torch
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import SharpnessMonitor, measure
torch.manual_seed(0)
x, y = torch.randn(64, 12), torch.arange(64) % 4
class Einsum(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Parameter(torch.randn(12, 16) * .4); self.b = nn.Parameter(torch.randn(16, 4) * .4)
    def forward(self, x): return (x @ self.a).tanh() @ self.b
loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
bad = []
for name, m in (("nn.Linear", nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4))), ("matmul", Einsum())):
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    ref = SharpnessMonitor(m, loss, [(x, y)], optimizer=opt, budget=1.).check().lambda_max
    sd = measure(m, loss, [(x, y)], rate=.5, exact=True).controls
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mon = SharpnessMonitor(m, loss, [(x, y)], optimizer=opt, budget=1.)
            got = mon.check().lambda_max
            sd2 = measure(m, loss, [(x, y)], rate=.5, exact=True).controls
        e = abs(got - ref) / ref; n = abs(sd2["null_space"] - sd["null_space"]); t = abs(sd2["trace"] / sd["trace"] - 1)
        if max(e, t) > 1e-5 or n: bad.append(f"{name}: lambda_max off by {e:.1e}, trace off by {t:.1e}, null space {sd['null_space']:.0f} -> {sd2['null_space']:.0f}")
    except Exception as error:
        if not type(error).__module__.startswith("telltale"): bad.append(f"{name}: {type(error).__name__}: {str(error)[:70]}")
print("; ".join(bad) or "same inside and outside autocast"); sys.exit(bool(bad))
