"""The equations of OGER (arXiv 2604.18530), one function each, on tensors with any leading dimensions.

Online rollouts are what the policy sampled, offline ones what teachers wrote for the same prompt. A correct online rollout earns
a bonus ``D exp(-H)`` for being unlike the teachers (divergence D) while the policy is sure of it (entropy H). Where the source
leaves a choice open, the function has an argument for it. Nothing here knows of models, text or TRL; which rollouts make up a
group is in :mod:`telltale.align.oger.groups`.
"""

from __future__ import annotations

import torch

from telltale.config import check_choice, check_range
from telltale.errors import ConfigError, DataError

SIMILARITIES = ("mean", "max", "min", "centroid")
ENTROPIES = ("last", "mean", "top20", "none")
SCALES = ("group", "none", "batch")
TEACHER_ADVANTAGES = ("raw", "clamp")
OFFLINE_LOSSES = ("on_policy", "shaped", "behavior", "sft")
TOP_SHARE = 0.2
SHORTEST = 1e-30
"""Length that is divided by at least; a vector of length 0 is dealt with before."""
STD_EPSILON = 1e-4
"""What TRL adds to a standard deviation before it divides by it."""


def divergence(
    online: torch.Tensor,
    offline: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduce: str = "mean",
    clip: bool = True,
) -> torch.Tensor:
    """``D_i = 1 - sim_i``, where ``sim_i`` reduces the cosines ``s_ij`` of rollout i to the teachers j.

    online: (..., N, d); offline: (..., M, d); neither needs unit length. mask: True where there is a teacher, (..., M), or
    (..., N, M) if every rollout has references of its own. reduce: "mean" (the paper's), "max" (nearest teacher), "min"
    (farthest), or "centroid" (cosine to the mean of the unit vectors). clip: to [0, 1], the range that the source states; the
    true one is [0, 2].

    Returns (..., N); 0 for a rollout without a reference, and for an online embedding of length 0 (an empty completion). Raises
    :class:`~telltale.errors.DataError` for NaN or infinite embeddings and for a teacher of length 0, with its index.
    """
    check_choice("reduce", reduce, SIMILARITIES)
    if online.shape[-1] != offline.shape[-1]:
        raise DataError(
            f"online embeddings have {online.shape[-1]} dimensions and offline ones {offline.shape[-1]}; expected one encoder."
        )
    present = _references(online, offline, mask)
    length = online.norm(dim=-1)
    _check_lengths(length, "online")
    teachers = _unit(offline, needed=_any_row(present, offline))
    if reduce == "centroid":
        centre = torch.einsum("...nm,...md->...nd", present.to(teachers.dtype), teachers)
        lengths = length.clamp(min=SHORTEST) * centre.norm(dim=-1).clamp(min=SHORTEST)
        similarity = (online * centre).sum(-1) / lengths
    else:
        cosines = online @ teachers.transpose(-1, -2) / length.clamp(min=SHORTEST).unsqueeze(-1)
        count = present.sum(-1)
        if reduce == "mean":
            similarity = cosines.masked_fill(~present, 0).sum(-1) / count.clamp(min=1)
        elif reduce == "max":
            similarity = cosines.masked_fill(~present, -2).amax(-1) if cosines.shape[-1] else cosines.sum(-1)
        else:
            similarity = cosines.masked_fill(~present, 2).amin(-1) if cosines.shape[-1] else cosines.sum(-1)
    apart = (1 - similarity).clamp(0, 1) if clip else 1 - similarity
    return apart.masked_fill((length == 0) | ~present.any(-1), 0)


