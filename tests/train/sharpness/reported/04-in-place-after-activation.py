# fmt: off
# ruff: noqa
# Models that train fine in PyTorch, but whose probe crashes with PyTorch's own RuntimeError (kept forms are views / narrower).
import sys, torch, warnings
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import Probe
warnings.simplefilter("ignore")
x, y = torch.randn(8, 6), torch.arange(8) % 4
class Net(nn.Module):
    def __init__(self, f): super().__init__(); self.a, self.b, self.f = nn.Linear(6, 6), nn.Linear(6, 4), f
    def forward(self, x): return self.b(self.f(self, x))
def residual(s, x): h = F.gelu(s.a(x)); h += x; return h
def gate(s, x): h = F.silu(s.a(x)); h *= x; return h
def scale(s, x): return nn.GELU()(s.a(x)).mul_(1.7)
def rowbias(s, x): return F.linear(x, s.a.weight, s.a.bias[None]).tanh()
def sparse(s, x): return F.embedding((x[:, 0] > 0).long(), s.a.weight, sparse=True)
bad = []
for f in (residual, gate, scale, rowbias, sparse):
    m = Net(f)
    F.cross_entropy(m(x), y).backward()  # trains
    try: op = Probe(m, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)]).operator(); op.matvec(torch.ones(op.size))
    except Exception as error:
        if not type(error).__module__.startswith("telltale"): bad.append(f"{f.__name__}: {type(error).__name__}: {str(error)[:60]}")
print("crash: " + "; ".join(bad) if bad else "all measured or refused"); sys.exit(bool(bad))
