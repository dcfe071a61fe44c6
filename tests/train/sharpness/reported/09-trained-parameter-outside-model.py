# fmt: off
# ruff: noqa
# A parameter that the optimizer trains and the loss uses, but that is not the model's (learnable temperature, ArcFace head): left out without a word.
import sys, torch, warnings
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import SharpnessMonitor
torch.manual_seed(0); x, y = torch.randn(20, 6), torch.arange(20) % 4
model = nn.Linear(6, 4); scale = nn.Parameter(torch.tensor(1.0))
opt = torch.optim.SGD([*model.parameters(), scale], lr=.1)
class Both(nn.Module):
    def __init__(self): super().__init__(); self.model, self.scale = model, scale
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try: mon = SharpnessMonitor(model, lambda m, b: F.cross_entropy(m(b[0]) * scale.exp() * 9, b[1]), [(x, y)], optimizer=opt, budget=1.)
    except Exception as e: print("refused:", e); sys.exit(0)
a = mon.check()
b = SharpnessMonitor(Both(), lambda m, b: F.cross_entropy(m.model(b[0]) * m.scale.exp() * 9, b[1]), [(x, y)], optimizer=opt, budget=1.).check()
told = bool(caught) or bool(mon.probe.excluded)
print(f"ratio without it {a.ratio:.3f}, with it {b.ratio:.3f}; told: {told}"); sys.exit(not told)
