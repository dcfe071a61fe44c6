"""How far training is from its edge, from forward passes alone, along the updates that the optimizer really made.

Without an optimizer's table this is critical sharpness (arXiv 2601.16979). With u the update just taken, the critical step s is
the least multiple of u at which the loss of a fixed minibatch is above what it was before: L(theta + s u) > L(theta). For plain
gradient descent u = -rate g, the curvature along g is lambda_c = 2 / (rate s), and the threshold 2 / rate is met at s = 1. At
the edge with momentum or Adam a step reverses the one before it, so s = 1 there too, as long as u is such a step. In full-batch
training with momentum most of u is drift along flat directions, and s is large whatever the steepest direction does.

So where the optimizer's edge is known, the drift is taken out. Of three updates in a row the second difference is formed, in
which what stays the same from step to step cancels and what reverses is multiplied by four. Curvature is measured, by second
differences of the loss, in the span of that vector and of the steepest directions found so far; the largest Ritz value in it,
in the optimizer's own metric (rate, preconditioner, decay), is divided by the optimizer's threshold: 2 for SGD, 2 (1 + m) for
heavy ball, (2 + 2 m) / (1 + 2 m) for Nesterov, (2 + 2 beta1) / (1 - beta1) for Adam. It is never above the largest eigenvalue,
and gets there as training brings the steepest direction up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.config import check_integer
from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.train.sharpness.edges import KINDS, StepJacobian, step_jacobian_of, underlying
from telltale.train.sharpness.forward_passes import Copies, InPlace, LossAt, passes_of
from telltale.train.sharpness.probe import LossFunction
from telltale.train.sharpness.readings import largest, shares_by_module

FARTHEST = 2.0**10
"""Multiples of the update between its reciprocal and which the critical step is looked for."""
BISECTIONS = 5
"""Halvings of the last bracket, which is a factor of 2 wide: the critical step is right to 1.6%."""
WINDOW = 3
"""Updates in a row that a reading takes where it can."""
KEPT = 1
"""Steepest directions that are kept from one reading to the next."""
REACH = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Length of a step beside the weights, as a part of theirs; in float32 it is then fitted to the loss."""
BEND = (1e-3, 1e-2, 1e-1)
"""Least, wanted and largest second difference in float32, as a part of the loss: between its rounding and its higher orders."""
FITS = 3
"""Trials of such a step."""
SAME = 1e-4
"""A direction of which no more than this part is new is left out."""


@dataclass(frozen=True)
class CriticalReading:
    """``ratio`` = lambda * rate / threshold: 1 is the edge."""

    ratio: float
    loss: float
    """Of the probe's minibatch: before the update where the critical step was searched, else after it."""
    forwards: int
    along: str
    """"update": the critical step of the update itself. "steepest": the steepest direction that updates have shown so far."""
    step: float | None = None
    """Critical step, in multiples of the update; infinite if the loss has not risen within :data:`FARTHEST` of them (flat along
    the update), 0 if it rises from the start. None along "steepest"."""
    sharpness: float | None = None
    """lambda: along "update" 2 / (rate s), critical sharpness. None where the rate is not known."""
    threshold: float | None = None
    """lambda * rate at the edge."""
    precision: str = "float64"
    """Of the passes."""
    leading: dict[str, float] | None = None
    """Share of the steepest direction's square in each module, the five largest; None along "update" and for sharded weights."""