def token_entropies(logits: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """``H = -sum_v p_v ln p_v`` of ``p = softmax(logits / temperature)``, in nats.

    logits: (..., V), -inf allowed. Give the temperature that tokens are sampled at. Returns (...), float32.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(-1)  # 0 ln 0 = 0


def sequence_entropy(token_entropies: torch.Tensor, mask: torch.Tensor, *, reduce: str = "mean") -> torch.Tensor:
    """``H_i`` of a rollout from the entropies of the distributions that emitted its tokens, in nats.

    token_entropies, mask: (..., T); mask is true for the rollout's own tokens, end-of-sequence included. reduce: "last" (that of
    the last kept token, end-of-sequence or the one at the cap: the paper's), "mean", "top20" (mean of the highest fifth, rounded
    up) or "none" (0, so that its weight is 1). Returns (...); a rollout without tokens has 0.
    """
    check_choice("reduce", reduce, ENTROPIES)
    kept = mask.bool()
    values = token_entropies.masked_fill(~kept, 0)
    count = kept.sum(-1)
    if reduce == "none":
        return torch.zeros_like(values.sum(-1))
    if reduce == "mean":
        return values.sum(-1) / count.clamp(min=1)
    places = torch.arange(kept.shape[-1], device=kept.device)
    if reduce == "last":
        last = torch.where(kept, places, -1).amax(-1).clamp(min=0)
        return values.gather(-1, last.unsqueeze(-1)).squeeze(-1)
    best = token_entropies.masked_fill(~kept, -torch.inf).sort(dim=-1, descending=True).values
    wanted = (count * TOP_SHARE).ceil().long()
    chosen = places < wanted.unsqueeze(-1)
    return best.masked_fill(~chosen, 0).sum(-1) / wanted.clamp(min=1)


def entropy_weight(entropy: torch.Tensor) -> torch.Tensor:
    """``exp(-H)`` of an entropy in nats: 1 for a policy that is sure, 1/V for a uniform one. Same shape."""
    return torch.exp(-entropy)


def exploration_reward(
    divergence: torch.Tensor,
    entropy: torch.Tensor,
    reward: torch.Tensor,
    *,
    offline: torch.Tensor | None = None,
    coef: float = 1.0,
) -> torch.Tensor:
    """Total reward: ``R_i = r_i + coef D_i exp(-H_i) max(r_i, 0)`` for online rollouts, ``R_i = r_i`` for offline ones.

    divergence, entropy [nats], reward: one shape; offline: boolean, the same shape. A wrong rollout (r = 0) gets no bonus; a
    negative reward stays as it is; a NaN reward (no verdict) stays NaN. The paper has ``coef = 1``.
    """
    check_range("coef", coef, low=0.0)
    bonus = coef * divergence * entropy_weight(entropy) * reward.clamp(min=0)
    if offline is not None:
        bonus = bonus.masked_fill(offline, 0)
    return reward + bonus


def group_advantages(
    rewards: torch.Tensor,
    *,
    offline: torch.Tensor | None = None,
    scale: str = "group",
    teacher: str = "raw",
    std_floor: float = 0.0,
) -> torch.Tensor:
    """``A_i = (R_i - mean R) / (std R + 1e-4)`` over each group, offline rows included; 0 for a NaN reward.

    rewards: (..., G); offline: boolean, the same shape. scale: divide by the "group"'s unbiased standard deviation (GRPO), by
    the whole "batch"'s, or by "none" (Dr. GRPO). teacher: leave offline advantages "raw" (the paper's) or "clamp" them at 0, so
    that a group is never pushed off its teacher. std_floor: the least deviation that is divided by; it keeps differences of
    1e-4 from becoming advantages of 1. Returns the same shape; with the defaults, TRL's own advantages.

    Raises :class:`~telltale.errors.ConfigError` for "clamp" without ``offline``.
    """
    check_choice("scale", scale, SCALES)
    check_choice("teacher", teacher, TEACHER_ADVANTAGES)
    if teacher == "clamp" and offline is None:
        raise ConfigError("teacher='clamp' needs offline, true where a teacher's trace stands; got None.")
    check_range("std_floor", std_floor, low=0.0)
    advantages = rewards - torch.nanmean(rewards, dim=-1, keepdim=True)
    if scale != "none":
        deviation = _deviation(rewards if scale == "group" else rewards.flatten())
        advantages = advantages / (deviation.clamp(min=std_floor) + STD_EPSILON)
    advantages = advantages.nan_to_num(nan=0.0)
    if teacher == "clamp":
        assert offline is not None
        advantages = torch.where(offline, advantages.clamp(min=0), advantages)
    return advantages


def offline_token_weight(
    log_probs: torch.Tensor,
    *,
    mode: str = "shaped",
    gamma: float = 0.1,
    behavior_log_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The factor ``w_t`` of an offline token's policy gradient ``w_t A grad log pi``; detached.

    log_probs: log pi(token) of the policy, any shape. mode: "on_policy" (1, as if the policy had written it), "shaped" (LUFFY's
    ``gamma pi / (pi + gamma)**2``, the gradient of ``pi / (pi + gamma)`` in log pi), "behavior" (the true ratio ``pi / pi_b`` to
    ``behavior_log_probs`` that the teacher recorded), or "sft" (1; the advantage then is 1 too). Only "behavior" is an
    importance weight; the others are biased. Returns the same shape.

    Raises :class:`~telltale.errors.ConfigError` for ``gamma <= 0`` and for "behavior" without recorded log-probabilities.
    """
    check_choice("mode", mode, OFFLINE_LOSSES)
    check_gamma(gamma)
    log_probs = log_probs.detach()
    if mode == "shaped":
        probability = log_probs.exp()
        return gamma * probability / (probability + gamma) ** 2
    if mode == "behavior":
        if behavior_log_probs is None:
            raise ConfigError(
                "mode='behavior' needs behavior_log_probs, the log-probabilities that the teacher recorded; got None."
            )
        return torch.exp(log_probs - behavior_log_probs)
    return torch.ones_like(log_probs)


