"""What a world model is here: anything with a ``step``. :func:`adapt` checks it once and gives it one form.

A model of level 1 (Chu et al., arXiv 2604.22748, section 3) has four operators on a belief z: inference q(z_t | o, a),
forward dynamics p(z_t | z_{t-1}, a_t), decoding p(o_t | z_t) and inverse dynamics. Only the dynamics are required.
The index convention here: ``step(z, a) -> z'``, and ``actions[0]`` is the first one taken.

What ``step(belief, action)`` is given: a tensor belief (B, D) with actions (B, A), or one row (D,) with (A,) where the
caller has one; discrete actions are (B,) int64. A model over plain Python states is given one state and one action.
What it may return: a :class:`Transition` (or any object with a ``belief``), or the next belief itself. It may take
``generator`` (its noise comes from there) and ``common`` (one draw of the noise serves every row).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from telltale.errors import DataError, NumericalError, UnsupportedModelError
from telltale.world.randomness import drawn_seed, replayed_own_randomness


class DivergedError(NumericalError, ValueError):
    """A model predicted NaN or infinite values; names the model, the field and the first index."""


@dataclass(frozen=True)
class Transition:
    """What one step predicts. ``belief`` (B, D) or a plain state; the others (B,), or None where the model is silent."""

    belief: Any
    reward: Any = None
    terminated: Any = None
    log_prob: Any = None


@runtime_checkable
class WorldModel(Protocol):
    """The protocol. Optional, found by capability and never by class: ``infer(history) -> belief``,
    ``decode(belief) -> observation``, ``inverse(belief, next_belief) -> action``,
    ``predict(belief, action) -> (mean, standard deviation)`` of the next belief, ``particles`` and ``step_particles``, and
    ``successors(state) -> next states``, one per discrete action, which saves a search most of its calls.
    """

    def step(self, belief: Any, action: Any) -> Any:
        """The next belief, as a :class:`Transition` or by itself."""
        ...


class Adapted:
    """A model behind one form: :meth:`step` always takes a generator and always returns a :class:`Transition`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        parameters = _parameters_of(model.step)
        self.takes_generator = "generator" in parameters
        self.takes_common = "common" in parameters
        self.particles = int(getattr(model, "particles", 1))
        self._stochastic: bool | None = getattr(model, "stochastic", None)
        self._checked = False

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    def stochastic(self, belief: Any, action: Any) -> bool:
        """Whether two steps from one belief differ: the model's own word (``stochastic``), or one trial with two seeds."""
        if self._stochastic is None:
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            first, second = (self.step(belief, action, generator=generator).belief for generator in generators)
            self._stochastic = not _same(first, second)
        return self._stochastic

    def infer(self, observation: Any) -> Any:
        """The belief after the observation: the model's own ``infer``, or the observation itself."""
        infer = getattr(self.model, "infer", None)
        return infer(observation) if callable(infer) else observation

    def step(
        self, belief: Any, action: Any, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step of the model. With a generator, whatever the model draws is determined by the generator's state.

        Raises :class:`~telltale.errors.UnsupportedModelError` if the model returns what the protocol does not take.
        """
        options: dict[str, Any] = {}
        if self.takes_generator:
            options["generator"] = generator
        if self.takes_common:
            options["common"] = common
        if generator is None or self.takes_common or self._stochastic is False:
            returned = self.model.step(belief, action, **options)
        else:
            with replayed_own_randomness(self.model, drawn_seed(generator)):
                returned = self.model.step(belief, action, **options)
        transition = returned if isinstance(returned, Transition) else _as_transition(returned)
        if not self._checked or isinstance(belief, Tensor):
            self._check(belief, transition)
        return transition

    def successors(self, state: Any, actions: int) -> Iterable[Any]:
        """The next plain state of each of ``actions`` actions, in order: the model's own ``successors``, or a step each."""
        own = getattr(self.model, "successors", None)
        if callable(own):
            return own(state)
        return (self.step(state, action).belief for action in range(actions))

    def _check(self, belief: Any, transition: Transition) -> None:
        after = transition.belief
        if isinstance(belief, Tensor):
            if not isinstance(after, Tensor):
                raise UnsupportedModelError(
                    f"{self.name}.step returned {type(after).__name__} for a tensor belief of shape {tuple(belief.shape)}; "
                    f"return the next belief as a tensor of that shape, or a telltale.world.Transition."
                )
            if after.shape != belief.shape:
                raise UnsupportedModelError(
                    f"{self.name}.step returned a belief of shape {tuple(after.shape)} for one of shape "
                    f"{tuple(belief.shape)}; the next belief must have the same batch size and width."
                )
            if not self._checked:
                for field in ("reward", "terminated", "log_prob"):
                    value = getattr(transition, field)
                    if value is not None and tuple(torch.as_tensor(value).shape) != tuple(belief.shape[:-1]):
                        raise UnsupportedModelError(
                            f"{self.name}.step returned {field} of shape {tuple(torch.as_tensor(value).shape)}; expected "
                            f"one value per row, {tuple(belief.shape[:-1])}."
                        )
        elif after is None:
            raise UnsupportedModelError(f"{self.name}.step returned None; return the next state or a Transition.")
        self._checked = True


def adapt(model: Any) -> Adapted:
    """``model`` behind the one form of :class:`Adapted`; an Adapted comes back as it is.

    Raises :class:`~telltale.errors.UnsupportedModelError` if it has no ``step(belief, action)``.
    """
    if isinstance(model, Adapted):
        return model
    if not callable(getattr(model, "step", None)):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no world model: it has no step(belief, action). Give it one that returns the next "
            f"belief (B, D), or a telltale.world.Transition."
        )
    return Adapted(model)


def check_finite(value: Tensor, field: str) -> None:
    """Raise :class:`~telltale.errors.DataError` naming ``field`` and the first index that is NaN or infinite."""
    if not _all_finite(value):
        raise DataError(f"{field}{_first_bad(value)} is not finite; expected numbers. Check where it comes from.")


def check_predicted(value: Tensor, name: str, field: str) -> None:
    """Raise :class:`DivergedError` if a model's prediction is NaN or infinite."""
    if not _all_finite(value):
        raise DivergedError(
            f"{name} predicted a {field} that is not finite, first at {_first_bad(value)}; the model left the region where it "
            f"is defined. Shorten the horizon, add laws, or fit it on more data."
        )


def _all_finite(value: Tensor) -> bool:
    # one pass where all is well: a sum is finite only if every term is, and a sum that overflows is looked at again
    if not value.is_floating_point() or math.isfinite(float(value.detach().sum())):
        return True
    return bool(torch.isfinite(value).all())


def _first_bad(value: Tensor) -> list[int]:
    return [int(i) for i in (~torch.isfinite(value)).nonzero()[0]]


def _as_transition(returned: Any) -> Transition:
    if not isinstance(returned, Tensor) and hasattr(returned, "belief"):
        fields = ("reward", "terminated", "log_prob")
        return Transition(returned.belief, *(getattr(returned, field, None) for field in fields))
    return Transition(returned)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return bool(torch.equal(first, second))
    return bool(first == second)


def _parameters_of(step: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(step).parameters)
    except (TypeError, ValueError):
        return frozenset()
