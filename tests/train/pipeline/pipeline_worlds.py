"""Configurations and rank jobs for the tests of the trainer against the one-process reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from telltale.train.pipeline.layers import as_layered
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.reference import Reference
from telltale.train.pipeline.runtime.optimizer import RateDiscount
from telltale.train.pipeline.runtime.stage import Stage
from telltale.train.pipeline.trainer import PipelineTrainer
from train.pipeline.chain_runs import run_chain
from train.pipeline.pipeline_models import BATCHES, OPTIMIZERS, build, loss, warm


@dataclass(frozen=True)
class Case:
    """One run: a plan on a model, where it is cut, and the trainer's settings."""

    name: str
    stages: tuple[tuple[int, ...], ...]
    replicas: tuple[int, ...]
    policy: str
    microbatches: int = 1
    model: str = "mixed"
    optimizer: str = "sgd"
    batches: str = "even"
    stops: tuple[int, ...] = (13,)
    """Ends of the runs; the trainer evaluates after each of them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For the trainer and the reference."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """For the trainer alone: what may not change a bit."""
    recompute: bool = False
    placement: tuple[int, ...] | None = None

    @property
    def plan(self) -> Plan:
        return Plan.manual(
            self.stages,
            replicas=self.replicas,
            policy=self.policy,
            microbatches=self.microbatches,
            recompute=self.recompute,
            placement=self.placement,
        )


@dataclass
class Run:
    """What one rank, or the reference, did."""

    losses: list[float]
    evaluations: list[float]
    state: dict[str, Tensor]
    trace: list[tuple[str, int, int]] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    """Fingerprints of the weights in place at each F and B of the trace."""
    alive: list[int] = field(default_factory=list)
    most_versions: int = 0
    buffers: int = 0
    """Most receives that were posted at once."""
    history: dict[tuple[int, int], str] = field(default_factory=dict)
    """(stage, version) -> fingerprint of its weights; the reference's."""


def digest(named: Iterator[tuple[str, Tensor]]) -> str:
    made = hashlib.sha256()
    for _, tensor in named:
        made.update(tensor.detach().numpy().tobytes())
    return made.hexdigest()[:12]


def run_case(case: Case) -> Run:
    """This rank's run of ``case``, with the weights that were really in place recorded at every operation."""
    trainer = PipelineTrainer(
        build(case.model),
        case.plan,
        optimizer=OPTIMIZERS[case.optimizer],
        loss=loss,
        reduction="ordered",
        timeout=30,
        **case.settings,
        **case.own,
    )
    found = Run([], [], {})
    _observe(trainer, found)
    batches = BATCHES[case.batches]
    for stop in case.stops:
        found.losses += trainer.train(batches, stop=stop)
        found.trace += [(o.kind, o.minibatch, o.version) for o in trainer.trace]
        read = list(found.read)
        found.evaluations.append(trainer.evaluate(batches, 3))
        found.read = read
    own = trainer.model.parameter_names(trainer.stage.first, trainer.stage.stop)
    found.state = {name: parameter.detach().clone() for name, parameter in own.items()}
    found.most_versions = trainer.most_versions
    return found


def _observe(trainer: PipelineTrainer, found: Run) -> None:
    stage, hold, worker = trainer.stage, trainer.stage.holding, trainer._worker
    links = (*worker.place.values_in, *worker.place.gradients_in)

    @contextmanager
    def holding(weights: Mapping[str, Tensor]) -> Iterator[None]:
        with hold(weights):
            found.read.append(digest(stage.named_parameters()))
            found.alive.append(len(trainer.versions.alive))
            found.buffers = max(found.buffers, sum(len(link._receiving) for link in links))
            yield

    stage.holding = holding  # type: ignore[method-assign]


def run_cases(rank: int, cases: list[Case]) -> dict[str, Run]:
    """The job of one rank."""
    return {case.name: run_case(case) for case in cases}


