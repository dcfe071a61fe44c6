"""What the native step is told of a model: the structures of model.h, field by field, and a model's weights by address.

Nothing is copied; a matrix that has a form in 8 bits beside it is named with both. What norms compute is asked of the norms
themselves: a few random numbers are put through each, and the formula that comes nearest is taken, so that no family has to be
listed. Numbers near zero are among them, where the epsilon shows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.models.arithmetic import layer_weights
from telltale.models.draft_exits import MATRICES, NORMS
from telltale.models.draft_heads import DraftHeads
from telltale.models.families import parts_of
from telltale.models.int8_weights import GROUP, Int8Weights, int8_of

POINTER = ctypes.c_void_p
LONG = ctypes.c_int64
ACTIVATIONS = {
    "SiLUActivation": 0,
    "SiLU": 0,
    "GELUTanh": 1,
    "NewGELUActivation": 1,
    "GELUActivation": 2,
    "ReLU": 3,
    "ReLUSquaredActivation": 4,
}
_PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "query_norm", "key_norm")


class MatrixView(ctypes.Structure):
    """A linear map by address, all null where the family has none; ``intact``: 8 bits and matrix hold the same numbers."""

    _fields_ = [
        ("weights", POINTER),
        ("bias", POINTER),
        ("values", POINTER),
        ("scales", POINTER),
        ("intact", LONG),
    ]


class LayerView(ctypes.Structure):
    """Weights of one layer, by address; null where the family has none."""

    _fields_ = [
        *[(name, MatrixView) for name in _PROJECTIONS],
        *[(name, POINTER) for name in _NORMS],
        *[(f"{name}_bias", POINTER) for name in _NORMS],
        *[(name, POINTER) for name in ("cosines", "sines")],
        ("window", LONG),
    ]


class ModelView(ctypes.Structure):
    """Sizes, constants and weights of a model."""

    _fields_ = [
        *[
            (name, LONG)
            for name in (
                "layers",
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "feed_forward",
                "vocabulary",
                "rotary_dim",
                "is_bf16",
                "tiles",
                "activation",
                "norm_centres",
                "norm_adds_one",
                "norm_rounds",
                "norms_whole",
                "norm_stride",
                "parallel",
                "interleaved",
            )
        ],
        *[
            (name, ctypes.c_float)
            for name in (
                "norm_epsilon",
                "attention_scale",
                "attention_cap",
                "embedding_scale",
                "residual_scale",
                "logit_scale",
                "logit_cap",
            )
        ],
        ("head", MatrixView),
        *[(name, POINTER) for name in ("embedding", "final_norm", "final_norm_bias")],
        ("layer", ctypes.POINTER(LayerView)),
    ]


class CacheView(ctypes.Structure):
    """Addresses of a cache, and of the cache whose prefix it shares."""

    _fields_ = [
        ("keys", ctypes.POINTER(POINTER)),
        ("values", ctypes.POINTER(POINTER)),
        ("capacity", LONG),
        ("prefix_keys", ctypes.POINTER(POINTER)),
        ("prefix_values", ctypes.POINTER(POINTER)),
        ("prefix_capacity", LONG),
        ("prefix_lengths", ctypes.POINTER(LONG)),
        ("prefix_rows", ctypes.POINTER(LONG)),
        ("own_rows", ctypes.POINTER(LONG)),
    ]


class BlocksView(ctypes.Structure):
    """Where a pass leaves the attention among a step's own tokens."""

    _fields_ = [("out", POINTER), ("since", ctypes.POINTER(LONG)), ("first_layer", LONG), ("span", LONG)]


@dataclass(frozen=True)
class NormKind:
    """What a norm computes: the mean taken off, 1 added to its weight, rounded before the weight as well, and its epsilon."""

    centres: bool
    adds_one: bool
    rounds: bool
    epsilon: float


_KINDS = ((False, False, True), (False, False, False), (False, True, False), (True, False, False), (True, True, False))


def norm_kind(norm: Any) -> NormKind | None:
    """The formula of ``norm``; None if it is none that is known here, or has no weight."""
    weight = getattr(norm, "weight", None)
    epsilon = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    if weight is None or epsilon is None:
        return None
    given = torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    # Rows of several sizes: around the epsilon, as embeddings are, as they are as a rule, and as outliers make them.
    sizes = torch.tensor([max(float(epsilon), 1e-12) ** 0.5, 0.02, 1.0, 300.0]).view(-1, *[1] * weight.ndim)
    given = (given * sizes).to(weight)
    with torch.inference_mode():
        wanted = norm(given).float()
        errors = {kind: _error(_normed(given, norm, epsilon, *kind).float(), wanted) for kind in _KINDS}
    nearest = min(errors, key=lambda kind: errors[kind])
    tolerance = 1e-5 if weight.dtype == torch.float32 else 1e-2
    return NormKind(*nearest, float(epsilon)) if errors[nearest] <= tolerance else None


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().mean() / wanted.abs().mean().clamp(min=1e-6))


