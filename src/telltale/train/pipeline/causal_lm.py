"""A Hugging Face causal LM as a chain: embedding, every decoder layer, final norm with LM head and loss.

Any family of ``models/families.py``. Between layers only the hidden states travel, (batch, length, hidden). Masks, rotary
tables and position ids are made again on every stage from the minibatch, by the functions that the family itself uses, so that
the chain computes to the last bit what ``model(..., use_cache=False)`` does (with a cache, GPT-2 lays its keys out otherwise
and rounds differently). A minibatch is a mapping with ``input_ids`` (batch, length), and
optionally ``labels`` of that shape (-100 is ignored; None: ``input_ids`` without the padding) and ``attention_mask`` (1: token,
0: padding). Key-value caches, packed sequences and inputs other than token ids are out of scope.

The LayerSkip recipe (arXiv 2404.16710, section 4; ``train/layerskip.py``) through a pipeline.

The one LM head that every exit is read with lives in the last layer, so exit losses are computed there: the state of an active
exit E < L leaves its stage as an extra value and is handed on to the end, and its gradient comes back the same way. A cut right
behind layer E sends it once, as the hidden states; every later cut sends it beside them. The price is per cut and minibatch

    bytes = (1 + number of active exits before the cut) x batch x length x hidden x bytes per element,      each way,

against one such term without the recipe. With the default curriculum (rotation R = L/2) two exits at most are active beside
the last one; which ones is a function of the minibatch, so ``pattern`` tells the trainer what will arrive. When the last layer's
loss is off (``always_last=False``), layers behind the deepest active exit hand values on and do no work.

Layer dropout takes rows out of a layer by masks keyed by (seed, step, layer), so it depends neither on the cut nor on the order
in which a worker runs its minibatches. A layer that no row of a minibatch passes has no gradient from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from telltale.config import check_integer
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.models.attention import PositionEmbeddings
from telltale.models.families import Parts, parts_of, unwrap
from telltale.train.exit_loss import exit_losses
from telltale.train.layer_dropout import draw_kept_rows, run_rows
from telltale.train.layerskip import LayerSkipConfig, active_exits, layer_dropout_rates, weighted_loss
from telltale.train.pipeline.layers import IGNORED, Layer, LayeredModel, Values

CausalLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (batch, length, vocabulary), labels (batch, length), not shifted) -> scalar."""

_KEYS = ("input_ids", "labels", "attention_mask")
_SLIDING, _FULL = "sliding_attention", "full_attention"
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
_NO_CACHE: dict[str, Any] = {_CACHE: None}
"""Transformers 5.24 has another name for it and warns of the old one."""


