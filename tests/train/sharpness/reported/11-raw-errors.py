# fmt: off
# ruff: noqa
# Bad or half-precision input that ends in PyTorch's own RuntimeError instead of a telltale message (or a number).
import sys, torch
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import Probe
x, y, bad = torch.randn(8, 6), torch.arange(8) % 4, []
cases = {
    "loss casts its input to bf16 (bf16 weights)": (nn.Linear(6, 4).bfloat16(), lambda m, b: F.cross_entropy(m(b[0].bfloat16()).float(), b[1])),
    "complex loss": (nn.Linear(6, 4), lambda m, b: torch.complex(m(b[0]).sum(), m(b[0]).sum())),
    "meta parameters": (nn.Linear(6, 4, device="meta"), lambda m, b: F.cross_entropy(m(b[0]), b[1])),
}
for name, (m, loss) in cases.items():
    try: Probe(m, loss, [(x, y)]).operator()
    except Exception as e:
        if not type(e).__module__.startswith("telltale"): bad.append(f"{name}: {type(e).__name__}: {str(e)[:60]}")
print("; ".join(bad) or "all refused or measured"); sys.exit(bool(bad))
