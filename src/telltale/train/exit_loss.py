"""The loss of several exits through one LM head, without ever holding more than a slice of one exit's logits.

For each exit: final norm, LM head, cross-entropy on the shifted labels (LayerSkip, arXiv 2404.16710, eq. 5), computed over
slices of tokens. The gradient of a slice is taken while its logits are there, so nothing is recomputed and memory
does not grow with exits x tokens x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from telltale.errors import ConfigError, DataError
from telltale.models.families import Parts

LOGITS_AT_ONCE = 1 << 22
"""Elements of the largest logits slice (float32: 16 MB)."""


class ExitLossSettings(Protocol):
    """What the exit loss reads of a :class:`~telltale.train.layerskip.LayerSkipConfig`."""

    @property
    def exit_target(self) -> str: ...

    @property
    def distillation_temperature(self) -> float: ...


def exit_losses(
    parts: Parts,
    states: Sequence[Tensor | None],
    labels: Tensor,
    *,
    exits: Sequence[int],
    config: ExitLossSettings,
    normalizer: Tensor | float | None = None,
    shifted: bool = False,
    smoothing: float = 0.0,
) -> dict[int, Tensor]:
    """Mean loss per exit layer E in ``exits``, in nats per predicted token.

    ``states``: raw outputs of the layers, each (batch, length, hidden); ``labels``: (batch, length), -100 is ignored. They
    are the tokens themselves, or what each position predicts if ``shifted``. ``normalizer`` divides the summed losses in
    place of the number of predicted tokens. ``smoothing`` is the part of a label that is spread evenly over the vocabulary.
    With ``exit_target="distill"`` an early exit's loss is T^2 KL(last layer || exit), the last layer detached.
    Raises :class:`~telltale.errors.DataError` if every label is ignored and there is no ``normalizer``.
    """
    last = len(parts.layers)
    device = _state(states, max(exits)).device
    targets = (labels if shifted else labels[:, 1:]).reshape(-1).to(device)
    counted = (targets != -100).nonzero(as_tuple=True)[0]
    if counted.numel() == 0 and normalizer is None:
        raise DataError("every label of the batch is -100 or it holds one token only; expected a token to predict.")
    every_position = counted.numel() == targets.numel()
    targets = targets if every_position else targets[counted]
    normalizer = targets.numel() if normalizer is None else normalizer

    def read(exit_layer: int) -> Tensor:
        state = _state(states, exit_layer).to(device)
        flat = (state if shifted else state[:, :-1]).reshape(-1, state.shape[-1])
        return parts.norm(flat if every_position else flat[counted])

    teacher = None
    if config.exit_target == "distill" and any(exit_layer != last for exit_layer in exits):
        with torch.no_grad():
            teacher = read(last)
    losses = {}
    for exit_layer in exits:
        distilled = teacher if exit_layer != last else None
        objective = _Objective(config.distillation_temperature, smoothing)
        losses[exit_layer] = _head_loss(parts.head, read(exit_layer), targets, distilled, objective) / normalizer
    return losses


def _state(states: Sequence[Tensor | None], exit_layer: int) -> Tensor:
    state = states[exit_layer - 1]
    if state is None:
        raise ConfigError(
            f"layer {exit_layer} of {len(states)} did not run; expected a model that runs all of its layers "
            f"(config.num_hidden_layers) through the modules themselves."
        )
    return state


@dataclass(frozen=True)
class _Objective:
    """The temperature of distillation, and the smoothing of labels."""

    temperature: float
    smoothing: float


def _head_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, teacher: Tensor | None, objective: _Objective
) -> Tensor:
    """Summed loss of normed states (tokens, hidden) through ``head``; any head module that is not a plain linear one
    (an adapter, say) is called as it is, slice by slice under recomputation."""
    plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
    if plain:
        return _LinearHeadLoss.apply(hidden, head.weight, head.bias, targets, teacher, objective)
    vocabulary = parameters_vocabulary(head)
    width = max(1, LOGITS_AT_ONCE // vocabulary)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], width):
        part = slice(start, start + width)
        total = total + torch.utils.checkpoint.checkpoint(
            _slice_loss,
            head,
            hidden[part],
            targets[part],
            None if teacher is None else teacher[part],
            objective,
            use_reentrant=False,
        )
    return total


def _slice_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, teacher: Tensor | None, objective: _Objective
) -> Tensor:
    logits = head(hidden).float()
    if teacher is None:
        return nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=objective.smoothing)
    temperature = objective.temperature
    with torch.no_grad():
        wanted = torch.log_softmax(head(teacher).float() / temperature, -1)
    given = torch.log_softmax(logits / temperature, -1)
    return temperature**2 * nn.functional.kl_div(given, wanted, reduction="sum", log_target=True)


def parameters_vocabulary(head: nn.Module) -> int:
    """Rows of the head's largest weight: the vocabulary size of a head that is not a plain linear layer."""
    return max((p.shape[0] for p in head.parameters() if p.ndim == 2), default=1 << 15)


class _LinearHeadLoss(torch.autograd.Function):
    """Summed cross-entropy (or T^2 KL to a teacher) of a linear head, its gradients made slice by slice on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        teacher: Tensor | None,
        objective: _Objective,
    ) -> Tensor:
        kind = hidden.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            return _LinearHeadLoss._run(ctx, hidden, weight, bias, targets, teacher, objective, compute)

    @staticmethod
    def _run(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        teacher: Tensor | None,
        objective: _Objective,
        compute: torch.dtype,
    ) -> Tensor:
        matrix = weight.to(compute)
        offset = None if bias is None else bias.to(compute)
        ctx.needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        grad_hidden = torch.empty_like(hidden) if ctx.needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        width = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, hidden.shape[0], width):
            part = slice(start, start + width)
            states = hidden[part].to(compute)
            logits = nn.functional.linear(states, matrix, offset).float()
            if teacher is None:
                loss, grad = _cross_entropy(logits, targets[part], objective.smoothing)
            else:
                wanted = nn.functional.linear(teacher[part].to(compute), matrix, offset).float()
                loss, grad = _distillation(logits, wanted, objective.temperature)
            total += loss
            grad = grad.to(compute)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ matrix
            if grad_weight is not None:
                grad_weight += grad.T @ states
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads = [
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None)


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient in the logits, softmax - wanted; ``logits`` is used up.

    What is wanted is (1 - smoothing) one-hot + smoothing / vocabulary.
    """
    log_probabilities = torch.log_softmax(logits, -1)
    rows = torch.arange(targets.shape[0], device=targets.device)
    loss = -(1.0 - smoothing) * log_probabilities[rows, targets].sum()
    if smoothing:
        loss = loss - smoothing * log_probabilities.mean(-1).sum()
    grad = log_probabilities.exp_()
    grad[rows, targets] -= 1.0 - smoothing
    if smoothing:
        grad -= smoothing / logits.shape[-1]
    return loss, grad


def _distillation(logits: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(teacher || exit), summed, and its gradient in the exit's logits, T (softmax_exit - softmax_teacher)."""
    given = torch.log_softmax(logits / temperature, -1)
    teacher = torch.log_softmax(wanted / temperature, -1)
    probabilities = teacher.exp()
    loss = temperature**2 * (probabilities * (teacher - given)).sum()
    return loss, temperature * (given.exp() - probabilities)
