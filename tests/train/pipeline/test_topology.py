"""Machines: levels, sizes with units, YAML, and refused values."""

from __future__ import annotations

from pathlib import Path

import pytest

from telltale.errors import ConfigError
from telltale.train.pipeline.topology import Level, Topology, parse_bytes


def test_workers_and_levels() -> None:
    topology = Topology((Level(4, 10e9), Level(2, "10Gbit/s")), device_memory="16GB")
    assert topology.workers == 8
    assert topology.levels[1].bandwidth == 1.25e9
    assert topology.device_memory == 16e9
    assert not topology.is_flat
    assert Topology.flat(3, bandwidth="1GB").is_flat


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16e9), ("16 GiB", 16 * 2**30), ("512", 512.0), ("1.5e3kB", 1.5e6), ("200mbit", 25e6), (7, 7.0)],
)
def test_sizes(text: str | int, size: float) -> None:
    assert parse_bytes("memory", text) == size


@pytest.mark.parametrize("value", ["much", "-3GB", "3XB", "1.2.3GB", float("nan"), None, True, [1]])
def test_sizes_that_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="memory="):
        parse_bytes("memory", value)


def test_yaml_round_trip(tmp_path: Path) -> None:
    topology = Topology((Level(4, 10e9), Level(2, 1.25e9)), device_memory=8e9, latency=5e-5, shared_link=True)
    topology.save(tmp_path / "topology.yaml")
    assert Topology.load(tmp_path / "topology.yaml") == topology
    (tmp_path / "exponents.yaml").write_text("levels: [{count: 2, bandwidth: 1e9}]\nlatency: 5e-5\n")
    assert Topology.load(tmp_path / "exponents.yaml") == Topology.flat(2, bandwidth=1e9, latency=5e-5)
    (tmp_path / "short.yaml").write_text("levels:\n- {count: 2, bandwidth: 1GB}\ndevice_memory: 16GB\n")
    assert Topology.load(tmp_path / "short.yaml") == Topology.flat(2, bandwidth=1e9, device_memory=16e9)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Level(0, 1.0), "count=0"),
        (lambda: Level(True, 1.0), "count=True"),
        (lambda: Level(2.0, 1.0), "count=2.0"),
        (lambda: Level(2, 0.0), "bandwidth=0.0.*> 0"),
        (lambda: Level(2, -1.0), "bandwidth=-1.0"),
        (lambda: Level(2, float("nan")), "bandwidth=nan"),
        (lambda: Level(2, 10**400), "bandwidth is an integer beyond the largest float"),
        (lambda: Topology(()), "levels="),
        (lambda: Topology(Level(2, 1.0)), r"levels=Level\(count=2"),
        (lambda: Topology.flat(2, bandwidth=1.0, latency="slow"), "latency='slow'"),
        (lambda: Topology.flat(2, bandwidth=1.0, latency="nan"), "latency=nan"),
        (lambda: Topology(((2, 1.0),)), "levels="),
        (lambda: Topology.flat(2, bandwidth=1.0, device_memory=0), "device_memory=0"),
        (lambda: Topology.flat(2, bandwidth=1.0, latency=-1.0), "latency=-1.0"),
        (lambda: Topology.flat(2, bandwidth=1.0, shared_link="yes"), "shared_link='yes'"),
    ],
)
def test_refused_values_name_the_field(make, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("levels: 4", "no list of levels"),
        ("levels: [{count: 4}]", r"levels\[0\].*count and bandwidth"),
        ("levels: [{count: 4, bandwidth: 1.0}, {count: 0, bandwidth: 1.0}]", r"levels\[1\]: count=0"),
        ("levels: []", "levels="),
        ("level: []", "unknown config field 'level'.*levels"),
    ],
)
def test_wrong_yaml_names_file_and_field(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        Topology.load(path)
    assert "topology.yaml" in str(caught.value)
