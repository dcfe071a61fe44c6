"""How many environment steps do SAC, PPO and DQN need where the world model needs 1,200? Whole learning curves, CPU-seconds.

Stable-baselines3 with the tuned settings of its RL Zoo. A policy is judged on the starts that the world models are judged
on (seeds 9000-9009), without exploration noise. CPU-seconds are process time of training alone, one thread. Each run is
one record in ``runs/world_model_free.jsonl``; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from measurement import write_result
from telltale.runs.files import JsonLines

RECORDS = Path("runs/world_model_free.jsonl")
THRESHOLD = {"Pendulum-v1": -150.0, "CartPole-v1": 450.0}

RUNS: dict[tuple[str, str], dict[str, Any]] = {
    ("Pendulum-v1", "SAC"): {"steps": 10_000, "every": 500, "envs": 1, "settings": {"learning_rate": 1e-3}},
    ("Pendulum-v1", "PPO"): {
        "steps": 100_000, "every": 4096, "envs": 4,
        "settings": {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "clip_range": 0.2,
                     "learning_rate": 1e-3, "use_sde": True, "sde_sample_freq": 4},
    },
    ("CartPole-v1", "PPO"): {
        "steps": 50_000, "every": 1024, "envs": 8,
        "settings": {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0,
                     "learning_rate": "linear 0.001", "clip_range": "linear 0.2"},
    },
    ("CartPole-v1", "DQN"): {
        "steps": 50_000, "every": 2500, "envs": 1,
        "settings": {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99,
                     "target_update_interval": 10, "train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.16,
                     "exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]}},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="environment/algorithm, e.g. Pendulum-v1/SAC")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = JsonLines(RECORDS)
    done = {(r["environment"], r["algorithm"], r["seed"]) for r in records}
    for seed in range(arguments.seeds):
        for (environment, algorithm), run in RUNS.items():
            if arguments.only not in (None, f"{environment}/{algorithm}") or (environment, algorithm, seed) in done:
                continue
            record = {
                "environment": environment,
                "algorithm": algorithm,
                "seed": seed,
                **trained(environment, algorithm, seed, run),
            }
            records.append(record)
            print(environment, algorithm, seed, record["to_threshold"], round(record["cpu_seconds"], 1), flush=True)
    found = list(records)
    write_result(
        "world_model_free", seeds=arguments.seeds, stable_baselines3=stable_baselines3.__version__, threshold=THRESHOLD,
        settings={f"{e}/{a}": run for (e, a), run in RUNS.items()}, summary=summary(found), runs=found,
    )  # fmt: skip


def trained(environment: str, algorithm: str, seed: int, run: dict[str, Any]) -> dict[str, Any]:
    """One run: its curve of (steps, mean return over ten starts), and the first point above the threshold."""
    settings = {key: _schedule(value) for key, value in run["settings"].items()}
    kind = {"SAC": SAC, "PPO": PPO, "DQN": DQN}[algorithm]
    env = make_vec_env(environment, n_envs=run["envs"], seed=seed)
    model = kind("MlpPolicy", env, seed=seed, device="cpu", **settings)
    judge = Judge(environment, run["every"])
    model.learn(run["steps"], callback=judge)
    curve, cpu = judge.curve, judge.cpu()
    crossed = next((point for point in curve if point[1] >= THRESHOLD[environment]), None)
    return {
        "curve": curve, "cpu_seconds": cpu, "to_threshold": crossed[0] if crossed else None,
        "cpu_to_threshold": crossed[2] if crossed else None,
    }  # fmt: skip


class Judge(BaseCallback):
    """Judges the policy every ``every`` steps, and keeps the CPU time of judging out of the account."""

    def __init__(self, environment: str, every: int) -> None:
        super().__init__()
        self.environment, self.every, self.next = environment, every, every
        self.curve: list[list[float]] = []
        self.judging, self.start = 0.0, time.process_time()

    def cpu(self) -> float:
        return time.process_time() - self.start - self.judging

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next:
            self.next += self.every
            cpu, start = self.cpu(), time.process_time()
            self.curve.append([self.num_timesteps, judged(self.environment, self.model), round(cpu, 2)])
            self.judging += time.process_time() - start
        return True


def judged(environment: str, model: Any) -> float:
    """Mean return from the ten starts."""
    returns = []
    env = gymnasium.make(environment)
    for seed in range(9000, 9010):
        observation, _ = env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per environment and algorithm: steps and CPU-seconds to the threshold by seed, None where it was not reached."""
    return {
        f"{environment}/{algorithm}": {
            name: [r[name] for r in records if (r["environment"], r["algorithm"]) == (environment, algorithm)]
            for name in ("to_threshold", "cpu_to_threshold")
        }
        for environment, algorithm in RUNS
        if any((r["environment"], r["algorithm"]) == (environment, algorithm) for r in records)
    }


def _schedule(value: Any) -> Any:
    """``linear x`` falls from x to 0 over training, as the Zoo writes it."""
    if isinstance(value, str) and value.startswith("linear "):
        start = float(value.split()[1])
        return lambda left: start * left
    return value


if __name__ == "__main__":
    main()
