import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from telltale.errors import ConfigError, DataError
from telltale.signals.sharpness_dimension import dimension_over_checkpoints, sharpness_dimension


def member(*exponents):
    values = torch.tensor(exponents, dtype=torch.float64)
    return values, torch.ones_like(values)


def test_the_largest_exponent_of_each_rank_by_hand():
    points = [[member(1.0, -2.0, -8.0)], [member(0.5, -1.0, -6.0)]]
    # Ranks: 1, -1, -6 against .75, -1.5, -7.
    assert dimension_over_checkpoints(points) == pytest.approx(2.0)
    assert dimension_over_checkpoints(points, over="mean") == pytest.approx(1 + 0.75 / 1.5)


def test_the_aggregates_differ_where_minibatches_do():
    """E over minibatches of the supremum over points, or the supremum over points of the pooled minibatches."""
    points = [[member(1.0, -4.0), member(3.0, -4.0)], [member(2.0, -6.0), member(1.0, -6.0)]]
    # By rank: sup (2, -4) and (3, -4), mean (2.5, -4). Pooled: (3, 1, -4, -4) / 2 against (2, 1, -6, -6) / 2.
    assert dimension_over_checkpoints(points, aggregate="rank") == pytest.approx(1 + 2.5 / 4)
    assert dimension_over_checkpoints(points) == pytest.approx(1 + (1.5 + 0.5) / 4)


FLOATS = st.floats(-3, 3, allow_nan=False).map(lambda value: round(value, 3))
POINTS = st.lists(st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=2, max_size=2), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(POINTS, st.sampled_from(["mixture", "rank"]))
def test_the_supremum_is_above_every_point_and_one_point_is_itself(points, aggregate):
    points = [[member(*minibatch) for minibatch in point] for point in points]
    alone = [sharpness_dimension([v for v, _ in point], [m for _, m in point], aggregate=aggregate) for point in points]
    assert dimension_over_checkpoints(points, aggregate=aggregate) >= max(alone) - 1e-9
    for over in ("sup", "mean"):
        assert dimension_over_checkpoints(points[:1] * 3, over=over, aggregate=aggregate) == pytest.approx(alone[0])


def test_bad_points_are_refused():
    with pytest.raises(DataError, match="at least one point"):
        dimension_over_checkpoints([])
    with pytest.raises(DataError, match=r"\[1, 2\] minibatches"):
        dimension_over_checkpoints([[member(1.0)], [member(1.0), member(1.0)]])
    with pytest.raises(DataError, match="total mass"):
        dimension_over_checkpoints([[member(1.0)], [member(1.0, 2.0)]])
    with pytest.raises(ConfigError, match="over='max'"):
        dimension_over_checkpoints([[member(1.0)]], over="max")
    assert dimension_over_checkpoints([[member(0.5, -math.inf)]]) == 1.0
