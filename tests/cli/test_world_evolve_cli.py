"""telltale world evolve and registry: a life from the command line, and what is refused."""

from __future__ import annotations

import json

import pytest

from cli.commands import called, refused
from telltale.cli.world_evolve import phases
from telltale.errors import ConfigError

SHORT = ["--set", "episodes=64", "--set", "block=2", "--budget", 420, "--change", "400:migrated=true"]


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    from telltale import world

    folder = tmp_path_factory.mktemp("life")
    place = world.make("digital/orders")
    world.save_model(world.fit("program", world.collect(place, steps=600, seed=1), world=place), folder / "program")
    return folder


def test_a_life_is_told_kept_and_checked(life, capsys):
    from telltale import world

    arguments = ["world", "evolve", life / "program", "digital/orders", "-o", life / "life", *SHORT]
    captured = called([*arguments, "--bundle", life / "bundle"], capsys)
    assert "phase:" in captured.out
    assert "calibrated on" in captured.err
    again = json.loads(called([*arguments, "--json"], capsys).out)
    assert again["steps"] >= 420
    assert again["versions"] == 1
    assert "verified" in called(["world", "registry", "log", life / "life"], capsys).out
    # a world by id is built from the bundle, with its changes, and played again
    assert "as it says; 20 of 20 episodes replayed" in called(["world", "verify", life / "bundle"], capsys).out
    log = json.loads(called(["world", "registry", "log", life / "life", "--json"], capsys).out)
    assert log["entries"][0]["kind"] == "found"
    name = log["active"][:8]
    same = json.loads(called(["world", "registry", "diff", life / "life", name, name, "--json"], capsys).out)
    assert same["added"] == []
    refused(["world", "registry", "promote", life / "life", name, "--by", "me"], capsys, "no receipt")
    refused(["world", "registry", "decline", life / "life", name, "--by", "me"], capsys, "no receipt")
    refused(["world", "registry", "rollback", life / "life"], capsys, "no earlier active version")
    refused([*arguments, "--seed", 5], capsys, "another life")
    refused([*arguments, "--approval"], capsys, "founded without approval")
    place = world.make("digital/orders")
    world.save_model(world.fit("program", world.collect(place, steps=60, seed=2), world=place), life / "other")
    refused(["world", "evolve", life / "other", "digital/orders", "-o", life / "life"], capsys, "another model")
    entry = life / "life" / "log" / "00000001.json"
    entry.write_text(entry.read_text().replace("found", "faked"))
    refused(["world", "registry", "log", life / "life"], capsys, "chain of hashes")


def test_what_is_refused(life, capsys, tmp_path):
    refused(["world", "registry", "log", tmp_path], capsys, "holds no registry")
    start = ["world", "evolve", life / "program", "digital/orders", "-o", tmp_path / "x"]
    refused([*start, "--set", "episode=3"], capsys, "episode")
    refused([*start, "--set", "calibration_blocks=100"], capsys, "calibration_blocks=100", "200")
    refused([*start, "--bundle", tmp_path / "x" / "bundle"], capsys, "lie in one another")
    refused([*start, "--bundle", life / "program"], capsys, "is no bundle")
    refused([*start, "--change", "soon:migrated=true"], capsys, "STEP:key=value")
    refused([*start, "--change", "10:colour=red"], capsys, "colour")
    refused([*start, "--change", "\u00b2:migrated=true"], capsys, "STEP:key=value")
    assert phases(["9:a=1,b=x", "3:a=2"]) == [(3, {"a": 2}), (9, {"a": 1, "b": "x"})]
    with pytest.raises(ConfigError):
        phases(["x"])
