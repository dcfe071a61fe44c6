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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telltale.configuration import check_range
from telltale.errors import ConfigError

KINDS: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.RMSprop: "rmsprop",
}
"""Exact types: a subclass may step in another way."""

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

    Of parameter groups that differ in rate the fastest is meant; ``preconditioner.view_of`` has all of them.

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
