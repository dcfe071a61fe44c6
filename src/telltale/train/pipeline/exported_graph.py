"""Where the graph of an exported module can be cut into a chain, and the graph of each piece.

A new piece begins between two operations that read parameters, at the point where the fewest bytes cross; among equal points
the last one, so that an activation function stays with what it follows. Everything that is computed before a cut and read
behind it crosses, so skip connections become extra values. A cut is possible only where all that crosses is a contiguous tensor
(another memory layout could round differently on the other side) and where no later operation writes to it in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from telltale.errors import UnsupportedModelError

Nodes = list[fx.Node]

_MODES = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def body_of(graph: fx.Graph) -> Nodes:
    """The graph's operations in order, without those that nothing needs (shape checks).

    Raises :class:`~telltale.errors.UnsupportedModelError` for one that cannot be run piecewise: control flow, or writing to a
    parameter, buffer or input.
    """
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node.op == "call_function" and (node in needed or _has_effect(node))):
            needed.update(node.all_input_nodes)
            needed.add(node)
    body = [node for node in graph.nodes if node.op == "call_function" and node in needed and not _is_size(node)]
    for node in body:
        _refuse(node)
    return body


def pieces_of(graph: fx.Graph, parameters: set[str]) -> list[Nodes]:
    """The operations of ``graph``, piece by piece; ``parameters`` are the names under which it reads them."""
    body = body_of(graph)
    readers = [index for index, node in enumerate(body) if any(_reads(node, parameters))]
    forbidden = _between_writes(body)
    starts = [0]
    for first, second in itertools.pairwise(readers):
        possible = []
        for cut in range(first, second):
            crossing = crossing_at(body, cut)
            if cut not in forbidden and crossing and all(_can_cross(node) for node in crossing):
                possible.append((sum(_bytes(node) for node in crossing), -cut))
        if possible:
            starts.append(1 - min(possible)[1])
    return [body[start:stop] for start, stop in zip(starts, [*starts[1:], len(body)], strict=True)]


def crossing_at(body: Nodes, cut: int) -> Nodes:
    """Results of ``body[: cut + 1]`` that an operation behind it, or the output, reads."""
    behind = {node: index for index, node in enumerate(body)}
    return [node for node in body[: cut + 1] if any(behind.get(user, len(body)) > cut for user in _users(node, behind))]


def name_of(piece: Nodes, parameters: set[str]) -> str | None:
    """The module whose parameters the piece reads first; None if it reads none."""
    first = next((name for node in piece for name in _reads(node, parameters)), None)
    return None if first is None else first.rpartition(".")[0] or first


def piece_graph(
    piece: Nodes, received: Nodes, sent: Sequence[Any], unused: Sequence[str]
) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of ``piece`` that takes ``received``, the module inputs that it reads (returned) and whether it is training.

    It gives ``sent``, nodes or constants. Dropout is on if it was on when the module was exported and the piece is training.
    ``unused`` parameters are read and let go, so that they belong to a piece.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in received}
    read = [
        node
        for node in dict.fromkeys(source for node in piece for source in _sources(node))
        if node.op == "placeholder"
    ]
    read += [node for node in sent if isinstance(node, fx.Node) and node.op == "placeholder" and node not in read]
    new |= {node: graph.placeholder(node.name) for node in read}
    training = graph.placeholder("is_training")
    for name in unused:
        graph.get_attr(name)

    def known(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in new:
            new[node] = graph.get_attr(str(node.target))
        if _is_size(node) and node not in new:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known)
            new[node] = graph.call_function(cast(Callable[..., Any], node.target), args, kwargs)
        return new[node]

    for node in piece:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known)
        new[node] = graph.call_function(
            cast(Callable[..., Any], node.target), *_switched(graph, node, args, kwargs, training)
        )
    graph.output(fx.map_arg(tuple(sent), known))
    return graph, read


def _switched(
    graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], training: fx.Node
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operation's arguments with what only training does made to depend on ``training``."""
    schema = getattr(node.target, "_schema", None)
    given, named = list(args), dict(kwargs)
    if schema is None or "batch_norm" in schema.name:
        return args, kwargs
    for place, argument in enumerate(schema.arguments):
        if argument.name not in ("train", "training", "dropout_p"):
            continue
        if place < len(given) and given[place]:
            given[place] = _when(graph, given[place], training)
        elif named.get(argument.name):
            named[argument.name] = _when(graph, named[argument.name], training)
    return tuple(given), named


def _when(graph: fx.Graph, value: Any, training: fx.Node) -> fx.Node:
    return graph.call_function(_value_if, (training, value))


def _value_if(training: bool, value: Any) -> Any:
    return value if training else type(value)(0)


def _reads(node: fx.Node, parameters: set[str]) -> list[str]:
    return [
        str(source.target) for source in node.all_input_nodes if source.op == "get_attr" and source.target in parameters
    ]


