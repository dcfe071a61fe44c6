"""Ratings of any scale, and everything that is none."""

from __future__ import annotations

import math

import pytest
import torch

from telltale.align.judge.data import Scale, check_rated, label_matrix
from telltale.errors import ConfigError, DataError


def test_helpsteers_scale_is_the_cards() -> None:
    scale = Scale(0, 4, bins=5)
    assert [scale.to_unit(rating) for rating in range(5)] == pytest.approx([(rating + 0.5) / 5 for rating in range(5)])
    for label in (0.1, 0.656, 1.2):
        assert scale.from_unit(label) == pytest.approx(5 * label - 0.5)


@pytest.mark.parametrize("scale", [Scale(), Scale(-3, 7), Scale(1, 10, bins=10), Scale(0, 1, bins=2)])
def test_ratings_come_back(scale: Scale) -> None:
    for share in (0.0, 0.25, 1.0):
        rating = scale.low + share * (scale.high - scale.low)
        assert scale.from_unit(scale.to_unit(rating)) == pytest.approx(rating)
        assert 0.0 <= scale.to_unit(rating) <= 1.0


def test_missing_ratings_are_nan_and_booleans_are_ends() -> None:
    scales = {"helpful": Scale(0, 4, bins=5), "safe": Scale()}
    found = label_matrix([{"helpful": 4, "safe": True}, {"safe": False, "helpful": None}, {}], scales)
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx([0.9, 1.0])
    assert math.isnan(found[1, 0])
    assert found[1, 1] == 0.0
    assert bool(found[2].isnan().all())


@pytest.mark.parametrize(
    ("rated", "words"),
    [
        ({"helpful": 5}, "answer-7 rates 'helpful' as 5; expected a number from 0 to 4"),
        ({"helpful": -0.01}, "from 0 to 4"),
        ({"helpful": math.nan}, "from 0 to 4"),
        ({"helpful": "good"}, "as 'good'; expected a number"),
        ({"kind": 1}, "rates 'kind'; expected one of the objectives helpful"),
    ],
)
def test_what_is_no_rating_is_named_and_never_clipped(rated: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        label_matrix([{"helpful": 1}, rated], {"helpful": Scale(0, 4, bins=5)}, rows=["answer-6", "answer-7"])


def test_an_objective_that_nobody_rates_is_refused() -> None:
    with pytest.raises(DataError, match="no row rates 'b'"):
        label_matrix([{"a": 1}], {"a": Scale(), "b": Scale()})
    with pytest.raises(DataError, match="no row rates 'x'"):
        check_rated(torch.tensor([[math.nan]]), ["x"])
    with pytest.raises(DataError, match="0 rows"):
        label_matrix([], {"a": Scale()})


@pytest.mark.parametrize("ends", [(1, 1), (2, 0), (0, math.inf), (math.nan, 1)])
def test_scales_have_two_ends(ends: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="finite low < high"):
        Scale(*ends)
    with pytest.raises(ConfigError, match="bins=1"):
        Scale(0, 1, bins=1)
