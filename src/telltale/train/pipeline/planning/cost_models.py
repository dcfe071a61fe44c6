"""How long a replicated stage takes per minibatch, and what a cut costs: four readings of PipeDream's equations.

With T the seconds of forward and backward of a stage's layers, w its parameter bytes, m its replicas and B bytes/s:

================  ======================================  ================================================================
name              seconds per minibatch                   source
================  ======================================  ================================================================
``ring``          max(T, 2 (m-1)/m w/B) / m               SOSP'19, section 3.1, prose: a worker sends (m-1)/m |w| twice
``v1``            max(T, 4 (m-1)/m w/B) / m               arXiv 1806.03377, section 3.2: W_l^m, sent and received
``sosp-literal``  max(T, 2 (m-1) w/B) / m                 SOSP'19, section 3.1, display formula of T^k(i -> j, m)
``official-code`` (T + 4 (m-1)/m w/B) / m                 msr-fiddle/pipedream, optimizer_graph_hierarchical.py
================  ======================================  ================================================================

Only ``ring`` and ``v1`` lead to the plans that the paper prints (VGG-16 15-1, ResNet-50 16). In a topology with levels, T
is the bottleneck of the pipeline inside one component. A cut of ``a`` bytes costs 2 a/B (activation there, gradient
back), or a/B on links that carry both ways at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from telltale.errors import ConfigError

Number = Any
"""A float or an array of them; everything here broadcasts."""


def ring_traffic(replicas: Number) -> Number:
    """2 (m-1)/m: bytes that a worker of a ring all-reduce sends per parameter byte (SOSP'19, section 3.1, prose)."""
    return 2.0 * (replicas - 1) / replicas


def v1_traffic(replicas: Number) -> Number:
    """4 (m-1)/m: sent plus received, as to a sharded parameter server (arXiv 1806.03377, section 3.2, W_l^m)."""
    return 4.0 * (replicas - 1) / replicas


def sosp_literal_traffic(replicas: Number) -> Number:
    """2 (m-1): the display formula of SOSP'19, section 3.1, without the /m that its prose implies."""
    return 2.0 * (replicas - 1)


@dataclass(frozen=True)
class CostModel:
    """Synchronisation traffic, and whether it overlaps with compute (max) or follows it (sum)."""

    name: str
    traffic: Callable[[Number], Number]
    """Bytes on a worker's link per parameter byte and round, from the number of replicas."""
    overlapped: bool = True

    def synchronisation(self, parameter_bytes: Number, replicas: Number, bandwidth: float) -> Number:
        """Seconds to average the gradients of one round of m minibatches."""
        return self.traffic(replicas) * parameter_bytes / bandwidth

    def stage_seconds(self, inner: Number, parameter_bytes: Number, replicas: Number, bandwidth: float) -> Number:
        """T^k(i -> j, m): seconds per minibatch of a stage replicated m times; ``inner`` seconds on one component."""
        synchronisation = self.synchronisation(parameter_bytes, replicas, bandwidth)
        if not self.overlapped:
            return (inner + synchronisation) / replicas
        return np.maximum(inner, synchronisation) / replicas


COST_MODELS = {
    "ring": CostModel("ring", ring_traffic),
    "v1": CostModel("v1", v1_traffic),
    "sosp-literal": CostModel("sosp-literal", sosp_literal_traffic),
    "official-code": CostModel("official-code", v1_traffic, overlapped=False),
}


def cost_model_of(name: str | CostModel) -> CostModel:
    """The cost model of a name. Raises :class:`~telltale.errors.ConfigError` for an unknown one."""
    if isinstance(name, CostModel):
        return name
    if not isinstance(name, str) or name not in COST_MODELS:
        raise ConfigError(f"cost_model={name!r} is unknown; expected one of {', '.join(map(repr, COST_MODELS))}.")
    return COST_MODELS[name]


def cut_seconds(cut_bytes: Number, bandwidth: float, directions: int = 2) -> Number:
    """Seconds per minibatch on the link of a cut: 2 a/B (SOSP'19, section 3.1), a/B full duplex, 0 for free cuts.

    ``directions`` is how many of the two transfers of a minibatch share the link's time: 2, 1, or 0, which ignores cuts
    as the official optimizer does by default.
    """
    return directions * cut_bytes / bandwidth
