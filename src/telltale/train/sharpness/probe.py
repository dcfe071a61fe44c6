"""A model, a loss and some minibatches as Hessian operators, without a trace left on the training run.

The probe has its own minibatches and its own random state; gradients, buffers, train/eval flags and the optimizer stay
as they are, so that training with a probe is bit-identical to training without (see ``telltale.train.sharpness.isolation``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError, NumericalError, UnsupportedModelError
from telltale.signals.hessian import HessianOperator, computing, leaves_of
from telltale.signals.quiet import Quiet, own_precision
from telltale.signals.receipt import Receipt, all_finite, with_gradient
from telltale.train.sharpness.isolation import (
    MODES,
    Isolated,
    in_full_precision,
    live_of,
    on_device,
    original,
    own_random_state,
    uncompiled,
)

_HOOKS = "telltale: this graph saves its tensors through hooks"
FROZEN, NOT_CHOSEN, UNUSED, OUTSIDE = "frozen", "not chosen", "unused", "outside the model"

LossFunction = Callable[[nn.Module, Any], Tensor]
"""loss_fn(model, batch) -> the mean loss of the minibatch, a scalar tensor."""


class Probe:
    """``model`` and ``loss_fn`` on fixed minibatches: N trainable parameters, one Hessian operator for each minibatch.

    Tensors in ``batches`` (through mappings, lists and tuples) are moved to the model's device.
    ``loss_fn`` None is :func:`language_model_loss`. ``parameters`` chooses some: names of parameters, names of modules (all that
    is in them), or patterns such as ``*.bias``; None takes all. ``mode`` is the train/eval flag during the probe's forward pass:
    "as is" keeps each module's own, "no dropout" that of batch norm only and evaluates the rest; dropout masks come from
    ``seed`` and are the same at every call. Parameters that are frozen, not chosen, or used by no minibatch's loss are excluded,
    with the reason in ``excluded``; so are those that the loss trains beside the model.

    Forward passes run on copies of parameters, buffers, generators and plain attributes; half precision becomes float32. An
    operator is checked when it is opened: see :mod:`telltale.signals.receipt`.

    Raises :class:`~telltale.errors.ConfigError` for a model that is no module, a loss that is no function and a choice that
    names nothing, :class:`~telltale.errors.DataError` for no minibatches, nothing trainable, or a loss that reads parameters
    past the model that it is given, :class:`~telltale.errors.NumericalError` for parameters or a loss that are not finite, and
    :class:`~telltale.errors.UnsupportedModelError` for reentrant activation checkpointing and for a model or loss that cannot
    be computed in full precision.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        batches: Iterable[Any],
        *,
        parameters: Iterable[str] | None = None,
        mode: str = "as is",
        seed: int = 0,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_integer("seed", seed, low=0)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
        if loss_fn is not None and not callable(loss_fn):
            raise ConfigError(f"loss_fn is {loss_fn!r}; expected a function loss_fn(model, batch), or None.")
        if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping)):
            raise ConfigError(f"the probe is {type(batches).__name__}; expected a list (or loader) of minibatches.")
        self.model = original(model)
        self.loss_fn: LossFunction = uncompiled(loss_fn or language_model_loss)
        self.mode, self.seed = mode, seed
        self.chosen = None if parameters is None else chosen_names(parameters, self.model)
        self.isolated = Isolated(self.model, self.loss_fn, mode=mode, seed=seed)
        devices = {parameter.device for parameter in self.model.parameters()}
        with own_random_state(seed):
            self.batches = list(batches)
        if len(devices) == 1:
            device = devices.pop()
            self.batches = [on_device(batch, device) for batch in self.batches]
        if not self.batches:
            raise DataError("the probe has no minibatches; expected at least one.")
        self.excluded: dict[str, str] = self._left_out()
        if len(self.excluded) == len(list(self.model.parameters())):
            raise DataError(
                "the model has no trainable parameters among those chosen; expected at least one that requires a gradient."
            )
        self.receipts: dict[int, Receipt] = {}
        """Of each minibatch, from when its operator was last checked."""
        self.outside: list[Tensor] = []
        """What the loss trains and reads that is not the model's."""
        self._recomputes, self._keep = False, True
        used: set[str] = set()
        for index in range(len(self.batches)):
            used |= self._used_names(index)
        for name, _ in self.model.named_parameters():
            if name not in self.excluded and name not in used:
                self.excluded[name] = UNUSED
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

    def operator(self, index: int = 0, *, check: bool = True) -> HessianOperator:
        """The Hessian of minibatch ``index`` at the parameters' present values; one forward pass and one gradient.

        ``check`` adds two products and two gradients, and leaves their residuals in ``receipts``; what fails is refused. The
        operator holds its own copy of the parameters.
        """
        self._check_finite()
        if self._keep:
            quiet = self._quiet()
            try:
                return self._opened(index, check, quiet)
            except UnsupportedModelError:
                if not quiet.kept:
                    raise
            # Something about the model does not go with the kept second derivatives; PyTorch's own do.
            self._keep = False
        return self._opened(index, check, self._quiet())

    def loss(self, index: int = 0) -> float:
        """The loss of minibatch ``index`` in nats (or whatever ``loss_fn`` returns), without a trace on the model."""
        values = self._values()
        return float(self._computed(index, values, self._quiet()).detach())

    def _opened(self, index: int, check: bool, quiet: Quiet) -> HessianOperator:
        values, buffers = self._values(), self.isolated.buffers()
        loss = self._computed(index, values, quiet, buffers)
        names = self.names
        leaves = [values[name] for name in names]

        def at(moved: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
            dtype = moved[0].dtype
            there = {name: value.detach().to(dtype) for name, value in values.items()}
            there |= dict(zip(names, moved, strict=True))
            beside = Quiet(dtype, drawn=leaves[0].dtype, keep=False, renormalise=False)
            batch, inside = in_full_precision(self.batches[index], dtype), self.isolated.buffers(dtype)
            if self._recomputes:
                return self.isolated.run(
                    lambda: with_gradient(self.loss_fn(self.model, batch), moved), there, inside, beside
                )
            loss = self.isolated.run(lambda: self.loss_fn(self.model, batch), there, inside, beside)
            with own_precision():
                return with_gradient(loss, moved)

        kind: Any = HessianOperator
        extra: dict[str, Any] = {"suspects": self._suspects()}
        if self._recomputes:
            kind = _Recomputing
            extra["around"] = lambda thunk: self.isolated.run(thunk, values, buffers, self._quiet())
        operator: HessianOperator = kind(loss, leaves, at=at, names=names, fixed=quiet.fixed, check=check, **extra)
        if operator.receipt is not None:
            self.receipts[index] = operator.receipt
        return operator

    def _suspects(self) -> list[str]:
        """Modules whose backward hooks may change a gradient."""
        return [
            f"the backward hook of {name or 'the model'} ({type(module).__name__})"
            for name, module in self.model.named_modules()
            if module._backward_hooks or module._backward_pre_hooks
        ]

    def _quiet(self) -> Quiet:
        found = [parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()]
        dtype = torch.float64 if found and all(one == torch.float64 for one in found) else torch.float32
        return Quiet(dtype, keep=self._keep and not self._recomputes)

    def _values(self) -> dict[str, Tensor]:
        return self.isolated.values(trained=lambda name: name not in self.excluded)

    def _computed(
        self,
        index: int,
        values: Mapping[str, Tensor],
        quiet: Quiet,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        batch = in_full_precision(self.batches[index])
        own = self.isolated.buffers() if buffers is None else buffers
        with computing("the loss"):
            return self.isolated.run(lambda: self.loss_fn(self.model, batch), values, own, quiet)

    def _left_out(self) -> dict[str, str]:
        """Frozen parameters and those that were not chosen, with the reason."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                found[name] = FROZEN
            elif self.chosen is not None and name not in self.chosen:
                found[name] = NOT_CHOSEN
        return found

    def _used_names(self, index: int) -> set[str]:
        """Names of the parameters that the loss of minibatch ``index`` uses; notes whether its graph recomputes."""
        values = self._values()
        if not self._recomputes:
            try:
                with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
                    return self._names_in(self._computed(index, values, self._quiet()), values)
            except RuntimeError as error:  # Of PyTorch itself where the hooks are the caller's.
                if _HOOKS not in str(error):
                    raise
            self._recomputes = True
        return self._names_in(self._computed(index, values, self._quiet()), values)

    def _names_in(self, loss: Any, inside: Mapping[str, Tensor]) -> set[str]:
        """Names of the model's parameters that ``loss`` reaches. What it reaches beside them is excluded by name, too."""
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            return set()
        live = {id(parameter): name for name, parameter in self.isolated.parameters().items()}
        names = {id(value): name for name, value in inside.items()}
        found, strays = set(), 0
        for leaf in leaves_of(loss):
            name = names.get(id(leaf))
            if name is None and id(leaf) in live:
                strays += 1
            elif name is None and isinstance(live_of(leaf), nn.Parameter):
                self._note_outside(f"a parameter of shape {tuple(leaf.shape)} that the loss holds", live_of(leaf))
            elif name is None:
                # Told of only if an optimizer holds it: inputs that require a gradient are leaves, too.
                self._note_outside(None, live_of(leaf))
            elif name is not None and name.startswith("beside."):
                self._note_outside(name, self.isolated.parameters()[name])
            elif name is not None:
                found.add(name)
        if strays:
            raise DataError(
                f"the loss reads {strays} parameters past the model that it is given; expected loss_fn(model, batch) to take "
                f"them from its argument, which runs on copies."
            )
        return found

    def _note_outside(self, name: str | None, tensor: Tensor) -> None:
        if name is not None:
            self.excluded[name] = OUTSIDE
        if all(tensor is not known for known in self.outside):
            self.outside.append(tensor)

    def _check_finite(self) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not all_finite(parameter):
                raise NumericalError(f"parameter {name} holds NaN or infinite values; expected finite parameters.")


def chosen_names(parameters: Iterable[str], model: nn.Module) -> frozenset[str]:
    """The names that ``parameters`` stands for: a parameter's own, a module's, or a pattern.

    Raises :class:`~telltale.errors.ConfigError` for one that names nothing.
    """
    if not isinstance(parameters, Iterable):
        raise ConfigError(f"parameters is {parameters!r}; expected a list of names, or None for all.")
    wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for one in wanted:
        matches = [name for name in names if name == one or name.startswith(f"{one}.") or fnmatchcase(name, str(one))]
        if not matches:
            raise ConfigError(
                f"parameters names {one!r}, which the model does not have; expected names of parameters or modules, or "
                f"patterns, such as {', '.join(names[:3])}."
            )
        found.update(matches)
    if not found:
        raise ConfigError("parameters is empty; expected at least one name, or None for all.")
    return frozenset(found)


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

    Left outside, they would move batch norm's running statistics, and see other weights than the forward pass did.
    """

    def __init__(self, *arguments: Any, around: Callable[[Callable[[], Tensor]], Tensor], **keywords: Any) -> None:
        self._around = around
        around(lambda: super(_Recomputing, self).__init__(*arguments, **keywords))  # type: ignore[arg-type,return-value]

    def matvec(self, v: Tensor) -> Tensor:
        """H v. (N,) -> (N,)."""
        return self._around(lambda: super(_Recomputing, self).matvec(v))


class _Operators(Sequence[HessianOperator]):
    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def __len__(self) -> int:
        return len(self._probe.batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._probe.operator(item) for item in range(len(self))[index]]
        return self._probe.operator(range(len(self))[index])
