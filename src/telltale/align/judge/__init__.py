"""A judge with named objectives, a gate that weighs them by the prompt, and a score that adds up (arXiv 2406.12845).

Importing this package registers the judge with Transformers' Auto classes; everything else is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import telltale.align.judge.model  # noqa: F401

if TYPE_CHECKING:
    from telltale.align.judge.auditing import audit
    from telltale.align.judge.benchmarks import evaluate as evaluate
    from telltale.align.judge.decorrelation import decorrelate as decorrelate
    from telltale.align.judge.fitting import fit
    from telltale.align.judge.judge import Judge as Judge
    from telltale.align.judge.ridge import fit_ridge as fit_ridge

_MODULES = {
    "Judge": "judge",
    "audit": "auditing",
    "decorrelate": "decorrelation",
    "evaluate": "benchmarks",
    "fit": "fitting",
    "fit_ridge": "ridge",
}

__all__ = ["Judge", "audit", "decorrelate", "evaluate", "fit", "fit_ridge"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"telltale.align.judge.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'telltale.align.judge' has no attribute {name!r}")
