"""The planner's description of a model: seconds and bytes of every layer (PipeDream, SOSP'19, section 3.1).

A profile is a chain of layers or a graph of them. It is measured by :mod:`telltale.train.pipeline.profiler` or read from
a file: our JSON, or the text format of the official repository. Times are seconds per minibatch, sizes bytes.

The text format of the official PipeDream repository has one line per node, ``node4 -- Conv2d(...) -- forward_compute_time=ms,
backward_compute_time=ms, activation_size=bytes, parameter_size=bytes`` with an optional ``-- stage_id=k``, and one line per
edge, a tab (or spaces, as an editor may have made of it) and ``node3 -- node4``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telltale.errors import DataError, PlanError
from telltale.runs.files import write_atomically
from telltale.train.pipeline.graph import Edge, crossing_bytes, topological_order
from telltale.train.pipeline.plan import Plan

FORMAT = "telltale-pipeline-profile-1"


@dataclass(frozen=True)
class LayerProfile:
    """One layer, in the position it has in the model. A negative, NaN or infinite figure raises DataError."""

    name: str
    forward: float
    """Seconds of one minibatch's forward."""
    backward: float
    """Seconds of its backward; cheaper in the first layer (no input gradient), with the loss in the last."""
    activation_bytes: float
    """Bytes of the output for one minibatch, and of the gradient that comes back for it."""
    parameter_bytes: float
    saved_bytes: float = 0.0
    """Bytes that autograd keeps between forward and backward of one minibatch."""
    update: float = 0.0
    """Seconds of the optimizer step on this layer's parameters; 0 if unknown."""
    version: float = 0.0
    """Seconds to copy its trainable parameters to fresh storage, as an update does where older versions live on; 0 if unknown."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DataError(f"a layer has name={self.name!r}; expected a non-empty string.")
        for field in ("forward", "backward", "activation_bytes", "parameter_bytes", "saved_bytes", "update", "version"):
            _check_amount(f"layer {self.name!r}: {field}", getattr(self, field))

    @property
    def compute(self) -> float:
        """Seconds of forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Profile:
    """The layers of a model in execution order, with what was measured beside them. Wrong values raise DataError."""

    layers: tuple[LayerProfile, ...]
    edges: tuple[tuple[int, int], ...] | None = None
    """Which layer's output (by index) which later layer reads; None for a chain."""
    step_seconds: float | None = None
    """Measured forward and backward of the whole model."""
    batch_size: int | None = None
    threads: int | None = None
    device: str = "cpu"
    fingerprint: str | None = None
    """Hash of the model's parameter names and shapes."""
    optimizer_bytes_per_parameter_byte: float = 2.0
    """Optimizer state; AdamW keeps two copies."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise DataError("the profile has no layers; expected at least one.")
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"layer {twice!r} is in the profile twice; expected every name once.")
        if self.edges is not None:
            self._check_edges()
        _check_amount("optimizer_bytes_per_parameter_byte", self.optimizer_bytes_per_parameter_byte)
        if self.step_seconds is not None:
            _check_amount("step_seconds", self.step_seconds)
        for field in ("batch_size", "threads"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise DataError(f"{field}={value!r} is not allowed; expected an integer >= 1 or nothing.")

    def _check_edges(self) -> None:
        assert self.edges is not None
        for edge in self.edges:
            if len(edge) != 2 or not all(isinstance(end, int) and 0 <= end < len(self.layers) for end in edge):
                raise DataError(f"edge {edge!r} names an unknown layer; expected indices 0 to {len(self.layers) - 1}.")
            if edge[0] >= edge[1]:
                first, second = (self.layers[end].name for end in edge)
                raise DataError(
                    f"the edge from {first!r} to {second!r} goes back (a cycle, or layers out of order); "
                    f"expected layers in topological order."
                )
        if len(set(self.edges)) < len(self.edges):
            raise DataError("an edge is in the profile twice; expected every edge once.")

    @property
    def compute(self) -> float:
        """Seconds of forward and backward of all layers."""
        return sum(layer.compute for layer in self.layers)

    @property
    def residual(self) -> float | None:
        """Sum of the layers over the measured whole step, minus 1; None if the step was not measured."""
        return self.compute / self.step_seconds - 1.0 if self.step_seconds else None

    def chain(self, order: Sequence[str] | None = None) -> Profile:
        """The profile as a chain: a graph's layers one after another, each with the bytes that cross the cut after it.

        ``order`` lists all layer names in an order that respects the edges; None keeps the profile's own. A prefix of
        the chain is an antichain state of the graph: its ``activation_bytes`` sum the outputs of the layers in it that
        layers behind it still read. A chain returns itself.
        """
        if self.edges is None and order is None:
            return self
        place = {layer.name: index for index, layer in enumerate(self.layers)}
        indices = list(range(len(self.layers))) if order is None else [place.get(name, -1) for name in order]
        if sorted(indices) != list(range(len(self.layers))):
            raise DataError(f"the order names {len(indices)} layers; expected each of the profile's {len(place)} once.")
        if self.edges is None:
            if indices != list(range(len(self.layers))):
                raise DataError("the order moves layers of a chain; expected them as they are in the profile.")
            return self
        position = {node: rank for rank, node in enumerate(indices)}
        for source, target in self.edges:
            if position[source] > position[target]:
                first, second = self.layers[source].name, self.layers[target].name
                raise DataError(f"the order puts {second!r} before {first!r}, whose output it reads.")
        crossing = crossing_bytes(indices, self.edges, [layer.activation_bytes for layer in self.layers])
        layers = tuple(
            dataclasses.replace(self.layers[node], activation_bytes=size)
            for node, size in zip(indices, crossing, strict=True)
        )
        return dataclasses.replace(self, layers=layers, edges=None)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, aside and then renamed."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        document["layers"] = [{"index": index, **layer} for index, layer in enumerate(document["layers"])]
        write_atomically(Path(path), json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read our JSON or the official text format; DataError names the file and the line, layer or field at fault."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"profile {path} cannot be read: {error}.") from error
        if looks_like_text_format(text):
            nodes, edges = read_text_format(text, str(path))
            layers = tuple(LayerProfile(**node) for node in nodes)
            chain = edges == [(index, index + 1) for index in range(len(layers) - 1)]
            return cls(layers, edges=None if chain else tuple(edges))
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"profile {path} is neither JSON ({error}) nor the official text format.") from error
        return cls._from_document(document, path)

    @classmethod
    def _from_document(cls, document: Any, path: str | Path) -> Profile:
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a pipeline profile; expected a JSON file with format {FORMAT!r}.")
        entries = document.pop("layers", None)
        if not isinstance(entries, list):
            raise DataError(f"profile {path} has no list of layers.")
        try:
            layers = tuple(_layer(entry, index) for index, entry in enumerate(entries))
            edges = document.pop("edges", None)
            if edges is not None:
                edges = tuple(tuple(edge) for edge in edges)
            return cls(layers, edges=edges, **document)
        except DataError as error:
            raise DataError(f"profile {path}: {error}") from error
        except TypeError as error:
            raise DataError(f"profile {path} has a missing or unknown field: {error}.") from error


def _layer(entry: Any, index: int) -> LayerProfile:
    if not isinstance(entry, dict):
        raise DataError(f"layer {index} is {entry!r}; expected a mapping of its figures.")
    found = entry.pop("index", None)
    if found != index:
        raise DataError(f"layer {index} is missing: the next entry has index {found!r}.")
    try:
        return LayerProfile(**entry)
    except TypeError as error:
        raise DataError(f"layer {index} ({entry.get('name', 'no name')}) has a wrong field: {error}.") from error


def _check_amount(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise DataError(f"{what}={value!r} is not allowed; expected a finite number >= 0.")


FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


def looks_like_text_format(text: str) -> bool:
    """Whether the first line that is not empty reads ``name -- ...``."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return " -- " in first and not first.lstrip().startswith(("{", "["))


def read_text_format(text: str, source: str) -> tuple[list[dict[str, Any]], list[Edge]]:
    """Fields of a LayerProfile per node in topological order, and edges between their indices.

    ``source`` is the file's name for messages. Inputs are left out (every stage reads the batch itself), and so are
    ``__getitem__`` nodes that nothing reads; the official optimizer does the same. Milliseconds become seconds, and
    a node's output counts as what its backward keeps. Anything malformed raises DataError with the line's number.
    """
    nodes: dict[str, dict[str, Any]] = {}
    links: dict[tuple[str, str], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{source}, line {number}"
        if not line.strip():
            continue
        if line[0].isspace():
            _read_edge(line, where, links, number)
        else:
            identifier, fields = _read_node(line, where)
            if identifier in nodes:
                raise DataError(f"{where}: node {identifier!r} is defined twice; expected every node once.")
            nodes[identifier] = fields
    for (first, second), number in links.items():
        for identifier in (first, second):
            if identifier not in nodes:
                raise DataError(f"{source}, line {number}: the edge names {identifier!r}, which no node line defines.")
    kept = _without_inputs_and_unread(nodes, links)
    if not kept:
        raise DataError(f"{source} has no node with work in it; expected at least one besides the inputs.")
    ranked = sorted(kept, key=_natural)
    place = {identifier: index for index, identifier in enumerate(ranked)}
    edges = [(place[first], place[second]) for first, second in links if first in place and second in place]
    try:
        order = topological_order(len(ranked), edges, ranked)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    position = {node: rank for rank, node in enumerate(order)}
    return [kept[ranked[node]] for node in order], sorted((position[a], position[b]) for a, b in edges)


def _read_node(line: str, where: str) -> tuple[str, dict[str, Any]]:
    tokens = line.strip().split(" -- ")
    if len(tokens) not in (3, 4):
        raise DataError(f"{where}: {line.strip()[:60]!r} is not a node; expected 'node -- description -- figures'.")
    identifier, description, figures = tokens[:3]
    if len(tokens) == 4 and not re.fullmatch(r"stage_id=\d+", tokens[3].strip()):
        raise DataError(f"{where}: {tokens[3]!r} after node {identifier!r}; expected stage_id=<number>.")
    values = dict(_figures(identifier, figures, where))
    return identifier, {
        "name": f"{identifier} {description}",
        "forward": values["forward_compute_time"] / 1e3,
        "backward": values["backward_compute_time"] / 1e3,
        "activation_bytes": values["activation_size"],
        "parameter_bytes": values["parameter_size"],
        "saved_bytes": values["activation_size"],
    }


def _figures(identifier: str, figures: str, where: str) -> Iterator[tuple[str, float]]:
    given: dict[str, str] = {}
    for part in figures.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key in given or key not in FIELDS:
            raise DataError(f"{where}: node {identifier!r} has {key!r} twice or it is unknown; expected {FIELDS}.")
        given[key] = value
    for field in FIELDS:
        if field not in given:
            raise DataError(f"{where}: node {identifier!r} lacks {field}.")
        # A node with several outputs lists their sizes: [a; b; c].
        pieces = given[field].strip().strip("[]").split(";")
        try:
            amounts = [float(piece) for piece in pieces]
        except ValueError:
            amounts = [math.nan]
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts):
            raise DataError(
                f"{where}: node {identifier!r} has {field}={given[field]}; expected finite numbers >= 0 (ms, bytes)."
            )
        yield field, sum(amounts)


def _read_edge(line: str, where: str, links: dict[tuple[str, str], int], number: int) -> None:
    tokens = line.strip().split(" -- ")
    if len(tokens) != 2:
        raise DataError(f"{where}: {line.strip()[:60]!r} is not an edge; expected '<tab>node -- node'.")
    edge = (tokens[0].strip(), tokens[1].strip())
    if edge in links:
        raise DataError(f"{where}: the edge {tokens[0]} -- {tokens[1]} is given twice (first in line {links[edge]}).")
    links[edge] = number


def _without_inputs_and_unread(
    nodes: Mapping[str, dict[str, Any]], links: Mapping[tuple[str, str], int]
) -> dict[str, dict[str, Any]]:
    targets = {second for _, second in links}
    sources = {first for first, _ in links}
    kept = {}
    for identifier, fields in nodes.items():
        description = fields["name"].split(" ", 1)[1]
        is_input = identifier not in targets and description.startswith("Input")
        is_unread = identifier not in sources and description.startswith("__getitem__")
        if not (is_input or (is_unread and len(nodes) > 1)):
            kept[identifier] = fields
    return kept


def _natural(identifier: str) -> tuple[int, str]:
    """node9 before node10: the numbers follow the order in which the profiler saw the layers."""
    digits = re.search(r"\d+$", identifier)
    return (int(digits.group()) if digits else 0, identifier)


def arranged(profile: Profile, plan: Plan) -> Profile:
    """The chain of layers that the plan's stages index; for a graph, its nodes in the order that the plan names."""
    names = [name for stage in plan.stages for name in stage.names]
    chain = profile.chain(names if profile.edges is not None and names else None)
    if len(chain.layers) != plan.n_layers:
        raise PlanError(f"the plan has {plan.n_layers} layers and the profile {len(chain.layers)}; expected the same.")
    return chain
