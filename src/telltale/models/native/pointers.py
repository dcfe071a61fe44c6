"""A model's sizes, constants and weights as the C structures have them: by address, nothing is copied."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from telltale.models.native.interface import LayerView, ModelView

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}


class ModelPointers:
    """``struct`` describes the model of ``decoder`` (a fused one); :meth:`fill` anew after its weights have moved."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._kept: list[Any] = []
        self.struct = ModelView()
        self.table_length = 0
        self.fill()

    def fill(self) -> None:
        """Point the C structures at the model's weights."""
        self._kept.clear()
        rows = [self._layer(index) for index in range(self._decoder.layers)]
        layers = (LayerView * self._decoder.layers)(*rows)
        model, norm, head = self.struct, self._decoder.parts.norm, self._decoder.parts.head
        model.layers, model.hidden, model.heads, model.kv_heads = (
            self._decoder.layers,
            self._decoder.hidden_size,
            self._decoder.heads,
            self._decoder.kv_heads,
        )
        model.head_dim, model.vocabulary = self._decoder.head_dim, self._decoder.vocabulary_size
        model.feed_forward = self._decoder.weights[0].gate.weight.shape[0]
        model.rotary_dim = self._decoder.rotary_dim
        model.is_bf16 = int(self._decoder.dtype == torch.bfloat16)
        model.norm_adds_one = int(self._decoder.family == "gemma")
        model.activation = ACTIVATIONS[activation_of(self._decoder.config)]
        model.norm_epsilon = float(getattr(norm, "variance_epsilon", None) or norm.eps)
        model.attention_scale = self._decoder.head_dim**-0.5
        scale = getattr(self._decoder.parts.embedding, "embed_scale", None)
        model.embedding_scale = 1.0 if scale is None else float(scale.to(self._decoder.dtype))
        model.embedding = self._in_place(self._decoder.parts.embedding.weight)
        model.head = self._in_place(head.weight)
        model.head_bias = self._in_place(getattr(head, "bias", None))
        model.final_norm = self._in_place(norm.weight)
        model.layer = ctypes.cast(layers, ctypes.POINTER(LayerView))
        self._kept.append(layers)
        self.point_at_tables()

    def _layer(self, index: int) -> LayerView:
        weights = self._decoder.weights[index]
        row = LayerView(window=self._decoder.windows[index] or 0)
        for name in ("query", "key", "value", "output", "gate", "up", "down"):
            projection = getattr(weights, name)
            setattr(row, name, self._in_place(projection.weight))
            setattr(row, f"{name}_bias", self._in_place(projection.bias))
        for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm"):
            module = getattr(weights, name)
            setattr(row, name, None if module is None else self._in_place(module.weight))
        return row

    def point_at_tables(self) -> None:
        """Follow the rotary tables after they have grown."""
        half = self._decoder._sin.shape[-1] // 2
        tables = [
            self._decoder._cos.float(),
            torch.cat([-self._decoder._sin[:, :half], self._decoder._sin[:, half:]], -1).float(),
        ]
        self._tables = [table.contiguous() for table in tables]
        self.struct.cosines, self.struct.sines = (table.data_ptr() for table in self._tables)
        self.table_length = self._decoder._cos.shape[0]

    def _in_place(self, parameter: Any) -> int | None:
        """Address of a parameter, None if there is none; its storage is kept alive."""
        if parameter is None:
            return None
        tensor = parameter.detach()
        self._kept.append(tensor)
        return int(tensor.data_ptr())


def activation_of(config: Any) -> str:
    """Name of the activation in the MLP."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
