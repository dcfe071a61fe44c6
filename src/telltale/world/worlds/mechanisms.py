"""MuJoCo mechanisms: Reacher to plan in, HalfCheetah and a double pendulum for laws and replay.

The oracles step MuJoCo itself from a state rebuilt out of the observation, on a second engine; MuJoCo's ``rollout``
does the rows of a batch in C. Training and evaluation count those steps as planning, never as experience.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import mujoco
import numpy as np
import torch
from gymnasium import spaces
from mujoco import rollout as mujoco_rollout
from torch import Tensor

from telltale.world.laws import library
from telltale.world.protocol import Transition
from telltale.world.worlds.base import Episode, Outcome, World
from telltale.world.worlds.gym_world import GymWorld


class EngineDynamics:
    """MuJoCo as a model: ``to_engine(belief) -> (qpos, qvel)`` and ``from_engine(before, qpos, qvel) -> belief``, by rows."""

    stochastic = False

    def __init__(self, model: Any, frame_skip: int, to_engine: Any, from_engine: Any) -> None:
        self.engine, self.frame_skip = model, frame_skip
        self.to_engine, self.from_engine = to_engine, from_engine
        self.data = mujoco.MjData(model)
        self.width = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)

    def step(self, belief: Tensor, action: Tensor) -> Transition:
        """``frame_skip`` engine steps for rows (..., D)."""
        rows = belief.reshape(-1, belief.shape[-1]).double().numpy()
        control = action.reshape(len(rows), -1).double().numpy()
        qpos, qvel = self.to_engine(rows)
        start = np.zeros((len(rows), self.width))
        start[:, 1 : 1 + qpos.shape[1]] = qpos
        start[:, 1 + qpos.shape[1] : 1 + qpos.shape[1] + qvel.shape[1]] = qvel
        states, _ = mujoco_rollout.rollout(
            self.engine, self.data, start, np.repeat(control[:, None], self.frame_skip, 1)
        )
        end = states[:, -1]
        after = self.from_engine(
            rows, end[:, 1 : 1 + qpos.shape[1]], end[:, 1 + qpos.shape[1] : 1 + qpos.shape[1] + qvel.shape[1]]
        )
        return Transition(torch.as_tensor(after, dtype=belief.dtype).reshape(belief.shape))


def _mujoco_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("gymnasium", "mujoco", "numpy")}


class Reacher(GymWorld):
    """A two-link arm reaches a target. Success: the tip is within .05 of it on average over the last 10 steps."""

    columns = (
        "cosine 1",
        "cosine 2",
        "sine 1",
        "sine 2",
        "target x",
        "target y",
        "velocity 1",
        "velocity 2",
        "off x",
        "off y",
    )

    def __init__(self) -> None:
        super().__init__("Reacher-v5", horizon=10)
        self.reward = reacher_reward
        self.laws = (
            library.unit_circle(0, 2, name="unit circle 1"),
            library.unit_circle(1, 3, name="unit circle 2"),
            library.fixed((4, 5), tolerance=0.005, name="target stays"),
        )

    def spawn(self) -> World:
        """Another Reacher."""
        return Reacher()

    def success(self, episode: Episode) -> bool:
        """Mean distance over the last 10 observations below .05."""
        return len(episode) >= 10 and float(np.mean([np.hypot(*o[8:10]) for o in episode.observations[-10:]])) < 0.05

    def oracle(self) -> Any:
        """MuJoCo from the observed angles."""
        env = self.env.unwrapped
        return EngineDynamics(env.model, env.frame_skip, _reacher_to_engine, _reacher_from_engine)

    def versions(self) -> dict[str, str]:
        """Gymnasium, MuJoCo, NumPy."""
        return _mujoco_versions()


def _reacher_to_engine(rows: Any) -> tuple[Any, Any]:
    angles = np.stack([np.arctan2(rows[:, 2], rows[:, 0]), np.arctan2(rows[:, 3], rows[:, 1])], 1)
    return np.concatenate([angles, rows[:, 4:6]], 1), np.concatenate([rows[:, 6:8], np.zeros((len(rows), 2))], 1)


def _reacher_from_engine(before: Any, qpos: Any, qvel: Any) -> Any:
    # Gymnasium reads the tip from the last stage of MuJoCo's Runge-Kutta step, a few millimetres from where the joints are
    one, two = qpos[:, 0], qpos[:, 1]
    tip = np.stack([0.1 * np.cos(one) + 0.11 * np.cos(one + two), 0.1 * np.sin(one) + 0.11 * np.sin(one + two)], 1)
    target = before[:, 4:6]
    return np.concatenate([np.cos(qpos[:, :2]), np.sin(qpos[:, :2]), target, qvel[:, :2], tip - target], 1)


def reacher_reward(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """-(distance + |action|^2) after the step, as Gymnasium pays it."""
    return -after[..., 8:10].norm(dim=-1) - action.square().sum(-1)


class HalfCheetah(GymWorld):
    """The cheetah runs. Success: a mean forward velocity of at least 1 m/s over the last 100 steps. Reward is learned."""

    def __init__(self) -> None:
        super().__init__("HalfCheetah-v5", horizon=15)
        dt = float(self.env.unwrapped.dt)
        self.laws = (
            library.kinematics(0, 9, dt, tolerance=0.35, explicit=False, name="height kinematics"),
            library.limits(0, -0.9, 0.9, name="height", hard=False),
        )

    def spawn(self) -> World:
        """Another HalfCheetah."""
        return HalfCheetah()

    def step(self, action: Any) -> Outcome:
        """One step; the receipt adds the contacts and the deepest penetration in metres."""
        outcome = super().step(action)
        data = self.env.unwrapped.data
        depth = max((0.0, *(-float(data.contact[i].dist) for i in range(data.ncon))))
        outcome.receipt.update(contacts=float(data.ncon), penetration=depth)
        return outcome

    def success(self, episode: Episode) -> bool:
        """Mean forward velocity of the last 100 steps, from the receipts."""
        last = episode.receipts[-100:]
        return len(last) == 100 and float(np.mean([receipt["x_velocity"] for receipt in last])) >= 1.0

    def oracle(self) -> Any:
        """MuJoCo from the observed positions; the distance run, which nothing depends on, is 0."""
        env = self.env.unwrapped

        def to_engine(rows: Any) -> tuple[Any, Any]:
            return np.concatenate([np.zeros((len(rows), 1)), rows[:, :8]], 1), rows[:, 8:]

        def from_engine(before: Any, qpos: Any, qvel: Any) -> Any:
            return np.concatenate([qpos[:, 1:], qvel], 1)

        return EngineDynamics(env.model, env.frame_skip, to_engine, from_engine)

    def versions(self) -> dict[str, str]:
        """Gymnasium, MuJoCo, NumPy."""
        return _mujoco_versions()


DOUBLE_PENDULUM = """
<mujoco>
  <option timestep="0.001" integrator="RK4"><flag contact="disable" energy="enable"/></option>
  <worldbody>
    <body name="upper">
      <joint name="shoulder" type="hinge" axis="0 1 0"/>
      <geom type="capsule" fromto="0 0 0 0 0 -0.5" size="0.02" mass="1"/>
      <body name="lower" pos="0 0 -0.5">
        <joint name="elbow" type="hinge" axis="0 1 0"/>
        <geom type="capsule" fromto="0 0 0 0 0 -0.5" size="0.02" mass="1"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="shoulder" ctrlrange="-20 20" ctrllimited="true"/></actuator>
