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
from telltale.models.agreement import disagreement
from telltale.models.attention import PassAttention, check_since, rope_by_length
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.families import parts_of


@dataclass
class Projection:
    """One linear map, or several with the same input whose rows are stacked: views of the model's own parameters."""

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

    Weights are read where the model has them and never copied, so whatever is written into them counts from then on. Weights
    that lie elsewhere and modules that were replaced are noticed when the next cache is made.
    """

    backend = "fused"

    def __init__(self, model: nn.Module, *, exact: bool = False, threads: int | None = None) -> None:
        super().__init__(model, exact=exact, threads=threads)
        reason = self.unavailable(self.model)
        if reason is not None:
            raise UnsupportedModelError(f"the {self.backend} backend cannot serve this model: {reason}.")
        self.weights: list[LayerWeights] = []
        self._cos = self._sin = torch.empty(0)
        self._angles: Any = None
        self.refresh()
        self.rotary_dim = self._grow_rotary(64)

    def refresh(self) -> None:
        """Look at the model's weights where they are now."""
        self.weights = [layer_weights(layer, self) for layer in self.parts.layers]

    def outdated_reason(self) -> str | None:
        """See :meth:`telltale.models.decoder.Decoder.outdated_reason`; rotary tables follow their frequencies."""
        reason = super().outdated_reason()
        if reason is None and not _same_angles(self._angles, _angles_of(self.parts.rotary)):
            self._cos = self._sin = torch.empty(0)
            self._grow_rotary(64)
        return reason

    def _follow(self, change: str) -> str | None:
        reason = self.unavailable(self.model) or super()._follow(change)
        if reason is None:
            self.refresh()
            reason = disagreement(self) if change == "modules" else None
        return reason

    @staticmethod
    def unavailable(model: nn.Module) -> str | None:
        """Why this backend cannot serve ``model``, or None if it can."""
        return fused_unavailable_reason(model)

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
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        prefill: bool,
        lengths: Sequence[int] | None = None,
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
        if weights.query_key_value is not None:
            qkv = weights.query_key_value(normed)
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
        if weights.gate_up is not None:
            gate, up = weights.gate_up(normed).chunk(2, -1)
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
        self._angles = _angles_of(self.parts.rotary)
        self._cos = cos[0].contiguous()
        half = sin.shape[-1] // 2
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1).contiguous()
        return int(cos.shape[-1])


def fused_unavailable_reason(model: nn.Module) -> str | None:
    """Why ``model`` cannot be served by the fused backend, or None if it can."""
    parts = parts_of(model, listed=False)
    if not parts.family.llama_like:
        return f"family {parts.family.name!r} does not have the Llama layout"
    rope = rope_by_length(model.config)
    if rope is not None:
        return f"rotary scaling {rope!r} depends on the sequence length"
    for name, module in parts.layers.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain linear layer"
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            return f"the weights of {name} are offloaded by accelerate"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, not a plain tensor"
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


def _angles_of(rotary: Any) -> Any:
    """A copy of what rotary tables are made from."""
    frequencies = getattr(rotary, "inv_freq", None)
    return None if frequencies is None else frequencies.clone(), getattr(rotary, "attention_scaling", None)


def _same_angles(before: Any, now: Any) -> bool:
    """Whether tables made from ``before`` still hold."""
    if before[0] is None or now[0] is None:
        return before[0] is now[0] and before[1] == now[1]
    return before[1] == now[1] and torch.equal(before[0], now[0])