class CriticalStep:
    """Call :meth:`before` ahead of each of the last three steps, or of one, and :meth:`after` behind the last::

        channel = CriticalStep(model, loss_fn, [batch], optimizer=optimizer)
        for step in range(1000):
            ...
            if step % 25 >= 22:
                channel.before()
            optimizer.step()
            if step % 25 == 24:
                channel.after().ratio

    ``probe``, ``parameters`` and ``mode`` are those of :class:`~telltale.train.sharpness.probe.Probe`; the first minibatch is
    read. ``optimizer`` None, or one whose edge is not known (Lion, Muon, Adafactor...), reads the critical step of the last update.
    Forward passes run on copies and see the same random numbers; training is bit-identical. Of a model that FSDP2 has sharded the
    weights are moved in place and put back, and every process makes every call. ``before`` copies the weights; three copies at
    most are held, and one vector between readings. A reading holds one float64 copy of the weights and six vectors besides.

    Raises what :class:`~telltale.train.sharpness.probe.Probe` and
    :func:`~telltale.train.sharpness.edges.step_jacobian_of` raise, :class:`~telltale.errors.ConfigError` for ``after`` without
    ``before``, and :class:`~telltale.errors.NumericalError` for a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        probe: Iterable[Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        parameters: Iterable[str] | None = None,
        mode: str = "no dropout",
        seed: int = 0,
    ) -> None:
        check_integer("seed", seed, low=0)
        self._begin(passes_of(model, loss_fn, probe, parameters=parameters, mode=mode, seed=seed), optimizer)

    @classmethod
    def of(cls, passes: Copies | InPlace, *, optimizer: torch.optim.Optimizer | None = None) -> CriticalStep:
        """On a probe that there is already."""
        found = cls.__new__(cls)
        found._begin(passes, optimizer)
        return found

    def _begin(self, passes: Copies | InPlace, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = None if optimizer is None else underlying(optimizer)
        if self._optimizer is not None and not isinstance(self._optimizer, torch.optim.Optimizer):
            raise ConfigError(f"optimizer is {type(optimizer).__name__}; expected one of torch.optim, or None.")
        self.passes = passes
        self._kept: list[Tensor] = []
        self._ended: list[Tensor] = []
        self._steepest: list[Tensor] = []

    def before(self) -> None:
        """Keep the weights as they are now."""
        now = self.passes.weights()
        if self._ended:
            follows = torch.equal(now, self._ended[-1])
            self._kept, self._ended = (self._ended[:-1] if follows else []), []
        self._kept = [*self._kept, now][-WINDOW:]

    def after(self) -> CriticalReading:
        """The reading of the update since :meth:`before`: along the steepest direction 6 forward passes on one minibatch, for
        the critical step 7 and one more a doubling."""
        if not self._kept:
            raise ConfigError("after() without before(); expected before() right before optimizer.step().")
        weights, self._kept = [*self._kept, self.passes.weights()], []
        self._ended = weights[-WINDOW:]
        view = self._view()
        failure: UnsupportedModelError | None = None
        for dtype in self.passes.precisions:
            try:
                if view is None:
                    return self._along_update(weights[-2], weights[-1], dtype)
                return self._along_steepest(weights, view, dtype)
            except UnsupportedModelError as error:
                failure = error
        assert failure is not None
        raise failure

    def restart(self) -> None:
        """The next :meth:`before` begins a new row of updates; the steepest direction stays."""
        self._kept, self._ended = [], []

    def forget(self) -> None:
        """Drop the weights and directions that are kept."""
        self.restart()
        self._steepest = []

    def _view(self) -> StepJacobian | None:
        if self._optimizer is None or type(self._optimizer) not in KINDS:
            return None
        return step_jacobian_of(self._optimizer, self.passes.parameters)

    def _rate(self) -> float | None:
        return None if self._optimizer is None else max(float(group["lr"]) for group in self._optimizer.param_groups)

    def _along_steepest(self, weights: Sequence[Tensor], view: StepJacobian, dtype: torch.dtype) -> CriticalReading:
        assert view.scale is not None
        assert view.shift is not None
        # In the weights' own precision, in which neighbours differ exactly.
        changes = [after - before for before, after in itertools.pairwise(weights)]
        while len(changes) > 1:
            changes = [after - before for before, after in itertools.pairwise(changes)]
        scale, shift = view.scale.to(changes[0]), view.shift.to(changes[0])
        dead = (scale == 0).any()
        inverse = torch.where(scale > 0, scale.reciprocal(), 0.0) if dead else scale.reciprocal()
        units = self._orthonormal([*(scale * old for old in self._steepest), inverse * changes[0]])
        directions, size = [scale * unit for unit in units], math.sqrt(self.passes.dot(weights[-1], weights[-1])) or 1.0
        del changes, weights

        def search(loss_at: LossAt) -> tuple[Tensor, float, int]:
            return _form(loss_at, directions, size, dtype, self.passes.dot)

        form, loss, forwards = self.passes.run(search, dtype)
        rate, ratio, leading = self._rate() or 0.0, 0.0, None
        if units:
            for (i, one), (j, other) in itertools.combinations_with_replacement(enumerate(units), 2):
                form[i, j] = form[j, i] = form[i, j] + self.passes.dot(one, shift * other)
            values, coordinates = torch.linalg.eigh(form)
            ratio = float(values[-1]) / view.threshold
            rows = [_combined(coordinates[:, -1 - place], units) for place in range(min(KEPT, len(units)))]
            if isinstance(self.passes, Copies):
                sizes = [parameter.numel() for parameter in self.passes.parameters]
                leading = largest(shares_by_module(rows[0], self.passes.names, sizes))
            self._steepest = [inverse * row for row in rows]
        return CriticalReading(
            ratio,
            loss,
            forwards,
            "steepest",
            sharpness=ratio * view.threshold / rate if rate > 0 else None,
            threshold=view.threshold,
            precision=str(dtype).removeprefix("torch."),
            leading=leading,
        )

    def _orthonormal(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Gram and Schmidt, twice where most of a vector goes; what is not new is left out."""
        found: list[Tensor] = []
        for given in vectors:
            length = math.sqrt(self.passes.dot(given, given))
            if not (0.0 < length < math.inf):
                continue
            vector, rest = given / length, 1.0
            for _ in range(2):
                for other in found:
                    vector.sub_(other, alpha=self.passes.dot(vector, other))
                before, rest = rest, math.sqrt(self.passes.dot(vector, vector))
                if rest > 0.5 * before:
                    break
            if rest > SAME:
                found.append(vector.div_(rest))
        return found

    def _along_update(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> CriticalReading:
        update, count = after - before, 0

        def search(loss_at: LossAt) -> tuple[float, float]:
            def loss_after(step: float) -> float:
                nonlocal count
                count += 1
                return loss_at([(step - 1.0, update)])  # The present weights are behind the update.

            base = loss_after(0.0)
            if not math.isfinite(base):
                raise NumericalError(f"the probe's loss is {base} before the update; expected a finite number.")
            low, high = _bracket(lambda step: not loss_after(step) <= base)
            if low > 0 and high < math.inf:
                for _ in range(BISECTIONS):
                    middle = math.sqrt(low * high)
                    low, high = (low, middle) if not loss_after(middle) <= base else (middle, high)
                low = high = math.sqrt(low * high)
            return (high if low > 0 else 0.0), base

        step, loss = self.passes.run(search, dtype)
        ratio, rate = 1.0 / step if step > 0 else math.inf, self._rate()
        return CriticalReading(
            ratio,
            loss,
            count,
            "update",
            step=step,
            sharpness=2.0 * ratio / rate if rate else None,
            threshold=2.0 if rate else None,
            precision=str(dtype).removeprefix("torch."),
        )


def _combined(factors: Tensor, units: Sequence[Tensor]) -> Tensor:
    found = torch.zeros_like(units[0])
    for factor, unit in zip(factors.tolist(), units, strict=True):
        found.add_(unit, alpha=factor)
    return found


def _form(
    loss_at: LossAt,
    directions: Sequence[Tensor],
    size: float,
    dtype: torch.dtype,
    dot: Callable[[Tensor, Tensor], float],
) -> tuple[Tensor, float, int]:
    """Second derivatives of the loss along and between ``directions``, as a matrix in float64; the loss, and the passes.

    ``size``: length of the weights. With k directions 1 + 2 k + k (k - 1) / 2 passes in float64; in float32 more where a step
    had to be fitted to the loss.
    """
    base, count = loss_at([]), 1
    if not math.isfinite(base):
        raise NumericalError(f"the probe's loss is {base}; expected a finite number.")
    form, steps, slopes = torch.zeros(len(directions), len(directions), dtype=torch.float64), [], []
    for index, direction in enumerate(directions):
        step = REACH[dtype] * size / (math.sqrt(dot(direction, direction)) or 1.0)
        for attempt in range(FITS):
            ahead, behind = loss_at([(step, direction)]), loss_at([(-step, direction)])
            count += 2
            bend = ahead + behind - 2 * base
            part = abs(bend / base) if base else math.inf
            if dtype == torch.float64 or BEND[0] <= part <= BEND[2] or attempt + 1 == FITS:
                break
            step *= min(max(math.sqrt(BEND[1] / max(part, 1e-12)), 0.03), 30.0) if math.isfinite(part) else 0.03
        if not math.isfinite(bend):
            raise NumericalError("the probe's loss beside the weights is not finite; expected a finite number.")
        form[index, index] = bend / step**2
        steps.append(step)
        slopes.append((ahead - behind) / (2 * step))
    for i, j in itertools.combinations(range(len(directions)), 2):
        both = loss_at([(steps[i], directions[i]), (steps[j], directions[j])])
        count += 1
        alone = sum(steps[k] * slopes[k] + 0.5 * steps[k] ** 2 * float(form[k, k]) for k in (i, j))
        form[i, j] = form[j, i] = (both - base - alone) / (steps[i] * steps[j])
    return form, base, count


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
