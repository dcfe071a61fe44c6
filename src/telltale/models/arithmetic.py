"""The arithmetic of a decoder layer by role, read off its modules: what the fused and the native backend compute.

Families are not listed here. Every parameter of a layer must have a role under a name that is known: projections of the attention
and the MLP, norms before and behind them, norms of queries and keys. Scales, caps, windows and what turns by position are
attributes of these modules or of the configuration. A layer with a parameter more (experts, sinks, a second attention) is refused
with its name, and what a family does without parameters is found by the comparison with its own forward when a decoder is opened.

Rotary embeddings are tables over positions, made by the family's own module; layers that turn alike share one. Families that give
each kind of layer its own angles (a local and a global base, say) have several, and layers that do not turn have none.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.models.families import Parts
from telltale.models.loading import evaluating
from telltale.models.seam import FamilySeam

_QUERY_NORMS, _KEY_NORMS = ("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")
_OUTPUTS = ("o_proj", "dense")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_MLPS = (
    ("gate_up_proj", "down_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
)
_ORDERS = {
    ("input_layernorm", "post_attention_layernorm"): (0, None, 1, None),
    ("post_attention_layernorm", "post_feedforward_layernorm"): (None, 0, None, 1),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ): (0, 1, 2, 3),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"): (0, 1, 2, 3),
    ("input_layernorm",): (0, None, None, None),
}
"""Names of a layer's norms -> which of them stands before the attention, behind it, before the MLP and behind it. One norm alone
is read by both, which then run in parallel."""

LINEAR = {"q_proj", "k_proj", "v_proj", "qkv_proj", *_OUTPUTS, *(name for names in _MLPS for name in names)}
"""Names of what has to be a plain linear layer."""

_AT_ONCE = 1024
"""Positions that the family is asked for in one pass: some families make a mask of that size squared beside."""
Angles = tuple[Tensor, Tensor]


@dataclass
class Projection:
    """One linear map, or several with the same input whose rows are stacked: views of the model's own parameters."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass
class LayerWeights:
    """One layer by role: the family's own parameters, split the same way for every family. None: the family has none.

    ``query_key_value`` and ``gate_up`` are the family's own stacked projections. ``parallel``: attention and MLP read the same
    normed states. ``norms_whole``: query and key norms go over all heads at once.
    """

    attention_norm: nn.Module | None
    attention_post_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp_post_norm: nn.Module | None
    parallel: bool
    residual_scale: float
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    norms_whole: bool
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    gate: Projection | None
    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    attention_scale: float
    attention_cap: float | None
    query_key_value: Projection | None
    gate_up: Projection | None

    @property
    def norms(self) -> list[Any]:
        """All norms that the layer has."""
        own = (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm)
        return [norm for norm in (*own, self.query_norm, self.key_norm) if norm is not None]


@dataclass(frozen=True)
class OuterArithmetic:
    """What stands around the layers: embeddings times ``embedding_scale``, logits times ``logit_scale``, then softly capped."""

    embedding_scale: float
    logit_scale: float
    logit_cap: float | None

    def logits(self, given: Tensor) -> Tensor:
        """Scaled and capped logits."""
        given = given if self.logit_scale == 1.0 else given * self.logit_scale
        return given if self.logit_cap is None else torch.tanh(given / self.logit_cap) * self.logit_cap


def outer_arithmetic(model: Any, parts: Parts) -> OuterArithmetic:
    """Scales and caps of ``model``, from its configuration and base."""
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    embedding = float(getattr(parts.base, "embedding_multiplier", None) or 1.0)
    return OuterArithmetic(embedding, scale, None if cap is None else float(cap))


