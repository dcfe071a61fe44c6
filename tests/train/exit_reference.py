"""The recipe as a loop of its own: formulas of the paper written out, whole logits, every row computed and then masked.

It shares no code with the package; only the masks' random draws follow the rule that the package documents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import create_causal_mask

LAYERS = 4
E_SCALE, P_MAX, ROTATION, SEED = 0.2, 0.1, 2, 3


def model() -> Any:
    """A small Llama with weights large enough for its exits to differ."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def weights(step: int) -> dict[int, float]:
    """Equation 6 and the rotational curriculum, the last layer always on: exit layer -> weight."""
    scale = [E_SCALE * sum(range(index + 1)) for index in range(LAYERS)]
    scale[-1] = (LAYERS - 1) + E_SCALE * sum(range(LAYERS - 1))
    on = [index for index in range(LAYERS) if (index - step) % ROTATION == 0 or index == LAYERS - 1]
    total = sum(scale[index] for index in on)
    return {index + 1: scale[index] / total for index in on if scale[index] > 0}


def kept(rows: int, layer: int, step: int, microbatch: int) -> Tensor:
    """Equations 1 to 3 for one micro-batch: the rows that layer ``layer`` works on."""
    rate = (2 ** (layer / (LAYERS - 1)) - 1) * P_MAX
    if rate == 0:
        return torch.ones(rows, dtype=torch.bool)
    draws = np.random.Generator(np.random.Philox(key=[SEED, step], counter=[0, 0, layer, microbatch])).random(rows)
    return torch.from_numpy(draws >= rate)


def exit_logits(net: Any, batch: dict[str, Any], step: int, microbatch: int) -> tuple[dict[int, Tensor], int]:
    """Logits of every exit, and how many rows were dropped from layers."""
    base = net.model
    hidden = base.embed_tokens(batch["input_ids"])
    positions = batch.get("position_ids")
    positions = torch.arange(hidden.shape[1])[None] if positions is None else positions
    mask = create_causal_mask(
        config=base.config,
        inputs_embeds=hidden,
        attention_mask=batch.get("attention_mask"),
        cache=None,
        position_ids=positions,
    )
    rotary = base.rotary_emb(hidden, position_ids=positions)
    found, dropped = {}, 0
    for index, layer in enumerate(base.layers):
        after = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        rows = kept(hidden.shape[0], index, step, microbatch)
        dropped += int((~rows).sum())
        hidden = torch.where(rows[:, None, None], after, hidden)
        found[index + 1] = net.lm_head(base.norm(hidden))
    return found, dropped


def token_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss of each predicted token, zero where the label is ignored."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", label_smoothing=smoothing
    )


def power_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of a user's own, by the number of tokens if it is given."""
    each = token_losses(outputs.logits, labels) ** 1.5
    return each.sum() / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def independent(
    steps: Sequence[Sequence[Sequence[dict[str, Any]]]],
    *,
    learning_rate: float,
    each: Callable[[Tensor, Tensor], Tensor] = token_losses,
    net: Any = None,
) -> tuple[list[float], list[dict[str, Tensor]], int]:
    """Train on ``steps[step][rank][micro-batch]``: losses and gradients of each step, and the rows dropped."""
    net = net or model()
    net.train()
    losses, gradients, dropped = [], [], 0
    for step, ranks in enumerate(steps):
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for micro in ranks for batch in micro)
        total = torch.zeros(())
        for micro in ranks:
            for number, batch in enumerate(micro):
                logits, rows = exit_logits(net, batch, step, number)
                dropped += rows
                for layer, weight in weights(step).items():
                    total = total + weight * each(logits[layer], batch["labels"]).sum() / tokens
        total.backward()
        losses.append(total.item())
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= learning_rate * parameter.grad
                parameter.grad = None
    return losses, gradients, dropped


class Recorded(transformers.TrainerCallback):
    """Gradients of each step as the optimizer gets them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        )


def recording(trainer_class: type) -> type:
    """``trainer_class`` that keeps the batches it trains on, by step and micro-batch, in ``batches``."""

    class Recording(trainer_class):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model.training:
                batches = vars(self).setdefault("batches", [])
                while len(batches) <= self.state.global_step:
                    batches.append([])
                batches[self.state.global_step].append(copy.deepcopy(dict(inputs)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Recording
