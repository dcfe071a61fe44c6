"""Any ``nn.Module`` as a chain, by ``torch.export`` on an example minibatch ``(inputs, targets)``.

``inputs`` is a tensor or a tuple of tensors, the positional arguments of ``forward``; later minibatches must have the example's
shapes, but for the number of rows (a smaller last one) where the module takes any. The module is exported in train mode and its
operations are cut into pieces; every piece holds the module's own ``Parameter`` objects under their unsplit names. The module's
inputs are read from the minibatch wherever they are needed and never sent.

Dropout of every kind, also inside of attention and recurrent layers, follows the train flag of the piece's module, whatever its
unsplit module's flag is later on. So does batch norm, which the pieces run as the module's own (one in eval mode keeps its
frozen statistics). Other layers that update buffers in train mode are refused, as are data-dependent control flow and anything
else that eval mode changes.

Before a chain is given out, its loss, its gradients and its outputs in eval mode are compared with the module's own on the
example, which also catches what an export loses silently (such as a custom ``autograd.Function``'s backward).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from telltale.errors import DataError, UnsupportedModelError
from telltale.models.loading import evaluating
from telltale.train.pipeline.exported_graph import crossing_at, name_of, norms_as_modules, piece_graph, pieces_of
from telltale.train.pipeline.layers import Layer, LayeredModel, Values, buffers_kept, pair, terms_for

_TOLERANCE = 1e-4


def exported(model: nn.Module, example: Any, *, loss: Callable[[Any, Any], Tensor]) -> LayeredModel:
    """``model`` as a chain for minibatches like ``example``; ``loss(outputs, targets)`` is a scalar.

    Raises :class:`~telltale.errors.UnsupportedModelError` with the reason if the module cannot be exported, cut, or run the same
    way in pieces, and :class:`~telltale.errors.DataError` for an example (or later a minibatch) of another form.
    """
    with _training(model), buffers_kept(model.modules()):
        _refuse_updated_buffers(model)
        chain = None
        if _rows(example) > 2:  # one row and two are compiled in by torch.export
            with contextlib.suppress(UnsupportedModelError, RuntimeError, ValueError, TypeError, KeyError):
                any_rows = _chain(model, example, loss, any_rows=True)
                _verify(any_rows, _rows_of(example, -1), loss)
                chain = _from_two_rows_if_one_differs(any_rows, example, loss)
        if chain is None:
            chain = _chain(model, example, loss, any_rows=False)
        _verify(chain, example, loss)
    for layer in chain.layers:
        layer.module.train(model.training)
    return chain


def _chain(model: nn.Module, example: Any, loss: Callable[[Any, Any], Tensor], *, any_rows: bool) -> LayeredModel:
    """The export of ``model`` in pieces, for the example's number of rows or for any."""
    # Detached: an export leaves marks on the tensors that it was given, which the next one would obey.
    values = tuple(value.detach() for value in inputs_like(pair(example)[0])(example))
    rows = tuple({0: torch.export.Dim.DYNAMIC} for _ in values) if any_rows else None
    try:
        with _without_cumulative_means(model):
            program = torch.export.export(model, values, strict=False, dynamic_shapes=rows)
        module = program.module()
    except Exception as error:  # torch.export raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UnsupportedModelError(
            f"torch.export cannot trace {type(model).__name__}: {reason}; expected a forward without data-dependent control "
            f"flow, an nn.Sequential, or a supported Hugging Face causal LM."
        ) from error
    assert isinstance(module, fx.GraphModule)
    norms_as_modules(model, module.graph)
    guards = getattr(module, "_guards_fn", None) if any_rows else None
    inputs = inputs_like(pair(example)[0], any_rows=any_rows, guards=guards)
    layers, constants = _layers(model, module, inputs)
    spec = program.call_spec.out_spec

    def judged(values: Values, batch: Any, minibatch: int) -> Tensor:
        flat = list(values)
        leaves = [flat.pop(0) if leaf is _TENSOR else leaf for leaf in constants]
        return loss(pytree.tree_unflatten(leaves, spec), pair(batch)[1])

    return LayeredModel(model, layers, inputs=inputs, loss=judged, weight=terms_for(loss))


def _rows(example: Any) -> int:
    """Rows that all inputs of the example have; 0 if they differ."""
    values = _flat(pair(example)[0])
    counts = {value.shape[0] if value.ndim else 0 for value in values}
    return counts.pop() if len(counts) == 1 else 0


def _rows_of(example: Any, stop: int) -> Any:
    """The rows of the example up to ``stop``."""
    rows = _rows(example)

    def some(leaf: Any) -> Any:
        return leaf[:stop] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == rows else leaf

    return pytree.tree_map(some, example)


def _from_two_rows_if_one_differs(
    chain: LayeredModel, example: Any, loss: Callable[[Any, Any], Tensor]
) -> LayeredModel:
    """``chain``, which refuses a minibatch of one row unless it does there what the module does: torch.export supposes two."""
    try:
        _verify(chain, _rows_of(example, 1), loss)
    except (UnsupportedModelError, RuntimeError, ValueError, TypeError, IndexError, KeyError):

        def inputs(batch: Any) -> Values:
            if _rows(batch) == 1:
                raise DataError(
                    f"the minibatch has one row, for which {type(chain.root).__name__} works otherwise than for several; expected "
                    f"at least two (drop_last=True leaves such a last minibatch out)."
                )
            return chain.inputs(batch)

        return dataclasses.replace(chain, inputs=inputs)
    return chain


_TENSOR = object()
"""Marks the place of a tensor among the module's flat outputs."""


def inputs_like(
    example: Any, *, any_rows: bool = False, guards: Callable[..., object] | None = None
) -> Callable[[Any], Values]:
    """A function of a minibatch that gives its inputs and checks that they have the example's shapes and dtypes; with ``any_rows``
    there may be another number of rows, at least one and the same in all of them, for which ``guards``, what torch.export
    supposed of the inputs, holds."""
    like = _flat(example)
    wanted = _described(like)

    def inputs(batch: Any) -> Values:
        values = _flat(pair(batch)[0])
        resized = _described(like)
        if any_rows and values[0].ndim and (rows := values[0].shape[0]):
            resized = _described(tuple(value.new_empty((rows, *value.shape[1:]), device="meta") for value in like))
        if _described(values) != resized:
            more = " with any number of rows" if any_rows else ""
            raise DataError(
                f"the minibatch has inputs {_described(values)}; expected those of the example{more}, {wanted}."
            )
        if guards is not None:
            try:
                guards(*values)
            except AssertionError as error:
                raise DataError(
                    f"the minibatch has inputs {_described(values)}, for which the module takes another way than for the example "
                    f"({error}); expected more like those of the example, {wanted}."
                ) from error
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