def unknown_reason(layer: Any) -> str | None:
    """The first thing in ``layer`` that has no role here, in words; None if all of it has one."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        return f"a {type(layer).__name__} has no self_attn and mlp"
    names = _norm_names(layer)
    if names not in _ORDERS:
        return f"the order of its norms ({', '.join(names) or 'none'}) is not known"
    stacked = hasattr(attention, "qkv_proj")
    taken = ("qkv_proj",) if stacked else ("q_proj", "k_proj", "v_proj")
    output, inner = _first(attention, _OUTPUTS), _mlp_names(mlp)
    if output is None or any(not hasattr(attention, name) for name in taken):
        return f"a {type(attention).__name__} has no {', '.join(taken)} and output projection"
    if inner is None or _first(mlp, _ACTIVATIONS) is None:
        return f"its MLP is a {type(mlp).__name__}, which is not known"
    for owner, known in (
        (layer, ("self_attn", "mlp", *names)),
        (attention, (*taken, output, *_QUERY_NORMS, *_KEY_NORMS)),
        (mlp, inner),
    ):
        for name, _ in owner.named_parameters():
            if name.split(".")[0] not in known:
                return f"{name} of a {type(owner).__name__} has no known role"
    for name in (*_QUERY_NORMS, *_KEY_NORMS):
        if list(getattr(getattr(attention, name, None), "_modules", ())):
            return f"{name} of a {type(attention).__name__} has modules of its own"
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        return f"a {type(attention).__name__} clips queries, keys and values (clip_qkv)"
    place = inspect.signature(type(attention).forward).parameters.get("position_ids")
    if place is not None and place.default is inspect.Parameter.empty:
        return f"a {type(attention).__name__} looks at positions beside its rotary embeddings"
    if (_first(attention, _QUERY_NORMS) is None) is not (_first(attention, _KEY_NORMS) is None):
        return f"a {type(attention).__name__} norms only queries or only keys"
    return None


def layer_weights(layer: Any, *, heads: int, kv_heads: int, head_dim: int) -> LayerWeights:
    """The weights of one Hugging Face layer by role, as views of its parameters. Ask :func:`unknown_reason` first."""
    attention, mlp, names = layer.self_attn, layer.mlp, _norm_names(layer)
    placed = [None if place is None else getattr(layer, names[place]) for place in _ORDERS[names]]
    query_key_value = gate_up = gate = None
    if hasattr(attention, "qkv_proj"):
        query_key_value = _projection(attention.qkv_proj)
        query, key, value = _split(attention.qkv_proj, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    else:
        query, key, value = (_projection(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
    inner = [getattr(mlp, name) for name in _mlp_names(mlp) or ()]
    if hasattr(mlp, "gate_up_proj"):
        gate_up = _projection(inner[0])
        half = inner[0].weight.shape[0] // 2
        gate, up = _split(inner[0], [half, half])
    elif len(inner) == 3:
        gate, up = _projection(inner[0]), _projection(inner[1])
    else:
        up = _projection(inner[0])
    query_norm, key_norm = (_named(attention, choice) for choice in (_QUERY_NORMS, _KEY_NORMS))
    weight = getattr(query_norm, "weight", None)
    cap = getattr(attention, "attn_logit_softcapping", None)
    return LayerWeights(
        attention_norm=placed[0],
        attention_post_norm=placed[1],
        mlp_norm=placed[2],
        mlp_post_norm=placed[3],
        parallel=len(names) == 1,
        residual_scale=float(getattr(layer, "residual_multiplier", None) or 1.0),
        query_norm=query_norm,
        key_norm=key_norm,
        norms_whole=weight is not None and weight.ndim == 1 and weight.numel() == heads * head_dim != head_dim,
        query=query,
        key=key,
        value=value,
        output=_projection(_named(attention, _OUTPUTS)),
        gate=gate,
        up=up,
        down=_projection(inner[-1]),
        activation=_named(mlp, _ACTIVATIONS),
        attention_scale=float(getattr(attention, "scaling", None) or head_dim**-0.5),
        attention_cap=None if cap is None else float(cap),
        query_key_value=query_key_value,
        gate_up=gate_up,
    )


def turns_neighbours(layer: Any) -> bool:
    """Whether rotary embeddings turn lanes 2i and 2i + 1 together, not those of two halves: asked of the family's own code."""
    for kind in type(layer.self_attn).__mro__:
        rotate_half = getattr(sys.modules.get(kind.__module__), "rotate_half", None)
        if rotate_half is not None:
            return bool(
                torch.equal(rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([-2.0, 1.0, -4.0, 3.0]))
            )
    return False


