"""How far the step just taken is from overshooting, from forward passes alone (critical sharpness, arXiv 2601.16979).

With u the update that the optimizer made, the critical step s is the least multiple of u at which the loss of a fixed minibatch
is above what it was before: L(theta + s u) > L(theta). No derivative is taken, so it does not matter how the gradient was made
or what the optimizer, clipping or the schedule did with it. For plain gradient descent u = -rate g, and along g the curvature
is lambda_c = 2 / (rate s): the threshold 2 / rate is met at s = 1, and lambda_c <= lambda_max.

With momentum and with Adam the threshold along the steepest direction is met at s = 1 as well: at its edge a step reverses the
one before it, u' = -u, both ends of u have one loss, and lambda_c = threshold / (rate s). That holds while u is such a step. In
full-batch training with momentum most of u soon is drift along flat directions, gathered over many steps. Then s is large
whatever the steepest direction does, and 1 / s does not follow the edge (docs/log.md has figures): read it for plain steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_integer
from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.signals.hessian import computing
from telltale.signals.quiet import Quiet
from telltale.train.sharpness.isolation import in_full_precision, seed_all
from telltale.train.sharpness.probe import LossFunction, Probe

FARTHEST = 2.0**10
"""Multiples of the update between its reciprocal and which the critical step is looked for."""
BISECTIONS = 5
"""Halvings of the last bracket, which is a factor of 2 wide: the critical step is right to 1.6%."""


@dataclass(frozen=True)
class CriticalReading:
    """The critical step of one update. ``ratio`` = 1 / ``step``: at 1 this step ends as high as it began."""

    step: float
    """Multiples of the update; infinite if the loss has not risen within :data:`FARTHEST` of them (flat along the update), 0
    if it rises from the start."""
    loss: float
    """Of the probe's minibatch before the update."""
    forwards: int

    @property
    def ratio(self) -> float:
        """lambda_c * rate / threshold."""
        return 1.0 / self.step if self.step > 0 else math.inf


class CriticalStep:
    """Call :meth:`before` and :meth:`after` right around ``optimizer.step()``::

        channel = CriticalStep(model, loss_fn, [batch])
        channel.before()
        optimizer.step()
        channel.after().ratio

    ``probe`` and ``mode`` are those of :class:`~telltale.train.sharpness.probe.Probe`; the first minibatch is read. Forward passes
    run on copies and see the same random numbers; training is bit-identical. Between the two calls it holds a copy of the
    parameters. Weights that are sharded over processes are not supported.

    Raises what :class:`~telltale.train.sharpness.probe.Probe` raises, :class:`~telltale.errors.ConfigError` for ``after`` without
    ``before``, and :class:`~telltale.errors.NumericalError` for a loss that is not finite before the update.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        probe: Iterable[Any],
        *,
        mode: str = "no dropout",
        seed: int = 0,
    ) -> None:
        check_integer("seed", seed, low=0)
        self.probe = Probe(model, loss_fn, probe, mode=mode, seed=seed)
        self._before: dict[str, Tensor] | None = None

    def before(self) -> None:
        """Keep the weights as they are now."""
        self._before = self.probe.isolated.values()

    def after(self) -> CriticalReading:
        """The critical step of the update since :meth:`before`, by 7 forward passes on one minibatch, one more a doubling.

        They run in float64, since the losses at both ends of a small update differ by less than float32 can tell; in the
        model's own precision where it has no float64.
        """
        if self._before is None:
            raise ConfigError("after() without before(); expected before() right before optimizer.step().")
        start, self._before = self._before, None
        try:
            return self._searched(start, torch.float64)
        except UnsupportedModelError:
            return self._searched(start, torch.float32)

    def _searched(self, start: dict[str, Tensor], dtype: torch.dtype) -> CriticalReading:
        isolated, batch = self.probe.isolated, in_full_precision(self.probe.batches[0], dtype)
        values, buffers = isolated.values(dtype), isolated.buffers(dtype)
        origin = [start[name].detach().to(dtype) for name in values]
        leaves = [value.detach() for value in values.values()]
        update = [leaf - before for leaf, before in zip(leaves, origin, strict=True)]
        kept = [buffer.clone() for buffer in buffers.values()]
        count = 0

        def loss_at(step: float) -> float:
            """Every pass sees the same buffers and the same random numbers."""
            nonlocal count
            count += 1
            for leaf, before, moved in zip(leaves, origin, update, strict=True):
                torch.add(before, moved, alpha=step, out=leaf)
            for buffer, value in zip(buffers.values(), kept, strict=True):
                buffer.copy_(value)
            seed_all(self.probe.seed)
            return float(self.probe.loss_fn(self.probe.model, batch))

        def search() -> CriticalReading:
            with torch.no_grad():
                base = loss_at(0.0)
                if not math.isfinite(base):
                    raise NumericalError(f"the probe's loss is {base} before the update; expected a finite number.")
                low, high = _bracket(lambda step: not loss_at(step) <= base)
                if low > 0 and high < math.inf:
                    for _ in range(BISECTIONS):
                        middle = math.sqrt(low * high)
                        low, high = (low, middle) if not loss_at(middle) <= base else (middle, high)
                    low = high = math.sqrt(low * high)
            return CriticalReading(high if low > 0 else 0.0, base, count)

        with computing("the loss"):
            return isolated.run(search, values, buffers, Quiet(dtype, keep=False))


def _bracket(rises: Callable[[float], bool]) -> tuple[float, float]:
    """(a step at which the loss has not risen, twice that, at which it has), by doubling or halving the update.

    Never from farther out: beyond the first step at which the loss rises it may be lower again.
    """
    step = 1.0
    if rises(step):
        while step > 1 / FARTHEST:
            step /= 2
            if not rises(step):
                return step, 2 * step
        return 0.0, step
    while step < FARTHEST:
        step *= 2
        if rises(step):
            return step / 2, step
    return step, math.inf
