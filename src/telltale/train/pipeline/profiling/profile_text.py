"""Reader of the text format in which the official PipeDream repository ships its profiles.

One line per node, ``node4 -- Conv2d(...) -- forward_compute_time=ms, backward_compute_time=ms, activation_size=bytes,
parameter_size=bytes`` with an optional ``-- stage_id=k``, and one line per edge, a tab (or spaces, as an editor may have made
of it) and ``node3 -- node4``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from telltale.errors import DataError
from telltale.train.pipeline.planning.graph import Edge, topological_order

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
