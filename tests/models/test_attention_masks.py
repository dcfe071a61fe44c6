"""Masks from positions against the definition, slot by slot."""

from __future__ import annotations

import pytest
import torch

from telltale.models.attention import is_whole_prompt, visible_slots

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("positions", [[0], [7], [4, 0, 9]])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_each_token_sees_itself_and_its_past_within_the_window(positions, width, window):
    mask, length = visible_slots(positions, width, window=window, device=CPU)
    assert length == max(positions) + width
    wanted = torch.zeros(len(positions), 1, width, length, dtype=torch.bool)
    for row, first in enumerate(positions):
        for column in range(width):
            place = first + column
            for slot in range(length):
                wanted[row, 0, column, slot] = slot <= place and (window is None or place - slot < window)
    given = torch.ones_like(wanted) if mask is None else mask
    assert torch.equal(given, wanted)


def test_one_token_within_its_window_needs_no_mask():
    assert visible_slots([6], 1, window=None, device=CPU)[0] is None
    assert visible_slots([6], 1, window=7, device=CPU)[0] is None
    assert visible_slots([6], 1, window=6, device=CPU)[0] is not None
    assert visible_slots([6, 6], 1, window=None, device=CPU)[0] is None
    assert visible_slots([6, 5], 1, window=None, device=CPU)[0] is not None


def test_a_whole_prompt_is_recognised():
    assert is_whole_prompt([0, 0], 4, 4, None)
    assert is_whole_prompt([0], 4, 4, 4)
    assert not is_whole_prompt([0], 4, 4, 3)
    assert not is_whole_prompt([1], 5, 4, None)
    assert not is_whole_prompt([0, 2], 6, 4, None)
