"""Where an optimizer becomes unstable: the roots of one step along one eigenvector of the curvature.

Along an eigenvalue alpha a step with momentum is linear in (weight, buffer). Its two roots solve z^2 - T z + D = 0, and the
edge is where one of them reaches -1. With a = rate * alpha, mu the momentum, c = 1 - rate * decoupled weight decay:

==================================  ====================  ============  =============================
optimizer                           T                     D             edge, as a value of a
==================================  ====================  ============  =============================
SGD                                 c - k a (one root)                  (1 + c) / k
heavy ball, k = 1 - dampening       c + mu - k a          mu c          (1 + c) (1 + mu) / k
Nesterov                            c + mu - a (1 + mu)   mu (c - a)    (1 + c) (1 + mu) / (1 + 2 mu)
Adam, k = 1 - beta1, mu = beta1     c + mu - k a          mu c          (1 + c) (1 + mu) / k
==================================  ====================  ============  =============================

For Adam and RMSprop alpha is an eigenvalue of the preconditioned Hessian (``preconditioner``). Coupled weight decay adds to
alpha. One-step singular values are not used: a step with momentum is not normal, and they exceed 1 where it is stable.

An optimizer's live state as a symmetric operator: S (H + wd) S with S^2 = rate / P, entry by entry.

For Adam P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), for RMSprop sqrt(v) + eps (less the squared mean if centered),
for SGD 1. Rates, weight decay and eps are those of each parameter's own group, read when the view is made, so a schedule is
followed. The eigenvalues of the operator are rate * alpha along each direction; ``edges`` turns them into roots.

How one update step sees the Hessian: the seam between a measurement and the optimizer's own Jacobian.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.config import check_choice, check_range
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.signals.hessian import Operator, vector_like
from telltale.signals.sharpness_dimension import Exponents, gradient_descent
from telltale.train.sharpness.isolation import local

KINDS: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.RMSprop: "rmsprop",
}
"""Exact types: a subclass may step in another way."""

JACOBIANS = ("gd", "optimizer")
"""The paper's I - rate H, or the optimizer's own map."""
FLOOR = 1e-12
"""Moduli below this are read as this: a root of exactly 0 has no logarithm."""


@dataclass(frozen=True)
class Edge:
    """One step's linear recurrence along an eigenvector."""

    name: str
    rate: float = 1.0
    momentum: float = 0.0
    gain: float = 1.0
    """k: 1 - dampening of SGD, 1 - beta1 of Adam."""
    nesterov: bool = False
    decay: float = 0.0
    """rate * decoupled weight decay, 1 - c."""
    coupled: float = 0.0
    """Weight decay that is part of the gradient."""

    @property
    def roots(self) -> int:
        """Roots per direction: 2 with momentum."""
        return 2 if self.momentum else 1

    @property
    def threshold(self) -> float:
        """rate * lambda at which a root reaches -1."""
        c, mu = 1.0 - self.decay, self.momentum
        factor = 1.0 + 2.0 * mu if self.nesterov else self.gain
        return (1.0 + c) * (1.0 + mu) / factor - self.rate * self.coupled

    def log_moduli(self, eigenvalues: Tensor) -> Tensor:
        """ln|z| of the roots for eigenvalues (m,); shape (m, roots), float64. A null direction without decay has exactly 0.

        The roots are found as 1 - delta, so that those near 1 keep their digits.
        """
        a = self.rate * (eigenvalues.to(torch.float64) + self.coupled)
        mu, decay = self.momentum, self.decay
        pull = a if self.nesterov else self.gain * a
        at_one = decay * (1.0 - mu) + pull
        if not mu:
            return _log_of_one_minus(at_one)[:, None]
        t = (1.0 - decay) + mu - (pull * (1.0 + mu) if self.nesterov else pull)
        d = mu * ((1.0 - decay) - (a if self.nesterov else 0.0)) + torch.zeros_like(a)
        away = 2.0 - t
        inside = away.square() - 4.0 * at_one
        far = (away + torch.where(away >= 0, 1.0, -1.0) * inside.clamp_min(0.0).sqrt()) / 2
        near = torch.where(far == 0, torch.zeros_like(far), at_one / torch.where(far == 0, torch.ones_like(far), far))
        real = torch.stack([_log_of_one_minus(near), _log_of_one_minus(far)], dim=1)
        both = (d.clamp_min(FLOOR**2).log() / 2)[:, None].expand(-1, 2)
        return torch.where((inside < 0)[:, None], both, real)

    def moduli(self, eigenvalues: Tensor) -> Tensor:
        """|z| of the roots for eigenvalues (m,); shape (m, roots), float64."""
        return self.log_moduli(eigenvalues).exp()