def causal_lm(model: nn.Module, *, loss: CausalLoss | None = None) -> LayeredModel:
    """``model`` (a Hugging Face causal LM, PEFT and DistributedDataParallel wrappers looked through) as a chain.

    ``loss`` None is the model's own: the mean cross-entropy of the shifted labels in float32, in nats per predicted token. A
    tied head is held by the first and by the last layer, see
    :meth:`~telltale.train.pipeline.layers.LayeredModel.shared_parameters`.

    Raises :class:`~telltale.errors.UnsupportedModelError` for an unknown family, and for an adapter that keeps parameters
    outside of the model's layers (prompt tuning).
    """
    root = unwrapped(model)
    parts = parts_of(root)
    judge = loss or own_loss(root)
    decoder = DecoderLayers(root, parts)

    def read(values: Values, batch: Any, minibatch: int) -> Values:
        return (parts.head(parts.norm(values[0])),)

    def judged(values: Values, batch: Any, minibatch: int) -> Tensor:
        return judge(values[0], labels_of(batch))

    layers = (
        embedding_layer(parts),
        *(_decoder_layer(decoder, index) for index in range(len(decoder.modules))),
        Layer(parts.family.head, head_module(parts), read),
    )
    return LayeredModel(root, layers, inputs=inputs_of(parts), loss=judged, weight=predicted_tokens)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under its wrappers; :class:`~telltale.errors.UnsupportedModelError` if a wrapper has parameters of its own."""
    root = unwrap(model)
    foreign = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in root.parameters()}
    if foreign:
        names = [name for name, parameter in model.named_parameters() if id(parameter) in foreign]
        raise UnsupportedModelError(
            f"{type(model).__name__} trains {names[0]}, which is outside of {type(root).__name__}'s layers; expected an adapter "
            f"inside of them, such as LoRA."
        )
    return root


def token_ids(batch: Any) -> Tensor:
    """The minibatch's ``input_ids``, (batch, length). Raises :class:`~telltale.errors.DataError` for anything else in it."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        given = f"a mapping of {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"a minibatch is {given}; expected a mapping with input_ids, and labels and attention_mask if any."
        )
    foreign = [key for key in batch if key not in _KEYS]
    if foreign:
        raise DataError(
            f"the minibatch holds {foreign[0]!r}, which would be left out; expected {', '.join(_KEYS)} alone."
        )
    ids = batch["input_ids"]
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise DataError(f"input_ids is {_described(ids)}; expected integer token ids (batch, length), at least one.")
    for key in _KEYS[1:]:
        other = batch.get(key)
        if other is not None and (not isinstance(other, torch.Tensor) or other.shape != ids.shape):
            raise DataError(f"{key} is {_described(other)}; expected the shape of input_ids, {tuple(ids.shape)}.")
    return ids


def labels_of(batch: Any) -> Tensor:
    """Labels (batch, length), not shifted. Raises :class:`~telltale.errors.DataError` if there is no token to predict."""
    if not predicted_tokens(batch):
        raise DataError("every label of the minibatch is -100 or it holds one token only; expected a token to predict.")
    return _labels(batch)


def predicted_tokens(batch: Any) -> float:
    """Tokens of the minibatch that have a label: what the mean loss is over."""
    return float((_labels(batch)[:, 1:] != IGNORED).sum())


def _labels(batch: Any) -> Tensor:
    ids = token_ids(batch)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask.to(ids.device) == 0, IGNORED)
    return labels


def own_loss(root: Any) -> CausalLoss:
    """The loss that ``root(input_ids, labels=labels)`` returns."""

    def judge(logits: Tensor, labels: Tensor) -> Tensor:
        return root.loss_function(logits=logits, labels=labels, vocab_size=root.config.vocab_size)

    return judge


def inputs_of(parts: Parts) -> Callable[[Any], Values]:
    """Minibatch -> (token ids,), checked once, where the minibatch enters."""
    places = getattr(parts.position_embedding, "num_embeddings", None)

    def inputs(batch: Any) -> Values:
        ids = token_ids(batch)
        if places is not None and ids.shape[1] > places:
            raise DataError(f"the minibatch has sequences of {ids.shape[1]} tokens; the model has {places} positions.")
        return (ids,)

    return inputs


def embedding_layer(parts: Parts) -> Layer:
    """Token ids -> states: the embedding (and its scaling), learned positions and dropout where the family has them."""
    own = {"embedding": parts.embedding, "positions": parts.position_embedding}
    dropout = getattr(parts.base, "drop", None) or getattr(parts.base, "emb_dropout", None)
    module = nn.ModuleDict({name: part for name, part in (own | {"dropout": dropout}).items() if part is not None})

    def embed(values: Values, batch: Any, minibatch: int) -> Values:
        hidden = parts.embedding(values[0])
        if parts.position_embedding is not None:
            hidden = hidden + parts.position_embedding(_places(hidden))
        return (hidden if dropout is None else dropout(hidden),)

    return Layer(parts.family.embedding, module, embed)


def head_module(parts: Parts) -> nn.Module:
    """What the last layer owns: the final norm and the LM head."""
    return nn.ModuleDict({"norm": parts.norm, "head": parts.head})


