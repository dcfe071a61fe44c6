"""Profiles as files: our JSON, the official text format, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telltale.errors import DataError
from telltale.train.pipeline.profile import LayerProfile, Profile
from train.pipeline.made_profiles import chain

NODE = "node{n} -- {d} -- forward_compute_time={f}, backward_compute_time={b}, activation_size={a}, parameter_size={w}"


def node(n: int, d: str = "Linear()", f: str = "1.500", b: str = "2.500", a: str = "8.0", w: str = "4.000") -> str:
    return NODE.format(n=n, d=d, f=f, b=b, a=a, w=w)


GRAPH = "\n".join(
    [
        node(10, "Add"),
        node(1, "Input0", f="0.000", b="0.000", a="0.0", w="0.000"),
        node(2, "LSTM(4, 4)", a="[6.0; 1.0; 1.0]") + " -- stage_id=0",
        node(3, "Conv2d(3, 8, kernel_size=(3, 3))", a="2.0") + " -- stage_id=1",
        node(4, "__getitem__(1)"),
        "\tnode1 -- node2",
        "\tnode2 -- node3",
        "\tnode2 -- node10",
        "\tnode3 -- node10",
        "\tnode2 -- node4",
    ]
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_official_text_format(tmp_path: Path) -> None:
    """Milliseconds become seconds, several outputs add up, inputs and unread items go, node10 comes after node3."""
    profile = Profile.load(write(tmp_path / "graph.txt", GRAPH))
    assert [layer.name for layer in profile.layers] == [
        "node2 LSTM(4, 4)",
        "node3 Conv2d(3, 8, kernel_size=(3, 3))",
        "node10 Add",
    ]
    assert profile.edges == ((0, 1), (0, 2), (1, 2))
    first = profile.layers[0]
    assert (first.forward, first.backward, first.activation_bytes) == (0.0015, 0.0025, 8.0)
    assert (first.parameter_bytes, first.saved_bytes, first.compute) == (4.0, 8.0, 0.004)


def test_official_chain_has_no_edges(tmp_path: Path) -> None:
    text = "\n".join([node(2), node(1), node(3), "\tnode1 -- node2", "\tnode2 -- node3"])
    profile = Profile.load(write(tmp_path / "graph.txt", text))
    assert profile.edges is None
    assert profile.chain() is profile
    assert [layer.name for layer in profile.layers] == ["node1 Linear()", "node2 Linear()", "node3 Linear()"]


@pytest.mark.parametrize(
    ("line", "replacement", "expected"),
    [
        (4, node(4, f="nan"), "line 5.*'node4'.*forward_compute_time=nan.*finite numbers >= 0"),
        (4, node(4, a="-8.0"), "line 5.*'node4'.*activation_size=-8.0"),
        (4, node(4, a="[1.0; x]"), "line 5.*activation_size"),
        (4, node(4, w="inf"), "line 5.*parameter_size=inf"),
        (4, node(3), "line 5.*'node3' is defined twice"),
        (4, node(4).replace("backward_compute_time=2.500, ", ""), "line 5.*lacks backward_compute_time"),
        (4, node(4).replace("backward", "sideways"), "line 5.*sideways_compute_time"),
        (4, node(4) + " -- stage_id=x", "line 5.*stage_id=<number>"),
        (4, "node4 -- lost", "line 5.*is not a node"),
        (9, "\tnode2 -- node7", "line 10.*names 'node7'"),
        (9, "\tnode2 -- node3", "line 10.*given twice"),
        (9, "\tnode2 node3", "line 10.*is not an edge"),
        (9, "\tnode10 -- node3", "cycle.*expected a graph without cycles|node3.*cycle"),
    ],
)
def test_malformed_text_names_line_and_node(tmp_path: Path, line: int, replacement: str, expected: str) -> None:
    lines = GRAPH.split("\n")
    lines[line] = replacement
    path = write(tmp_path / "graph.txt", "\n".join(lines))
    with pytest.raises(DataError, match=expected) as caught:
        Profile.load(path)
    assert "graph.txt" in str(caught.value)


def test_text_with_odd_spacing_reads_the_same(tmp_path: Path) -> None:
    wanted = Profile.load(write(tmp_path / "graph.txt", GRAPH))
    odd = (
        GRAPH.replace("\t", "    ")
        .replace(", backward", " ,backward")
        .replace("activation_size=", "activation_size = ")
    )
    odd = odd.replace("; ", ";").replace("\n", "  \r\n")
    (tmp_path / "odd.txt").write_bytes(odd.encode())
    assert Profile.load(tmp_path / "odd.txt") == wanted


def test_text_with_only_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no node with work"):
        Profile.load(write(tmp_path / "graph.txt", node(1, "Input0")))


def test_json_round_trip(tmp_path: Path) -> None:
    layers = chain([3.0, 6.0, 1.5], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [1.0, 2.0, 3.0]).layers
    profile = Profile(
        layers,
        edges=((0, 1), (0, 2), (1, 2)),
        step_seconds=10.0,
        batch_size=16,
        threads=2,
        fingerprint="abc",
        optimizer_bytes_per_parameter_byte=1.0,
    )
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert profile.residual == pytest.approx(0.05)
    assert Profile(layers).residual is None


def test_malformed_json_names_file_and_layer(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for change, expected in [
        (lambda d: d["layers"][1].update(forward=float("nan")), "'layer1': forward=nan.*finite number >= 0"),
        (lambda d: d["layers"][1].update(parameter_bytes=-1), "'layer1': parameter_bytes=-1"),
        (lambda d: d["layers"][1].update(backward="fast"), "'layer1': backward='fast'"),
        (lambda d: d["layers"][1].update(forward=10**400), "'layer1': forward=1000.*finite number >= 0"),
        (lambda d: d["layers"].pop(1), "layer 1 is missing"),
        (lambda d: d["layers"][1].pop("forward"), r"layer 1 \(layer1\).*forward"),
        (lambda d: d["layers"][1].update(colour=1), r"layer 1 \(layer1\).*colour"),
        (lambda d: d["layers"][1].update(name="layer0"), "'layer0' is in the profile twice"),
        (lambda d: d["layers"].__setitem__(1, 7), "layer 1 is 7"),
        (lambda d: d.update(layers=[]), "no layers"),
        (lambda d: d.update(layers=None), "no list of layers"),
        (lambda d: d.update(edges=[[0, 3]]), r"edge \(0, 3\) names an unknown layer"),
        (lambda d: d.update(edges=[[0, 1], [1, 0]]), "from 'layer1' to 'layer0' goes back"),
        (lambda d: d.update(edges=[[0, 1], [0, 1]]), "an edge is in the profile twice"),
        (lambda d: d.update(step_seconds=-2.0), "step_seconds=-2.0"),
        (lambda d: d.update(batch_size=0), "batch_size=0"),
        (lambda d: d.update(format="other"), "not a pipeline profile"),
        (lambda d: d.update(mood="good"), "unknown field.*mood"),
    ]:
        with subtests.test(change=change):
            path = tmp_path / "profile.json"
            chain([1.0, 2.0, 3.0], [1.0] * 3, [1.0] * 3).save(path)
            document = json.loads(path.read_text())
            change(document)
            path.write_text(json.dumps(document))
            with pytest.raises(DataError, match=expected) as caught:
                Profile.load(path)
            assert "profile.json" in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Profile.load(tmp_path / "missing.json")
    with pytest.raises(DataError, match="neither JSON"):
        Profile.load(write(tmp_path / "odd.json", "{"))
    with pytest.raises(DataError, match="non-empty string"):
        LayerProfile("", 1.0, 1.0, 1.0, 1.0)
