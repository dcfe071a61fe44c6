"""One thread for all tests, and the tiers: what is marked neither ``long`` nor ``slow`` is ``fast``.

The machine may be shared, and tiny models gain nothing from more threads.
"""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long") is None and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)
