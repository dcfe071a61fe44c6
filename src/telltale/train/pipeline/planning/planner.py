"""From a profile and machines to a plan: cuts, replicas, weight policy, and the reasons in plain words.

The plan is the one that runs fastest by simulation of ``PipelineTrainer`` (:mod:`telltale.train.pipeline.planning.search`). With a
``cost_model`` of the papers it is the one with the least bottleneck by that model's equations
(:mod:`telltale.train.pipeline.planning.partition`). The policy is the first of this list under which a plan fits into a worker's
memory, unless a later one saves at least 4% of the time, or 10% by a cost model, whose differences are less certain:

1. ``stash``, PipeDream's own: every worker is always busy and every gradient belongs to the weights it was computed with.
   If the best plan is one replicated stage, that is plain data parallelism, and it is called by its name: ``flush`` with
   one minibatch per replica.
2. ``2bw``: as busy, with two versions of the weights instead of one per minibatch in flight.
3. ``flush``: one version, at the price of draining the pipe once per batch.
4. The same three with activation recomputation, which runs every forward twice.

``synchronous=True`` leaves out the asynchronous ones, and then ``interleaved`` (torch's schedule) is taken where it predicts
less time than ``flush``. ``vertical`` is never faster than ``stash`` and ``gpipe`` never faster than ``flush``, both need
more memory, and so they are planned only when given as ``policy``; so is ``none``, the ablation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, PlanError
from telltale.train.pipeline.plan import POLICIES, Plan
from telltale.train.pipeline.planning.candidates import Candidate, best_candidate, interleaved_candidate, shortfall
from telltale.train.pipeline.planning.costs import MEMORY_POLICIES, CostModel, cost_model_of, cost_of_stages
from telltale.train.pipeline.planning.explain import reasons_for
from telltale.train.pipeline.planning.ordering import best_order
from telltale.train.pipeline.planning.partition import Problem, solve
from telltale.train.pipeline.planning.search import MOST_WORKERS, SAME, SimulatedSearch, placement_of
from telltale.train.pipeline.profile import Profile
from telltale.train.pipeline.simulation.simulator import simulate
from telltale.train.pipeline.topology import Topology, parse_bytes

REORDER_TOLERANCE = 1e-6
"""How near the best the own order's plan must be that another order of a graph's layers is measured against."""
MAX_STAGES_COMPARED = 16
"""Up to so many stages the best plan with one stage fewer is looked for as well, for comparison."""
PREFERENCE = ("stash", "2bw", "flush")


class _Unasked(str):
    """The name of a cost model that nobody asked for."""

    __slots__ = ()


UNASKED = _Unasked("ring")
"""The default: the figures of a plan's table are those of this model, and the plan is the fastest by simulation."""
MIN_SAVING = 0.04
"""A policy later in the order is taken if it saves this part of the simulated time."""
MIN_PREDICTED_SAVING = 0.1
"""The same by the equations of a cost model."""