def check_gamma(gamma: float) -> None:
    """Raise :class:`~telltale.errors.ConfigError` unless ``gamma`` is a number above 0."""
    check_range("gamma", gamma, low=0.0)
    if gamma == 0:
        raise ConfigError("gamma=0 is out of range; expected a number > 0.")


def _references(online: torch.Tensor, offline: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask as (..., N, M)."""
    shape = (*online.shape[:-1], offline.shape[-2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=online.device)
    if mask.dim() == online.dim() - 1:
        mask = mask.unsqueeze(-2)
    return mask.bool().expand(shape)


def _any_row(present: torch.Tensor, offline: torch.Tensor) -> torch.Tensor:
    """Which offline rows any rollout refers to, (..., M)."""
    needed = present.any(-2)
    while needed.dim() > offline.dim() - 1:
        needed = needed.any(0)
    return needed


def _unit(rows: torch.Tensor, *, needed: torch.Tensor) -> torch.Tensor:
    """Teachers at unit length; what no rollout is compared with may be anything and becomes 0."""
    length = rows.norm(dim=-1)
    _check_lengths(length, "offline", needed=needed)
    rows = rows.masked_fill(~torch.isfinite(length).unsqueeze(-1), 0)
    return rows / length.nan_to_num(nan=1.0, posinf=1.0).clamp(min=SHORTEST).unsqueeze(-1)


def _check_lengths(length: torch.Tensor, name: str, *, needed: torch.Tensor | None = None) -> None:
    bad = ~torch.isfinite(length)
    if needed is not None:
        bad = (bad | (length == 0)) & needed
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{name} embedding {place} is not finite or has length 0; expected finite vectors. Check the encoder."
        )


def _deviation(rewards: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation over the last dimension, kept; NaN left out; 0 for fewer than two rewards."""
    known = ~torch.isnan(rewards)
    count = known.sum(-1, keepdim=True)
    centred = (rewards - torch.nanmean(rewards, dim=-1, keepdim=True)).masked_fill(~known, 0)
    return (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
