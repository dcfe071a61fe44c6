"""The hybrid group: which of a prompt's rollouts leaves, which teacher trace enters, and what rollouts are compared with.

A group keeps its size: N online rollouts lose ``hybrid`` of their number to as many offline traces. All functions take one prompt
group per leading index; the draws of teachers depend on seed, generation and prompt alone, so that they are the same for any number
of processes and after a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError

REPLACED = ("least_divergent", "least_divergent_correct", "random", "lowest_reward")
TEACHER_DRAWS = ("uniform", "shortest")
REFERENCES = ("teachers", "group", "teachers+group")


@dataclass(frozen=True)
class Composition:
    """What becomes of the groups' rows.

    offline: (..., G) boolean, true where a teacher trace stands. teacher: (..., G) int64, which one, -1 where the rollout stays.
    dropped_correct: (..., G) boolean, true where a correct rollout had to leave.
    """

    offline: torch.Tensor
    teacher: torch.Tensor
    dropped_correct: torch.Tensor


def compose_group(
    divergence: torch.Tensor,
    reward: torch.Tensor,
    teacher_draws: torch.Tensor,
    *,
    hybrid: int = 1,
    replaced: str = "least_divergent",
    keep_only_correct: bool = True,
    random_keys: torch.Tensor | None = None,
) -> Composition:
    """Put ``hybrid`` teacher traces into each group in place of as many rollouts.

    divergence, reward: (..., G). teacher_draws: (..., hybrid) int64 from :func:`draw_teachers`, -1 in groups without a usable
    teacher, which stay as they are. replaced: the rollout that leaves is the "least_divergent" (the paper's), the
    "least_divergent_correct" (of the correct ones, if there are any), a "random" one by ``random_keys`` (..., G), or the one of
    "lowest_reward"; ties go to the lowest index. keep_only_correct: the group's only correct rollout
    stays, and so does the last of several where ``hybrid`` would have them all leave.

    Raises :class:`~telltale.errors.ConfigError` unless ``0 <= hybrid < G``.
    """
    check_choice("replaced", replaced, REPLACED)
    size = divergence.shape[-1]
    check_integer("hybrid", hybrid, low=0)
    if hybrid >= size:
        raise ConfigError(f"hybrid={hybrid} leaves no rollout in a group of {size}; expected at most {size - 1}.")
    correct = reward.nan_to_num(nan=0.0) > 0
    if replaced == "random":
        if random_keys is None:
            raise ConfigError("replaced='random' needs random_keys, one number per rollout; got None.")
        order = random_keys.to(torch.float64)
    elif replaced == "lowest_reward":
        order = reward.nan_to_num(nan=0.0).to(torch.float64)
    else:
        order = divergence.to(torch.float64)
        if replaced == "least_divergent_correct":
            order = torch.where(correct, order, order + 4)  # divergence is at most 2
    if keep_only_correct:
        last = torch.where(correct, order, -torch.inf).argsort(dim=-1, stable=True)[..., -1:]
        stays = correct & (torch.arange(size, device=order.device) == last)
        order = order.masked_fill(stays, torch.inf)
    leaving = order.argsort(dim=-1, stable=True)[..., :hybrid]
    usable = teacher_draws[..., :hybrid] >= 0
    teacher = torch.full(divergence.shape, -1, dtype=torch.int64, device=divergence.device)
    teacher.scatter_(-1, leaving, torch.where(usable, teacher_draws[..., :hybrid], -1))
    offline = teacher >= 0
    return Composition(offline=offline, teacher=teacher, dropped_correct=offline & correct)


def draw_teachers(lengths: list[int], count: int, *, rule: str, generator: torch.Generator) -> list[int]:
    """Indices of ``count`` of a prompt's teachers, whose traces have ``lengths`` tokens; -1 throughout if there is none.

    rule: "uniform" (the paper's; without replacement while there are enough) or "shortest".
    """
    check_choice("rule", rule, TEACHER_DRAWS)
    if not lengths:
        return [-1] * count
    if rule == "shortest":
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    return [order[index % len(order)] for index in range(count)]


def draw_generator(seed: int, generation: int, prompt_id: str) -> torch.Generator:
    """The private generator of one prompt's draws in one generation: the same in every process and after a resume."""
    digest = hashlib.sha256(f"{seed}/{generation}/{prompt_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def group_references(reward: torch.Tensor) -> torch.Tensor:
    """(..., G, G) boolean: rollout i is compared with every other rollout j that is correct.

    This is the group-relative reference: a distance to fixed teachers has one optimum and the policy goes there; a distance to
    the other correct rollouts moves with the policy.
    """
    correct = reward.nan_to_num(nan=0.0) > 0
    others = ~torch.eye(reward.shape[-1], dtype=torch.bool, device=reward.device)
    return others & correct.unsqueeze(-2)
