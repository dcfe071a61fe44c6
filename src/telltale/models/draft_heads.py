"""A decoder's draft exits: their weights in the decoder's dtype, the shortlist of its head, and drafts in plain PyTorch.

The native backend computes the same in one call (``backends/native/draft_exit.h``). A head's rows are the model's own, copied when
the exits are opened: what is written into the model's head later makes drafts worse and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import CheckpointError, UnsupportedModelError
from telltale.models.arithmetic import outer_arithmetic
from telltale.models.cache import Cache
from telltale.models.draft_exits import BIASES, FILE, MATRICES, NORMS, READS, DraftExit, DraftExits, draft_states
from telltale.models.int8_weights import Int8Weights, gathered, int8_of, packed


class DraftHeads:
    """Draft exits made ready for ``decoder``.

    Raises :class:`~telltale.errors.CheckpointError` for exits of another shape, and
    :class:`~telltale.errors.UnsupportedModelError` for a model whose head is no plain linear layer.
    """

    def __init__(self, decoder: Any, exits: DraftExits) -> None:
        check_head(decoder.parts.head)
        _check(decoder, exits)
        self._decoder = decoder
        self._outer = outer_arithmetic(decoder.model, decoder.parts)
        self.late_layers = exits.late_layers
        self.shortlist = exits.shortlist.to(decoder.device)
        options = {"device": decoder.device, "dtype": decoder.dtype}
        self.exits = {
            layer: DraftExit(layer, {name: weight.to(**options, copy=True) for name, weight in one.weights.items()})
            for layer, one in exits.exits.items()
        }
        head = decoder.parts.head
        self.head = head.weight.detach()[self.shortlist].contiguous()
        self.bias = None if head.bias is None else head.bias.detach()[self.shortlist].contiguous()
        self.short: dict[tuple[int, str], Int8Weights] = {}
        """Matrices in 8 bits by exit and name, where the model's head is; ``short_head`` is the head's."""
        own_head = int8_of(head.weight)
        self.short_head = None if own_head is None else gathered(own_head, self.shortlist)
        if own_head is not None:
            self._put_in_8_bits()

    def _put_in_8_bits(self) -> None:
        for layer, one in self.exits.items():
            for name in MATRICES:
                self.short[layer, name] = short = packed(f"draft exit {layer}: {name}", one.weights[name])
                one.weights[name].copy_(short.dequantized())

    def parameters(self, exit_layer: int) -> int:
        """Numbers that a draft step reads beside the layers below the exit."""
        weights = self.exits[exit_layer].weights
        return self.head.numel() + sum(weights[name].numel() for name in ("state", READS[0], "gate", "up", "down"))

    def states(
        self, state: Tensor, exit_layer: int, cache: Cache, positions: Sequence[int], since: Sequence[int] | None
    ) -> Tensor:
        """What the head reads, (batch, width, hidden), of states (batch, width, hidden) at ``positions`` and those that follow.

        The late layers are read one position before ``since`` (each row's first token that is not verified; the rows of one pass
        are equally far from it), or, if that is None, before each token's own position.
        """
        weights = self.exits[exit_layer].weights
        width = state.shape[1]
        if since is None:
            firsts, step = [[first + index for index in range(width)] for first in positions], 0
        else:
            firsts, step = [[first] * width for first in since], positions[0] - since[0]
        return draft_states(weights, state, self._values(cache, firsts), step)

    def drafts(self, states: Tensor, exit_layer: int, cache: Cache, step: int) -> Tensor:
        """The exit's draft ``step`` (0 is the first) behind every token of whole texts, (batch, width), from states (batch, width,
        hidden): the ``step`` tokens before each state, drafts themselves, are not verified yet. All layers have read the texts."""
        firsts = [[place - step for place in range(states.shape[1])]] * len(states)
        with torch.inference_mode():
            normed = draft_states(self.exits[exit_layer].weights, states, self._values(cache, firsts), step)
            logits = functional.linear(normed, self.head, self.bias)
            return self.shortlist[self._outer.logits(logits).float().argmax(-1)]

    def _values(self, cache: Cache, firsts: Sequence[Sequence[int]]) -> Tensor:
        """The late layers' values (batch, width, size) one position before each of ``firsts``, zero where there is none."""
        device = self.shortlist.device
        places = torch.tensor(firsts, device=device) - 1
        rows = torch.arange(len(places), device=device).view(-1, 1)
        length = max(1, int(places.max()) + 1)
        found = [cache.read(layer, length)[1][rows, :, places.clamp(min=0)].flatten(2) for layer in self.late_layers]
        return torch.cat(found, -1) * (places >= 0).unsqueeze(-1)

    def logits(self, states: Tensor, *, whole: bool = False) -> Tensor:
        """Logits (..., vocabulary) in float32 of what :meth:`states` gave, -inf for tokens off the shortlist.

        With the ``whole`` head every token has a logit: a processor may forbid all of the shortlist.
        """
        if whole:
            return self._outer.logits(self._decoder.parts.head(states)).float()
        return self.spread(self._outer.logits(functional.linear(states, self.head, self.bias)).float())

    def spread(self, short: Tensor) -> Tensor:
        """Logits of the shortlist (..., tokens) over the whole vocabulary."""
        found = short.new_full((*short.shape[:-1], self._decoder.vocabulary_size), -torch.inf)
        found[..., self.shortlist] = short
        return found


def check_head(head: Any) -> None:
    """Raise :class:`~telltale.errors.UnsupportedModelError` for an LM head whose rows cannot be taken."""
    if type(head) is not nn.Linear:
        raise UnsupportedModelError(
            f"draft exits need a model whose LM head is a plain linear layer; this one is {type(head).__module__}."
            f"{type(head).__name__}. Merge the adapter into the head if it has one; to decode without draft exits move their file "
            f"({FILE}) away, or choose drafter='ngram'."
        )


def _check(decoder: Any, exits: DraftExits) -> None:
    hidden, late = decoder.hidden_size, len(exits.late_layers) * decoder.kv_heads * decoder.head_dim
    fits = all(0 <= layer < decoder.layers for layer in exits.late_layers)
    fits = fits and exits.shortlist.ndim == 1 and len(exits.shortlist) > 0
    fits = fits and 0 <= int(exits.shortlist.min()) <= int(exits.shortlist.max()) < decoder.vocabulary_size
    for layer, one in exits.exits.items():
        wanted: dict[str, tuple[int, ...]] = {
            "state": (hidden, hidden),
            "gate": (one.width, hidden),
            "up": (one.width, hidden),
            "down": (hidden, one.width),
        }
        wanted |= dict.fromkeys(READS, (hidden, late)) | dict.fromkeys((*BIASES, *NORMS), (hidden,))
        fits = fits and 1 <= layer < decoder.layers
        fits = fits and all(tuple(one.weights[name].shape) == shape for name, shape in wanted.items())
    if not fits:
        raise CheckpointError(
            f"the draft exits are for another model: expected some of {decoder.layers} layers, {hidden} numbers wide, and tokens "
            f"below {decoder.vocabulary_size}."
        )
