"""Any ``nn.Module`` as a chain, by ``torch.export`` on an example minibatch ``(inputs, targets)``.

``inputs`` is a tensor or a tuple of tensors, the positional arguments of ``forward``; later minibatches must have the example's
shapes. The module is exported in train mode and its operations are cut into pieces; every piece holds the module's own
``Parameter`` objects under their unsplit names. The module's inputs are read from the minibatch wherever they are needed and
never sent.

Dropout of every kind, also inside of attention and recurrent layers, follows the train flag of the piece's module, whatever its
unsplit module's flag is later on. So does batch norm, which the pieces run as the module's own (one in eval mode keeps its
frozen statistics). Other layers that update buffers in train mode are refused, as are data-dependent control flow and anything
else that eval mode changes.

Before a chain is given out, its loss, its gradients and its outputs in eval mode are compared with the module's own on the
example, which also catches what an export loses silently (such as a custom ``autograd.Function``'s backward).

Where the graph of an exported module can be cut into a chain, and the graph of each piece.

A new piece begins between two operations that read parameters, at the point where the fewest bytes cross; among equal points
the last one, so that an activation function stays with what it follows. Everything that is computed before a cut and read
behind it crosses, so skip connections become extra values. A cut is possible only where all that crosses is a contiguous tensor
(another memory layout could round differently on the other side) and where no later operation writes to it in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from telltale.errors import DataError, UnsupportedModelError
from telltale.models.loading import evaluating
from telltale.train.pipeline.layers import Layer, LayeredModel, Values, buffers_kept, pair, terms_for

_TOLERANCE = 1e-4


def exported(model: nn.Module, example: Any, *, loss: Callable[[Any, Any], Tensor]) -> LayeredModel:
    """``model`` as a chain for minibatches like ``example``; ``loss(outputs, targets)`` is a scalar.

    Raises :class:`~telltale.errors.UnsupportedModelError` with the reason if the module cannot be exported, cut, or run the same
    way in pieces, and :class:`~telltale.errors.DataError` for an example (or later a minibatch) of another form.
    """
    inputs = inputs_like(pair(example)[0])
    with _training(model), buffers_kept(model.modules()):
        _refuse_updated_buffers(model)
        try:
            with _without_cumulative_means(model):
                program = torch.export.export(model, inputs(example), strict=False)
            module = program.module()
        except Exception as error:  # torch.export raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UnsupportedModelError(
                f"torch.export cannot trace {type(model).__name__}: {reason}; expected a forward without data-dependent control "
                f"flow, an nn.Sequential, or a supported Hugging Face causal LM."
            ) from error
        assert isinstance(module, fx.GraphModule)
        _norms_as_modules(model, module.graph)
        layers, constants = _layers(model, module, inputs)
        spec = program.call_spec.out_spec

        def judged(values: Values, batch: Any, minibatch: int) -> Tensor:
            flat = list(values)
            leaves = [flat.pop(0) if leaf is _TENSOR else leaf for leaf in constants]
            return loss(pytree.tree_unflatten(leaves, spec), pair(batch)[1])

        chain = LayeredModel(model, layers, inputs=inputs, loss=judged, weight=terms_for(loss))
        _verify(chain, example, loss)
    for layer in layers:
        layer.module.train(model.training)
    return chain


_TENSOR = object()
"""Marks the place of a tensor among the module's flat outputs."""


def inputs_like(example: Any) -> Callable[[Any], Values]:
    """A function of a minibatch that gives its inputs and checks that they have the example's shapes and dtypes."""
    wanted = _described(_flat(example))

    def inputs(batch: Any) -> Values:
        values = _flat(pair(batch)[0])
        if _described(values) != wanted:
            raise DataError(f"the minibatch has inputs {_described(values)}; expected those of the example, {wanted}.")
        return values

    return inputs


def _flat(inputs: Any) -> Values:
    values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not values or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise DataError(f"the minibatch's inputs are ({kinds}); expected a tensor or a tuple of tensors.")
    return values


