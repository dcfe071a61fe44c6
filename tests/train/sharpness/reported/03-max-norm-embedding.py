# fmt: off
# ruff: noqa
# Promise: weights bit-equal with and without a monitor. A forward that renormalises weights in place breaks it.
import sys, torch
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import SharpnessMonitor
def train(watch):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Embedding(50, 8, max_norm=1.0), nn.Flatten(), nn.Linear(8 * 4, 3))
    opt = torch.optim.SGD(m.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(1)
    probe = (torch.randint(25, 50, (6, 4), generator=g), torch.randint(3, (6,), generator=g))
    before = m[0].weight.detach().clone()
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    if watch: mon = SharpnessMonitor(m, loss, [probe], optimizer=opt, every=1, budget=1.0)
    changed = int((before != m[0].weight).any(1).sum())
    for _ in range(30):
        b = (torch.randint(50, (6, 4), generator=g), torch.randint(3, (6,), generator=g))
        opt.zero_grad(); loss(m, b).backward(); opt.step()
        if watch: mon.step()
    return [p.detach().clone() for p in m.parameters()], changed
(a, _), (b, changed) = train(False), train(True)
d = max((p - q).abs().max().item() for p, q in zip(a, b))
print(f"rows of the embedding changed by building the monitor: {changed}; weights after 30 steps differ by {d:.2e}")
sys.exit(d > 0 or changed > 0)
