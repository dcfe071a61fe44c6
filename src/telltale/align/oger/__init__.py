"""OGER: teachers' traces as a reference for exploration in reinforcement learning with a verifier (arXiv 2604.18530).

The equations are functions of tensors; :class:`OGERTrainer` is TRL's ``GRPOTrainer`` with them. Everything is imported on first
use: the equations need PyTorch alone, the trainer ``telltale[align]``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from telltale.errors import MissingExtraError

if TYPE_CHECKING:
    from telltale.align.oger.adapters import verifiers_reward as verifiers_reward
    from telltale.align.oger.adapters import verl_reward as verl_reward
    from telltale.align.oger.config import OGERConfig as OGERConfig
    from telltale.align.oger.encoders import CallableEncoder as CallableEncoder
    from telltale.align.oger.encoders import HashedNGramEncoder as HashedNGramEncoder
    from telltale.align.oger.encoders import HiddenStateEncoder as HiddenStateEncoder
    from telltale.align.oger.encoders import SentenceEncoder as SentenceEncoder
    from telltale.align.oger.groups import compose_group as compose_group
    from telltale.align.oger.pass_at_k import distinct_correct_at_k as distinct_correct_at_k
    from telltale.align.oger.pass_at_k import pass_at_k as pass_at_k
    from telltale.align.oger.reward import divergence as divergence
    from telltale.align.oger.reward import entropy_weight as entropy_weight
    from telltale.align.oger.reward import exploration_reward as exploration_reward
    from telltale.align.oger.reward import group_advantages as group_advantages
    from telltale.align.oger.reward import offline_token_weight as offline_token_weight
    from telltale.align.oger.reward import sequence_entropy as sequence_entropy
    from telltale.align.oger.reward import token_entropies as token_entropies
    from telltale.align.oger.reward_only import make_oger_reward as make_oger_reward
    from telltale.align.oger.teachers import TeacherStore as TeacherStore
    from telltale.align.oger.trainer import OGERTrainer as OGERTrainer

_ROOMS = {
    "CallableEncoder": "encoders",
    "HashedNGramEncoder": "encoders",
    "HiddenStateEncoder": "encoders",
    "OGERConfig": "config",
    "OGERTrainer": "trainer",
    "SentenceEncoder": "encoders",
    "TeacherStore": "teachers",
    "compose_group": "groups",
    "distinct_correct_at_k": "pass_at_k",
    "divergence": "reward",
    "entropy_weight": "reward",
    "exploration_reward": "reward",
    "group_advantages": "reward",
    "make_oger_reward": "reward_only",
    "offline_token_weight": "reward",
    "pass_at_k": "pass_at_k",
    "sequence_entropy": "reward",
    "token_entropies": "reward",
    "verifiers_reward": "adapters",
    "verl_reward": "adapters",
}

__all__ = [
    "CallableEncoder",
    "HashedNGramEncoder",
    "HiddenStateEncoder",
    "OGERConfig",
    "OGERTrainer",
    "SentenceEncoder",
    "TeacherStore",
    "compose_group",
    "distinct_correct_at_k",
    "divergence",
    "entropy_weight",
    "exploration_reward",
    "group_advantages",
    "make_oger_reward",
    "offline_token_weight",
    "pass_at_k",
    "sequence_entropy",
    "token_entropies",
    "verifiers_reward",
    "verl_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'telltale.align.oger' has no attribute {name!r}")
    try:
        room = importlib.import_module(f"telltale.align.oger.{_ROOMS[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("trl", "datasets", "accelerate"):
            raise MissingExtraError("OGER's trainer needs TRL: pip install 'telltale[align]'") from error
        raise
    return getattr(room, name)