def _normed(given: Tensor, norm: Any, epsilon: float, centres: bool, adds_one: bool, rounds: bool) -> Tensor:
    states = given.float()
    if centres:
        states = states - states.mean(-1, keepdim=True)
    states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
    weight, bias = norm.weight.float(), getattr(norm, "bias", None)
    states = states.to(given.dtype).float() if rounds else states
    states = states * (weight + 1.0 if adds_one else weight)
    return (states if bias is None else states + bias.float()).to(given.dtype)


def arithmetic_reason(model: Any) -> str | None:
    """Why the native step cannot compute what the fused backend can, or None: some things it has once a model, not once a layer."""
    parts, config = parts_of(model, listed=False), model.config
    heads = int(config.num_attention_heads)
    sizes = {
        "heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    }
    kinds: set[NormKind | None] = {norm_kind(parts.norm)}
    constants = set()
    for layer in parts.layers:
        weights = layer_weights(layer, **sizes)
        for norm in weights.norms:
            kinds.add(norm_kind(norm))
        own = weights.query_norm, weights.key_norm
        shape = getattr(getattr(own[0], "weight", None), "ndim", None)
        constants.add(
            (weights.attention_scale, weights.attention_cap, weights.residual_scale, weights.norms_whole, shape)
        )
        if weights.up.weight.shape != (int(weights.down.weight.shape[1]), weights.down.weight.shape[0]):
            return "its MLP has no one width"
    if None in kinds:
        return "the formula of one of its norms is not known"
    if len(kinds) > 1:
        return "its norms are of several kinds"
    if len(constants) > 1:
        return "its layers differ in the scale of their scores, or in their norms of queries and keys"
    return None


def activation_of(layer: Any) -> str:
    """Name of the class of the activation in a layer's MLP."""
    found = next(getattr(layer.mlp, name) for name in ("act_fn", "activation_fn", "act") if hasattr(layer.mlp, name))
    return type(found).__name__


class ModelPointers:
    """``struct`` describes the model of ``decoder`` (a fused one); :meth:`fill` anew after its weights have moved. ``tiles``:
    whether products go by the processor's matrix tiles; ``order``: see :func:`int8_addresses`."""

    def __init__(self, decoder: Any, *, tiles: bool, order: str) -> None:
        self._decoder = decoder
        self._tiles = tiles
        self._order = order
        self._kept: list[Any] = []
        self._short: list[tuple[int, int, Int8Weights]] = []
        self.read_short = self.read_long = 0
        """Matrices with a form in 8 bits beside them, and those without one or whose rows start or end inside one of its blocks."""
        self.struct = ModelView()
        self.table_length = 0
        self.fill()

    def fill(self) -> None:
        """Point the C structures at the model's weights."""
        self._kept.clear()
        decoder, model = self._decoder, self.struct
        self._short = [
            (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, short)
            for parameter in decoder.model.parameters()
            if (short := int8_of(parameter)) is not None and tuple(parameter.shape) == (short.rows, short.columns)
        ]
        self.read_short = self.read_long = 0
        self._rows = (LayerView * decoder.layers)(*[self._layer(index) for index in range(decoder.layers)])
        first, norm, head = decoder.weights[0], decoder.parts.norm, decoder.parts.head
        kind = norm_kind(norm)
        assert kind is not None
        model.layers, model.hidden, model.heads, model.kv_heads = (
            decoder.layers,
            decoder.hidden_size,
            decoder.heads,
            decoder.kv_heads,
        )
        model.head_dim, model.vocabulary = decoder.head_dim, decoder.vocabulary_size
        model.feed_forward, model.rotary_dim = first.up.weight.shape[0], decoder.rotary.dim
        model.is_bf16 = int(decoder.dtype == torch.bfloat16)
        model.tiles = int(self._tiles)
        model.activation = ACTIVATIONS[activation_of(decoder.parts.layers[0])]
        model.norm_centres, model.norm_adds_one, model.norm_rounds = kind.centres, kind.adds_one, kind.rounds
        model.norm_epsilon = kind.epsilon
        own = getattr(first.query_norm, "weight", None)
        model.norms_whole, model.norm_stride = first.norms_whole, 0 if own is None or own.ndim < 2 else own.shape[-1]
        model.parallel, model.interleaved = first.parallel, decoder.rotary.neighbours
        model.attention_scale, model.attention_cap = first.attention_scale, first.attention_cap or 0.0
        model.residual_scale = first.residual_scale
        model.logit_scale, model.logit_cap = decoder.outer.logit_scale, decoder.outer.logit_cap or 0.0
        scale = getattr(decoder.parts.embedding, "embed_scale", None)
        model.embedding_scale = (
            1.0 if scale is None else float(scale.to(decoder.dtype))
        ) * decoder.outer.embedding_scale
        model.embedding = self._in_place(decoder.parts.embedding.weight)
        model.head = self._matrix(head.weight, getattr(head, "bias", None))
        model.final_norm, model.final_norm_bias = (
            self._in_place(norm.weight),
            self._in_place(getattr(norm, "bias", None)),
        )
        model.layer = ctypes.cast(self._rows, ctypes.POINTER(LayerView))
        self.point_at_tables()

    def _layer(self, index: int) -> LayerView:
        weights = self._decoder.weights[index]
        row = LayerView(window=self._decoder.windows[index] or 0)
        for name in _PROJECTIONS:
            projection = getattr(weights, name)
            if projection is not None:
                setattr(row, name, self._matrix(projection.weight, projection.bias))
        for name in _NORMS:
            module = getattr(weights, name)
            setattr(row, name, self._in_place(getattr(module, "weight", None)))
            setattr(row, f"{name}_bias", self._in_place(getattr(module, "bias", None)))
        return row

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> MatrixView:
        """A linear map, its form in 8 bits with it; not yet ``intact``."""
        view = MatrixView(self._in_place(weight), self._in_place(bias))
        address = weight.data_ptr()
        for first, last, short in self._short:
            if first <= address < last and short.columns == weight.shape[1]:
                row = (address - first) // (short.columns * weight.element_size())
                own = int8_addresses(short, row, len(weight), tiles=self._tiles, order=self._order)
                if own is not None:
                    self._kept.append(short)
                    view.values, view.scales = own
        self.read_short += view.values is not None
        self.read_long += view.values is None
        return view

    def point_at_tables(self) -> None:
        """Follow the rotary tables after they have grown."""
        rotary = self._decoder.rotary
        half = rotary.dim // 2
        self._tables = [
            (
                cos.float().contiguous(),
                (sin if rotary.neighbours else torch.cat([-sin[:, :half], sin[:, half:]], -1)).float().contiguous(),
            )
            for cos, sin in rotary.tables
        ]
        for row, own in zip(self._rows, rotary.of_layer, strict=True):
            row.cosines, row.sines = (
                (None, None) if own is None else tuple(table.data_ptr() for table in self._tables[own])
            )
        self.table_length = rotary.length

    def _in_place(self, parameter: Any) -> int | None:
        """Address of a parameter, None if there is none; its storage is kept alive."""
        if parameter is None:
            return None
        tensor = parameter.detach()
        self._kept.append(tensor)
        return int(tensor.data_ptr())


def int8_addresses(short: Int8Weights, first_row: int, rows: int, *, tiles: bool, order: str) -> tuple[int, int] | None:
    """Addresses of rows of a matrix in 8 bits, which is put in the order that the native step takes.

    That is the order of matrix tiles where they compute and take the matrix's depth, else ``order``, that of the processor's
    vectors. None if a row begins inside of a block, or the matrix is in another order already.
    """
    wanted = "tiles" if tiles and short.columns % GROUP == 0 else order
    short.arrange(wanted)
    return short.addresses(first_row, rows, wanted)


class DraftExitView(ctypes.Structure):
    """The weights of one draft exit, and which token each row of its head stands for."""

    _fields_ = [
        *[(name, MatrixView) for name in (*MATRICES, "head")],
        *[(name, POINTER) for name in NORMS],
        *[(name, ctypes.POINTER(LONG)) for name in ("tokens", "late_layers")],
        *[(name, LONG) for name in ("late", "width", "count")],
    ]


class DraftExitPointers:
    """``views``: a structure by exit layer. It keeps alive what they point at."""

    def __init__(self, heads: DraftHeads, *, tiles: bool, order: str) -> None:
        self._kept: list[Any] = []
        self._tiles = tiles
        self._order = order
        shortlist = heads.shortlist.tolist()
        tokens, late = (LONG * len(shortlist))(*shortlist), (LONG * len(heads.late_layers))(*heads.late_layers)
        head = self._matrix(heads.head, heads.bias, heads.short_head)
        self.views = {}
        for layer, one in heads.exits.items():
            view = DraftExitView(head=head, late=len(late), width=one.width, count=len(shortlist))
            view.tokens, view.late_layers = (ctypes.cast(numbers, ctypes.POINTER(LONG)) for numbers in (tokens, late))
            for name in MATRICES:
                bias = one.weights.get(f"{name}_bias")
                setattr(view, name, self._matrix(one.weights[name], bias, heads.short.get((layer, name))))
            for name in NORMS:
                setattr(view, name, self._address(one.weights[name]))
            self.views[layer] = view
        self._kept += [tokens, late]

    def _matrix(self, weight: Tensor, bias: Tensor | None, short: Int8Weights | None) -> MatrixView:
        view = MatrixView(self._address(weight), None if bias is None else self._address(bias))
        if short is not None:
            addresses = int8_addresses(short, 0, len(weight), tiles=self._tiles, order=self._order)
            if addresses is not None:
                view.values, view.scales = addresses
                view.intact = int(torch.equal(short.dequantized().to(weight.dtype), weight))
                self._kept.append(short)
        return view

    def _address(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self._kept.append(tensor)
        return int(tensor.data_ptr())
