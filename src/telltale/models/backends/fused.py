"""The pure PyTorch backend for Llama-like families: fused projections, rotary tables, a preallocated cache.

It computes what the family's modules compute, with fewer and larger operations, on any device. ``open_decoder`` checks it
against the family's own forward. Quantised or adapted (LoRA) projections are left to the module backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import UnsupportedModelError
from telltale.models.attention import STATIC_ROPE, PassAttention, check_since, rope_kind
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.families import parts_of


@dataclass
class Projection:
    """One linear map, or several with the same input whose rows are stacked."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass
class LayerWeights:
    """One Llama-like layer by role: the family's own parameters, split the same way for every family.

    ``query_key_value`` and ``gate_up`` are the family's own stacked projections, None where it has separate ones.
    """

    attention_norm: nn.Module
    mlp_norm: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    gate: Projection
    up: Projection
    down: Projection
    activation: Any
    query_key_value: Projection | None
    gate_up: Projection | None


class FusedDecoder(Decoder):
    """Llama, Mistral, Qwen2, Qwen3, Gemma and Phi-3 in plain tensor operations.

    The stacked projections are copies (about the size of the attention and MLP input weights), except Phi-3's, which is
    stacked already. Weights that were changed in place, by an optimizer say, are noticed when the next cache is made.
    """

    backend = "fused"
    fuses = True

    def __init__(self, model: nn.Module, *, exact: bool = False, threads: int | None = None) -> None:
        super().__init__(model, exact=exact, threads=threads)
        reason = fused_unavailable_reason(model)
        if reason is not None:
            raise UnsupportedModelError(f"the fused backend cannot serve this model: {reason}.")
        self.weights: list[LayerWeights] = []
        self._fused: list[tuple[Projection, Projection]] = []
        self._owners: list[nn.Module] = []
        self._versions: list[tuple[int, int]] = []
        self.refresh()
        self._cos = self._sin = torch.empty(0)
        self.rotary_dim = self._grow_rotary(64)

    def refresh(self) -> None:
        """Take over the model's weights as they are now."""
        self.weights = [layer_weights(layer, self) for layer in self.parts.layers]
        if self.fuses:
            self._fused = [
                (w.query_key_value or _stack(w.query, w.key, w.value), w.gate_up or _stack(w.gate, w.up))
                for w in self.weights
            ]
        modules = nn.ModuleList([self.parts.embedding, *self.parts.layers, self.parts.norm, self.parts.head]).modules()
        self._owners = [module for module in modules if module._parameters]
        self._versions = _versions(self._owners)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See :meth:`telltale.models.decoder.Decoder.new_cache`; notices weights that have changed or moved."""
        cache = super().new_cache(batch, capacity)
        if _versions(self._owners) != self._versions:
            self.refresh()
        return cache

    def run_with_blocks(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        since: Sequence[int],
        first_layer: int,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`telltale.models.decoder.Decoder.run_with_blocks`; the weights are made where queries and keys are."""
        batch, width, _ = hidden.shape
        if self.exact and batch * width > 1:
            return super().run_with_blocks(hidden, start, stop, cache, positions, since=since, first_layer=first_layer)
        span = check_since(since, positions, width)
        watched = range(max(first_layer, start), stop)
        self._admit(cache, positions, start, stop, batch, width)
        attention = PassAttention(
            cache, positions, width, windows=self.windows, watched=watched, since=since, span=span
        )
        with torch.inference_mode():
            hidden = self._run_layers(hidden, start, stop, positions, attention)
            blocks = torch.stack(attention.blocks) if watched else torch.zeros(0, batch, width, span)
        return hidden, blocks

    def _run(
        self, hidden: Tensor, start: int, stop: int, cache: Cache, positions: Sequence[int], *, prefill: bool
    ) -> Tensor:
        attention = PassAttention(cache, positions, hidden.shape[1], windows=self.windows)
        return self._run_layers(hidden, start, stop, positions, attention)

    def _run_layers(
        self, hidden: Tensor, start: int, stop: int, positions: Sequence[int], attention: PassAttention
    ) -> Tensor:
        width = hidden.shape[1]
        length = max(positions) + width
        if length > self._cos.shape[0]:
            self._grow_rotary(length)
        if len(set(positions)) == 1:
            cos = self._cos[positions[0] : positions[0] + width]
            sin = self._sin[positions[0] : positions[0] + width]
        else:
            place = torch.tensor(positions, device=self.device).view(-1, 1) + torch.arange(width, device=self.device)
            cos, sin = self._cos[place], self._sin[place]
        for index in range(start, stop):
            hidden = self._layer(index, hidden, cos, sin, attention)
        return hidden

    def _layer(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor, attention: PassAttention) -> Tensor:
        weights = self.weights[index]
        batch, width, _ = hidden.shape
        normed = weights.attention_norm(hidden)
        if self._fused:
            qkv = self._fused[index][0](normed)
        else:
            qkv = torch.cat([weights.query(normed), weights.key(normed), weights.value(normed)], -1)
        qkv = qkv.view(batch, width, self.heads + 2 * self.kv_heads, self.head_dim)
        turned = self.heads + self.kv_heads
        queries_keys, values = qkv[:, :, :turned], qkv[:, :, turned:].transpose(1, 2)
        if weights.query_norm is not None and weights.key_norm is not None:
            queries_keys = torch.cat(
                [
                    weights.query_norm(queries_keys[:, :, : self.heads]),
                    weights.key_norm(queries_keys[:, :, self.heads :]),
                ],
                2,
            )
        queries_keys = _rotate(queries_keys, cos.unsqueeze(-2), sin.unsqueeze(-2), self.rotary_dim).transpose(1, 2)
        mixed = attention(index, queries_keys[:, : self.heads], queries_keys[:, self.heads :], values)
        hidden = hidden + weights.output(mixed.transpose(1, 2).reshape(batch, width, -1))
        normed = weights.mlp_norm(hidden)
        if self._fused:
            gate, up = self._fused[index][1](normed).chunk(2, -1)
        else:
            gate, up = weights.gate(normed), weights.up(normed)
        return hidden + weights.down(weights.activation(gate) * up)

    def _grow_rotary(self, length: int) -> int:
        """Have cos and sin tables for positions below ``length``, (positions, rotary dim); returns the rotary dim."""
        size = max(64, self._cos.shape[0])
        while size < length:
            size *= 2
        assert self.parts.rotary is not None
        place = torch.arange(size, device=self.device).unsqueeze(0)
        with torch.inference_mode():
            cos, sin = self.parts.rotary(torch.empty(1, 1, 1, dtype=self.dtype, device=self.device), position_ids=place)
        self._cos = cos[0].contiguous()
        half = sin.shape[-1] // 2
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1).contiguous()
        return int(cos.shape[-1])


