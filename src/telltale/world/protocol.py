"""What a world model is here: anything with a ``step``. :func:`adapt` checks it once and gives it one form.

A model of level 1 (Chu et al., arXiv 2604.22748, section 3) has four operators on a belief z: inference q(z_t | o, a),
forward dynamics p(z_t | z_{t-1}, a_t), decoding p(o_t | z_t) and inverse dynamics. Only the dynamics are required.
The index convention here: ``step(z, a) -> z'``, and ``actions[0]`` is the first one taken.

What ``step(belief, action)`` is given: a tensor belief (B, D) with actions (B, A), or one row (D,) with (A,) where the
caller has one; discrete actions are (B,) int64. A model over plain Python states is given one state and one action.
What it may return: a :class:`Transition` (or any object with a ``belief``), or the next belief itself, of the shape of the
one before. It may take ``generator`` (its noise comes from there) and ``common`` (one draw of the noise serves every row).

A module is stepped in evaluation mode, in its own dtype and on its own device; the caller gets back what it gave. State
belongs into the belief: a model that keeps some between calls cannot be asked the same question twice.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from telltale.config import check_integer
from telltale.errors import DataError, NumericalError, UnsupportedModelError
from telltale.world.plugs import called, modules_of
from telltale.world.randomness import copy_of, drawn_seed, replayed_own_randomness


class DivergedError(NumericalError, ValueError):
    """A model predicted NaN or infinite values; names the model, the field and the first index."""


@dataclass(frozen=True)
class Transition:
    """What one step predicts. ``belief`` (B, D) or a plain state; the others (B,), or None where the model is silent.

    ``terminated`` is boolean, or the probability of an end, which counts from a half on.
    """

    belief: Any
    reward: Any = None
    terminated: Any = None
    log_prob: Any = None


@runtime_checkable
class WorldModel(Protocol):
    """The protocol. Optional, found by capability and never by class: ``infer(observation) -> belief`` (rows, or one plain
    state), ``decode(belief) -> observation`` for beliefs that are not observations (rewards, laws and errors are then
    those of what it decodes), ``predict(belief, action) -> (mean, standard deviation)`` of the next observation,
    ``particles`` and ``step_particles``, and ``successors(state) -> next states``, one per discrete action, which saves a
    search over plain states most of its calls.
    """

    def step(self, belief: Any, action: Any) -> Any:
        """The next belief, as a :class:`Transition` or by itself."""
        ...


class Adapted:
    """A model behind one form: :meth:`step` always takes a generator and always returns a :class:`Transition`.

    ``repeatable``: whether two steps from one belief with one seed were equal, where that was tried.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        parameters = _parameters_of(model.step)
        self.takes_generator = "generator" in parameters
        self.takes_common = "common" in parameters
        self.particles = check_integer(f"particles of {self.name}", getattr(model, "particles", 1), low=1)
        if self.particles > 1 and not callable(getattr(model, "step_particles", None)):
            raise UnsupportedModelError(
                f"{self.name} has {self.particles} particles and no step_particles(belief, action, *, generator, common) "
                f"for rows (particles, B, D); add it, or leave particles out."
            )
        self.decodes = callable(getattr(model, "decode", None))
        self.repeatable = True
        self._stochastic: bool | None = getattr(model, "stochastic", None)
        self._modules = list(modules_of(model))
        weights = [p for module in self._modules for p in module.parameters() if p.is_floating_point()]
        self._dtype = weights[0].dtype if len({p.dtype for p in weights}) == 1 else None
        self._device = weights[0].device if len({p.device for p in weights}) == 1 else None

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    def stochastic(self, belief: Any, action: Any) -> bool:
        """Whether steps from one belief differ: the model's own word (``stochastic``), or trials with two seeds."""
        if self._stochastic is None:
            # an outcome may depend on chance in few states only, so all the rows are tried
            first, again, second = (
                self.step(belief, action, generator=torch.Generator().manual_seed(seed)).belief for seed in (1, 1, 2)
            )
            self.repeatable = _same(first, again)
            self._stochastic = not (self.repeatable and _same(first, second))
        return self._stochastic

    def infer(self, observation: Any) -> Any:
        """The belief after the observation, rows (B, O) or one plain state: the model's own ``infer``, or the observation."""
        infer = getattr(self.model, "infer", None)
        if not callable(infer):
            return observation
        if not isinstance(observation, Tensor):
            return called(f"{self.name}.infer", infer, observation)
        with self._as_it_runs(), torch.no_grad():
            belief = called(f"{self.name}.infer", infer, self._given(observation))
        if not isinstance(belief, Tensor) or belief.shape[:-1] != observation.shape[:-1]:
            raise UnsupportedModelError(
                f"{self.name}.infer returned {_described(belief)} for observations of shape {tuple(observation.shape)}; "
                f"return one row of belief per row."
            )
        return belief.to(observation)

    def observed(self, belief: Any) -> Any:
        """The observation of a belief: what the model decodes, or the belief itself."""
        if not self.decodes:
            return belief
        if not isinstance(belief, Tensor):
            return called(f"{self.name}.decode", self.model.decode, belief)
        with self._as_it_runs(), torch.no_grad():
            found = called(f"{self.name}.decode", self.model.decode, self._given(belief))
        if not isinstance(found, Tensor) or found.shape[:-1] != belief.shape[:-1]:
            raise UnsupportedModelError(
                f"{self.name}.decode returned {_described(found)} for beliefs of shape {tuple(belief.shape)}; return one "
                f"row of observation per row."
            )
        return found.to(belief)

    def predict(self, belief: Tensor, action: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (B, D) of the next observation as the model states them; None where it does not."""
        stated = getattr(self.model, "predict", None)
        if not callable(stated) or self.decodes:
            return None
        what = f"{self.name}.predict"
        with self._as_it_runs():
            found = called(what, stated, self._given(belief), self._given(action))
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(side, Tensor) for side in found)):
            raise UnsupportedModelError(
                f"{what} returned {_described(found)}; expected two tensors, (mean, standard deviation) of the next observation."
            )
        mean, deviation = (side.to(belief) for side in found)
        if mean.shape != belief.shape or deviation.shape != belief.shape or bool((deviation < 0).any()):
            raise UnsupportedModelError(
                f"{what} returned a mean {tuple(mean.shape)} and a deviation {tuple(deviation.shape)}, the least "
                f"{float(deviation.min()):.3g}; expected {tuple(belief.shape)} and no negative deviation."
            )
        return mean, deviation

    def step(
        self, belief: Any, action: Any, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step of the model. With a generator, whatever the model draws is determined by the generator's state.

        Raises :class:`~telltale.errors.UnsupportedModelError` if the model returns what the protocol does not take, and
        :class:`~telltale.world.plugs.UserCodeError` if it raises.
        """
        return self._stepped("step", belief, action, generator, common)

    def step_particles(
        self, belief: Tensor, action: Tensor, *, generator: torch.Generator | None = None, common: bool = False
    ) -> Transition:
        """One step of every particle, ``belief`` (P, B, D)."""
        return self._stepped("step_particles", belief, action, generator, common)

    def successors(self, state: Any, actions: int, *, generator: torch.Generator | None = None) -> Iterable[Any]:
        """The next plain state of each of ``actions`` actions, in order: the model's own ``successors``, or a step each.

        With a generator, which does not move, every action is stepped from its state.
        """
        own = getattr(self.model, "successors", None)
        if generator is not None or not callable(own):
            return (
                self.step(state, action, generator=None if generator is None else copy_of(generator)).belief
                for action in range(actions)
            )
        what = f"{self.name}.successors"
        found = list(called(what, own, state))
        if len(found) != actions:
            raise UnsupportedModelError(
                f"{what} returned {len(found)} states; return one for each of {actions} actions."
            )
        return [self._checked(what, state, Transition(after)).belief for after in found]

    def _stepped(
        self, method: str, belief: Any, action: Any, generator: torch.Generator | None, common: bool
    ) -> Transition:
        options: dict[str, Any] = {}
        if self.takes_generator or method == "step_particles":
            options["generator"] = generator
        if self.takes_common or method == "step_particles":
            options["common"] = common
        step = getattr(self.model, method)
        what = f"{self.name}.{method}"
        given = self._given(belief), self._given(action)
        if generator is None or self.takes_common or self._stochastic is False or method == "step_particles":
            with self._as_it_runs():
                returned = called(what, step, *given, **options)
        else:
            with self._as_it_runs(), replayed_own_randomness(self.model, drawn_seed(generator)):
                returned = called(what, step, *given, **options)
        transition = returned if isinstance(returned, Transition) else _as_transition(returned)
        return self._checked(what, belief, transition)

    def _as_it_runs(self) -> AbstractContextManager[None]:
        """Modules that the user left in training mode run in evaluation mode: no dropout, no statistics of the batch."""
        training = [root for root in self._modules if root.training]
        return _evaluating(training) if training else _AS_IT_IS

    def _given(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=self._device, dtype=self._dtype if value.is_floating_point() else None)

    def _checked(self, what: str, belief: Any, transition: Transition) -> Transition:
        after = transition.belief
        if not isinstance(belief, Tensor):
            if after is None:
                raise UnsupportedModelError(f"{what} returned None; return the next state or a Transition.")
            if isinstance(belief, tuple) and not (isinstance(after, tuple) and len(after) == len(belief)):
                raise UnsupportedModelError(
                    f"{what} returned {_described(after)} for a state of {len(belief)} fields; return a tuple of as many."
                )
            return transition
        if not isinstance(after, Tensor):
            raise UnsupportedModelError(
                f"{what} returned {type(after).__name__} for a tensor belief of shape {tuple(belief.shape)}; "
                f"return the next belief as a tensor of that shape, or a telltale.world.Transition."
            )
        if after.shape != belief.shape:
            raise UnsupportedModelError(
                f"{what} returned a belief of shape {tuple(after.shape)} for one of shape {tuple(belief.shape)}; the next "
                f"belief must have the same batch size and width."
            )
        values = {}
        for field in ("reward", "terminated", "log_prob"):
            value = getattr(transition, field)
            if value is not None:
                value = torch.as_tensor(value)
                if value.shape != belief.shape[:-1]:
                    raise UnsupportedModelError(
                        f"{what} returned {field} of shape {tuple(value.shape)}; expected one value per row, "
                        f"{tuple(belief.shape[:-1])}."
                    )
                value = _ended(value, what) if field == "terminated" else value
                values[field] = value.to(belief.device)
        return Transition(after.to(belief), **values)


_AS_IT_IS = nullcontext()


@contextmanager
def _evaluating(roots: list[torch.nn.Module]) -> Iterator[None]:
    """The modules in evaluation mode; afterwards each of their parts is as it was."""
    training = [module for root in roots for module in root.modules() if module.training]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ended(value: Tensor, what: str) -> Tensor:
    """A boolean end: as it is, or where a probability is at least a half."""
    if value.dtype == torch.bool:
        return value
    if bool(((value < 0) | (value > 1) | value.isnan()).any()):
        raise UnsupportedModelError(
            f"{what} returned terminated between {float(value.min()):.3g} and {float(value.max()):.3g}; expected booleans, or "
            f"probabilities from 0 to 1 (the sigmoid of a logit)."
        )
    return value >= 0.5


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]


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
    if not all_finite(value):
        raise DataError(f"{field}{_first_bad(value)} is not finite; expected numbers. Check where it comes from.")


def check_predicted(value: Tensor, name: str, field: str) -> None:
    """Raise :class:`DivergedError` if a model's prediction is NaN or infinite."""
    if not all_finite(value):
        raise DivergedError(
            f"{name} predicted a {field} that is not finite, first at {_first_bad(value)}; the model left the region where it "
            f"is defined. Shorten the horizon, add laws, or fit it on more data."
        )


def all_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
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
