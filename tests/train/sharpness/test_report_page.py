"""The snippets of the how-to do what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).parents[3]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the reader of a snippet has already: a model, a loss, minibatches, an optimizer."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(120)]
    return {
        "torch": torch,
        "model": model,
        "layers": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        "loss": functional.mse_loss,
        "loss_fn": loss_fn,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "batch": batches[0],
        "batches": batches[:4],
        "probe": batches[:2],
        "data": batches,
        "minibatches": batches,
    }


@pytest.mark.long
def test_the_page_runs_from_top_to_bottom(names: dict[str, Any]) -> None:
    found = snippets("docs/sharpness/howto.md")
    assert len(found) >= 5
    for snippet in found:
        exec(compile(snippet, "docs/sharpness/howto.md", "exec"), names)
    assert len(names["watch"].readings) >= 5
    assert json.loads(Path("runs/mine/sharpness_config.json").read_text())["parameters"] == 58
    assert len(names["monitor"].readings) == len(Path("readings.csv").read_text().splitlines()) - 1 == 1
    assert list(Path("events").iterdir())
    assert Path("sharpness_dimension.html").is_file()
