"""One stage of the one-process reference: whole copies of every weight version, and gradient sums per replica."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from telltale.train.pipeline.runtime.stage import Stage

Weights = dict[str, Tensor]
"""Parameter name -> value."""


class ReferenceStage:
    """Weights of one stage: the live ones, whole copies of the past ones, and gradient sums per replica."""

    def __init__(self, module: Stage) -> None:
        self.module = module
        self.locals = dict(module.names)
        own = module.model.value.parameter_names(module.first, module.stop)
        self.live = {name: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for name, p in own.items()}
        self.history: dict[int, Weights] = {}
        self._sums: dict[int, dict[str, Tensor]] = {}
        self.publish(0, 0)

    def leaves(self, version: int) -> Weights:
        """Fresh leaf copies of ``version``, by stage-local name."""
        values = self.history[max(version, min(self.history))]
        return {
            local: values[name].clone().requires_grad_(self.live[name].requires_grad)
            for local, name in self.locals.items()
        }

    def overwrite(self, weights: Weights, version: int) -> None:
        """Put the values of ``version`` under leaves that a graph already holds, unseen by autograd."""
        for local, name in self.locals.items():
            weights[local].data.copy_(self.history[max(version, min(self.history))][name])

    def collect(self, weights: Weights, replica: int) -> None:
        """Add the leaves' gradients to the sums of ``replica``, in the order of the minibatches."""
        sums = self._sums.setdefault(replica, {})
        for local, name in self.locals.items():
            gradient = weights[local].grad
            if gradient is not None:
                sums[name] = gradient if name not in sums else sums[name] + gradient

    def reduce(self, replicas: int, present: int | None) -> None:
        """Sum over replicas in their order, divided by ``present`` if given, onto the live parameters."""
        for name, parameter in self.live.items():
            if not parameter.requires_grad:
                continue
            parts = [self._sums.get(replica, {}).get(name) for replica in range(replicas)]
            if replicas == 1:
                parameter.grad = parts[0]
                continue
            filled = [torch.zeros_like(parameter) if part is None else part for part in parts]
            total = filled[0].clone()
            for part in filled[1:]:
                total += part
            parameter.grad = total if present is None else total.div_(present)
        self._sums = {}

    def restart(self, version: int, past: dict[int, Weights]) -> None:
        """Number the live weights ``version``, with ``past`` before them."""
        self.history = {number: weights for number, weights in past.items() if number < version}
        self.publish(version, version)

    def publish(self, version: int, delay: int) -> None:
        """Number the live weights ``version`` and forget those that are more than ``delay`` updates older."""
        self.history[version] = {name: parameter.detach().clone() for name, parameter in self.live.items()}
        for old in [number for number in self.history if number < version - delay]:
            del self.history[old]
