"""A model, a loss and some minibatches as Hessian operators, without a trace left on the training run.

The probe has its own minibatches and its own random state; gradients, buffers, train/eval flags and the optimizer stay
as they are, so that training with a probe is bit-identical to training without (see ``telltale.train.sharpness.isolation``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.hessian import HessianOperator, leaves_of
from telltale.train.sharpness.isolation import MODES, in_full_precision, isolated, on_device, original, own_random_state

_HOOKS = "telltale: this graph saves its tensors through hooks"

LossFunction = Callable[[nn.Module, Any], Tensor]
"""loss_fn(model, batch) -> the mean loss of the minibatch, a scalar tensor."""


class Probe:
    """``model`` and ``loss_fn`` on fixed minibatches: N trainable parameters, one Hessian operator for each minibatch.

    Tensors in ``batches`` (through mappings, lists and tuples) are moved to the model's device.
    ``loss_fn`` None is :func:`language_model_loss`. ``mode`` is the train/eval flag during the probe's forward pass:
    "as is" keeps each module's own, "no dropout" that of batch norm only and evaluates the rest; dropout masks come from
    ``seed`` and are the same at every call. Frozen parameters and those that no minibatch's loss uses are excluded, with the
    reason in ``excluded``.

    Raises :class:`~telltale.errors.ConfigError` for a model that is no module and a loss that is no function,
    :class:`~telltale.errors.DataError` for no minibatches, nothing trainable, or a loss that reads parameters past the model
    that it is given, :class:`~telltale.errors.NumericalError` for parameters or a loss that are not finite, and
    :class:`~telltale.errors.UnsupportedModelError` for reentrant activation checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        batches: Iterable[Any],
        *,
        mode: str = "as is",
        seed: int = 0,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_integer("seed", seed, low=0)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
        if loss_fn is not None and not callable(loss_fn):
            raise ConfigError(f"loss_fn is {loss_fn!r}; expected a function loss_fn(model, batch), or None.")
        if not isinstance(batches, Iterable):
            raise ConfigError(f"the probe is {type(batches).__name__}; expected a list (or loader) of minibatches.")
        self.model = original(model)
        self.loss_fn: LossFunction = loss_fn or language_model_loss
        self.mode, self.seed = mode, seed
        devices = {parameter.device for parameter in self.model.parameters()}
        with own_random_state(seed):
            self.batches = list(batches)
        if len(devices) == 1:
            device = devices.pop()
            self.batches = [on_device(batch, device) for batch in self.batches]
        if not self.batches:
            raise DataError("the probe has no minibatches; expected at least one.")
        self.excluded: dict[str, str] = {
            name: "frozen" for name, parameter in self.model.named_parameters() if not parameter.requires_grad
        }
        if len(self.excluded) == len(list(self.model.parameters())):
            raise DataError("the model has no trainable parameters; expected at least one that requires a gradient.")
        self._recomputes = False
        used: set[str] = set()
        for index in range(len(self.batches)):
            used |= self._used_names(index)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in used:
                self.excluded[name] = "unused"
        if not used:
            raise DataError("the loss uses none of the model's trainable parameters; expected a loss of the model.")

    @property
    def names(self) -> list[str]:
        """Of the parameters that the operators act on, in their order."""
        return [name for name, _ in self.model.named_parameters() if name not in self.excluded]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The live parameters that the operators act on."""
        return [parameter for name, parameter in self.model.named_parameters() if name not in self.excluded]

    @property
    def size(self) -> int:
        """N, the number of trainable, used parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def operators(self) -> Sequence[HessianOperator]:
        """The Hessian of each minibatch at the parameters' present values; each is built when it is taken out."""
        return _Operators(self)

    def operator(self, index: int = 0) -> HessianOperator:
        """The Hessian of minibatch ``index`` at the parameters' present values; one forward pass and one gradient.

        It holds the graph: let go of it before the optimizer's next step changes the parameters in place.
        """
        with self._forward(index) as (loss, parameters):
            self._check_finite()
            leaves = [parameters[name] for name in self.names]
            if self._recomputes:
                return _Recomputing(loss, leaves, self._isolated)
            return HessianOperator(loss, leaves)

    def loss(self, index: int = 0) -> float:
        """The loss of minibatch ``index`` in nats (or whatever ``loss_fn`` returns), without a trace on the model."""
        with self._forward(index) as (loss, _):
            return float(loss.detach())

    def _isolated(self) -> AbstractContextManager[dict[str, Tensor]]:
        return isolated(self.model, mode=self.mode, seed=self.seed, keep=not self._recomputes)

    @contextmanager
    def _forward(self, index: int) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        with self._isolated() as parameters:
            yield self.loss_fn(self.model, in_full_precision(self.batches[index])), parameters

    def _used_names(self, index: int) -> set[str]:
        """Names of the parameters that the loss of minibatch ``index`` uses; notes whether its graph recomputes."""
        live = {id(parameter) for parameter in self.model.parameters()}
        if not self._recomputes:
            try:
                with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS), self._forward(index) as (loss, inside):
                    return _names_in(loss, inside, live)
            except RuntimeError as error:
                if _HOOKS not in str(error):
                    raise
            self._recomputes = True
        with self._forward(index) as (loss, inside):
            return _names_in(loss, inside, live)

    def _check_finite(self) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not bool(torch.isfinite(parameter).all()):
                raise NumericalError(f"parameter {name} holds NaN or infinite values; expected finite parameters.")


def language_model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Next-token cross-entropy of a Hugging Face causal LM, nats per token.

    ``batch`` is token ids (batch, length), or a mapping with input_ids and optionally attention_mask and labels; a
    missing label predicts the ids themselves, padding left out.
    """
    fields = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if "input_ids" not in fields:
        raise DataError(f"the batch has {', '.join(fields) or 'nothing'}; expected input_ids.")
    if "labels" not in fields:
        labels = fields["input_ids"]
        mask = fields.get("attention_mask")
        fields["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    loss: Tensor = model(**fields, use_cache=False).loss
    return loss


class _Recomputing(HessianOperator):
    """For a graph that runs parts of the model anew in every product (activation checkpointing): those run isolated as well.

    Left outside, they would move batch norm's running statistics, and see other train/eval flags than the forward pass did.
    """

    def __init__(
        self, loss: Tensor, parameters: Sequence[Tensor], around: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._around = around
        super().__init__(loss, parameters)

    def matvec(self, v: Tensor) -> Tensor:
        """H v. (N,) -> (N,)."""
        with self._around():
            return super().matvec(v)


def _names_in(loss: Any, inside: Mapping[str, Tensor], live: set[int]) -> set[str]:
    """Names of the parameters ``inside`` that ``loss`` reaches; ``live``: ids of those that the model has outside."""
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return set()
    leaves = leaves_of(loss)
    strays = leaves & (live - {id(parameter) for parameter in inside.values()})
    if strays:
        raise DataError(
            f"the loss reads {len(strays)} parameters past the model that it is given; expected loss_fn(model, batch) to take "
            f"them from its argument, where half-precision parameters are float32 copies."
        )
    return {name for name, parameter in inside.items() if id(parameter) in leaves}


class _Operators(Sequence[HessianOperator]):
    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def __len__(self) -> int:
        return len(self._probe.batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._probe.operator(item) for item in range(len(self))[index]]
        return self._probe.operator(range(len(self))[index])