def turns(layer: Any, embeddings: tuple[Tensor, Tensor], hidden_size: int) -> bool:
    """Whether the attention of ``layer`` makes use of rotary embeddings (1, width, rotary dim): some families leave layers out."""
    attention, (cos, sin) = layer.self_attn, embeddings
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, cos.shape[1], hidden_size, generator=generator).to(
        cos.device, next(attention.parameters()).dtype
    )
    still = torch.ones_like(cos), torch.zeros_like(sin)
    with torch.inference_mode(), evaluating(attention):
        given, other = (
            attention(hidden_states=states, position_embeddings=own, attention_mask=None)[0]
            for own in (embeddings, still)
        )
    return not torch.equal(given, other)


def _norm_names(layer: Any) -> tuple[str, ...]:
    """Names of a layer's norms, in the order of :data:`_ORDERS` where that has them."""
    found = {name for name, module in layer.named_children() if "norm" in name and module is not None}
    return next((names for names in _ORDERS if set(names) == found), tuple(sorted(found)))


def _mlp_names(mlp: Any) -> tuple[str, ...] | None:
    return next((names for names in _MLPS if all(hasattr(mlp, name) for name in names)), None)


def _first(owner: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if getattr(owner, name, None) is not None), None)


def _named(owner: Any, names: tuple[str, ...]) -> Any:
    name = _first(owner, names)
    return None if name is None else getattr(owner, name)