def reference_of(case: Case) -> Run:
    """The same run in one process. Only "none" is told where the run was cut."""
    net = build(case.model)
    model = as_layered(net, loss)
    history: dict[tuple[int, int], str] = {}
    stages = [Stage(model, s.layers[0], s.layers[-1] + 1) for s in case.plan.stages]

    def note(stage: int, version: int, root: nn.Module) -> None:
        history[stage, version] = digest(stages[stage].named_parameters())

    for number, stage in enumerate(stages):
        history[number, 0] = digest(stage.named_parameters())
    run = Reference(model, case.plan, optimizer=OPTIMIZERS[case.optimizer], on_update=note, **case.settings)
    found = Run([], [], {})
    for stop in case.stops if case.policy == "none" else case.stops[-1:]:
        found.losses += run.run(BATCHES[case.batches], stop=stop).losses
    net.eval()
    with torch.no_grad():
        given = [BATCHES[case.batches](t) for t in range(3)]
        rows = [len(batch[0]) for batch in given]
        shares = [count * len(rows) / sum(rows) for count in rows]
        losses = [float(run_chain(model, batch, t)[1]) for t, batch in enumerate(given)]
        found.evaluations = [sum(loss * share for loss, share in zip(losses, shares, strict=True)) / len(rows)]
    found.state = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    found.history = history
    return found


STRAIGHT2 = (((0, 1, 2), (3, 4, 5, 6, 7)), (1, 1))
STRAIGHT4 = (((0, 1), (2, 3), (4, 5), (6, 7)), (1, 1, 1, 1))
THREE = ((0, 1, 2), (3, 4, 5), (6, 7))
TWO = STRAIGHT2[0]


def _policies(world: int) -> list[tuple[str, int]]:
    return [
        ("stash", 1),
        ("vertical", 1),
        ("2bw", world),
        ("2bw", max(1, world - 1)),
        ("flush", 4),
        ("gpipe", 4),
        ("none", 1),
    ]


def _label(policy: str, microbatches: int) -> str:
    return policy if microbatches == 1 and policy != "2bw" else f"{policy}-m{microbatches}"


def straight_cases(world: int) -> list[Case]:
    """Every policy on ``world`` stages, on two with both optimizers; cut at 12 with an evaluation in between."""
    stages, replicas = STRAIGHT2 if world == 2 else STRAIGHT4
    return [
        Case(
            f"{_label(policy, m)}/{optimizer}",
            stages,
            replicas,
            policy,
            m,
            optimizer=optimizer,
            stops=(12, 17),
        )
        for number, (policy, m) in enumerate(_policies(world))
        for optimizer in (OPTIMIZERS if world == 2 else [list(OPTIMIZERS)[number % 2]])
    ]


def replicated_cases(world: int) -> list[Case]:
    """Every policy on unequal replicas, with an end that is ragged for all of them."""
    shapes = {3: [(TWO, (2, 1)), (TWO, (1, 2))]}.get(world) or [
        (THREE, (2, 1, 1)),
        (THREE, (1, 2, 1)),
        (TWO, (2, 2)),
        (TWO, (3, 1)),
    ]
    return [
        Case(
            f"{'-'.join(map(str, replicas))}/{_label(policy, m)}",
            stages,
            replicas,
            policy,
            m,
            optimizer="adamw" if index % 2 else "sgd",
            stops=(12, 17),
        )
        for index, (stages, replicas) in enumerate(shapes)
        for policy, m in _policies(world)
        if (policy, m) != ("2bw", world - 1)
    ]


def special_cases() -> list[Case]:
    """What else may cross two stages."""
    cut = ((0, 1, 2), (3, 4, 5))
    every = [("stash", 1), ("2bw", 2), ("flush", 4), ("gpipe", 2), ("vertical", 1)]
    synchronous = every[1:]
    cases = [
        Case(f"clip/{p}", *STRAIGHT2, p, m, settings={"grad_clip": 0.3}, stops=(8, 11))
        for p, m in (*every, ("none", 1))
    ]
    cases += [
        Case(f"schedule-discount/{p}", *STRAIGHT2, p, m, settings={"schedule": warm, "discount": RateDiscount(9)})
        for p, m in (("stash", 1), ("2bw", 2))
    ]
    cases += [Case(f"tied/{p}", cut, (1, 1), p, m, model="tied", stops=(8, 11)) for p, m in synchronous]
    cases += [
        Case(f"tied-clip/{p}", cut, (1, 1), p, m, model="tied", settings={"grad_clip": 0.3}, stops=(11,))
        for p, m in synchronous
    ]
    cases.append(Case("untied/stash", cut, (1, 1), "stash", model="untied", stops=(11,)))
    for p, m in (("stash", 1), ("2bw", 2)):
        cases += [
            Case(f"uneven-batches/{p}", *STRAIGHT2, p, m, batches="uneven"),
            Case(f"several/{p}", ((0, 1), (2, 3, 4)), (1, 1), p, m, model="several", stops=(11,)),
            Case(f"recompute-plan/{p}", *STRAIGHT2, p, m, recompute=True),
            Case(f"recompute-argument/{p}", *STRAIGHT2, p, m, own={"recompute": True}),
            Case(f"checkpointed/{p}", ((0, 1), (2, 3, 4)), (1, 1), p, m, model="checkpointed"),
            Case(f"checkpointed-twice/{p}", ((0, 1), (2, 3, 4)), (1, 1), p, m, model="checkpointed", recompute=True),
            Case(f"idle/{p}", ((0, 1), (2, 3)), (1, 1), p, m, model="idle", stops=(11,)),
            Case(f"frozen-first/{p}", ((0, 1), (2, 3, 4, 5, 6, 7)), (1, 1), p, m, model="frozen"),
            Case(f"no-prefetch/{p}", *STRAIGHT2, p, m, own={"prefetch": 0}),
            Case(f"deep-prefetch/{p}", *STRAIGHT2, p, m, own={"prefetch": 7}),
            Case(f"recorded/{p}", *STRAIGHT2, p, m, own={"record": True}),
        ]
    cases.append(Case("recompute-plan/none", *STRAIGHT2, "none", recompute=True))
    cases.append(Case("short/stash", *STRAIGHT2, "stash", stops=(1,)))
    cases.append(Case("short/flush", *STRAIGHT2, "flush", 4, stops=(3,)))
    return cases