def _users(node: fx.Node, body: dict[fx.Node, int]) -> Nodes:
    return [user for user in node.users if user in body or user.op == "output"]


def _is_size(node: fx.Node) -> bool:
    """Whether the result is a number made of the inputs' sizes, which every piece computes for itself."""
    return (
        node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.SymInt)
        and all(source.op == "placeholder" or _is_size(source) for source in node.all_input_nodes)
    )


def _sources(node: fx.Node) -> Nodes:
    """What the operation reads, with what the sizes that it reads are made of."""
    return [
        inner
        for source in node.all_input_nodes
        for inner in ([source, *_sources(source)] if _is_size(source) else [source])
    ]


def _bytes(node: fx.Node) -> int:
    """Bytes of the result, with as many rows as the example has."""
    value: Tensor = node.meta["val"]
    sizes: list[Any] = list(value.shape)
    return value.element_size() * math.prod(
        size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes
    )


def _can_cross(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_contiguous()


def _has_effect(node: fx.Node) -> bool:
    """Whether leaving the operation out could be noticed: it writes to something, or draws random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _written(node: fx.Node) -> Nodes:
    """Arguments that the operation writes to."""
    schema = getattr(node.target, "_schema", None)
    found: list[Any] = []
    for place, argument in enumerate(schema.arguments if schema else ()):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if (argument.alias_info is not None and argument.alias_info.is_write) or (
            argument.name in ("running_mean", "running_var") and _updates_statistics(node)
        ):
            found.append(value)
    return [value for value in found if isinstance(value, fx.Node)]


def _updates_statistics(node: fx.Node) -> bool:
    """Whether the operation is a norm that averages its statistics, which its schema is silent about."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    switches = [names.index(name) for name in ("training", "use_input_stats") if name in names]
    return any(place < len(node.args) and bool(node.args[place]) for place in switches)


def _viewed(node: fx.Node) -> Nodes:
    """Arguments whose memory the result may share."""
    if node.target is _batch_normed:
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.all_input_nodes
    shared = [place for place, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    given: list[Any] = [node.args[place] for place in shared if place < len(node.args)]
    return [value for value in given if isinstance(value, fx.Node)]


def _memory_of(node: fx.Node) -> fx.Node:
    """The operation, parameter or input that first held the memory of ``node``."""
    while node.op == "call_function" and (sources := _viewed(node)):
        node = sources[0]
    return node


def _between_writes(body: Nodes) -> set[int]:
    """Cuts between the making of a tensor and the last operation that writes to its memory."""
    place = {node: index for index, node in enumerate(body)}
    return {
        cut
        for index, node in enumerate(body)
        for written in _written(node)
        for cut in range(place[_memory_of(written)], index)
    }


def _refuse(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() not in _MODES:
        raise UnsupportedModelError(
            f"the module uses {target.name()}, control flow that cannot be cut; expected plain operations."
        )
    for written in _written(node):
        memory = _memory_of(written)
        if memory.op != "call_function":
            what = "its input" if memory.op == "placeholder" else f"its parameter or buffer {memory.target}"
            raise UnsupportedModelError(
                f"the module writes to {what} in forward ({node.name}); expected a forward that leaves them alone."
            )


def _batch_normed(norm: _BatchNorm, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm on ``value``; its parameters stand among the arguments so that the graph shows who reads them."""
    return _BatchNorm.forward(norm, value)


def norms_as_modules(model: nn.Module, graph: fx.Graph) -> None:
    """Let every batch norm in train mode be run by the model's own module: running statistics and train flag are then its own."""
    running: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.batch_norm.default or not node.args[5]:
            continue
        value, weight, bias, mean = node.args[:4]
        path, _, buffer = (
            str(mean.target).rpartition(".") if mean is not None and mean.op == "get_attr" else ("", "", "")
        )
        owner = dict(model.named_modules()).get(path)
        if buffer != "running_mean" or not isinstance(owner, _BatchNorm):
            continue  # without running statistics, or with those of another kind of module, which are refused as written buffers
        if path in running:
            raise UnsupportedModelError(
                f"{path} runs more than once in a forward, and its running statistics cannot be on two stages; expected one batch "
                f"norm per use."
            )
        with graph.inserting_before(node):
            held = graph.create_node("get_attr", path)
            running[path] = graph.call_function(_batch_normed, (held, value, weight, bias))
        running[path].meta = dict(node.meta)
        node.replace_all_uses_with(running[path])
        graph.erase_node(node)
    for node in list(graph.nodes):
        counted = node.args[0] if node.target is torch.ops.aten.add_.Tensor else None
        path, _, buffer = str(counted.target).rpartition(".") if isinstance(counted, fx.Node) else ("", "", "")
        if buffer == "num_batches_tracked" and path in running:
            graph.erase_node(node)
