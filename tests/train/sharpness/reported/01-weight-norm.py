# fmt: off
# ruff: noqa
# Hessian of a weight-normalised layer against finite differences of the plain gradient (fp64).
import sys, torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from telltale.train.sharpness import Probe
torch.set_default_dtype(torch.float64); torch.manual_seed(0)
x, t = torch.randn(9, 6), torch.randn(9, 6)
model = weight_norm(nn.Linear(6, 6))
def loss(m, b): return (m(b[0]).tanh() - b[1]).pow(2).mean()
ps = list(model.parameters()); n = sum(p.numel() for p in ps)
def grad(): return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(model, (x, t)), ps)])
def at(v, s):
    k = 0
    with torch.no_grad():
        for p in ps: p.add_(s * v[k:k + p.numel()].view_as(p)); k += p.numel()
    return grad()
columns = []
for e in torch.eye(n):
    up = at(e, 1e-5); down = at(e, -2e-5); at(e, 1e-5)
    columns.append((up - down) / 2e-5)
true = torch.stack(columns, 1)
try:
    op = Probe(model, loss, [(x, t)]).operator()
    got = torch.stack([op.matvec(e) for e in torch.eye(n)], 1)
except Exception as error:
    ok = type(error).__module__.startswith("telltale"); print(f"refused clearly: {ok} ({type(error).__name__})"); sys.exit(not ok)
err = ((got - true).norm() / true.norm()).item()
lam = (torch.linalg.eigvalsh((true + true.T) / 2).max().item(), torch.linalg.eigvalsh((got + got.T) / 2).max().item())
print(f"relative error of H {err:.2e}; |H - H^T| {(got - got.T).abs().max().item():.1e}; lambda_max true {lam[0]:.4f}, telltale {lam[1]:.4f}")
sys.exit(err > 1e-6)
