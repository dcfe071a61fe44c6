"""One thread for all tests, one seed before each, and the tiers: what is marked neither ``long`` nor ``slow`` is ``fast``.

The machine may be shared, and tiny models gain nothing from more threads.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy
import pytest
import torch

torch.set_num_threads(1)


def seed_everything():
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


seed_everything()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures of the test, those of its module included: what a test draws without a seed of its own is
    the same in every run, so that a test which fails once fails again."""
    seed_everything()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long") is None and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)
    # Files with long tests come first, those with several ahead, so that no worker ends with one while the other waits.
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: -min(long[item.path], 3))
