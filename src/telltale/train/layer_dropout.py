"""Layer dropout per sample (LayerSkip, arXiv 2404.16710, eq. 1): x + M f(x), with M drawn per row and layer.

A dropped row is taken out of the batch before the layer runs and put back after, so that dropping saves compute.
There is no rescaling by 1/(1-p), and nothing happens in eval mode. The layer modules are not replaced: only their
``forward`` is wrapped, so the module tree and ``state_dict`` stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telltale.errors import ConfigError
from telltale.models.families import Parts
from telltale.train.trainable import check_rows, innermost

CACHE_NAMES = ("past_key_values", "cache")
"""What layers call the key-value cache: until transformers 5.23, and since."""


class LayerDropout:
    """Layer dropout on the layers of one model. ``set_rates`` sets the probabilities of a step, ``remove`` undoes it.

    Masks come from a counter-based generator keyed by (seed, step) and counted by (micro-batch, layer): the recompute
    of activation checkpointing draws the same mask again, and every rank of a data-parallel job drops as many rows. The
    micro-batch counter moves at each forward of the model that has a backward, which belongs to the forward just before
    it; a forward without gradients leaves out the rows of the one before.
    """

    def __init__(self, parts: Parts, *, seed: int = 0) -> None:
        self._layers = [innermost(layer) for layer in parts.layers]
        self._seed = seed
        self._step = 0
        self._microbatch = -1
        self._rates = [0.0] * len(self._layers)
        self.dropped = 0
        self.seen = 0
        self._counting = parts.base.register_forward_pre_hook(self._on_forward)
        for index, layer in enumerate(self._layers):
            if "forward" in vars(layer):
                raise ConfigError("this model's layers are wrapped already; expected remove() on the first recipe.")
            layer.forward = self._wrap(index, layer, layer.forward)

    def set_rates(self, rates: list[float], *, step: int) -> None:
        """Probabilities of skipping, one per layer, for optimizer step ``step``."""
        self._rates = rates
        self._step = step
        self._microbatch = -1

    def remove(self) -> None:
        """Give the layers their own ``forward`` back."""
        self._counting.remove()
        for layer in self._layers:
            vars(layer).pop("forward", None)

    def kept_rows(self, layer: int, batch: int) -> list[int]:
        """Rows of the batch that layer ``layer`` processes in the current step and micro-batch."""
        return draw_kept_rows(
            batch,
            rate=self._rates[layer],
            seed=self._seed,
            step=self._step,
            microbatch=max(self._microbatch, 0),
            layer=layer,
        )

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._microbatch += 1

    def _wrap(self, index: int, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def with_dropout(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            batch = hidden_states.shape[0]
            if not layer.training or self._rates[index] <= 0.0:
                return forward(hidden_states, *args, **kwargs)
            kept = self.kept_rows(index, batch)
            self.seen += batch
            self.dropped += batch - len(kept)
            if len(kept) == batch:
                return forward(hidden_states, *args, **kwargs)
            _refuse_used_cache(kwargs, index)
            check_rows(batch, kwargs)
            if not kept:
                return _untouched(hidden_states, layer)
            return run_rows(forward, kept, hidden_states, *args, **kwargs)

        return with_dropout


def draw_kept_rows(batch: int, *, rate: float, seed: int, step: int, microbatch: int, layer: int) -> list[int]:
    """Rows of a batch of ``batch`` that a layer processes; each is dropped with probability ``rate``, a function of the rest."""
    if rate <= 0.0:
        return list(range(batch))
    bits = np.random.Philox(key=[seed, step], counter=[0, 0, layer, microbatch])
    draws = np.random.Generator(bits).random(batch)
    return np.flatnonzero(draws >= rate).tolist()


def run_rows(forward: Callable[..., Any], kept: list[int], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``forward`` on the rows ``kept`` (at least one) of ``hidden_states`` and of whatever else has a batch dimension.

    The other rows are handed on as they are. Returns what ``forward`` does, over the whole batch.
    """
    rows = torch.tensor(kept, device=hidden_states.device)
    taken = functools.partial(_take_rows, batch=hidden_states.shape[0], rows=rows)
    output = forward(
        hidden_states.index_select(0, rows),
        *map(taken, args),
        **{name: taken(value) for name, value in kwargs.items()},
    )
    new_rows = output[0] if isinstance(output, tuple) else output
    merged = hidden_states.to(new_rows.dtype).index_copy(0, rows, new_rows)
    return (merged, *output[1:]) if isinstance(output, tuple) else merged


def _take_rows(value: Any, *, batch: int, rows: Tensor) -> Any:
    """The kept rows of whatever has a batch dimension; what is shared by all rows (size 1, or no such shape) stays."""
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == batch and batch > 1:
        return value.index_select(0, rows)
    if type(value) in (tuple, list):
        return type(value)(_take_rows(item, batch=batch, rows=rows) for item in value)
    if type(value) is dict:
        return {key: _take_rows(item, batch=batch, rows=rows) for key, item in value.items()}
    return value


def _refuse_used_cache(kwargs: dict[str, Any], layer: int) -> None:
    """Dropped rows would leave holes in a layer's cache: a fresh one is set aside, one with content is an error."""
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is None:
            continue
        if cache.get_seq_length(layer) > 0:
            raise ConfigError(f"{name} with layer dropout in train mode would lose rows; expected model.eval().")
        kwargs[name] = None


def _untouched(hidden_states: Tensor, layer: nn.Module) -> Tensor:
    """The input itself. Data-parallel reduction waits for a gradient of every parameter, so give it zeros."""
    if not (torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return hidden_states
    nothing = [parameter.reshape(-1)[:0].sum() for parameter in layer.parameters() if parameter.requires_grad]
    return hidden_states + torch.stack(nothing).sum().to(hidden_states.dtype) if nothing else hidden_states
