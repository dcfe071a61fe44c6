"""Running a live model with dropout off, and leaving it as it was found.

``model.eval()`` followed by ``model.train()`` forgets which submodules a user had put in eval mode (a frozen backbone,
say); here every flag is remembered. The model's configuration and hooks are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is in the mode it had."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
