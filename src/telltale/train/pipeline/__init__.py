"""PipeDream (arXiv 1806.03377; SOSP'19): profile a model, plan its cuts, simulate the plan, train it as a pipeline.

``split`` makes layers of a model, ``profile`` times them, ``plan`` cuts them into stages for a ``Topology``, ``simulate`` draws
what will happen, ``PipelineTrainer`` does it under ``torchrun``; ``reference`` does the same updates in one process.
"""

from __future__ import annotations

from telltale.train.pipeline import reference
from telltale.train.pipeline.layers import Layer, LayeredModel, sequential
from telltale.train.pipeline.plan import Plan, PlannedStage
from telltale.train.pipeline.planning.costs import PlanInfeasible
from telltale.train.pipeline.planning.explain import explain
from telltale.train.pipeline.planning.planner import plan
from telltale.train.pipeline.profile import LayerProfile, Profile
from telltale.train.pipeline.profiler import profile
from telltale.train.pipeline.runtime.collectives import untie
from telltale.train.pipeline.runtime.failures import RankFailure
from telltale.train.pipeline.runtime.optimizer import RateDiscount, delay_aware_nadam
from telltale.train.pipeline.runtime.torch_schedules import TorchPipelineTrainer
from telltale.train.pipeline.simulation import gantt
from telltale.train.pipeline.simulation.simulator import calibrated, simulate
from telltale.train.pipeline.simulation.timeline import Timeline
from telltale.train.pipeline.split import split
from telltale.train.pipeline.topology import Level, Topology
from telltale.train.pipeline.trainer import PipelineTrainer

__all__ = [
    "Layer",
    "LayerProfile",
    "LayeredModel",
    "Level",
    "PipelineTrainer",
    "Plan",
    "PlanInfeasible",
    "PlannedStage",
    "Profile",
    "RankFailure",
    "RateDiscount",
    "Timeline",
    "Topology",
    "TorchPipelineTrainer",
    "calibrated",
    "delay_aware_nadam",
    "explain",
    "gantt",
    "plan",
    "profile",
    "reference",
    "sequential",
    "simulate",
    "split",
    "untie",
]
