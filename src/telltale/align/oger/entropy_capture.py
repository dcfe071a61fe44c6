"""Entropies of the distributions that rollouts are sampled from, read where the logits already are."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from telltale.align.oger.reward import token_entropies


class EntropyCapture:
    """Inside the block, notes the entropy [nats] of each next-token distribution that ``model`` computes while it generates.

    It is the model's own distribution at the sampling ``temperature``, before top-k, top-p and penalties: what TRL's entropy metric
    is too. Nothing the model returns is changed and no random number is drawn.
    """

    def __init__(self, model: Any, *, temperature: float) -> None:
        self.model, self.temperature = model, temperature
        self._steps: list[torch.Tensor] = []
        self._handle: Any = None

    def __enter__(self) -> EntropyCapture:
        self._handle = self.model.register_forward_hook(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def entropies(self, rows: int, width: int) -> torch.Tensor | None:
        """(rows, width) of the generated tokens, on the CPU; None if generation did not go one token a forward pass."""
        if width == 0 or len(self._steps) != width or any(len(step) != rows for step in self._steps):
            return None
        return torch.stack(self._steps, dim=1).cpu()

    def _note(self, module: Any, arguments: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None:
            self._steps.append(token_entropies(logits[:, -1], temperature=self.temperature))