def plan(
    profile: Profile,
    topology: Topology,
    *,
    cost_model: str | CostModel = UNASKED,
    policy: str | None = None,
    memory: float | str | None = None,
    microbatches: int | None = None,
    recompute: bool | None = None,
    use_all_workers: bool = True,
    full_duplex: bool = False,
    max_stages: int | None = None,
    synchronous: bool = False,
    chunks: int = 2,
    stages: int | None = None,
    straight: bool = False,
) -> Plan:
    """The plan with the least predicted time per minibatch that fits.

    ``cost_model``: left out, the proposals of all of them are ranked by simulation of what the trainer does (on more than 64
    workers by the equations of "ring"); given, "ring", "v1", "sosp-literal" or "official-code" plans by its equations alone, as
    the papers do. ``policy``: None chooses as described above.
    ``memory``: bytes of one worker, or "16GB"; None takes the topology's, which may be no limit. ``microbatches``: m of 2bw,
    flush, gpipe and interleaved; None chooses (:func:`~telltale.train.pipeline.planning.candidates.microbatches_for`).
    ``recompute``: None only where nothing fits without. ``use_all_workers``: between equal bottlenecks and stages, more
    workers; False: fewer. ``full_duplex``: links carry activations and gradients at once. ``max_stages``: stages at the
    outermost level. ``chunks`` per worker of interleaved. ``stages``: exactly so many, found by simulation alone. ``straight``: one
    replica of every stage.

    The plan's bottleneck is the simulated time per minibatch, or with a cost model A(1 -> N, M), in seconds. For a profile with
    edges, stages index its layers in the order of ``stage.names``. Raises :class:`~telltale.errors.PlanError` for what does not
    go together and :class:`~telltale.train.pipeline.planning.costs.PlanInfeasible` naming the layer or stage and the missing bytes.
    """
    model = cost_model_of(cost_model)
    simulated = cost_model is UNASKED and topology.workers <= MOST_WORKERS
    finder: Finder = partial(_simulated, topology, stages) if simulated else _predicted
    _check_shape(stages, straight, policy, max_stages, len(profile.layers), topology.workers, simulated=simulated)
    _check(policy, microbatches, recompute, max_stages, synchronous, chunks)
    check_choice("use_all_workers", use_all_workers, (True, False))
    check_choice("full_duplex", full_duplex, (True, False))
    problem = Problem(
        profile.chain(),
        # A level of one component costs nothing; without it the memory arithmetic of flat machines is exact.
        tuple(level for level in topology.levels if level.count > 1) or topology.levels[:1],
        model,
        directions=1 if full_duplex else 2,
        memory_limit=_memory_limit(topology, memory),
        max_stages=max_stages if stages is None else stages,
        max_replicas=1 if straight else None,
        use_all_workers=use_all_workers,
    )
    problem = reordered_for(profile, problem)
    tried: dict[str, Candidate | None] = {}
    if policy == "interleaved":
        chosen = interleaved_candidate(problem, microbatches=microbatches, chunks=chunks)
        chosen = _as_simulated(chosen, problem.profile, topology) if simulated else chosen
    else:
        policies = [policy] if policy else ["flush"] if synchronous else list(PREFERENCE)
        chosen, tried = _choose(problem, policies, microbatches, recompute, finder)
        if policy is None and synchronous and len(chosen.plan.stages) > 1 and stages is None:
            chosen = _interleaved_if_faster(problem, chosen, microbatches, chunks, finder, topology)
    quick: Finder = partial(_simulated_proposal, topology) if simulated else _predicted
    others = _others(problem, chosen, tried, policy, microbatches, quick)
    shared = not simulated and topology.shared_link and bool(others) and policy != "interleaved"
    if shared:
        chosen, others = _best_simulated(chosen, others, problem.profile, topology)
    reordered = [layer.name for layer in problem.profile.layers] != [layer.name for layer in profile.layers]
    reasons = reasons_for(chosen, others, tried, problem, asked=policy, reordered=reordered, simulated=simulated)
    if shared:
        reasons.append(
            "All traffic shares one link, which the cost models do not know: the plans were compared by simulation."
        )
    return _finished(chosen, reasons, profile, simulated=simulated)


def _memory_limit(topology: Topology, memory: float | str | None) -> float:
    limit = topology.device_memory if memory is None else parse_bytes("memory", memory)
    if limit is not None and not limit > 0:
        raise ConfigError(f"memory={memory!r} is not allowed; expected bytes > 0.")
    return math.inf if limit is None else limit


def _finished(chosen: Candidate, reasons: list[str], profile: Profile, *, simulated: bool) -> Plan:
    """The candidate's plan with its reasons, the model's fingerprint, and which rank is which replica (simulated with it)."""
    plan = dataclasses.replace(chosen.plan, reasons=tuple(reasons), fingerprint=profile.fingerprint)
    return plan if simulated else dataclasses.replace(plan, placement=placement_of(chosen))


Finder = Callable[[Problem, str, int | None, bool], Candidate | None]
"""(problem, policy, microbatches, recompute) -> the fastest plan, None if nothing fits."""


def _predicted(problem: Problem, policy: str, microbatches: int | None, recompute: bool) -> Candidate | None:
    return best_candidate(problem, policy, microbatches=microbatches, recompute=recompute)


def _simulated(
    topology: Topology,
    stages: int | None,
    problem: Problem,
    policy: str,
    microbatches: int | None,
    recompute: bool,
) -> Candidate | None:
    return SimulatedSearch(problem, topology, policy, microbatches, recompute, stages).best()


