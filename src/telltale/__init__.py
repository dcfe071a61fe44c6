"""telltale reads the signals a model gives off anyway and acts on them.

``telltale.load`` opens a local Hugging Face checkpoint; the wings (``telltale.train``, ``telltale.decode``)
are imported on first use, so that ``import telltale`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from telltale.models.loading import load as load

_PACKAGES = ("decode", "edge", "errors", "models", "runs", "signals", "tasks", "train")

__all__ = ["__version__", "load", *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name == "load":
        from telltale.models.loading import load

        return load
    if name in _PACKAGES:
        return importlib.import_module(f"telltale.{name}")
    raise AttributeError(f"module 'telltale' has no attribute {name!r}")
