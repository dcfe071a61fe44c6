# fmt: off
# ruff: noqa
# Custom autograd functions whose backward hides curvature (no once_differentiable mark): six ways people write them.
import sys, torch
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import Probe
torch.set_default_dtype(torch.float64)
A = torch.autograd.Function
class SavedDerivative(A):
    @staticmethod
    def forward(c, x): c.save_for_backward(3 * x * x); return x ** 3
    @staticmethod
    def backward(c, g): return g * c.saved_tensors[0]
class NoGrad(A):
    @staticmethod
    def forward(c, x): c.save_for_backward(x); return x ** 3
    @staticmethod
    def backward(c, g):
        with torch.no_grad(): return g * 3 * c.saved_tensors[0] ** 2
class Replay(A):
    @staticmethod
    def forward(c, x): c.save_for_backward(x); return x ** 3
    @staticmethod
    def backward(c, g):
        x = c.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(): y = x ** 3
        return torch.autograd.grad(y, x, g)[0]
class Numpy(A):
    @staticmethod
    def forward(c, x): c.save_for_backward(x); return x ** 3
    @staticmethod
    def backward(c, g): return torch.from_numpy(g.detach().numpy() * 3 * c.saved_tensors[0].detach().numpy() ** 2)
x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
def run(f):
    torch.manual_seed(1)
    m = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    loss = lambda m, b: F.cross_entropy(m[1](f(m[0](b[0]))), b[1])
    op = Probe(m, loss, [(x, y)]).operator()
    return torch.stack([op.matvec(e) for e in torch.eye(op.size)], 1)
true, bad = run(lambda z: z ** 3), []
for f in (SavedDerivative, NoGrad, Replay, Numpy):
    try: H = run(f.apply)
    except Exception as error:
        if not type(error).__module__.startswith("telltale"): bad.append(f"{f.__name__}: {type(error).__name__}")
        continue
    e = ((H - true).norm() / true.norm()).item()
    if e > 1e-6: bad.append(f"{f.__name__}: rel. error {e:.2f}, asymmetry {(H - H.T).abs().max().item():.1e}")
print("silent wrong: " + "; ".join(bad) if bad else "all right or refused"); sys.exit(bool(bad))
