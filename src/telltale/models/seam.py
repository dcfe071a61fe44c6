"""What a family does around its layers, asked of the family itself: embedding, what each layer is called with, and the head.

For families outside the table. Two twins share the model's weights. In one the layers are replaced by recorders, so that its
forward shows what enters the first layer and with which arguments each layer is called (rotary embeddings by kind of layer, say).
In the other the whole stack is replaced by a stub, so that its forward is the head alone, with whatever scale or soft cap the
family has there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from telltale.errors import UnsupportedModelError
from telltale.models.families import Parts
from telltale.models.twin import twin_of


class FamilySeam:
    """The two twins of one model; ``parts`` are found by structure."""

    def __init__(self, model: Any, parts: Parts) -> None:
        self._kind = getattr(model.config, "model_type", "")
        self._recorders = [_Recorder(layer) for layer in parts.layers]
        stack = nn.ModuleList(self._recorders)
        self._skeleton = _part_of(model, twin_of(model, model.config, replaced={id(parts.layers): stack}), parts.base)
        self._stub = _Stub()
        self._head = twin_of(model, model.config, replaced={id(parts.base): self._stub})
        self._stub.eval()

    @property
    def entering(self) -> Tensor:
        """What entered the first layer in the last call of :meth:`arguments`: the states given there, scaled and with learned
        positions added as the family does with embedded tokens."""
        return self._recorders[0].entering

    def arguments(self, hidden: Tensor, place: Tensor) -> list[dict[str, Any]]:
        """What each layer is called with for tokens at ``place`` (batch, width), masks and caches left out.

        Raises :class:`~telltale.errors.UnsupportedModelError` for a bias by distance, which depends on the whole row.
        """
        self._walk(hidden, place)
        found = [recorder.arguments for recorder in self._recorders]
        if any(isinstance(one.get("alibi"), Tensor) for one in found):
            raise UnsupportedModelError(
                f"this {self._kind} model cannot be decoded layer by layer: its attention adds a bias by distance (alibi), which "
                f"its layers are handed for the whole row; expected a family with rotary or learned positions."
            )
        return found

    def _walk(self, hidden: Tensor, place: Tensor) -> None:
        """Send states past the recorders. Some families take a layer's states out of a tuple, the others as they are."""
        try:
            self._skeleton(inputs_embeds=hidden, position_ids=place, use_cache=False)
        except IndexError:
            if self._recorders[0].gives_tuple:
                raise
        if self._recorders[-1].entering.shape == hidden.shape:
            return
        for recorder in self._recorders:
            recorder.gives_tuple = True
        self._skeleton(inputs_embeds=hidden, position_ids=place, use_cache=False)

    def stored_shape(self, layer: Any, hidden: Tensor, place: Tensor, cache_name: str) -> tuple[int, int]:
        """Heads and lanes of the keys that ``layer`` stores: families differ in whether they repeat them first."""
        store = _Store()
        mask = torch.zeros(1, 1, hidden.shape[1], hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        layer(hidden, attention_mask=mask, **{**self.arguments(hidden, place)[0], cache_name: store})
        return store.shape

    def head(self, normed: Tensor) -> Tensor:
        """Logits of normed states (batch, width, hidden)."""
        self._stub.states = normed
        ids = torch.zeros(normed.shape[:2], dtype=torch.int64, device=normed.device)
        return self._head(input_ids=ids, use_cache=False).logits


class _Recorder(nn.Module):
    """Stands in a layer's place, keeps what it is called with, and hands the states on."""

    LEFT_OUT = (
        "attention_mask",
        "cache",
        "past_key_values",
        "layer_past",
        "past_key_value",
        "use_cache",
        "hidden_states",
    )

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some families look up what kind of layer it is.
        for name, value in vars(layer).items():
            if (
                not name.startswith("_")
                and not isinstance(value, (nn.Module, Tensor))
                and name not in ("training", "forward")
            ):
                setattr(self, name, value)
        self.gives_tuple = False
        self.entering = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **arguments: Any) -> Any:
        self.entering = hidden_states
        self.arguments = {name: value for name, value in arguments.items() if name not in self.LEFT_OUT}
        return (hidden_states, None) if self.gives_tuple else hidden_states


class _Store:
    """A cache that remembers the shape of what it was given."""

    shape = (0, 0)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.shape = (keys.shape[1], keys.shape[3])
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class _Stub(nn.Module):
    """Stands in the whole stack's place and gives the states that it was told."""

    states = torch.empty(0)

    def forward(self, *args: Any, **arguments: Any) -> Any:
        return MoeModelOutputWithPast(last_hidden_state=self.states)


def _part_of(model: nn.Module, twin: nn.Module, part: nn.Module) -> Any:
    """The module of ``twin`` that stands where ``part`` stands in ``model``."""
    name = next(name for name, module in model.named_modules() if module is part)
    return twin.get_submodule(name)