def _simulated_proposal(
    topology: Topology, problem: Problem, policy: str, microbatches: int | None, recompute: bool
) -> Candidate | None:
    return SimulatedSearch(problem, topology, policy, microbatches, recompute).proposal()


def _others(
    problem: Problem,
    chosen: Candidate,
    tried: dict[str, Candidate | None],
    policy: str | None,
    microbatches: int | None,
    finder: Finder,
) -> list[Candidate]:
    """What the choice is compared with: other shapes under its policy, and the other policies looked at."""
    compared = chosen.plan.policy if chosen.plan.policy in MEMORY_POLICIES else "flush"
    if policy is None and len(chosen.plan.stages) == 1:
        # Data parallelism goes by the name of flush; other shapes would run under the first policy that fits.
        compared = next(found.plan.policy for found in tried.values() if found)
    others = _alternatives(problem, chosen, compared, microbatches, finder) + [
        found for found in tried.values() if found
    ]
    return [other for other in others if not _same(other.plan, chosen.plan)]


def _check(
    policy: str | None,
    microbatches: int | None,
    recompute: bool | None,
    max_stages: int | None,
    synchronous: bool,
    chunks: int,
) -> None:
    if policy is not None:
        check_choice("policy", policy, POLICIES)
    for name, value in (("microbatches", microbatches), ("max_stages", max_stages)):
        if value is not None:
            check_integer(name, value, low=1)
    check_integer("chunks", chunks, low=2)
    check_choice("recompute", recompute, (None, True, False))
    check_choice("synchronous", synchronous, (True, False))
    if synchronous and policy not in (None, "flush", "gpipe", "interleaved"):
        raise PlanError(
            f"policy={policy!r} is not synchronous; expected flush, gpipe or interleaved, or synchronous=False."
        )
    if policy == "interleaved" and (recompute or max_stages):
        raise PlanError("interleaved plans take neither recompute nor max_stages; leave them out.")


def _check_shape(
    stages: int | None,
    straight: bool,
    policy: str | None,
    max_stages: int | None,
    layers: int,
    workers: int,
    *,
    simulated: bool,
) -> None:
    check_choice("straight", straight, (True, False))
    if policy == "interleaved" and (stages is not None or straight):
        raise PlanError("interleaved plans have chunks stages per worker; leave out stages and straight.")
    if stages is None:
        return
    check_integer("stages", stages, low=1)
    if max_stages is not None:
        raise ConfigError(f"stages={stages} and max_stages={max_stages} were both given; expected one of them.")
    if not simulated:
        raise PlanError(
            f"stages={stages} is looked for by simulation, on at most {MOST_WORKERS} workers; expected no cost_model beside it."
        )
    if stages > min(layers, workers):
        raise PlanError(
            f"stages={stages} is more than the {layers} layers or the {workers} workers; expected at most "
            f"{min(layers, workers)}."
        )


def _best_simulated(
    chosen: Candidate, others: list[Candidate], profile: Profile, topology: Topology
) -> tuple[Candidate, list[Candidate]]:
    """On a link that everybody shares: the candidate that is fastest in simulation, and the rest.

    The cost models give every worker links of its own; there, replicating a heavy stage looks far cheaper than it is.
    """
    ranked = sorted((chosen, *others), key=lambda each: simulate(each.plan, profile, topology).seconds_per_minibatch)
    return ranked[0], ranked[1:]


def reordered_for(profile: Profile, problem: Problem) -> Problem:
    """For a graph: the order of layers in which the best pipeline's stages are consecutive."""
    if profile.edges is None:
        return problem
    parts = solve(problem, tolerance=REORDER_TOLERANCE) or []
    bounds = [0, *(part.stop for part in parts)]
    replicas = [part.replicas for part in parts]
    upper = cost_of_stages(
        problem.profile, bounds, replicas, problem.levels, problem.cost_model, directions=problem.directions
    ).bottleneck
    order = best_order(profile, problem.levels, problem.cost_model, directions=problem.directions, upper=upper)
    return dataclasses.replace(problem, profile=profile.chain(order)) if order else problem


