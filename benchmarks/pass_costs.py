"""V(n): what a pass over n tokens costs relative to one token, per backend, dtype and size; and the bandwidth floor.

V decides whether verification is cheap. CPU time of one thread, the least of several repeats.
"""

from __future__ import annotations

from typing import Any

import torch

from autoregressive_sizes import bandwidth
from measurement import write_result
from telltale.decode.pass_costs import WIDTHS, measure_passes
from telltale.models import open_decoder
from telltale.models.presets import build


def main() -> None:
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for preset in ("tiny", "small"):
        for dtype in (torch.float32, torch.bfloat16):
            model = build(preset).to(dtype)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            for backend in ("native", "fused", "module"):
                costs = measure_passes(open_decoder(model, backend=backend), 1)
                relative = {width: costs.relative(width) for width in WIDTHS}
                runs[f"{preset} {str(dtype)[6:]} {backend}"] = {
                    "step_ms": costs.plain * 1e3,
                    "read_once_floor_ms": size / bandwidth() * 1e3,
                    "relative_cost": relative,
                }
                shown = " ".join(f"V({width})={value:.2f}" for width, value in relative.items())
                print(f"{preset} {str(dtype)[6:]} {backend}: {costs.plain * 1e3:.3f} ms  {shown}", flush=True)
    write_result("pass_costs", context=64, runs=runs)


if __name__ == "__main__":
    main()
