"""What the ranks do in the tests of checkpoints: train in pieces that are saved, resume at every piece, on other plans too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import CheckpointError
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.pipeline.stage_checkpoint import buffers_of
from telltale.train.pipeline.trainer import PipelineTrainer

MINIBATCHES = 8
OPTIMIZERS = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda named: torch.optim.AdamW(named, lr=0.01),
    "nadam": lambda named: torch.optim.NAdam(named, lr=0.01),
}
POLICIES = {"stash": 1, "vertical": 1, "2bw": 2, "flush": 2, "gpipe": 2, "none": 1}
STRAIGHT3 = ([[0, 1], [2, 3, 4], [5, 6]], [1, 1, 1])
OTHER3 = ([[0, 1, 2], [3], [4, 5, 6]], [1, 1, 1])
REPLICATED = ([[0, 1, 2], [3, 4, 5, 6]], [2, 1])
STRAIGHT2 = ([[0, 1, 2], [3, 4, 5, 6]], [1, 1])
WHOLE = ([[0, 1, 2, 3, 4, 5, 6]], [1])

loss = nn.CrossEntropyLoss()


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(8, 12),
        nn.LayerNorm(12),
        nn.GELU(),
        nn.Linear(12, 12),
        nn.BatchNorm1d(12),
        nn.Dropout(0.2),
        nn.Linear(12, 4),
    )
    net[1].bias.requires_grad_(False)
    return net


def tied_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 8))
    net[6].weight = net[0].weight
    return net


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def plan_of(cut: tuple[list[list[int]], list[int]], policy: str, microbatches: int | None = None) -> Plan:
    m = POLICIES[policy] if microbatches is None else microbatches
    return Plan.manual(cut[0], replicas=cut[1], policy=policy, microbatches=m)


def trainer_of(
    plan: Plan, optimizer: str = "sgd", *, seed: int = 0, tied: bool = False, **options: Any
) -> PipelineTrainer:
    net = tied_model(seed) if tied else model(seed)
    options = {"reduction": "ordered", "timeout": 30.0} | options
    return PipelineTrainer(net, plan, optimizer=OPTIMIZERS[optimizer], loss=loss, **options)


def state_of(trainer: PipelineTrainer) -> dict[str, Tensor]:
    """Parameters, optimizer state, past versions and (of a stage's only replica) buffers of this rank, by name."""
    stage = trainer.stage
    names = {id(parameter): stage.names[local] for local, parameter in stage.named_parameters()}
    state = {names[id(parameter)]: parameter.detach().clone() for parameter in stage.parameters()}
    for parameter, values in trainer.optimizer.optimizer.state.items():
        state |= {f"{names[id(parameter)]}/{k}": torch.as_tensor(v).clone() for k, v in values.items()}
    for version, weights in trainer.versions.past().items():
        state |= {f"{version}/{stage.names[local]}": value.clone() for local, value in weights.items()}
    if trainer.plan.replicas[trainer.plan.place(trainer.rank)[0]] == 1:
        state |= {name: value.clone() for name, value in buffers_of(stage).items()}
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resume_everywhere(
    rank: int, folder: str, cut: tuple[list[list[int]], list[int]], policy: str, optimizer: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Train in pieces with a save after each; resume at every one. Returns what differed, by minibatch."""
    plan = plan_of(cut, policy)
    saver = trainer_of(plan, optimizer, **options)
    step = saver.policy.alignment
    losses: list[float] = []
    for stop in range(step, MINIBATCHES + 1, step):
        losses += saver.train(batch, stop=stop)
        saver.save(folder, keep=100)
    wanted = state_of(saver)
    uncut = trainer_of(plan, optimizer, **options)
    once = uncut.train(batch, stop=MINIBATCHES) if policy != "none" else losses
    differ = [] if policy == "none" or (once == losses and same(state_of(uncut), wanted)) else ["saving"]
    for start in range(step, MINIBATCHES, step):
        again = trainer_of(plan, optimizer, seed=1, **options) if start == 2 * step else uncut
        found = again.resume(Path(folder) / f"step-{start:09d}")
        rest: list[float] = []
        pieces = range(start + step, MINIBATCHES + 1, step) if policy == "none" else [MINIBATCHES]
        for stop in pieces:
            rest += again.train(batch, stop=stop)
        if found != start or rest != losses[start:] or not same(state_of(again), wanted):
            differ.append(start)
    return {"differ": differ, "losses": losses, "alignment": step}


def on_another_plan(rank: int, folder: str, policy: str, m_before: int, m_after: int, before: Any, after: Any) -> bool:
    """Save under one plan, resume under another, compare with the reference that switches. World sizes are equal."""
    start = 4
    saver = trainer_of(plan_of(before, policy, m_before))
    saver.train(batch, stop=start)
    saver.save(folder)
    plan = plan_of(after, policy, m_after)
    trainer = trainer_of(plan, seed=1)
    trainer.resume(folder)
    losses = trainer.train(batch, stop=MINIBATCHES)
    net, reference = switched(saver.plan, plan, start)
    whole = dict(net.named_parameters())
    own = {trainer.stage.names[local]: p for local, p in trainer.stage.named_parameters()}
    return losses == reference and all(torch.equal(p, whole[name]) for name, p in own.items())


def switched(before: Plan, after: Plan, start: int, stop: int = MINIBATCHES) -> tuple[nn.Module, list[float]]:
    """One process: ``before`` up to ``start``, then ``after``; the model and the later losses."""
    net = model()
    run = Reference(sequential(net, loss), before, optimizer=OPTIMIZERS["sgd"])
    run.run(batch, stop=start)
    rest = run.switch(after)
    return net, rest.run(batch, stop=stop).losses


EVERYWHERE = {(cut, policy) for cut in ("straight", "replicated") for policy in POLICIES}


def cases_of_three(rank: int, folder: str, everywhere: set[tuple[str, str]], others: bool) -> dict[str, Any]:
    """What needs three ranks, in one job: (cut, policy) to resume at every step, and the ``others``."""
    found: dict[str, Any] = {}
    for cut_name, cut in (("straight", STRAIGHT3), ("replicated", REPLICATED)):
        for number, policy in enumerate(POLICIES):
            optimizer = ("sgd", "adamw")[(number + (cut_name == "straight")) % 2]
            if (cut_name, policy) in everywhere:
                found[f"{cut_name}/{policy}"] = resume_everywhere(
                    rank, f"{folder}/{cut_name}-{policy}", cut, policy, optimizer, {}
                )
    if not others:
        return found
    found["tied/2bw"] = resume_everywhere(
        rank, f"{folder}/tied", STRAIGHT3, "2bw", "nadam", {"tied": True, "grad_clip": 0.5}
    )
    for policy, m_before, m_after, after in (
        ("flush", 2, 2, OTHER3),
        ("gpipe", 2, 2, REPLICATED),
        ("2bw", 2, 2, OTHER3),
        ("vertical", 1, 1, OTHER3),
        ("stash", 1, 1, OTHER3),
        ("stash", 1, 1, REPLICATED),
        ("2bw", 2, 4, OTHER3),
    ):
        key = f"{policy}-{m_before}-{m_after}-{'other' if after is OTHER3 else 'replicated'}"
        found[key] = on_another_plan(rank, f"{folder}/{key}", policy, m_before, m_after, STRAIGHT3, after)
    return found


def cases_of_two(rank: int, folder: str, written_by_three: str) -> dict[str, Any]:
    """Everything that needs two ranks: other optimizers, steps of three stages, damage that only one rank sees, export."""
    found: dict[str, Any] = {}
    for number, policy in enumerate(POLICIES):
        optimizer = ("adamw", "sgd")[number % 2]
        found[f"straight/{policy}"] = resume_everywhere(
            rank, f"{folder}/{policy}", STRAIGHT2, policy, optimizer, {"grad_clip": 0.5}
        )
    trainer = trainer_of(plan_of(STRAIGHT2, "flush"), "sgd", seed=1)
    trainer.resume(f"{written_by_three}/step-000000004")
    found["from three stages"] = trainer.train(batch, stop=MINIBATCHES)
    trainer.export(f"{folder}/whole.safetensors")
    # Rank 0 has the last stage.
    placed = trainer_of(dataclasses.replace(plan_of(STRAIGHT2, "flush"), placement=(1, 0)), "sgd", seed=rank)
    placed.train(batch, stop=MINIBATCHES)
    placed.export(f"{folder}/placed.safetensors")
    damaged = Path(folder) / "flush" / "step-000000008" / "stage-1"
    if rank == 0:
        file = next(damaged.glob("*.distcp"))
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 255
        file.write_bytes(raw)
    trainer.groups.barrier()
    found["damage"] = refusal(lambda: trainer_of(plan_of(STRAIGHT2, "flush"), "sgd").resume(f"{folder}/flush"))
    found["fit"] = fit_and_go_on(folder)
    return found


def fit_and_go_on(folder: str) -> dict[str, Any]:
    """fit() to 4, then a new trainer to 10 with another span; the same in one go."""
    plan = plan_of(STRAIGHT2, "2bw", 2)
    first = trainer_of(plan).fit(batch, stop=5, directory=f"{folder}/run", save_every=2)
    second_trainer = trainer_of(plan, seed=1)
    second = second_trainer.fit(batch, stop=10, directory=f"{folder}/run", save_every=4)
    whole = trainer_of(plan)
    losses = whole.train(batch, stop=10)
    return {
        "first": first,
        "second": second,
        "losses": losses,
        "equal": same(state_of(second_trainer), state_of(whole)),
        "refused": refusal(lambda: trainer_of(plan).fit(batch, stop=10, directory=f"{folder}/run", resume=False)),
        "again": trainer_of(plan, seed=1).fit(batch, stop=10, directory=f"{folder}/run"),
    }


def refusal(call: Any) -> str:
    """The words of the CheckpointError that ``call`` raises."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "not refused"