def _choose(
    problem: Problem, policies: list[str], microbatches: int | None, recompute: bool | None, finder: Finder
) -> tuple[Candidate, dict[str, Candidate | None]]:
    """The candidate by this module's rule, and those looked at, by label, in order of preference."""
    tried: dict[str, Candidate | None] = {}
    chosen: Candidate | None = None
    # Nothing can be faster than the compute spread evenly, and without a limit all of them fit.
    floor = problem.profile.compute / problem.workers
    predicted = finder is _predicted
    saving = MIN_PREDICTED_SAVING if predicted else MIN_SAVING
    for recomputed in (False, True) if recompute is None else (recompute,):
        for policy in policies:
            # Without a limit on memory nothing is gained by recomputing, nor, by the equations, by a later policy.
            all_fit = math.isinf(problem.memory_limit) and (predicted or recomputed)
            if chosen and (all_fit or chosen.seconds * (1 - saving) <= floor):
                break
            found = finder(problem, policy, microbatches, recomputed)
            tried[policy + (" with recomputation" if recomputed else "")] = found
            if found and (chosen is None or found.seconds < chosen.seconds * (1 - saving)):
                chosen = found
    if chosen is not None:
        return _named_data_parallel(problem, chosen, policies, microbatches, finder), tried
    if policies == ["2bw"] and microbatches is not None:
        free = best_candidate(problem, "2bw", microbatches=None, recompute=recompute is not False)
        if free is not None:
            raise PlanError(
                f"microbatches={microbatches} is too few for 2bw on {free.plan.describe()}, which fits into the memory; "
                f"expected at least as many as are in flight, such as {free.plan.microbatches}, or None."
            )
    if isinstance(finder, partial) and finder.args[1] is not None:
        raise PlanError(
            f"no plan of exactly {finder.args[1]} stages was found that fits into {problem.memory_limit:.4g} bytes; expected "
            f"another number of stages, or more memory."
        )
    raise shortfall(problem, policies, recompute is not False)


def _named_data_parallel(
    problem: Problem, found: Candidate, policies: list[str], microbatches: int | None, finder: Finder
) -> Candidate:
    """One stage keeps one version under every policy; where the policy is ours to choose, it is called flush."""
    if len(found.plan.stages) > 1 or len(policies) == 1 or found.plan.policy == "flush":
        return found
    alone = dataclasses.replace(problem, max_stages=1)
    named = finder(alone, "flush", microbatches, found.plan.recompute)
    return named if named is not None and named.seconds <= found.seconds * (1 + SAME) else found


def _interleaved_if_faster(
    problem: Problem, chosen: Candidate, microbatches: int | None, chunks: int, finder: Finder, topology: Topology
) -> Candidate:
    try:
        other = interleaved_candidate(problem, microbatches=microbatches, chunks=chunks)
    except PlanError:
        return chosen
    if finder is not _predicted:
        other = _as_simulated(other, problem.profile, topology)
    return other if other.seconds < chosen.seconds * (1 - 1e-9) else chosen


def _as_simulated(candidate: Candidate, profile: Profile, topology: Topology) -> Candidate:
    """The candidate with the simulated time per minibatch in the place of the predicted one."""
    seconds = simulate(candidate.plan, profile, topology).seconds_per_minibatch
    return dataclasses.replace(candidate, seconds=seconds, plan=dataclasses.replace(candidate.plan, bottleneck=seconds))


def _alternatives(
    problem: Problem, chosen: Candidate, policy: str, microbatches: int | None, finder: Finder
) -> list[Candidate]:
    """Other shapes under ``policy``: data parallel, a straight pipeline, one stage fewer."""
    shapes = [dataclasses.replace(problem, max_stages=1), dataclasses.replace(problem, max_replicas=1)]
    n_stages = len(chosen.plan.stages)
    if problem.max_stages is None and 2 < n_stages <= min(MAX_STAGES_COMPARED, problem.levels[-1].count):
        shapes.append(dataclasses.replace(problem, max_stages=n_stages - 1))
    found = (finder(shape, policy, microbatches, chosen.plan.recompute) for shape in shapes)
    return [other for other in found if other is not None]


def _same(first: Plan, second: Plan) -> bool:
    """Whether two plans run alike: one stage does under every policy."""
    alike = [(stage.layers, stage.replicas) for stage in first.stages] == [
        (stage.layers, stage.replicas) for stage in second.stages
    ]
    return alike and (first.policy == second.policy or len(first.stages) == 1)