def edge_of(optimizer: torch.optim.Optimizer | str, **hyper: Any) -> Edge:
    """The edge of an optimizer: a live one of ``torch.optim`` (SGD, Adam, AdamW, RMSprop), or its name with ``lr`` and the
    options that torch has for it (``momentum``, ``dampening``, ``nesterov``, ``betas``, ``weight_decay``).

    Of parameter groups that differ in rate the fastest is meant; ``preconditioner.step_jacobian_of`` has all of them.

    Raises :class:`~telltale.errors.ConfigError` for another optimizer or an option out of range, and for parameter groups
    that differ in momentum, which have no common edge.
    """
    if isinstance(optimizer, str):
        return _edge(optimizer.lower(), hyper)
    inner = underlying(optimizer)
    if type(inner) not in KINDS:
        raise ConfigError(f"the edge of {type(inner).__name__} is not known; expected {_known()}.")
    found = group_edges(inner)
    shapes = {(edge.momentum, edge.gain, edge.nesterov) for edge in found}
    if len(shapes) > 1:
        raise ConfigError(
            f"the parameter groups of {type(inner).__name__} differ in momentum; expected the same in all."
        )
    return max(found, key=lambda edge: edge.rate)


def group_edges(optimizer: torch.optim.Optimizer) -> list[Edge]:
    """The edge of each parameter group of one of :data:`KINDS`, in their order."""
    return [_edge(KINDS[type(optimizer)], group) for group in optimizer.param_groups]


def underlying(optimizer: Any) -> torch.optim.Optimizer:
    """The ``torch.optim`` optimizer under the wrappers of Accelerate and Lightning, which keep it as ``.optimizer``."""
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = found.optimizer
    return found


def _edge(kind: str, options: dict[str, Any]) -> Edge:
    rate = float(options.get("lr", 1.0))
    check_range("lr", rate, low=0.0)
    decay = float(options.get("weight_decay", 0.0))
    check_range("weight_decay", decay, low=0.0)
    if options.get("maximize"):
        raise ConfigError("maximize=True climbs; expected an optimizer that descends.")
    if kind in ("adam", "adamw"):
        beta = float(options.get("betas", (0.9, 0.999))[0])
        check_range("betas", beta, low=0.0, below=1.0)
        decoupled = kind == "adamw" or bool(options.get("decoupled_weight_decay"))
        return Edge(
            kind,
            rate,
            momentum=beta,
            gain=1.0 - beta,
            decay=rate * decay if decoupled else 0.0,
            coupled=0.0 if decoupled else decay,
        )
    if kind in ("sgd", "rmsprop"):
        momentum = float(options.get("momentum", 0.0))
        check_range("momentum", momentum, low=0.0, below=1.0)
        dampening = float(options.get("dampening", 0.0)) if momentum else 0.0
        check_range("dampening", dampening, low=0.0, below=1.0)
        nesterov = bool(options.get("nesterov")) and momentum > 0
        return Edge(kind, rate, momentum, gain=1.0 - dampening, nesterov=nesterov, coupled=decay)
    raise ConfigError(f"the edge of {kind!r} is not known; expected {_known()}.")


