"""What planning, law checks and engines cost. Process CPU time, one thread, contestants alternated, medians.

Planning: one network (two hidden layers of 64, normalised inputs and targets), 96 samples, horizon 20, 3 iterations, 9 elites,
for 1 and 16 environments, by telltale and by the CEM of stable-worldmodel. The peer's solver is loaded under a stub of its parent
package, whose import needs torchvision: pass the folder that holds ``stable_worldmodel`` with ``--peer``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch.nn import functional

from measurement import write_result
from telltale import world
from telltale.world.models.ensemble import Ensemble, EnsembleConfig
from telltale.world.rollouts import rollout
from telltale.world.worlds.physical import pendulum_reward

SAMPLES, HORIZON, ITERATIONS, ELITES = 96, 20, 3, 9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path, help="Folder that holds stable_worldmodel.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = world.make("physical/Pendulum-v1")
    network = made_network()
    found: dict[str, Any] = {"planning": planning(place, network, arguments.peer, arguments.rounds)}
    found["laws"] = law_overhead(place, arguments.rounds)
    found["engines"] = engines()
    print(found)
    write_result(
        "world_speed", samples=SAMPLES, horizon=HORIZON, iterations=ITERATIONS, rounds=arguments.rounds, **found
    )


def made_network() -> Ensemble:
    torch.manual_seed(0)
    model = Ensemble(EnsembleConfig(3, 1, members=1, noise=False)).eval().requires_grad_(False)
    model.target_scale.fill_(0.05)
    model.input_scale.copy_(torch.tensor([0.7, 0.7, 3.0, 1.2]))
    return model


class Plain(torch.nn.Module):
    """The same network, as one writes it for the peer: a cost of candidates (B, N, H, A)."""

    def __init__(self, network: Ensemble) -> None:
        super().__init__()
        self.network = network

    def get_cost(self, info: dict[str, Any], candidates: torch.Tensor) -> torch.Tensor:
        net = self.network
        state = info["state"].reshape(-1, 3)
        actions = candidates.clamp(-2, 2).reshape(len(state), HORIZON, 1)
        total = torch.zeros(len(state))
        for t in range(HORIZON):
            rows = (torch.cat([state, actions[:, t]], -1) - net.input_mean) / net.input_scale
            hidden = functional.silu(torch.addmm(net.biases[0][0], rows, net.weights[0][0]))
            hidden = functional.silu(torch.addmm(net.biases[1][0], hidden, net.weights[1][0]))
            out = torch.addmm(net.biases[2][0], hidden, net.weights[2][0])[:, :3]
            after = state + out * net.target_scale + net.target_mean
            total = total - pendulum_reward(state, actions[:, t], after)
            state = after
        return total.reshape(candidates.shape[:2])


def peer_solver(folder: Path, network: Ensemble, environments: int) -> Any:
    for name in ("stable_worldmodel", "stable_worldmodel.solver"):
        stub = types.ModuleType(name)
        stub.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, stub)
    from stable_worldmodel.solver.cem import CEMSolver

    solver = CEMSolver(Plain(network), batch_size=environments, num_samples=SAMPLES, n_steps=ITERATIONS, topk=ELITES)
    space = gymnasium.spaces.Box(-2, 2, (environments, 1), np.float32)
    solver.configure(
        action_space=space, n_envs=environments, config=types.SimpleNamespace(horizon=HORIZON, action_block=1)
    )
    return solver


def planning(place: Any, network: Ensemble, peer: Path | None, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU per decision (of one environment), and the ratio of the medians."""
    out: dict[str, Any] = {}
    for environments, repeats in ((1, 16), (16, 4)):
        states = torch.stack([place.belief(place.reset(seed)) for seed in range(environments)])
        contestants = {"telltale": lambda s=states: world.plan(network, place, s, laws=[], seed=0)}
        rows = states.repeat_interleave(SAMPLES, 0)
        contestants["the network alone"] = lambda rows=rows: stepped(network, rows)
        if peer is not None:
            solver = peer_solver(peer, network, environments)
            contestants["stable-worldmodel"] = lambda s=states, solver=solver: solver({"state": s})
        times: dict[str, list[float]] = {name: [] for name in contestants}
        with torch.no_grad():
            for call in contestants.values():
                call()
            for turn in range(rounds):
                for name in list(contestants)[:: 1 if turn % 2 else -1]:
                    start = time.process_time()
                    with contextlib.redirect_stdout(io.StringIO()):  # the peer prints a line per call
                        for _ in range(repeats):
                            contestants[name]()
                    times[name].append(1e3 * (time.process_time() - start) / repeats / environments)
        row = {name: statistics.median(values) for name, values in times.items()}
        row |= {f"{name}, least": min(values) for name, values in times.items()}
        if peer is not None:
            row["ratio"] = statistics.median(
                a / b for a, b in zip(times["telltale"], times["stable-worldmodel"], strict=True)
            )
        out[f"{environments} environments"] = {"ms_per_decision": row, "all": times}
    one, many = (out[f"{n} environments"]["ms_per_decision"]["telltale"] for n in (1, 16))
    return {**out, "one_over_sixteen": one / many}


def stepped(network: Ensemble, rows: torch.Tensor) -> None:
    """The products and activations that a decision cannot do without: as many steps of as many rows, nothing else."""
    actions = torch.zeros(len(rows), 1)
    for _ in range(HORIZON * ITERATIONS):
        rows = network.step(rows, actions).belief


def law_overhead(place: Any, rounds: int) -> dict[str, float]:
    """CPU of a reported rollout of an ensemble of four, with the world's three laws over that without."""
    torch.manual_seed(0)
    model = Ensemble(EnsembleConfig(3, 1)).eval().requires_grad_(False)
    belief, actions = torch.randn(1536, 3), torch.rand(1536, HORIZON, 1)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, laws in (("without", ()), ("with", place.laws)):
            start = time.process_time()
            rollout(model, belief, actions, reward=pendulum_reward, laws=laws, common=True)
            times[name].append(time.process_time() - start)
    ratio = statistics.median(b / a for a, b in zip(times["without"], times["with"], strict=True))
    return {name: statistics.median(values) for name, values in times.items()} | {"overhead": ratio - 1}


def engines() -> dict[str, float]:
    """Steps per CPU-second: SQLite with a reset every 24 steps, the induced program, and law checks of plain states."""
    orders = world.make("digital/orders")
    actions = torch.randint(8, (24_000,), generator=torch.Generator().manual_seed(0)).tolist()
    start = time.process_time()
    for number, action in enumerate(actions):
        if number % 24 == 0:
            orders.reset(number)
        orders.step(action)
    sqlite = len(actions) / (time.process_time() - start)
    data = world.collect(orders, steps=1000, seed=0)
    program = world.fit("program", data, world=orders)
    start = time.process_time()
    for _ in range(30):
        for before, action in zip(data.before, actions, strict=False):
            program.step(before, action)
    stepping = 30 * len(data) / (time.process_time() - start)
    return {"sqlite_steps_per_second": sqlite, "program_steps_per_second": stepping}


if __name__ == "__main__":
    main()
