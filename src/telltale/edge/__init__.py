"""SAGE (arXiv 2604.19623): the best evidence that fits into the uplink, on a real wire, never worse than staying at the edge.

Selection, wire and budget run without PyTorch; names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "select": "selection",
    "selectors": "selection",
    "register_selector": "selection",
    "encode_indices": "index_coding",
    "decode_indices": "index_coding",
    "register_codec": "codecs",
    "codec_names": "codecs",
    "Frame": "wire",
    "pack": "budget",
    "ByteBudget": "budget",
    "BudgetTooSmall": "budget",
    "Gate": "gate",
    "Arbiter": "arbitration",
    "fit_arbiter": "arbitration",
    "EdgeClient": "client",
    "CloudServer": "server",
    "LinkProxy": "link",
    "audit_importances": "audit",
    "sweep_budgets": "sweep",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'telltale.edge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"telltale.edge.{_HOMES[name]}"), name)
