"""The monitor inside the pipeline's one-process reference: what stale weights do to the edge and to the attractor.

The rooms meet here alone: the reference calls a hook after each update of a stage, and this hook reads the newest weights
with the state of all stages' optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from telltale.errors import ConfigError
from telltale.train.pipeline.reference import Reference
from telltale.train.sharpness.monitor import Reading, SharpnessMonitor
from telltale.train.sharpness.probe import LossFunction


class StalenessSharpness:
    """Give it to a ``Reference`` as ``on_update`` and tell it the reference::

        watch = StalenessSharpness(loss_fn, probe, every=10, budget=1.0)
        run = Reference(layered, plan, optimizer=optimizer, on_update=watch)
        watch.follow(run)
        run.run(batches, stop=1000)
        watch.readings

    ``loss_fn(root, batch)`` is a loss of the whole model (None: the next-token loss of a causal LM); ``options`` are those
    of :class:`~telltale.train.sharpness.monitor.SharpnessMonitor`. A step is an update of the last stage. The threshold is that
    of the optimizer without delay. Delay moves the edge, either way: with a part p of the steepest direction's square in the
    first of two stages, plain SGD goes unstable at a ratio of min(1 / (1 - 2 p), 1 / (2 p)) for p < 1/2 and 1 / (2 p) above.
    Where a delayed run settles is what to look for.
    """

    def __init__(self, loss_fn: LossFunction | None, probe: Iterable[Any], **options: Any) -> None:
        self._loss_fn, self._probe, self._options = loss_fn, list(probe), options
        self._reference: Reference | None = None
        self.monitor: SharpnessMonitor | None = None

    @property
    def readings(self) -> list[Reading]:
        """All of them so far."""
        return [] if self.monitor is None else self.monitor.readings

    def follow(self, reference: Reference) -> None:
        """Read the optimizers of ``reference``; call it again after :meth:`Reference.switch`."""
        self._reference = reference

    def __call__(self, stage: int, version: int, root: nn.Module) -> None:
        """After an update of ``stage``, with the newest weights in ``root``."""
        if self._reference is None:
            raise ConfigError("the reference is not known; call follow(reference) before running it.")
        if stage != len(self._reference.stages) - 1:
            return
        if self.monitor is None:
            self.monitor = SharpnessMonitor(
                root, self._loss_fn, self._probe, optimizer=self._optimizer, **self._options
            )
        self.monitor.step()

    def _optimizer(self) -> torch.optim.Optimizer:
        """One optimizer on the whole model's parameters with the groups and the state of the stages' own."""
        assert self._reference is not None
        return whole_optimizer(self._reference)


def whole_optimizer(reference: Reference) -> torch.optim.Optimizer:
    """The stages' optimizers as one on the model's own parameters; state tensors are shared, nothing is stepped with it.

    A tied weight is read at its first owner. Raises :class:`~telltale.errors.ConfigError` for stages whose optimizers are of
    different kinds.
    """
    own = dict(reference.model.root.named_parameters())
    seen: set[str] = set()
    groups: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    kinds: set[type] = set()
    for stage, keeper in zip(reference.stages, reference.optimizers, strict=True):
        optimizer = keeper.optimizer
        if optimizer is None:
            continue
        kinds.add(type(optimizer))
        name_of = {id(parameter): name for name, parameter in stage.live.items()}
        for group in optimizer.param_groups:
            names = [name_of[id(parameter)] for parameter in group["params"] if name_of[id(parameter)] not in seen]
            seen.update(names)
            states |= {name: optimizer.state.get(stage.live[name], {}) for name in names}
            if names:
                groups.append(group | {"params": [own[name] for name in names]})
    if len(kinds) != 1:
        raise ConfigError(f"the stages have optimizers of {len(kinds)} kinds; expected one kind for all.")
    whole: torch.optim.Optimizer = kinds.pop()(groups)
    for name, state in states.items():
        if state:
            whole.state[own[name]] = state
    return whole
