"""The pure PyTorch backend: fused projections, rotary tables, a preallocated cache.

It computes what the family's modules compute, with fewer and larger operations, on any device. ``open_decoder`` checks it
against the family's own forward. Quantised or adapted (LoRA) projections are left to the module backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from telltale.errors import UnsupportedModelError
from telltale.models.agreement import disagreement
from telltale.models.arithmetic import (
    LINEAR,
    Angles,
    LayerWeights,
    RotaryTables,
    layer_weights,
    outer_arithmetic,
    unknown_reason,
)
from telltale.models.attention import PassAttention, check_since, rope_by_length
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.families import parts_of


class FusedDecoder(Decoder):
    """Any family whose layers :mod:`telltale.models.arithmetic` can read, in plain tensor operations.

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
        self.outer = outer_arithmetic(self.model, self.parts)
        self.refresh()
        self.rotary = RotaryTables(self.model, self.parts, self.hidden_size)

    def refresh(self) -> None:
        """Look at the model's weights where they are now."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        self.weights = [layer_weights(layer, **sizes) for layer in self.parts.layers]

    def embed(self, ids: Tensor) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.embed`."""
        states = super().embed(ids)
        return states if self.outer.embedding_scale == 1.0 else states * self.outer.embedding_scale

    def head(self, hidden: Tensor) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.head`."""
        return self.outer.logits(super().head(hidden))

    def outdated_reason(self) -> str | None:
        """See :meth:`telltale.models.decoder.Decoder.outdated_reason`; rotary tables follow their frequencies."""
        reason = super().outdated_reason()
        if reason is None and self.rotary.outdated():
            self._tables_changed()
        return reason

    def _tables_changed(self) -> None:
        """Called after rotary tables have been made anew or have grown."""

    def _follow(self, change: str) -> str | None:
        reason = self.unavailable(self.model) or super()._follow(change)
        if reason is None:
            self.outer = outer_arithmetic(self.model, self.parts)
            if change == "modules":
                self.rotary = RotaryTables(self.model, self.parts, self.hidden_size)
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
        tables = self.rotary.at(positions, hidden.shape[1])
        for index in range(start, stop):
            own = self.rotary.of_layer[index]
            hidden = self._layer(index, hidden, None if own is None else tables[own], attention)
        return hidden

    def _layer(self, index: int, hidden: Tensor, angles: Angles | None, attention: PassAttention) -> Tensor:
        weights = self.weights[index]
        normed = hidden if weights.attention_norm is None else weights.attention_norm(hidden)
        mixed = self._mixed(index, normed, angles, attention)
        hidden = hidden + _added(weights.output(mixed), weights.attention_post_norm, weights.residual_scale)
        if not weights.parallel:
            normed = hidden if weights.mlp_norm is None else weights.mlp_norm(hidden)
        if weights.gate is None:
            inner = weights.activation(weights.up(normed))
        else:
            if weights.gate_up is not None:
                gate, up = weights.gate_up(normed).chunk(2, -1)
            else:
                gate, up = weights.gate(normed), weights.up(normed)
            inner = weights.activation(gate) * up
        return hidden + _added(weights.down(inner), weights.mlp_post_norm, weights.residual_scale)

    def _mixed(self, index: int, normed: Tensor, angles: Angles | None, attention: PassAttention) -> Tensor:
        """The heads' mixtures of values, (batch, width, heads * head dim)."""
        weights = self.weights[index]
        batch, width, _ = normed.shape
        if weights.query_key_value is not None:
            qkv = weights.query_key_value(normed)
        elif weights.norms_whole and weights.query_norm is not None and weights.key_norm is not None:
            query, key = weights.query_norm(weights.query(normed)), weights.key_norm(weights.key(normed))
            qkv = torch.cat([query, key, weights.value(normed)], -1)
        else:
            qkv = torch.cat([weights.query(normed), weights.key(normed), weights.value(normed)], -1)
        qkv = qkv.view(batch, width, self.heads + 2 * self.kv_heads, self.head_dim)
        turned = self.heads + self.kv_heads
        queries_keys, values = qkv[:, :, :turned], qkv[:, :, turned:].transpose(1, 2)
        if not weights.norms_whole and weights.query_norm is not None and weights.key_norm is not None:
            queries_keys = torch.cat(
                [
                    weights.query_norm(queries_keys[:, :, : self.heads]),
                    weights.key_norm(queries_keys[:, :, self.heads :]),
                ],
                2,
            )
        if angles is not None:
            queries_keys = self.rotary.turned(queries_keys, *angles)
        queries_keys = queries_keys.transpose(1, 2)
        mixed = attention(
            index,
            queries_keys[:, : self.heads],
            queries_keys[:, self.heads :],
            values,
            scale=weights.attention_scale,
            cap=weights.attention_cap,
        )
        return mixed.transpose(1, 2).reshape(batch, width, -1)


def _added(branch: Tensor, norm: nn.Module | None, scale: float) -> Tensor:
    """What a sublayer adds to its residual."""
    branch = branch if norm is None else norm(branch)
    return branch if scale == 1.0 else branch * scale


def fused_unavailable_reason(model: nn.Module) -> str | None:
    """Why ``model`` cannot be served by the fused backend, or None if it can."""
    parts = parts_of(model, listed=False)
    for layer in parts.layers:
        unknown = unknown_reason(layer)
        if unknown is not None:
            return f"family {parts.family.name!r}: {unknown}"
    rope = rope_by_length(model.config)
    if rope is not None:
        return f"rotary scaling {rope!r} depends on the sequence length"
    for name, module in parts.layers.named_modules():
        if name.split(".")[-1] in LINEAR and type(module) is not nn.Linear:
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
