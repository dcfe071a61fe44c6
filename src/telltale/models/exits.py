"""What each layer would predict if the model stopped there: exit states, and the quality of each exit.

"Exit layer E" means the state after layers 0..E-1, read by the model's own final norm and LM head (LayerSkip,
arXiv 2404.16710, section 4). States are taken *before* the final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import DataError
from telltale.models.decoder import Decoder
from telltale.models.draft_exits import STEPS
from telltale.models.families import Parts, parts_of
from telltale.models.loading import evaluating

_TOKENS_AT_ONCE = 1024


@contextmanager
def captured_exits(parts: Parts) -> Iterator[list[Tensor | None]]:
    """Collect the raw state after each layer, (batch, width, hidden), while the model runs inside the block.

    A state is read where the *next* module receives it, so that it is the very tensor of the outer autograd graph
    even when the layer itself runs under activation checkpointing.
    """
    states: list[Tensor | None] = [None] * len(parts.layers)
    handles = []
    for index, reader in enumerate([*list(parts.layers)[1:], parts.norm]):

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
            states[index] = args[0] if args else kwargs["hidden_states"]

        handles.append(reader.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class ExitQuality:
    """Per exit layer E = 1..L: held-out cross-entropy in nats per token, and how often its top token is the last layer's."""

    losses: list[float]
    agreement: list[float]
    tokens: int


@torch.no_grad()
def exit_quality(model: nn.Module, batches: Iterable[Tensor]) -> ExitQuality:
    """Measure every exit of ``model`` on ``batches`` of token ids, each (batch, length).

    The model is put in eval mode meanwhile. Raises :class:`~telltale.errors.DataError` if there is no token to predict.
    """
    parts = parts_of(model)
    count = len(parts.layers)
    losses = torch.zeros(count, dtype=torch.float64)
    agreed = torch.zeros(count, dtype=torch.float64)
    tokens = 0
    with evaluating(model):
        for ids in batches:
            with captured_exits(parts) as states:
                parts.base(input_ids=ids, use_cache=False)
            labels = ids[:, 1:].reshape(-1)
            tokens += labels.numel()
            flat = [state[:, :-1].reshape(-1, state.shape[-1]) for state in states if state is not None]
            for start in range(0, labels.numel(), _TOKENS_AT_ONCE):
                chunk = slice(start, start + _TOKENS_AT_ONCE)
                final = parts.head(parts.norm(flat[-1][chunk])).float()
                top = final.argmax(-1)
                for exit_index in range(count):
                    last = exit_index == count - 1
                    logits = final if last else parts.head(parts.norm(flat[exit_index][chunk])).float()
                    losses[exit_index] += nn.functional.cross_entropy(logits, labels[chunk], reduction="sum").item()
                    agreed[exit_index] += (logits.argmax(-1) == top).sum().item()
    if tokens == 0:
        raise DataError("the evaluation data holds no token to predict; expected sequences of two tokens or more.")
    return ExitQuality((losses / tokens).tolist(), (agreed / tokens).tolist(), tokens)


def draft_acceptance(decoder: Decoder, batches: Iterable[Tensor]) -> dict[int, list[float]]:
    """For each draft exit in use how often its draft is the last layer's token, by draft step, on ``batches`` as above.

    Entry i is of drafts before which i others stood; the last holds for all later ones.
    """
    heads = decoder.draft_heads
    if heads is None:
        return {}
    agreed, tokens = {layer: [0] * STEPS for layer in heads.exits}, 0
    for ids in batches:
        batch, width = ids.shape
        cache, found = decoder.new_cache(batch, width), {}
        hidden, reached = decoder.embed(ids.to(decoder.device)), 0
        for layer in [*sorted(heads.exits), decoder.layers]:
            hidden = decoder.run(hidden, reached, layer, cache, [0] * batch, prefill=True)
            found[layer], reached = hidden, layer
        last = decoder.greedy(hidden)[:, :-1]
        tokens += last.numel()
        for layer, own in agreed.items():
            for step in range(STEPS):
                own[step] += int((heads.drafts(found[layer], layer, cache, step)[:, :-1] == last).sum())
    return {layer: [count / max(tokens, 1) for count in own] for layer, own in agreed.items()}