</mujoco>
"""


class DoublePendulum(World):
    """A frictionless double pendulum with a motor at the shoulder, 10 RK4 steps of 1 ms per action.

    Beliefs are (shoulder, elbow, their velocities) in radians and seconds. Success: the tip rises .5 m above the pivot.
    """

    id = "physical/DoublePendulum"
    regime = "physical"
    columns = ("shoulder", "elbow", "shoulder velocity", "elbow velocity")
    max_steps = 300
    horizon = 30
    frame_skip = 10

    def __init__(self) -> None:
        self.engine = mujoco.MjModel.from_xml_string(DOUBLE_PENDULUM)
        self.data = mujoco.MjData(self.engine)
        self._scratch = mujoco.MjData(self.engine)
        self.action_space = spaces.Box(-20.0, 20.0, (1,), np.float64)
        self.reward = double_pendulum_reward
        self.laws = (
            library.energy(
                lambda state: self.energy(state),
                work=_shoulder_work,
                tolerance=1e-3,
                relative=False,
                name="energy balance",
            ),
        )

    def reset(self, seed: int) -> Any:
        """Hanging, with angles and velocities drawn within +-.1."""
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self.engine, self.data)
        self.data.qpos[:] = rng.uniform(-0.1, 0.1, 2)
        self.data.qvel[:] = rng.uniform(-0.1, 0.1, 2)
        mujoco.mj_forward(self.engine, self.data)
        self._steps = 0
        return self._observed()

    def step(self, action: Any) -> Outcome:
        """Ten engine steps under one torque; the receipt has the engine's own energy in joules."""
        self.data.ctrl[:] = self.checked_action(action)
        for _ in range(self.frame_skip):
            mujoco.mj_step(self.engine, self.data)
        mujoco.mj_forward(self.engine, self.data)  # the energy of this state, not of the one before the last step
        self._steps += 1
        observation = self._observed()
        row = torch.as_tensor(observation).unsqueeze(0)
        reward = float(double_pendulum_reward(row, row[:, :1], row)[0])
        return Outcome(
            observation, reward, False, self._steps >= self.max_steps, {"energy": float(self.data.energy.sum())}
        )

    def _observed(self) -> Any:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def energy(self, state: Tensor) -> Tensor:
        """Kinetic plus potential energy of rows (..., 4), in joules, from the moments of inertia of the two capsules."""
        one, elbow, w1, w2 = state.unbind(-1)
        two, w = one + elbow, w1 + w2
        inertia = float(self.engine.body_inertia[1].max())
        mass, length, gravity = 1.0, 0.5, 9.81
        middle = length / 2
        kinetic = 0.5 * (inertia + mass * middle**2) * w1**2 + 0.5 * inertia * w**2
        kinetic = kinetic + 0.5 * mass * (
            length**2 * w1**2 + middle**2 * w**2 + 2 * length * middle * w1 * w * torch.cos(elbow)
        )
        potential = -mass * gravity * (middle * torch.cos(one) + length * torch.cos(one) + middle * torch.cos(two))
        return kinetic + potential

    def spawn(self) -> World:
        """Another one."""
        return DoublePendulum()

    def success(self, episode: Episode) -> bool:
        """The tip was above .5 m."""
        return any(-0.5 * (np.cos(o[0]) + np.cos(o[0] + o[1])) > 0.5 for o in episode.observations)

    def oracle(self) -> Any:
        """MuJoCo on a second engine."""
        return EngineDynamics(
            mujoco.MjModel.from_xml_string(DOUBLE_PENDULUM),
            self.frame_skip,
            lambda rows: (rows[:, :2], rows[:, 2:]),
            lambda before, qpos, qvel: np.concatenate([qpos, qvel], 1),
        )

    def versions(self) -> dict[str, str]:
        """MuJoCo and NumPy."""
        return {name: importlib.metadata.version(name) for name in ("mujoco", "numpy")}


def _shoulder_work(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """Torque is constant over a step, so its work is torque times the angle turned."""
    return action[..., 0].clamp(-20.0, 20.0) * (after[..., 0] - before[..., 0])


def double_pendulum_reward(before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """Height of the tip in metres."""
    return -0.5 * (torch.cos(after[..., 0]) + torch.cos(after[..., 0] + after[..., 1]))
