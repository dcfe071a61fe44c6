"""Running statistics of batch norm on a replicated stage: they move in the order of the minibatches, on every replica alike.

In train mode a norm's output depends on its minibatch alone, and its running mean and variance on all minibatches so far, of
which a replica sees every r-th. So a forward on a replicated stage notes the statistics of its minibatch instead of applying
them; at the round's update the replicas exchange their notes, and each applies all of them in the order of the minibatches:

    running <- (1 - momentum) * running + momentum * minibatch's,

or the cumulative mean where the momentum is None. What evaluation, checkpoint and export read is then what one process that
saw every minibatch would have, up to the rounding of a minibatch's statistics to the buffer's own precision; a stage with one
replica leaves all of this to torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from telltale.errors import PlanError


class NormStatistics:
    """Notes of the batch norms in ``module`` that keep running statistics, by minibatch. Instance norms do not count their runs:
    where they keep statistics, the comparison of replicas stops the run."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [
            (name, norm)
            for name, norm in module.named_modules()
            if isinstance(norm, _BatchNorm) and norm.track_running_stats and norm.running_mean is not None
        ]
        self._notes: dict[int, Tensor] = {}

    @classmethod
    def where_needed(cls, module: nn.Module, replicas: int) -> NormStatistics | None:
        """Notes for a stage of ``replicas``, or None where torch's own running statistics do: one replica, or no such norm."""
        notes = cls(module)
        return notes if replicas > 1 and notes.size else None

    @property
    def size(self) -> int:
        """Numbers in the note of one minibatch."""
        return sum(1 + 2 * norm.num_features for _, norm in self._norms)

    @contextmanager
    def noting(self, minibatch: int) -> Iterator[None]:
        """Around the forward of ``minibatch``: its statistics are noted, and the running ones are left as they are."""
        with_own = [(name, norm, dict(norm._buffers), norm.momentum) for name, norm in self._norms if norm.training]
        for _, norm, buffers, _ in with_own:
            norm._buffers.update({name: torch.zeros_like(buffer) for name, buffer in buffers.items()})  # type: ignore[arg-type]
            norm.momentum = 1.0  # running <- the minibatch's own
        noted: dict[str, dict[str, Tensor | None]] = {}
        try:
            yield
        finally:
            for name, norm, buffers, momentum in with_own:
                noted[name] = dict(norm._buffers)
                norm._buffers.update(buffers)
                norm.momentum = momentum
        self._notes[minibatch] = torch.cat([self._note(name, norm, noted.get(name)) for name, norm in self._norms])

    def note_of(self, minibatch: int) -> Tensor:
        """What was noted of ``minibatch``, :attr:`size` numbers in float64 on the CPU; it is forgotten here."""
        return self._notes.pop(minibatch)

    @torch.no_grad()
    def apply(self, note: Tensor) -> None:
        """Move the running statistics by the note of one minibatch."""
        offset = 0
        for _, norm in self._norms:
            runs, features = float(note[offset]), norm.num_features
            mean, variance = note[offset + 1 : offset + 1 + 2 * features].split(features)
            offset += 1 + 2 * features
            if not runs:
                continue
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            factor = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            for running, own in ((norm.running_mean, mean), (norm.running_var, variance)):
                running.mul_(1.0 - factor).add_(own.to(running.device, running.dtype), alpha=factor)

    def _note(self, name: str, norm: _BatchNorm, buffers: dict[str, Tensor | None] | None) -> Tensor:
        if buffers is None:
            return torch.zeros(1 + 2 * norm.num_features, dtype=torch.float64)
        runs = buffers["num_batches_tracked"]
        if runs is not None and int(runs) > 1:
            raise PlanError(
                f"{name} ran {int(runs)} times in one forward of a replicated stage, whose statistics are exchanged by minibatch; "
                f"expected one norm per use, or one replica."
            )
        mean, variance = buffers["running_mean"], buffers["running_var"]
        assert runs is not None
        assert mean is not None
        assert variance is not None
        return torch.cat([runs.view(1), mean, variance]).to("cpu", torch.float64)
