"""``inspect``: what the teachers wrote, and whether an encoder can tell their traces apart, before any training hour is spent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from telltale.align.oger.embeddings import TeacherEmbeddings
from telltale.align.oger.encoders import Encoder
from telltale.align.oger.teachers import TeacherStore, prompt_text, told_drops
from telltale.align.oger.tokens import TokenisedTeachers
from telltale.errors import DataError

LEAST_SPREAD = 0.05
"""Mean divergence below which a bonus is the same for all traces, and a standard deviation of rewards amplifies noise."""
MOST_PROMPTS = 500
"""Prompts, spread evenly, whose traces are compared."""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    teachers: per teacher the store's statistics, and with a tokenizer ``usable``, ``mean_tokens`` and what was dropped. similarity:
    mean cosine between the traces of two teachers for the same prompt (nan where they share none), in the order of ``names``.
    spread: mean divergence between different teachers of a prompt. recognised: share of traces whose teacher is the nearest one by
    its mean over the other prompts, each prompt's mean taken off; chance: what guessing would give; both None with one teacher.
    without_teacher: prompts without a trace, or with a tokenizer without a usable one.
    """

    teachers: list[dict[str, Any]]
    names: list[str]
    similarity: list[list[float]]
    spread: float | None
    recognised: float | None
    chance: float | None
    without_teacher: int
    prompts: int

    @property
    def separates(self) -> bool | None:
        """Whether the encoder tells the teachers' traces apart; None if there is nothing to compare."""
        if self.spread is None or self.recognised is None or self.chance is None:
            return None
        return self.spread >= LEAST_SPREAD and self.recognised >= (1 + self.chance) / 2

    @property
    def verdict(self) -> str:
        """In a sentence or two."""
        if self.spread is None or self.recognised is None or self.chance is None:
            return "Too few prompts have traces of the same two teachers, so nothing can be said about the encoder."
        found = (
            f"Traces of different teachers for one prompt are {self.spread:.2f} apart, and {self.recognised:.0%} of them are "
            f"nearest to their own teacher (guessing: {self.chance:.0%})."
        )
        if self.separates:
            return f"{found} The encoder can tell these traces apart."
        if self.spread < LEAST_SPREAD:
            return (
                f"{found} This encoder cannot separate these traces: to it they are all alike, so their divergence would carry no "
                f"signal. Try another layer or another encoder."
            )
        return (
            f"{found} This encoder cannot separate these teachers: their traces differ, but not by who wrote them. The "
            f"teachers may solve alike, or the encoder sees something else than their methods; compare some traces first."
        )


def inspect(store: TeacherStore, encoder: Encoder, *, tokens: TokenisedTeachers | None = None) -> Inspection:
    """Look at a store through an encoder; ``tokens`` adds what a policy's tokenizer and length make of it.

    Raises :class:`~telltale.errors.DataError` if no trace is left to look at.
    """
    if not store.traces():
        raise DataError(
            f"no teacher trace passed the verifier; expected some. Of each teacher: {told_drops(store.counts)}."
        )
    names, vectors = store.teachers(), _vectors(store, encoder)
    pairs: dict[tuple[str, str], list[float]] = {}
    for by_teacher in vectors.values():
        for left, right in combinations(by_teacher, 2):
            cosine = torch.nn.functional.cosine_similarity(by_teacher[left], by_teacher[right], dim=0).item()
            pairs.setdefault((left, right), []).append(cosine)
            pairs.setdefault((right, left), []).append(cosine)
    cosines = [value for values in pairs.values() for value in values]
    recognised, chance = _recognised(vectors)
    return Inspection(
        teachers=[row | _usable(tokens, row["teacher"]) for row in store.statistics()],
        names=names,
        similarity=[
            [1.0 if left == right else _mean(pairs.get((left, right), [])) for right in names] for left in names
        ],
        spread=1 - _mean(cosines) if cosines else None,
        recognised=recognised,
        chance=chance,
        without_teacher=sum(not (store.traces(name) if tokens is None else tokens.of(name)) for name in store.prompts),
        prompts=len(store.prompts),
    )


def _vectors(store: TeacherStore, encoder: Encoder) -> dict[str, dict[str, torch.Tensor]]:
    """Per prompt, each teacher's first trace as a vector, the mean over all taken off if the encoder is centred."""
    having = [name for name in store.prompts if store.traces(name)]
    step = max(len(having) / MOST_PROMPTS, 1.0)
    chosen = [having[int(index * step)] for index in range(min(len(having), MOST_PROMPTS))]
    first = [list({trace.teacher: trace for trace in reversed(store.traces(name))}.values())[::-1] for name in chosen]
    flat = [trace for traces in first for trace in traces]
    found = TeacherEmbeddings(encoder, cache=store.cache).of(
        [prompt_text(store.prompts[trace.prompt_id]) for trace in flat],
        [trace.text for trace in flat],
        [f"teacher {trace.teacher!r}, prompt {trace.prompt_id!r}" for trace in flat],
    )
    if encoder.centred:
        found = found - found.mean(0)
    vectors: dict[str, dict[str, torch.Tensor]] = {}
    for trace, vector in zip(flat, found, strict=True):
        vectors.setdefault(trace.prompt_id, {})[trace.teacher] = vector
    return vectors


def _recognised(vectors: dict[str, dict[str, torch.Tensor]]) -> tuple[float | None, float | None]:
    """Share of traces nearest to their teacher's mean over the other prompts, and by chance; None if none can be compared."""
    compared = {name: by_teacher for name, by_teacher in vectors.items() if len(by_teacher) > 1}
    counts = Counter(teacher for by_teacher in compared.values() for teacher in by_teacher)
    often = {teacher for teacher, count in counts.items() if count > 1}
    if len(often) < 2:
        return None, None
    residuals: list[dict[str, torch.Tensor]] = []
    for by_teacher in compared.values():
        own = {teacher: vector for teacher, vector in by_teacher.items() if teacher in often}
        if len(own) > 1:
            centre = torch.stack(list(own.values())).mean(0)
            residuals.append({teacher: vector - centre for teacher, vector in own.items()})
    if not residuals:
        return None, None
    seen = Counter(teacher for of_prompt in residuals for teacher in of_prompt)
    zero = torch.zeros_like(next(iter(residuals[0].values())))
    sums = {teacher: torch.stack([r.get(teacher, zero) for r in residuals]).sum(0) for teacher in seen}
    right = compared_traces = 0
    for of_prompt in residuals:
        # Without the whole prompt: its other residuals are this one's opposite, which would tell.
        others = {teacher: count - (teacher in of_prompt) for teacher, count in seen.items()}
        means = {
            teacher: (sums[teacher] - of_prompt.get(teacher, zero)) / count
            for teacher, count in others.items()
            if count
        }
        for teacher in of_prompt.keys() & means.keys():
            distances = {other: float((of_prompt[teacher] - mean).norm()) for other, mean in means.items()}
            compared_traces += 1
            right += min(distances, key=distances.__getitem__) == teacher
    return (right / compared_traces, 1 / len(seen)) if compared_traces else (None, None)


def _usable(tokens: TokenisedTeachers | None, teacher: str) -> dict[str, Any]:
    if tokens is None:
        return {}
    lengths = [len(trace.ids) for _, trace in tokens.all() if trace.teacher == teacher]
    return {
        "usable": len(lengths),
        "mean_tokens": _mean([float(length) for length in lengths]),
        "unusable": dict(tokens.dropped[teacher]),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