def _layers(
    model: nn.Module, module: fx.GraphModule, inputs: Callable[[Any], Values]
) -> tuple[tuple[Layer, ...], list[Any]]:
    """The layers, and the module's flat outputs with a marker in the place of tensors."""
    graph = module.graph
    own = dict(model.named_parameters(remove_duplicate=False))
    attributes = {str(n.target): _attribute(model, module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = list(next(node for node in graph.nodes if node.op == "output").args[0])
    pieces = pieces_of(graph, set(own))
    body = [node for piece in pieces for node in piece]
    read = {str(source.target) for node in body for source in node.all_input_nodes if source.op == "get_attr"}
    held_somewhere = {id(attributes[name]) for name in read}
    unused = [name for name, parameter in model.named_parameters() if id(parameter) not in held_somewhere]
    attributes |= {name: own[name] for name in unused}
    layers: list[Layer] = []
    received: list[fx.Node] = []
    position = 0
    for index, piece in enumerate(pieces):
        position += len(piece)
        last = index == len(pieces) - 1
        sent = [n for n in outputs if isinstance(n, fx.Node)] if last else crossing_at(body, position - 1)
        pieced, taken = piece_graph(piece, received, sent, unused if last else ())
        held = fx.GraphModule(attributes, pieced)
        name = _unique(name_of(piece, set(own)) or type(model).__name__, [layer.name for layer in layers])
        layers.append(
            Layer(name, held, _caller(held, [arguments.index(node) for node in taken], inputs, first=not index))
        )
        received = sent
    return tuple(layers), [_TENSOR if isinstance(leaf, fx.Node) else leaf for leaf in outputs]


def _caller(
    held: fx.GraphModule, taken: list[int], inputs: Callable[[Any], Values], *, first: bool
) -> Callable[[Values, Any, int], Values]:
    def call(values: Values, batch: Any, minibatch: int) -> Values:
        own = values if first else inputs(batch) if taken else ()
        crossing = () if first else values
        return tuple(held(*crossing, *(own[place] for place in taken), held.training))

    return call


def _attribute(model: nn.Module, module: fx.GraphModule, name: str) -> Any:
    """What the graph reads as ``name``: the unsplit module's own parameter or buffer, or a constant of the export."""
    for source in (model, module):
        try:
            found: Any = source
            for part in name.split("."):
                found = getattr(found, part)
            return found
        except AttributeError:
            continue
    raise UnsupportedModelError(f"the exported graph reads {name!r}, which {type(model).__name__} does not have.")


def _unique(name: str, taken: list[str]) -> str:
    count = sum(1 for other in taken if other.partition("#")[0] == name)
    return f"{name}#{count + 1}" if count else name


def _refuse_updated_buffers(model: nn.Module) -> None:
    for name, part in model.named_modules():
        moves = isinstance(part, _NormBase) and part.training and part.track_running_stats
        if moves and type(part).forward is not _BatchNorm.forward:
            raise UnsupportedModelError(
                f"{name or 'the module'} is a {type(part).__name__} in train mode, which updates its statistics in forward; "
                f"expected a batch norm of torch's, this one in eval mode, a norm without running statistics, or an nn.Sequential."
            )


@contextmanager
def _without_cumulative_means(model: nn.Module) -> Iterator[None]:
    """A batch norm without momentum reads its counter in forward, which cannot be traced; the pieces run the norm itself."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.momentum is None]
    for norm in norms:
        norm.momentum = 0.1
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None


def _batch_normed(norm: _BatchNorm, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm on ``value``; its parameters stand among the arguments so that the graph shows who reads them."""
    return _BatchNorm.forward(norm, value)


def _norms_as_modules(model: nn.Module, graph: fx.Graph) -> None:
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


def _verify(chain: LayeredModel, example: Any, loss: Callable[[Any, Any], Tensor]) -> None:
    """Compare the chain with the unsplit module on the example: loss and gradients in train mode, outputs in eval mode."""
    model, pieces = chain.root, [layer.module for layer in chain.layers]
    name = type(model).__name__
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _same_random_numbers():
        wanted = loss(model(*chain.inputs(example)), pair(example)[1])
        wanted_gradients = _gradients(wanted, trainable)
    with _same_random_numbers():
        given = _run(chain, example)
        given_gradients = _gradients(given, trainable)
    if not _close(given, wanted):
        raise UnsupportedModelError(
            f"the exported {name} has another loss on the example than the module itself, {float(given.detach()):.6g} instead of "
            f"{float(wanted.detach()):.6g}; expected a forward that depends on its inputs and parameters alone."
        )
    for (key, _), ours, theirs in zip(
        [item for item in model.named_parameters() if item[1].requires_grad],
        given_gradients,
        wanted_gradients,
        strict=True,
    ):
        alike = ours is theirs if ours is None or theirs is None else _close(ours, theirs)
        if not alike:
            raise UnsupportedModelError(
                f"the exported {name} has another gradient of {key} than the module itself; expected no custom backward and no "
                f"hooks on gradients."
            )
    with torch.no_grad(), evaluating(model, *pieces):
        wanted = loss(model(*chain.inputs(example)), pair(example)[1])
        given = _run(chain, example)
    if not _close(given, wanted):
        raise UnsupportedModelError(
            f"{name} does more in train mode than dropout: in eval mode its pieces give the loss {float(given):.6g} instead of "
            f"{float(wanted):.6g}."
        )


def _run(chain: LayeredModel, batch: Any) -> Tensor:
    values = chain.inputs(batch)
    for layer in chain.layers:
        values = layer.call(values, batch, 0)
    return chain.loss(values, batch, 0)


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(parameters)
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _close(given: Tensor, wanted: Tensor) -> bool:
    """Up to what the summation order of a GPU's kernels can change."""
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return torch.allclose(given, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)


def _described(values: Values) -> list[str]:
    return [f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in values]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    cards = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cards), torch.enable_grad():
        torch.manual_seed(0)
        yield


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """A model in eval mode is in train mode inside the block; one in train mode keeps its frozen parts."""
    flags = [(part, part.training) for part in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


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
    body = [node for node in graph.nodes if node.op == "call_function" and node in needed]
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
                possible.append((sum(node.meta["val"].nbytes for node in crossing), -cut))
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
        for node in dict.fromkeys(source for node in piece for source in node.all_input_nodes)
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
