"""The worlds that come with the package, by id."""

from __future__ import annotations

from typing import Any

BUILT_IN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "physical/Pendulum-v1": ("physical", "Pendulum", {}),
    "physical/CartPole-v1": ("physical", "CartPole", {}),
    "physical/Acrobot-v1": ("physical", "Acrobot", {}),
    "physical/Reacher-v5": ("mechanisms", "Reacher", {}),
    "physical/HalfCheetah-v5": ("mechanisms", "HalfCheetah", {}),
    "physical/DoublePendulum": ("mechanisms", "DoublePendulum", {}),
    "digital/orders": ("orders", "Orders", {}),
    "digital/files": ("file_tree", "FileTree", {}),
    "social/kuhn_poker": ("games", "PokerTable", {"game": "kuhn_poker"}),
    "social/leduc_poker": ("games", "PokerTable", {"game": "leduc_poker"}),
    "social/first_sealed_auction": ("games", "Auction", {}),
    "scientific/lotka_volterra": ("equations", "LotkaVolterra", {}),
    "scientific/sir": ("equations", "Epidemic", {}),
    "scientific/enzyme": ("equations", "Enzyme", {}),
}
"""Module, class and fixed arguments of each id."""
