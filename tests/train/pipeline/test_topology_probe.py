"""From measurements to a topology; the measurements themselves are tested with the job's two processes (test_job)."""

from __future__ import annotations

import pytest

from telltale.errors import ConfigError
from telltale.train.pipeline.topology import Level, Measurement, hosts_of, probe, topology_of


def test_ranks_of_hosts():
    assert hosts_of([2, 2, 2, 2]) == [(0, 1), (2, 3)]
    assert hosts_of([3, 3, 3]) == [(0, 1, 2)]
    assert hosts_of([1, 1]) == [(0,), (1,)]
    for uneven in ([2, 2, 1], [2, 2, 2], [4, 4]):
        with pytest.raises(ConfigError, match="same --nproc-per-node"):
            hosts_of(uneven)


def test_each_level_gets_its_slowest_link_and_the_latency_is_the_slowest_message():
    measurements = [
        Measurement(0, "message", (0, 1), 9e9, 1e-5),
        Measurement(0, "message", (2, 3), 7e9, 2e-5),
        Measurement(0, "all-reduce", (0, 1), 8e9, 9e-3),
        Measurement(1, "message", (0, 2), 2e9, 5e-5),
        Measurement(1, "all-reduce", (0, 2), 1e9, 8e-3),
    ]
    topology = topology_of(measurements, [(0, 1), (2, 3)], device_memory="16GB")
    assert topology.levels == (Level(2, 7e9), Level(2, 1e9))
    assert topology.latency == 5e-5
    assert topology.device_memory == 16e9


def test_hosts_of_one_rank_have_one_level():
    measurements = [Measurement(1, "message", (0, 1), 2e9, 5e-5), Measurement(1, "all-reduce", (0, 1), 3e9, 1e-4)]
    assert topology_of(measurements, [(0,), (1,)]).levels == (Level(2, 2e9),)


def test_one_process_has_no_links():
    with pytest.raises(ConfigError, match="at least two"):
        probe()
    with pytest.raises(ConfigError, match="repeats"):
        probe(repeats=0)
    with pytest.raises(ConfigError, match="message_bytes"):
        probe(message_bytes=10)
