"""SAGE (arXiv 2604.19623): the best evidence that fits into the uplink, on a real wire, never worse than staying at the edge.

Selection, wire and budget run without PyTorch; names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "select": "telltale.edge.selection",
    "selectors": "telltale.edge.selection",
    "register_selector": "telltale.edge.selection",
    "encode_indices": "telltale.edge.index_coding",
    "decode_indices": "telltale.edge.index_coding",
    "register_codec": "telltale.edge.codecs",
    "codec_names": "telltale.edge.codecs",
    "Frame": "telltale.edge.wire",
    "pack": "telltale.edge.budget",
    "ByteBudget": "telltale.edge.budget",
    "BudgetTooSmall": "telltale.edge.budget",
    "Gate": "telltale.edge.gate",
    "Arbiter": "telltale.edge.arbitration",
    "fit_arbiter": "telltale.edge.arbitration",
    "EdgeModel": "telltale.edge.client",
    "Policy": "telltale.edge.client",
    "edge_model": "telltale.edge.client",
    "served_model": "telltale.edge.server",
    "EdgeClient": "telltale.edge.client",
    "Profile": "telltale.edge.profile",
    "CloudServer": "telltale.edge.server",
    "LinkProxy": "telltale.edge.link",
    "audit_importances": "telltale.edge.audit",
    "sweep_budgets": "telltale.edge.sweep",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'telltale.edge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