def _known() -> str:
    *most, last = (kind.__name__ for kind in KINDS)
    return f"{', '.join(most)} or {last}"


def _log_of_one_minus(delta: Tensor) -> Tensor:
    far = (1.0 - delta).abs().clamp_min(FLOOR).log()
    return torch.where(delta < 0.5, torch.log1p(-delta.clamp_max(0.5)), far)


def step_jacobian_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> StepJacobian | None:
    """How a step of ``optimizer`` sees the Hessian over ``parameters`` (in the operator's order); None for one whose Jacobian
    is not known.

    The preconditioner is taken as constant during the step. Groups may differ in rate and weight decay. Where they differ
    in *decoupled* decay, that is put into the operator: exact without momentum; with it right to second order for null
    directions, and off by up to about rate * decay in the exponents of others.
    What an adaptive optimizer has had no gradient for (no state, or a second moment of exactly 0, as in the embeddings of
    tokens that never came) is left where it is by its steps; eps alone would make it look unstable.

    Raises :class:`~telltale.errors.DataError` for parameters that the optimizer does not hold and for an adaptive one that
    has not stepped yet, and :class:`~telltale.errors.ConfigError` for groups that differ in momentum.
    """
    optimizer = underlying(optimizer)
    if type(optimizer) not in KINDS:
        return None
    whole = edge_of(optimizer)
    places = zip(optimizer.param_groups, group_edges(optimizer), strict=True)
    found = {id(parameter): (group, edge) for group, edge in places for parameter in group["params"]}
    missing = sum(id(parameter) not in found for parameter in parameters)
    if missing:
        raise DataError(
            f"the optimizer does not hold {missing} of the {len(parameters)} parameters; expected the one that trains them."
        )
    conditioners = [_preconditioner(optimizer, parameter, found[id(parameter)][0]) for parameter in parameters]
    edges = [found[id(parameter)][1] for parameter in parameters]
    decays = {0.0 if p is None else edge.decay for edge, p in zip(edges, conditioners, strict=True)}
    common = decays.pop() if len(decays) == 1 else None
    scales, shifts = [], []
    for parameter, edge, conditioner in zip(parameters, edges, conditioners, strict=True):
        if isinstance(conditioner, float) or conditioner is None:
            rate = 0.0 if conditioner is None else edge.rate / conditioner
            scale = torch.full_like(_single(parameter), math.sqrt(rate))
            shift = torch.full_like(scale, rate * edge.coupled)
        else:
            square = edge.rate / conditioner
            scale, shift = square.sqrt(), square * edge.coupled
        if common is None and conditioner is not None:
            shift = shift + edge.decay * (1.0 - edge.momentum) / edge.gain
        scales.append(scale.reshape(-1))
        shifts.append(shift.reshape(-1))
    scale, shift = torch.cat(scales), torch.cat(shifts)
    step = dataclasses.replace(whole, rate=1.0, coupled=0.0, decay=common or 0.0)
    return StepJacobian(
        "optimizer",
        step.log_moduli,
        step.threshold,
        lambda hessian: Scaled(hessian, scale, shift),
        step.roots,
        scale=scale,
        shift=shift,
    )


