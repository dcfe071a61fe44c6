"""The weight versions that one stage keeps alive, as separate tensors that a stage puts in place of its parameters.

Swapping weights inside the parameters between a forward and its backward gives wrong gradients without an error (layer norm,
convolution, ``x @ W``), so every version has storage of its own. An update moves the parameters to fresh storage first and
leaves the old one to the minibatches that still need it: one copy per update, and never more storages than the policy's
count of versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from telltale.errors import CheckpointError
from telltale.train.pipeline.policies import Policy

Weights = dict[str, Tensor]
"""Stage-local parameter name -> leaf tensor of one version."""


class Versions:
    """Live and past weights of ``module``, the stage ``stage`` of a pipeline under ``policy``."""

    def __init__(self, module: nn.Module, policy: Policy, stage: int) -> None:
        self._parameters = dict(module.named_parameters())
        self._trainable = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._kept = policy.versions_held(stage)
        self._copies = self._kept > 1
        self._ring: dict[int, Weights] = {}
        self._spare: list[Weights] = []
        self.current = 0
        self.restart(0)

    def restart(self, version: int, past: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Number the live weights ``version``; ``past`` holds older versions' values by number and stage-local name.

        A version before ``version`` that is not in ``past`` reads as the oldest one known: training that goes on under
        another plan starts with these weights everywhere.
        """
        self.current = version
        self._ring = {version: self._alias()}
        self._spare = []
        for number, values in (past or {}).items():
            if version - self._kept < number < version:
                self._ring[number] = self._alias() | {
                    name: values[name].detach().clone().requires_grad_() for name in self._trainable
                }

    @property
    def alive(self) -> list[int]:
        """Numbers of the versions in memory, oldest first."""
        return sorted(self._ring)

    def at(self, version: int) -> Weights:
        """The leaf tensors of ``version``; an older one than any known reads as the oldest."""
        found = self._ring.get(version)
        if found is None:
            oldest = min(self._ring)
            if version > oldest:
                raise CheckpointError(f"weight version {version} is not alive; expected one of {self.alive}.")
            found = self._ring[oldest]
        return found

    def past(self) -> dict[int, Weights]:
        """Values of the versions before the live one, for a checkpoint."""
        return {
            number: {name: weights[name].detach() for name in self._trainable}
            for number, weights in self._ring.items()
            if number != self.current
        }

    def take_gradients(self, version: int) -> None:
        """Move the gradients that backwards under ``version`` left to the live parameters, where the optimizer looks."""
        weights = self.at(version)
        for name, parameter in self._trainable.items():
            leaf = weights[name]
            parameter.grad, leaf.grad = leaf.grad, None

    def advance(self, step: Callable[[], object]) -> None:
        """Keep the live version for those that need it, run ``step`` on the parameters, and number the result."""
        if self._copies:
            self._move_to_fresh_storage()
        step()
        self.current += 1
        if self._copies:
            self._ring[self.current] = self._alias()
            for number in [number for number in self._ring if number <= self.current - self._kept]:
                self._spare.append(self._ring.pop(number))
        else:
            self._ring = {self.current: next(iter(self._ring.values()))}

    def _alias(self) -> Weights:
        """Leaves that share the parameters' storage but not their version counters: the optimizer's in-place step is
        unseen by autograd, which is what the ablation "none" is, and what :meth:`advance` makes harmless otherwise."""
        return {
            name: parameter.data.requires_grad_(parameter.requires_grad) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def _move_to_fresh_storage(self) -> None:
        names = list(self._trainable)
        old = [self._trainable[name].data for name in names]
        spare = self._spare.pop() if self._spare else {}
        new = [spare[name].detach() if name in spare else torch.empty_like(old[i]) for i, name in enumerate(names)]
        if new:
            torch._foreach_copy_(new, old)
        for name, tensor in zip(names, new, strict=True):
            self._trainable[name].data = tensor
