"""The four readings of the cost equations, by hand-worked figures."""

from __future__ import annotations

import numpy as np
import pytest

from telltale.errors import ConfigError
from telltale.train.pipeline.planning.costs import COST_MODELS, cost_model_of, cut_seconds


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        # T = 8, w = 30, B = 5, m = 4: w / B = 6.
        ("ring", 9.0 / 4),
        ("v1", 18.0 / 4),
        ("sosp-literal", 36.0 / 4),
        ("official-code", (8.0 + 18.0) / 4),
    ],
)
def test_replicated_stage(name: str, seconds: float) -> None:
    assert COST_MODELS[name].stage_seconds(8.0, 30.0, 4, 5.0) == seconds
    assert COST_MODELS[name].name == name


@pytest.mark.parametrize("name", COST_MODELS)
def test_one_replica_only_computes_and_arrays_agree_with_floats(name: str) -> None:
    model = COST_MODELS[name]
    assert model.stage_seconds(8.0, 30.0, 1, 5.0) == 8.0
    replicas = np.arange(1, 9)
    together = model.stage_seconds(8.0, 30.0, replicas, 5.0)
    assert together.tolist() == [float(model.stage_seconds(8.0, 30.0, int(m), 5.0)) for m in replicas]


def test_compute_hides_what_it_outlasts() -> None:
    assert COST_MODELS["ring"].stage_seconds(10.0, 30.0, 4, 5.0) == 2.5
    assert COST_MODELS["official-code"].stage_seconds(10.0, 30.0, 4, 5.0) == 7.0


def test_cuts() -> None:
    assert cut_seconds(10.0, 5.0) == 4.0
    assert cut_seconds(10.0, 5.0, 1) == 2.0
    assert cut_seconds(10.0, 5.0, 0) == 0.0


def test_names() -> None:
    model = COST_MODELS["v1"]
    assert cost_model_of("v1") is model
    assert cost_model_of(model) is model
    with pytest.raises(ConfigError, match=r"cost_model='tree'.*'ring'"):
        cost_model_of("tree")
