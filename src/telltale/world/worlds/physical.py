"""Gymnasium's classic control tasks, each with laws, a success predicate, and oracle dynamics written here in PyTorch.

The oracles are batched and share no code with the environments: they are the equations of motion (Gymnasium's
documentation of Pendulum-v1, CartPole-v1 and Acrobot-v1), so that an error in one shows against the other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telltale.config import check_range
from telltale.world.laws import library
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, World
from telltale.world.worlds.gym_world import GymWorld

STEP = 0.05
"""Seconds of one step of Pendulum-v1."""


class Pendulum(GymWorld):
    """Swing up and hold. Success: the angle stays within .25 rad of upright for 90% of the last 50 steps.

    ``gain`` multiplies the torque (-1: the actuator's polarity is flipped). ``drag`` slows the bob by drag * w |w| below the
    pivot only, as in a basin half full of a liquid. With the defaults the engine is Gymnasium's, untouched.
    """

    columns = ("cosine", "sine", "velocity")
    angle = (0, 1, 2)
    top_speed = 8.0
    dt = STEP

    def __init__(self, *, gain: float = 1.0, drag: float = 0.0) -> None:
        super().__init__("Pendulum-v1", horizon=20)
        self.gain = check_range("gain", gain, low=-10.0, high=10.0)
        self.drag = check_range("drag", drag, low=0.0, high=10.0)
        self.reward = pendulum_reward
        self.laws = (
            library.unit_circle(0, 1, tolerance=0.05),
            library.limits(2, -8.0, 8.0, tolerance=1e-3, name="speed limit"),
            library.angle_kinematics(0, 1, 2, STEP, tolerance=0.05),
        )

    def step(self, action: Any) -> Outcome:
        """One step of Gymnasium's engine under the torque that the changed actuator and the liquid leave of ``action``."""
        if self.gain == 1.0 and self.drag == 0.0:
            return super().step(action)
        asked = float(np.clip(self.checked_action(action)[0], -2.0, 2.0))
        angle, speed = self.env.unwrapped.state
        slowing = self.drag * speed * abs(speed) * float(np.cos(angle) < 0)
        # the engine turns a torque u into the acceleration 3 u; its own limit of 2 must not cut the drag
        self.env.unwrapped.max_torque = np.inf
        torque = self.gain * asked - slowing / 3.0
        observation, reward, _, truncated, _ = self.env.unwrapped.step(np.array([torque], dtype=np.float32))
        self._steps += 1
        reward = float(reward) + 0.001 * (float(np.float32(torque)) ** 2 - asked**2)
        return Outcome(self._observed(observation), reward, False, bool(truncated) or self._steps >= self.max_steps)

    def settings(self) -> dict[str, Any]:
        """gain and drag, where they are not the engine's own."""
        changed = {"gain": (self.gain, 1.0), "drag": (self.drag, 0.0)}
        return {name: value for name, (value, usual) in changed.items() if value != usual}

    def spawn(self) -> World:
        """Another Pendulum."""
        return Pendulum(gain=self.gain, drag=self.drag)

    def success(self, episode: Episode) -> bool:
        """|angle| < .25 in at least 90% of the last 50 states."""
        angles = [abs(math.atan2(o[1], o[0])) for o in episode.observations[-50:]]
        return len(episode) >= 50 and sum(angle < 0.25 for angle in angles) >= 0.9 * len(angles)

    def oracle(self) -> Any:
        """The equation of motion."""
        return PendulumDynamics(gain=self.gain, drag=self.drag)


class PendulumDynamics:
    """theta'' = 3 g / (2 l) sin theta + 3 u / (m l^2), semi-implicit Euler, on (cos, sin, velocity); g 10, m 1, l 1.

    ``gravity``, ``gain`` (of the actuator) and ``drag`` (w |w| below the pivot) can be set, for worlds whose law has changed.
    """

    stochastic = False

    def __init__(self, gravity: float = 10.0, gain: float = 1.0, drag: float = 0.0) -> None:
        self.gravity, self.gain, self.drag = gravity, gain, drag

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One step of 0.05 s for rows (..., 3) and torques (..., 1) in N m."""
        cosine, sine, velocity = belief.unbind(-1)
        torque = self.gain * action[..., 0].clamp(-2.0, 2.0)
        push = 1.5 * self.gravity * sine + 3.0 * torque
        if self.drag:
            push = push - self.drag * velocity * velocity.abs() * (cosine < 0)
        velocity = (velocity + push * STEP).clamp(-8.0, 8.0)
        turn = velocity * STEP
        turned, moved = torch.cos(turn), torch.sin(turn)
        # rotating (cos, sin) by the turn saves an atan2 per step
        return Transition(torch.stack([cosine * turned - sine * moved, sine * turned + cosine * moved, velocity], -1))


def pendulum_reward(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """-(angle^2 + .1 velocity^2 + .001 torque^2) of the state before the step, as Gymnasium pays it."""
    angle = torch.atan2(before[..., 1], before[..., 0])
    return -(angle**2 + 0.1 * before[..., 2] ** 2 + 0.001 * action[..., 0].clamp(-2.0, 2.0) ** 2)


class CartPole(GymWorld):
    """Balance the pole. Success: at least 450 steps."""

    columns = ("position", "velocity", "angle", "angular velocity")

    def __init__(self) -> None:
        super().__init__("CartPole-v1", horizon=20)
        self.reward = cartpole_objective
        self.terminated = cartpole_fallen
        self.laws = (
            library.kinematics(0, 1, 0.02, tolerance=0.01, name="cart kinematics"),
            library.kinematics(2, 3, 0.02, tolerance=0.01, name="pole kinematics"),
        )

    def spawn(self) -> World:
        """Another CartPole."""
        return CartPole()

    def success(self, episode: Episode) -> bool:
        """The episode lasted 450 steps."""
        return len(episode) >= 450

    def oracle(self) -> Any:
        """The equations of motion."""
        return CartPoleDynamics()


class CartPoleDynamics:
    """Barto, Sutton and Anderson's cart and pole, explicit Euler of 0.02 s; action 0 pushes left, 1 right, with 10 N."""

    stochastic = False

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One step for rows (..., 4)."""
        x, speed, angle, turn = belief.unbind(-1)
        force = 20.0 * action.to(belief.dtype) - 10.0
        sine, cosine = torch.sin(angle), torch.cos(angle)
        push = (force + 0.05 * turn**2 * sine) / 1.1
        swing = (9.8 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
        slide = push - 0.05 * swing * cosine / 1.1
        after = torch.stack([x + 0.02 * speed, speed + 0.02 * slide, angle + 0.02 * turn, turn + 0.02 * swing], -1)
        return Transition(after, terminated=cartpole_fallen(after))


def cartpole_fallen(after: Tensor) -> Tensor:
    """The cart left +-2.4 or the pole +-12 degrees."""
    return (after[..., 0].abs() > 2.4) | (after[..., 2].abs() > 12 * 2 * math.pi / 360)


def cartpole_objective(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """1 per step, as Gymnasium pays, less a small price for leaving the middle that orders plans of equal length."""
    return 1.0 - 0.1 * (after[..., 0] / 2.4) ** 2 - 0.1 * (after[..., 2] / 0.2095) ** 2


class Acrobot(GymWorld):
    """Swing the tip above the bar. Success: the episode ends before its 500 steps are over."""

    columns = ("cosine 1", "sine 1", "cosine 2", "sine 2", "velocity 1", "velocity 2")

    def __init__(self) -> None:
        super().__init__("Acrobot-v1", horizon=25)
        self.reward = acrobot_objective
        self.terminated = acrobot_up
        self.laws = (
            library.unit_circle(0, 1, name="unit circle 1"),
            library.unit_circle(2, 3, name="unit circle 2"),
            library.limits(4, -4 * math.pi, 4 * math.pi, tolerance=1e-3, name="speed limit 1"),
            library.limits(5, -9 * math.pi, 9 * math.pi, tolerance=1e-3, name="speed limit 2"),
        )

    def spawn(self) -> World:
        """Another Acrobot."""
        return Acrobot()

    def success(self, episode: Episode) -> bool:
        """The tip came up."""
        return episode.terminated

    def oracle(self) -> Any:
        """The equations of motion."""
        return AcrobotDynamics()


class AcrobotDynamics:
    """Sutton and Barto's acrobot (links of 1 m and 1 kg, moments of inertia 1), one Runge-Kutta step of 0.2 s."""

    stochastic = False

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """One step for rows (..., 6); actions 0, 1, 2 are torques -1, 0, 1."""
        c1, s1, c2, s2, w1, w2 = belief.unbind(-1)
        state = torch.stack([torch.atan2(s1, c1), torch.atan2(s2, c2), w1, w2], -1)
        torque = action.to(belief.dtype) - 1.0
        k1 = _acrobot_slope(state, torque)
        k2 = _acrobot_slope(state + 0.1 * k1, torque)
        k3 = _acrobot_slope(state + 0.1 * k2, torque)
        k4 = _acrobot_slope(state + 0.2 * k3, torque)
        one, two, w1, w2 = (state + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind(-1)
        w1, w2 = w1.clamp(-4 * math.pi, 4 * math.pi), w2.clamp(-9 * math.pi, 9 * math.pi)
        after = torch.stack([torch.cos(one), torch.sin(one), torch.cos(two), torch.sin(two), w1, w2], -1)
        return Transition(after, terminated=acrobot_up(after))


def _acrobot_slope(state: Tensor, torque: Tensor) -> Tensor:
    one, two, w1, w2 = state.unbind(-1)
    gravity, half = 9.8, math.pi / 2
    cosine, sine = torch.cos(two), torch.sin(two)
    inertia = 0.25 + 1 + 0.25 + cosine + 2.0
    coupling = 0.25 + 0.5 * cosine + 1.0
    phi2 = 0.5 * gravity * torch.cos(one + two - half)
    phi1 = -0.5 * w2**2 * sine - w2 * w1 * sine + 1.5 * gravity * torch.cos(one - half) + phi2
    a2 = (torque + coupling / inertia * phi1 - 0.5 * w1**2 * sine - phi2) / (0.25 + 1.0 - coupling**2 / inertia)
    a1 = -(coupling * a2 + phi1) / inertia
    return torch.stack([w1, w2, a1, a2], -1)


def _tip_height(after: Tensor) -> Tensor:
    c1, s1, c2, s2 = after[..., :4].unbind(-1)
    return -c1 - (c1 * c2 - s1 * s2)


def acrobot_up(after: Tensor) -> Tensor:
    """The tip is above the bar by one link."""
    return _tip_height(after) > 1.0


def acrobot_objective(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """Height of the tip, plus a little kinetic energy, which is what a swing-up has to gather first; the goal pays 50."""
    return _tip_height(after) + 0.05 * after[..., 4] ** 2 + 0.02 * after[..., 5] ** 2 + 50.0 * acrobot_up(after)
