"""Parse a ``.gguf`` file once, however often Transformers asks for it.

Its header is parsed in Python by the ``gguf`` package, seconds for a large vocabulary, and Transformers does it anew for the
configuration, the weights and the tokenizer; the package's table of names it makes once a module. Inside :func:`parsed_once` both
remember what they gave. Nothing is kept outside of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_loading = threading.RLock()
_depth = 0


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Have the ``gguf`` package remember what it parses until the outermost block ends. Threads that load wait for each other."""
    global _depth
    with _loading:
        try:
            gguf = importlib.import_module("gguf")
        except ImportError:  # whoever needs it says what to install
            yield
            return
        own = gguf.GGUFReader, gguf.get_tensor_name_map
        if _depth == 0:
            gguf.GGUFReader, gguf.get_tensor_name_map = _remembered(own[0]), functools.lru_cache(maxsize=8)(own[1])
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            gguf.GGUFReader, gguf.get_tensor_name_map = own


def _remembered(reader: Any) -> Any:
    """``reader``, which parses a file that has not changed once."""
    # A mapped file's slices cost three times what a plain array's do, and there are several for each token.
    plain = property(lambda self: self._bytes, lambda self, given: setattr(self, "_bytes", np.asarray(given)))
    kind = type("PlainReader", (reader,), {"data": plain})
    known: dict[Any, Any] = {}

    def parse(path: Any, mode: str = "r") -> Any:
        found = Path(path).stat()
        key = str(path), mode, found.st_size, found.st_mtime_ns
        if key not in known:
            known[key] = kind(path, mode)
        return known[key]

    return parse