def fused_unavailable_reason(model: nn.Module) -> str | None:
    """Why ``model`` cannot be served by the fused backend, or None if it can."""
    parts = parts_of(model)
    if not parts.family.llama_like:
        return f"family {parts.family.name!r} does not have the Llama layout"
    rope = rope_kind(parts.rotary)
    if rope not in STATIC_ROPE:
        return f"rotary scaling {rope!r} depends on the sequence length"
    for name, module in parts.layers.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain linear layer"
    place = parts.embedding.weight.device
    for name, parameter in model.named_parameters():
        if parameter.device != place:
            return f"{name} is on {parameter.device} and the embedding on {place}; it runs on one device"
    if type(parts.head) is not nn.Linear:
        return f"the LM head is a {type(parts.head).__name__}, not a plain linear layer"
    if not parts.embedding.weight.is_floating_point():
        return "its weights are not floating point"
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """Rotary embedding of (..., head dim): the halves of the first ``rotary_dim`` turned by (cos, signed sin)."""
    if rotary_dim < x.shape[-1]:
        turned = _rotate(x[..., :rotary_dim], cos, sin, rotary_dim)
        return torch.cat([turned, x[..., rotary_dim:]], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second, first], -1) * sin


def layer_weights(layer: Any, decoder: Decoder) -> LayerWeights:
    """The weights of one Hugging Face layer by role, as views of its parameters."""
    attention, mlp = layer.self_attn, layer.mlp
    query_key_value = gate_up = None
    if hasattr(attention, "qkv_proj"):
        query_key_value = _projection(attention.qkv_proj)
        sizes = [decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim]
        query, key, value = _split(attention.qkv_proj, [sizes[0], sizes[1], sizes[1]])
    else:
        query, key, value = (_projection(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
    if hasattr(mlp, "gate_up_proj"):
        gate_up = _projection(mlp.gate_up_proj)
        half = mlp.gate_up_proj.weight.shape[0] // 2
        gate, up = _split(mlp.gate_up_proj, [half, half])
    else:
        gate, up = _projection(mlp.gate_proj), _projection(mlp.up_proj)
    return LayerWeights(
        attention_norm=layer.input_layernorm,
        mlp_norm=layer.post_attention_layernorm,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        query=query,
        key=key,
        value=value,
        output=_projection(attention.o_proj),
        gate=gate,
        up=up,
        down=_projection(mlp.down_proj),
        activation=getattr(mlp, "act_fn", None) or mlp.activation_fn,
        query_key_value=query_key_value,
        gate_up=gate_up,
    )


def _projection(linear: nn.Linear) -> Projection:
    return Projection(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _split(linear: nn.Linear, sizes: list[int]) -> list[Projection]:
    biases = [None] * len(sizes) if linear.bias is None else list(linear.bias.detach().split(sizes))
    return [Projection(w, b) for w, b in zip(linear.weight.detach().split(sizes), biases, strict=True)]


def _stack(*projections: Projection) -> Projection:
    biases = [p.weight.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias for p in projections]
    has_bias = any(p.bias is not None for p in projections)
    return Projection(torch.cat([p.weight for p in projections]), torch.cat(biases) if has_bias else None)


def _versions(owners: list[nn.Module]) -> list[tuple[int, int]]:
    """What changes when a weight is written to in place or gets other storage."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version)
        for owner in owners
        for p in owner._parameters.values()
        if p is not None
    ]
