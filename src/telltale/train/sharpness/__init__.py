"""The Sharpness Dimension (arXiv 2604.19740) and the edge of stability, measured on live training."""

from __future__ import annotations

from telltale.signals.sharpness_dimension import sharpness_dimension
from telltale.signals.statistics import kendall_tau, partial_tau
from telltale.train.sharpness.compare import Comparison, Point, compare, granulated
from telltale.train.sharpness.critical_step import CriticalReading, CriticalStep
from telltale.train.sharpness.edges import Edge, edge_of
from telltale.train.sharpness.measure import measure, over_checkpoints, point_controls, spectrum
from telltale.train.sharpness.monitor import SharpnessMonitor
from telltale.train.sharpness.persistence import persistence_dimension
from telltale.train.sharpness.probe import Probe, language_model_loss
from telltale.train.sharpness.readings import EdgeReading
from telltale.train.sharpness.result import Sharpness

Reading = EdgeReading
"""The shorter name, as :meth:`SharpnessMonitor.step` has always been documented."""

__all__ = [
    "Comparison",
    "CriticalReading",
    "CriticalStep",
    "Edge",
    "EdgeReading",
    "Point",
    "Probe",
    "Reading",
    "Sharpness",
    "SharpnessMonitor",
    "compare",
    "edge_of",
    "granulated",
    "kendall_tau",
    "language_model_loss",
    "measure",
    "over_checkpoints",
    "partial_tau",
    "persistence_dimension",
    "point_controls",
    "sharpness_dimension",
    "spectrum",
]
