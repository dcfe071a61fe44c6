"""The LayerSkip recipe (arXiv 2404.16710, section 4; ``train/layerskip.py``) through a pipeline.

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

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from telltale.configuration import check_integer
from telltale.errors import ConfigError
from telltale.models.families import Parts, parts_of
from telltale.train.exit_loss import exit_losses
from telltale.train.layer_dropout import draw_kept_rows
from telltale.train.layerskip import LayerSkipConfig, active_exits, layer_dropout_rates, weighted_loss
from telltale.train.pipeline.layered import Layer, LayeredModel, Values
from telltale.train.pipeline.splitters.causal_lm import (
    DecoderLayers,
    embedding_layer,
    head_module,
    inputs_of,
    labels_of,
    own_loss,
    unwrapped,
)


def layerskip_stages(model: nn.Module, config: LayerSkipConfig, *, minibatches_per_step: int = 1) -> LayeredModel:
    """``model`` (a Hugging Face causal LM) as a chain whose loss is the recipe's J(X, Y, t) (eq. 5), in nats per predicted token.

    Minibatches are those of :func:`~telltale.train.pipeline.splitters.causal_lm.causal_lm`. Minibatch b belongs to step
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
        *(_decoder_layer(decoder, index, schedule) for index in range(len(parts.layers))),
        Layer(parts.family.head, head_module(parts), _reader(root, parts, schedule)),
    )
    return LayeredModel(
        root, layers, inputs=inputs_of(parts), loss=lambda values, batch, minibatch: values[0], pattern=schedule.pattern
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


def _decoder_layer(decoder: DecoderLayers, index: int, schedule: _Schedule) -> Layer:
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