def _preconditioner(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]
) -> Tensor | float | None:
    """P of one parameter, in its shape and at least single precision; 1.0 for SGD, None where there is no state."""
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0
    state = optimizer.state.get(parameter, {})
    if not state:
        if not any(optimizer.state.values()):
            raise DataError(
                f"{type(optimizer).__name__} has not stepped yet, so it has no preconditioner; expected at least one step."
            )
        return None
    if isinstance(optimizer, torch.optim.RMSprop):
        square = _single(state["square_avg"])
        if group["centered"]:
            square = (square - _single(state["grad_avg"]).square()).clamp_min(0.0)
        return _where_moved(square, square.sqrt() + group["eps"])
    count = float(state["step"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    square = _single(state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"])
    return _where_moved(square, (1.0 - beta1**count) * ((square / (1.0 - beta2**count)).sqrt() + group["eps"]))


def _where_moved(square: Tensor, conditioner: Tensor) -> Tensor:
    """Infinite where there has never been a gradient."""
    return conditioner.masked_fill(square == 0, torch.inf)


def _single(tensor: Tensor) -> Tensor:
    """In float32 or wider, as the Hessian of a half-precision model is; of a sharded tensor this process's part."""
    return local(tensor).to(torch.promote_types(tensor.dtype, torch.float32))


class Scaled:
    """S H S + diag(shift)."""

    def __init__(self, hessian: Operator, scale: Tensor, shift: Tensor) -> None:
        if hessian.size != scale.numel():
            raise DataError(f"the operator has size {hessian.size} and the optimizer's state {scale.numel()}.")
        self._hessian, self.scale = hessian, scale
        self._shift = shift if bool(shift.any()) else None
        least, most = (float(end) for end in torch.aminmax(scale))
        # One rate and no preconditioner: a number, at one pass in place of two.
        self._square = least * most if least == most else None

    @property
    def size(self) -> int:
        """N."""
        return self._hessian.size

    @property
    def dtype(self) -> torch.dtype:
        """The Hessian's own."""
        return vector_like(self._hessian).dtype

    @property
    def device(self) -> torch.device:
        """The Hessian's own."""
        return vector_like(self._hessian).device

    def matvec(self, v: Tensor) -> Tensor:
        """(N,) -> (N,)."""
        if self._square is not None:
            product = self._hessian.matvec(v) * self._square
        else:
            scale = self.scale.to(v)
            product = scale * self._hessian.matvec(scale * v)
        return product if self._shift is None else product.addcmul_(self._shift.to(v), v)


class Block:
    """The diagonal block of an operator at the parameters that are ``inside``; ``sizes`` are those of all, in their order.

    Raises :class:`~telltale.errors.ConfigError` if that is none.
    """

    def __init__(self, operator: Operator, inside: Sequence[bool], sizes: Sequence[int]) -> None:
        self._operator = operator
        like = vector_like(operator)
        taken = torch.tensor(list(inside)).repeat_interleave(torch.tensor(list(sizes)))
        self._places = taken.nonzero()[:, 0].to(like.device)
        if not self.size:
            raise ConfigError("the block holds no parameter that is measured; expected one that is trained and used.")
        self.dtype, self.device = like.dtype, like.device

    @property
    def size(self) -> int:
        """Numbers of the block."""
        return self._places.numel()

    def matvec(self, v: Tensor) -> Tensor:
        """(size,) -> (size,)."""
        whole = torch.zeros(self._operator.size, dtype=v.dtype, device=v.device)
        return self._operator.matvec(whole.index_put_((self._places,), v))[self._places]


@dataclass(frozen=True)
class StepJacobian:
    """``exponents`` maps eigenvalues of ``wrap(H)`` to ln of the moduli of the step's Jacobian."""

    name: str
    exponents: Exponents
    threshold: float
    """Eigenvalue of ``wrap(H)`` above which the step overshoots; infinite at rate 0, where nothing moves."""
    wrap: Callable[[Operator], Operator] | None = None
    """H -> the symmetric operator that the step really has, such as P^-1/2 H P^-1/2. None: H itself."""
    roots: int = 1
    """Exponents for each direction: 2 with momentum."""
    scale: Tensor | None = None
    """S, (N,): ``wrap(H)`` is S H S + diag(``shift``). None where nothing is wrapped."""
    shift: Tensor | None = None


def gradient_descent_jacobian(rate: float) -> StepJacobian:
    """I - rate H, whatever the optimizer is; its edge is at 2 / rate."""
    return StepJacobian("gd", gradient_descent(rate), 2.0 / rate if rate > 0 else math.inf)


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
