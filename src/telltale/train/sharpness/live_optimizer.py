"""The optimizer that a monitor watches, read live at every look and checked before the first one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from telltale.config import check_choice
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.train.sharpness.edges import (
    KINDS,
    StepJacobian,
    edge_of,
    gradient_descent_jacobian,
    step_jacobian_of,
    underlying,
)
from telltale.train.sharpness.measure import JACOBIANS


class LiveOptimizer:
    """``given``: an optimizer, one in a wrapper, or a function that gives one. ``jacobian`` is "gd" for an unknown kind.

    Raises what :func:`~telltale.train.sharpness.edges.edge_of` raises, but for an unknown kind of optimizer: that is a warning;
    and :class:`~telltale.errors.UnsupportedModelError` for LBFGS.
    """

    def __init__(self, given: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer], jacobian: str) -> None:
        check_choice("jacobian", jacobian, JACOBIANS)
        self._given = given
        self.jacobian = jacobian
        now = self.now
        if jacobian == "optimizer" and isinstance(now, torch.optim.LBFGS):
            raise UnsupportedModelError(
                "the optimizer is LBFGS: a step is a search of many evaluations along a direction of its own, and has no rate that "
                "an edge goes with. Expected one that takes a step of its rate, or jacobian='gd' for lambda_max by the rate that "
                "it is given."
            )
        if jacobian == "optimizer" and type(now) not in KINDS:
            warnings.warn(
                f"the edge of {type(now).__name__} is not known; it is read as I - rate H ('gd').", stacklevel=3
            )
            self.jacobian = "gd"
        elif jacobian == "optimizer":
            edge_of(now)

    @property
    def now(self) -> torch.optim.Optimizer:
        """The ``torch.optim`` optimizer itself."""
        given = self._given
        wraps = isinstance(given, torch.optim.Optimizer) or hasattr(given, "optimizer")
        found = underlying(given() if callable(given) and not wraps else given)
        if not isinstance(found, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer is {type(found).__name__}; expected one of torch.optim, or a function for it."
            )
        return found

    @property
    def ready(self) -> bool:
        """Whether there is something to read: an adaptive optimizer has no preconditioner before its first step."""
        now = self.now
        return self.jacobian == "gd" or type(now) is torch.optim.SGD or any(now.state.values())

    @property
    def rate(self) -> float:
        """The largest of the groups' present rates."""
        return max(float(group["lr"]) for group in self.now.param_groups)

    def view(self, parameters: Sequence[Tensor]) -> StepJacobian:
        """How a step sees the Hessian over ``parameters`` now; see :func:`~telltale.train.sharpness.edges.step_jacobian_of`."""
        view = None if self.jacobian == "gd" else step_jacobian_of(self.now, parameters)
        return gradient_descent_jacobian(self.rate) if view is None else view

    def check_holds(self, parameters: Sequence[Tensor]) -> None:
        """Raises :class:`~telltale.errors.DataError` if steps leave some of ``parameters`` where they are."""
        held = {id(parameter) for group in self.now.param_groups for parameter in group["params"]}
        missing = sum(id(parameter) not in held for parameter in parameters)
        if missing and self.jacobian != "gd":
            raise DataError(
                f"the optimizer does not hold {missing} of the {len(parameters)} parameters; expected the one that trains "
                f"them, with the others frozen."
            )

    def tell_of(self, outside: Sequence[Tensor]) -> None:
        """Warn if steps move ``outside``, which the loss reads beside the model: a reading does not see it."""
        held = {id(parameter) for group in self.now.param_groups for parameter in group["params"]}
        trained = [tensor for tensor in outside if id(tensor) in held]
        if trained:
            warnings.warn(
                f"the optimizer trains {len(trained)} tensor(s) that the loss uses and the model does not hold; the readings "
                f"leave them out. Give a module that holds both to watch the whole.",
                stacklevel=3,
            )