class DecoderLayers:
    """The model's own decoder layers, with what they are given beside the hidden states: mask, positions, rotary embeddings.

    All layers of a stage get the same ones, so those of the last minibatch are kept. Rotary frequencies that depend on the
    length of a sequence (``dynamic``, ``longrope``) are those of this minibatch's length, whatever was seen before.
    """

    def __init__(self, root: Any, parts: Parts) -> None:
        self._config = root.config
        self._rotary = None if parts.rotary is None else PositionEmbeddings(parts.rotary)
        self.modules: list[nn.Module] = list(parts.layers)
        self.names = [f"{parts.family.layers}.{index}" for index in range(len(self.modules))]
        self.kinds = [_attention_kind(root.config, index) for index in range(len(self.modules))]
        """Per layer "full_attention" or "sliding_attention", as the family's own forward decides it."""
        self._key: Any = None
        self._padding: Tensor | None = None
        self._masks: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}

    def run(self, index: int, hidden: Tensor, batch: Any, *, rows: list[int] | None = None) -> Tensor:
        """Layer ``index`` on the states (batch, length, hidden) of this minibatch; on ``rows`` alone if given, at least one."""
        layer, arguments = self.modules[index], self._arguments(index, hidden, batch)
        output = layer(hidden, **arguments) if rows is None else run_rows(layer, rows, hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def _arguments(self, index: int, hidden: Tensor, batch: Any) -> dict[str, Any]:
        self._renew(hidden, batch.get("attention_mask"))
        kind = self.kinds[index]
        if kind not in self._masks:
            make = create_sliding_window_causal_mask if kind == _SLIDING else create_causal_mask
            self._masks[kind] = make(
                config=self._config,
                inputs_embeds=hidden,
                attention_mask=self._padding,
                position_ids=self._shared["position_ids"],
                **_NO_CACHE,
            )
        return {"attention_mask": self._masks[kind], "use_cache": False, **self._shared}

    def _renew(self, hidden: Tensor, padding: Tensor | None) -> None:
        # A tensor made in inference mode cannot be saved for a backward; one written to in place is another mask.
        key = (hidden.shape, hidden.dtype, hidden.device, torch.is_inference_mode_enabled(), _version(padding))
        if key == self._key and padding is self._padding:
            return
        self._key, self._padding = key, padding
        self._masks = {}
        places = _places(hidden)
        self._shared = {"position_ids": places}
        if self._rotary is not None:
            self._shared["position_embeddings"] = self._rotary(hidden, places, [0], prefill=True)


def _attention_kind(config: Any, layer: int) -> str:
    if config.model_type in ("mistral", "phi3"):
        return _FULL if config.sliding_window is None else _SLIDING
    if config.model_type in ("qwen2", "qwen3"):
        return config.layer_types[layer]
    return _FULL


def _decoder_layer(decoder: DecoderLayers, index: int) -> Layer:
    def call(values: Values, batch: Any, minibatch: int) -> Values:
        return (decoder.run(index, values[0], batch),)

    return Layer(decoder.names[index], decoder.modules[index], call)


def _places(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def layerskip_stages(model: nn.Module, config: LayerSkipConfig, *, minibatches_per_step: int = 1) -> LayeredModel:
    """``model`` (a Hugging Face causal LM) as a chain whose loss is the recipe's J(X, Y, t) (eq. 5), in nats per predicted token.

    Minibatches are those of :func:`~telltale.train.pipeline.causal_lm.causal_lm`. Minibatch b belongs to step
    t = b // ``minibatches_per_step`` of the recipe's schedules and is the (b mod ``minibatches_per_step``)-th of its
    micro-batches; give the plan's ``microbatches`` where the policy updates once per batch. Loss and gradients are to the last
    bit those of :class:`~telltale.train.layerskip.LayerSkip` at the same step.

    Raises :class:`~telltale.errors.ConfigError` if the configuration needs ``total_steps`` and has none, or if the recipe is on
    the model already, and :class:`~telltale.errors.UnsupportedModelError` for an unknown family.
    """
    check_integer("minibatches_per_step", minibatches_per_step, low=1)
    root = unwrapped(model)
    parts = parts_of(root)
    if any("forward" in vars(layer) for layer in parts.layers):
        raise ConfigError("this model's layers are wrapped already; expected remove() on the recipe that is on it.")
    schedule = _Schedule(config, len(parts.layers), minibatches_per_step)
    decoder = DecoderLayers(root, parts)
    layers = (
        embedding_layer(parts),
        *(_layerskip_decoder_layer(decoder, index, schedule) for index in range(len(parts.layers))),
        Layer(parts.family.head, head_module(parts), _reader(root, parts, schedule)),
    )
    return LayeredModel(
        root,
        layers,
        inputs=inputs_of(parts),
        loss=lambda values, batch, minibatch: values[0],
        weight=predicted_tokens,
        pattern=schedule.pattern,
    )


class _Schedule:
    """The recipe's equations by minibatch."""

    def __init__(self, config: LayerSkipConfig, layers: int, minibatches_per_step: int) -> None:
        self.config = config
        self.layers = layers
        self._per_step = minibatches_per_step
        self._exits_at = lru_cache(256)(lambda step: active_exits(layers, config, step))
        self._rates_at = lru_cache(256)(lambda step: layer_dropout_rates(layers, config, step).tolist())
        self.exits(0), self._rates_at(0)

    def exits(self, minibatch: int) -> dict[int, float]:
        """Active exit layer -> weight, shallowest first."""
        return self._exits_at(minibatch // self._per_step)

    def pattern(self, minibatch: int) -> Hashable:
        """The active exits, which decide what crosses the cuts."""
        return tuple(self.exits(minibatch))

    def kept_rows(self, layer: int, batch: int, minibatch: int) -> list[int]:
        """Rows that ``layer`` processes in train mode."""
        step, microbatch = divmod(minibatch, self._per_step)
        rate = self._rates_at(step)[layer]
        return draw_kept_rows(batch, rate=rate, seed=self.config.seed, step=step, microbatch=microbatch, layer=layer)


def _layerskip_decoder_layer(decoder: DecoderLayers, index: int, schedule: _Schedule) -> Layer:
    """Values are the hidden states, then the states of the active exits that later layers have gone past, shallowest first."""
    module = decoder.modules[index]

    def call(values: Values, batch: Any, minibatch: int) -> Values:
        exits = schedule.exits(minibatch)
        if index >= max(exits):
            return values
        hidden, passed = values[0], values[1:]
        if index in exits:
            passed = (*passed, hidden)
        size = hidden.shape[0]
        kept = schedule.kept_rows(index, size, minibatch) if module.training else list(range(size))
        if kept:
            hidden = decoder.run(index, hidden, batch, rows=None if len(kept) == size else kept)
        return (hidden, *passed)

    return Layer(decoder.names[index], module, call)


def _reader(root: Any, parts: Parts, schedule: _Schedule) -> Callable[[Values, Any, int], Values]:
    plain = own_loss(root)

    def read(values: Values, batch: Any, minibatch: int) -> Values:
        if not predicted_tokens(batch):
            return (sum(value.sum() for value in values) * 0.0,)  # type: ignore[return-value]
        labels, exits = labels_of(batch), schedule.exits(minibatch)
        deepest = max(exits)
        if list(exits) == [schedule.layers]:
            return (plain(parts.head(parts.norm(values[0])), labels),)
        states: list[Tensor | None] = [None] * schedule.layers
        states[deepest - 1] = values[0]
        for exit_layer, state in zip((layer for layer in exits if layer != deepest), values[1:], strict=True):
            states[exit_layer - 1] = state
        losses = exit_losses(parts, states, labels, exits=list(exits), config=schedule.config)
        return (weighted_loss(losses, exits),)

    return read