def replicated_special_cases() -> list[Case]:
    """On three ranks: what replicas and a middle stage add."""
    middle = ((0, 1, 2, 3, 4), (5, 6), (7,))
    cases = []
    for p, m in (("stash", 1), ("2bw", 4), ("gpipe", 4), ("vertical", 1)):
        cases += [
            Case(f"2-1 uneven clip/{p}", TWO, (2, 1), p, m, batches="uneven", settings={"grad_clip": 0.3}),
            Case(f"1-2 several/{p}", ((0, 1), (2, 3, 4)), (1, 2), p, m, model="several", stops=(11,)),
            Case(f"1-1-1 frozen middle/{p}", middle, (1, 1, 1), p, m, model="frozen", settings={"grad_clip": 0.3}),
            Case(f"2-1 recompute idle/{p}", ((0, 1), (2, 3)), (2, 1), p, m, model="idle", recompute=True, stops=(11,)),
            Case(f"short 2-1/{p}", TWO, (2, 1), p, m, stops=(1,)),
        ]
    for p, m in (("2bw", 4), ("flush", 4), ("vertical", 1)):
        cut = ((0, 1, 2), (3, 4, 5))
        settings = {"grad_clip": 0.3}
        cases += [
            Case(f"2-1 tied clip/{p}", cut, (2, 1), p, m, model="tied", settings=settings, stops=(12, 15)),
            Case(f"1-1-1 tied/{p}", ((0, 1), (2, 3), (4, 5)), (1, 1, 1), p, m, model="tied", stops=(11,)),
        ]
    thrice = ((0, 1), (2, 3), (4, 5))
    cases.append(Case("1-1-1 tied thrice/flush", thrice, (1, 1, 1), "flush", 2, model="tied-thrice", stops=(11,)))
    cases += [Case(f"3/{p}", (tuple(range(8)),), (3,), p, 1) for p in ("stash", "2bw", "flush")]
    cases.append(Case("1-2 no rate scaling/stash", TWO, (1, 2), "stash", settings={"replica_rates": False}))
    for p, m in (("stash", 1), ("2bw", 4)):
        cases.append(Case(f"2-1 placed/{p}", TWO, (2, 1), p, m, settings={"grad_clip": 0.3}, placement=(2, 0, 1)))
        cases.append(Case(f"3 placed/{p}", (tuple(range(8)),), (3,), p, m, placement=(1, 2, 0)))
    cases.append(Case("1-2 deep prefetch/stash", TWO, (1, 2), "stash", own={"prefetch": 9}, batches="uneven"))
    return cases


def cases_of(world: int) -> list[Case]:
    """All of one world's."""
    if world == 2:
        return straight_cases(2) + special_cases()
    if world == 3:
        return replicated_cases(3) + replicated_special_cases()
    return straight_cases(4) + replicated_cases(4)


def is_slow(case: Case) -> bool:
    """Mirror images of a shape of replicas, and extras under policies that have run the plain cases: for the slow tier."""
    what, _, policy = case.name.partition("/")
    if what in ("1-2", "2-1-1", "2-2", "3-1"):
        return True
    return policy in ("gpipe", "vertical") and what not in ("2-1", "1-2-1")
