"""From a batch of judged rollouts to hybrid groups with total rewards: encode, compare with the teachers, swap, add the bonus.

This is the algorithm of one generation without the trainer around it: texts and numbers go in, and out comes which rows are
replaced by which trace, and what every row is worth.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from telltale.align.oger.config import OGERConfig
from telltale.align.oger.embeddings import TeacherEmbeddings, check_dimensions
from telltale.align.oger.encoders import Encoder, encode_checked
from telltale.align.oger.groups import (
    Composition,
    compose_group,
    draw_generator,
    draw_teachers,
    group_references,
)
from telltale.align.oger.reward import divergence, entropy_weight, exploration_reward
from telltale.align.oger.teachers import prompt_text
from telltale.align.oger.tokens import TokenisedTeachers, TokenTrace

Metrics = dict[str, tuple[float, float]]
"""Sum and count of each figure, so that processes can be added up."""


@dataclass(frozen=True)
class HybridGroups:
    """Groups after composition, rows in their order. ``traces`` has the trace that stands in a row, or None."""

    offline: torch.Tensor
    traces: list[TokenTrace | None]
    rewards: torch.Tensor
    """(rows,) what the verifier gives the row that stands there now; NaN where it gave none."""
    totals: torch.Tensor
    """(rows,) with the bonus of online rows."""
    divergence: torch.Tensor
    entropy: torch.Tensor
    metrics: Metrics


class GroupBuilder:
    """Builds the groups of every generation; holds the teachers' tokens and embeddings and the frozen encoder."""

    def __init__(self, config: OGERConfig, teachers: TokenisedTeachers, encoder: Encoder | None) -> None:
        self.config, self.teachers, self.encoder = config, teachers, encoder
        self.embeddings: TeacherEmbeddings | None = None
        self.centre: torch.Tensor | None = None
        if encoder is not None:
            self.embeddings = TeacherEmbeddings(encoder, cache=teachers.store.cache)
            self.checksum = encoder.checksum()
            named = self.teachers.all()
            self.centre = self.embeddings.centre(
                [self._prompt(name) for name, _ in named],
                [trace.text for _, trace in named],
                [f"teacher {trace.teacher!r}, prompt {name!r}" for name, trace in named],
            )

    def build(
        self,
        ids: Sequence[str],
        prompts: Sequence[str],
        texts: Sequence[str],
        rewards: torch.Tensor,
        *,
        entropy: Callable[[torch.Tensor], torch.Tensor],
        generation: int,
    ) -> HybridGroups:
        """The groups of one generation.

        ids, prompts, texts: one per row, ``num_generations`` consecutive rows per prompt. rewards: (rows,), NaN for no verdict.
        entropy: gives the sequence entropies [nats] of the rows where its boolean argument is true;
        others do not matter. generation: counts up, and keys the draws of teachers.
        """
        config, began = self.config, time.perf_counter()
        size = config.num_generations
        groups = len(ids) // size
        reward = rewards.view(groups, size).float()
        traces = [self.teachers.of(ids[start]) for start in range(0, len(ids), size)]
        apart, bonus_apart = self._divergences(ids, prompts, texts, reward, traces)
        encoded_in = time.perf_counter() - began
        composition = self._compose(ids, apart, reward, traces, generation)
        standing = [
            traces[group][int(index)] if index >= 0 else None
            for group, row in enumerate(composition.teacher)
            for index in row
        ]
        offline = composition.offline
        kept = reward.clone()
        kept[offline] = torch.tensor([trace.reward for trace in standing if trace is not None])
        paid = (kept > 0) & ~offline & bool(config.oger_coef)
        spread = entropy(paid.flatten()).view(groups, size)
        assert config.oger_coef is not None
        totals = exploration_reward(bonus_apart, spread, kept, offline=offline, coef=config.oger_coef)
        metrics = self._metrics(apart, bonus_apart, spread, reward, kept, totals, composition, traces, paid)
        metrics["encode_ms"] = (1000 * encoded_in, 1)
        for teacher, count in Counter(trace.teacher for trace in standing if trace is not None).items():
            metrics[f"teacher/{teacher}"] = (count, 1)
        return HybridGroups(
            offline.flatten(),
            standing,
            kept.flatten(),
            totals.flatten(),
            bonus_apart.flatten(),
            spread.flatten(),
            metrics,
        )

    def _divergences(
        self, ids: Sequence[str], prompts: Sequence[str], texts: Sequence[str], reward: torch.Tensor, traces: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(groups, size) each: from the teachers, which decides who leaves, and from the reference of the bonus."""
        config = self.config
        if self.encoder is None or self.embeddings is None:
            return torch.zeros_like(reward), torch.zeros_like(reward)
        names = [f"row {row} (prompt {name!r})" for row, name in enumerate(ids)]
        vectors = encode_checked(self.encoder, prompts, texts, names)
        if self.centre is not None:
            check_dimensions(self.encoder, vectors, self.centre)
        online = self._centred(vectors).view(*reward.shape, -1)
        online = online.masked_fill((vectors.norm(dim=-1) == 0).view(*reward.shape, 1), 0)
        offline, mask = self._teacher_vectors(ids, traces, online)
        assert config.oger_similarity is not None
        assert config.oger_clip is not None
        options: dict[str, Any] = {"reduce": config.oger_similarity, "clip": config.oger_clip}
        from_teachers = divergence(online, offline, mask=mask, **options)
        if config.oger_reference == "teachers":
            return from_teachers, from_teachers
        others = group_references(reward) & (online.norm(dim=-1) > 0).unsqueeze(-2)
        if config.oger_reference == "group":
            return from_teachers, divergence(online, online, mask=others, **options)
        wide = mask.unsqueeze(-2).expand(*reward.shape, -1)
        both = divergence(online, torch.cat([offline, online], -2), mask=torch.cat([wide, others], -1), **options)
        return from_teachers, both

    def _teacher_vectors(
        self, ids: Sequence[str], traces: Sequence[list[TokenTrace]], online: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (groups, M, d) of ragged teachers, and which of them there are (groups, M)."""
        assert self.embeddings is not None
        assert self.encoder is not None
        size = self.config.num_generations
        most = max((len(own) for own in traces), default=0)
        vectors = torch.zeros(len(traces), most, online.shape[-1])
        mask = torch.zeros(len(traces), most, dtype=torch.bool)
        flat = [(group, index, trace) for group, own in enumerate(traces) for index, trace in enumerate(own)]
        found = self.embeddings.of(
            [self._prompt(ids[group * size]) for group, _, _ in flat],
            [trace.text for _, _, trace in flat],
            [f"teacher {trace.teacher!r}, prompt {ids[group * size]!r}" for group, _, trace in flat],
        )
        if flat:
            check_dimensions(self.encoder, online, found)
            places = torch.tensor([(group, index) for group, index, _ in flat]).unbind(1)
            vectors[places], mask[places] = self._centred(found), True
        return vectors, mask

    def _compose(
        self,
        ids: Sequence[str],
        apart: torch.Tensor,
        reward: torch.Tensor,
        traces: Sequence[list[TokenTrace]],
        generation: int,
    ) -> Composition:
        config = self.config
        size = config.num_generations
        assert config.oger_hybrid is not None
        assert config.oger_replaced is not None
        assert config.oger_teacher_draw is not None
        draws, keys = [], []
        for group, own in enumerate(traces):
            generator = draw_generator(config.seed, generation, ids[group * size])
            own_lengths = [len(trace.ids) for trace in own]
            draws.append(
                draw_teachers(own_lengths, config.oger_hybrid, rule=config.oger_teacher_draw, generator=generator)
            )
            keys.append(torch.rand(size, generator=generator))
        return compose_group(
            apart,
            reward,
            torch.tensor(draws, dtype=torch.int64).view(len(traces), -1),
            hybrid=config.oger_hybrid,
            replaced=config.oger_replaced,
            keep_only_correct=bool(config.oger_keep_only_correct),
            random_keys=torch.stack(keys),
        )

    def _metrics(
        self,
        apart: torch.Tensor,
        bonus_apart: torch.Tensor,
        spread: torch.Tensor,
        reward: torch.Tensor,
        kept: torch.Tensor,
        totals: torch.Tensor,
        composition: Composition,
        traces: Sequence[list[TokenTrace]],
        paid: torch.Tensor,
    ) -> Metrics:
        offline, correct = composition.offline, reward.nan_to_num(nan=0.0) > 0
        swapped = float(offline.sum())
        deviation = bonus_apart.std(-1)
        return {
            "divergence": _sums(apart),
            "divergence_std": _sums(deviation),
            "entropy_w": _sums(entropy_weight(spread)[paid]),
            "bonus": _sums((totals - kept).nan_to_num(nan=0.0)[~offline]),
            "online_solved": _sums(correct.float()),
            "offline_solved": _sums((kept[offline] > 0).float()),
            "replaced_correct_frac": (float(composition.dropped_correct.sum()), swapped),
            "no_teacher_frac": (float(sum(not own for own in traces)), float(len(traces))),
            "teacher_share": (swapped, float(offline.numel())),
        }

    def _centred(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self.centre is None else vectors - self.centre

    def _prompt(self, name: str) -> str:
        return prompt_text(self.teachers.store.prompts[name])


def _sums(values: torch.Tensor) -> tuple[float, float]:
    return float(values.sum()), float(values.numel())