def _projection(linear: nn.Linear) -> Projection:
    return Projection(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _split(linear: nn.Linear, sizes: list[int]) -> list[Projection]:
    biases = [None] * len(sizes) if linear.bias is None else list(linear.bias.detach().split(sizes))
    return [Projection(w, b) for w, b in zip(linear.weight.detach().split(sizes), biases, strict=True)]


class RotaryTables:
    """Cosines and signed sines, (positions, rotary dim). ``of_layer[i]`` is layer i's table, None where it does not turn."""

    def __init__(self, model: Any, parts: Parts, hidden_size: int) -> None:
        self._model, self._parts, self._hidden = model, parts, hidden_size
        self.neighbours = turns_neighbours(parts.layers[0])
        """Whether lanes 2i and 2i + 1 turn together, not those of two halves."""
        self.of_layer: list[int | None] = [0] * len(parts.layers)
        self.tables: list[Angles] = []
        self._source: Callable[[Tensor], list[Angles]] = self._from_module if parts.family.listed else self._from_seam()
        self._frequencies: Any = None
        self.grow(64)

    @property
    def length(self) -> int:
        """Positions that the tables have."""
        return self.tables[0][0].shape[0] if self.tables else 1 << 62

    @property
    def dim(self) -> int:
        """Lanes of a head that turn."""
        return int(self.tables[0][0].shape[1]) if self.tables else 0

    def outdated(self) -> bool:
        """Whether the module's frequencies have changed since; the tables have then been made anew."""
        if _same(self._frequencies, _frequencies(self._parts.rotary)):
            return False
        self.tables, size = [], self.length if self.tables else 64
        self.grow(size)
        return True

    def grow(self, length: int) -> None:
        """Have tables for positions below ``length``."""
        size = self.length if self.tables else 64
        while size < length:
            size *= 2
        device = self._parts.embedding.weight.device
        with torch.inference_mode():
            pieces = [
                self._source(torch.arange(first, min(first + _AT_ONCE, size), device=device).unsqueeze(0))
                for first in range(0, size, _AT_ONCE)
            ]
        self.tables = [
            self._signed(torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts]))
            for parts in zip(*pieces, strict=True)
        ]
        self._frequencies = _frequencies(self._parts.rotary)

    def at(self, positions: Sequence[int], width: int) -> list[Angles]:
        """Of each table the rows of tokens that begin at ``positions``: (width, dim), or (batch, width, dim) if they differ."""
        if max(positions) + width > self.length:
            self.grow(max(positions) + width)
        if len(set(positions)) == 1:
            rows: Any = slice(positions[0], positions[0] + width)
        else:
            device = self._parts.embedding.weight.device
            rows = torch.tensor(positions, device=device).view(-1, 1) + torch.arange(width, device=device)
        return [(cos[rows], sin[rows]) for cos, sin in self.tables]

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads (..., heads, head dim) turned by (..., dim)."""
        dim = cos.shape[-1]
        if dim < x.shape[-1]:
            return torch.cat([self.turned(x[..., :dim], cos, sin), x[..., dim:]], -1)
        if self.neighbours:
            other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            first, second = x.chunk(2, -1)
            other = torch.cat([second, first], -1)
        return (x * cos.unsqueeze(-2) + other * sin.unsqueeze(-2)).to(x.dtype)

    def _from_module(self, place: Tensor) -> list[Angles]:
        cos, sin = self._parts.rotary(self._like(1), position_ids=place)
        return [(cos[0], sin[0])]

    def _from_seam(self) -> Callable[[Tensor], list[Angles]]:
        """A source that reads what each layer is called with; finds out which layers share a table and which do not turn."""
        seam = FamilySeam(self._model, self._parts)
        first = torch.arange(3, device=self._parts.embedding.weight.device).unsqueeze(0)
        with torch.inference_mode():
            given = [one.get("position_embeddings") for one in seam.arguments(self._like(3), first)]
        kinds: dict[int, int] = {}
        for index, (layer, own) in enumerate(zip(self._parts.layers, given, strict=True)):
            self.of_layer[index] = None
            if own is not None and turns(layer, own, self._hidden):
                self.of_layer[index] = kinds.setdefault(id(own[0]), len(kinds))
        leaders = [self.of_layer.index(kind) for kind in range(len(kinds))]

        def source(place: Tensor) -> list[Angles]:
            found: list[Any] = [
                one.get("position_embeddings") for one in seam.arguments(self._like(place.shape[1]), place)
            ]
            return [(found[leader][0][0], found[leader][1][0]) for leader in leaders]

        return source

    def _like(self, width: int) -> Tensor:
        weight = self._parts.embedding.weight
        return torch.zeros(1, width, self._hidden, dtype=weight.dtype, device=weight.device)

    def _signed(self, cos: Tensor, sin: Tensor) -> Angles:
        half = cos.shape[-1] // 2
        if not self.neighbours:
            return cos.contiguous(), torch.cat([-sin[:, :half], sin[:, half:]], -1).contiguous()
        if not torch.equal(cos[:, ::2], cos[:, 1::2]):  # two halves that are alike, as for halves that turn
            cos, sin = cos[:, :half].repeat_interleave(2, -1), sin[:, :half].repeat_interleave(2, -1)
        sign = sin.new_tensor([-1.0, 1.0]).repeat(half)
        return cos.contiguous(), (sin * sign).contiguous()


def _frequencies(rotary: Any) -> Any:
    """A copy of what tables are made from; None if no one module makes them."""
    if rotary is None:
        return None
    scaling = {name: value for name, value in vars(rotary).items() if name.endswith("attention_scaling")}
    return {name: buffer.clone() for name, buffer in rotary.named_buffers()}, scaling


def _same(before: Any, now: Any) -> bool:
    """Whether tables made from ``before`` still hold."""
    if before is None or now is None:
        return before is now
    tensors, others = before
    same = tensors.keys() == now[0].keys() and others == now[1]
    return same and all(torch.equal(tensors[name], now[0][name]) for name in tensors)
