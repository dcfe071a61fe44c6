"""One minibatch through a layered model, whole or cut as a pipeline cuts it, with every parameter's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from telltale.train.pipeline.layers import LayeredModel, Values

Gradients = dict[str, Tensor | None]


def gradients_of(root: nn.Module) -> Gradients:
    """Copies of the gradients by name; the model's are cleared."""
    found = {name: None if p.grad is None else p.grad.clone() for name, p in root.named_parameters()}
    root.zero_grad(set_to_none=True)
    return found


def run_chain(model: LayeredModel, batch: Any, minibatch: int = 0) -> tuple[Values, Tensor]:
    """Values of the last layer and the loss."""
    values = model.inputs(batch)
    for layer in model.layers:
        values = layer.call(values, batch, minibatch)
    return values, model.loss(values, batch, minibatch)


def run_cut(model: LayeredModel, batch: Any, minibatch: int = 0) -> tuple[Tensor, Gradients, list[int]]:
    """Loss, gradients, and how many tensors crossed each cut, with a cut between all layers."""
    values, kept, crossed = model.inputs(batch), [], []
    for layer in model.layers:
        inputs = tuple(value.detach().requires_grad_(value.requires_grad) for value in values)
        values = layer.call(inputs, batch, minibatch)
        kept.append((inputs, values))
        crossed.append(len(values))
    loss = model.loss(values, batch, minibatch)
    gradients: list[Tensor | None] = [torch.ones_like(loss)]
    kept[-1] = (kept[-1][0], (loss,))
    for inputs, outputs in reversed(kept):
        wanted = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad and g is not None]
        if wanted:
            torch.autograd.backward([y for y, _ in wanted], [g for _, g in wanted])
        gradients = [value.grad for value in inputs]
    return loss.detach(), gradients_of(model.root), crossed[:-1]


def assert_same(given: Gradients, wanted: Gradients) -> None:
    """The same parameters have a gradient, equal to the last bit."""
    assert given.keys() == wanted.keys()
    for name, gradient in wanted.items():
        other = given[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name
