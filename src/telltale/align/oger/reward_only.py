"""The exploration reward alone, as a reward function for a trainer that stays as it is.

This is not OGER: a reward function cannot put a trace into a group, and sees no entropies unless the trainer hands them over. What
remains is the bonus for correct rollouts that are unlike the teachers. :class:`OGERTrainer` has the whole method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from telltale.align.oger.embeddings import TeacherEmbeddings, check_dimensions
from telltale.align.oger.encoders import Encoder, encode_checked, open_encoder
from telltale.align.oger.reward import SIMILARITIES, divergence, exploration_reward
from telltale.align.oger.verification import Verifier, checked_verifier, text_of, verdicts
from telltale.config import check_choice, check_range
from telltale.errors import ConfigError, DataError


def make_oger_reward(
    verifier: Verifier,
    encoder: str | Encoder,
    *,
    dataset: Iterable[Mapping[str, Any]] | None = None,
    coef: float = 1.0,
    similarity: str = "mean",
    clip: bool = True,
) -> Callable[..., list[float | None]]:
    """A TRL reward function: ``verifier``'s reward and, for correct completions, ``coef D exp(-H)``.

    The training data need a column ``teachers``: per prompt a list of correct solutions, which may be empty. H is taken from
    ``oger_entropy`` [nats] if the trainer passes it, else exp(-H) is 1. dataset: the training data, rows with ``prompt`` and
    ``teachers``; a centred encoder needs them here for the mean over all teachers, which a batch of few prompts does not tell.

    Raises :class:`~telltale.errors.ConfigError` for a centred encoder without ``dataset``, and
    :class:`~telltale.errors.DataError` if a column is missing, in training too.
    """
    check_range("coef", coef, low=0.0)
    check_choice("similarity", similarity, SIMILARITIES)
    checked, opened = checked_verifier(verifier), open_encoder(encoder)
    embeddings = TeacherEmbeddings(opened)
    centre = _centre(embeddings, dataset) if opened.centred else None

    def oger_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        teachers: Sequence[Sequence[str]] | None = None,
        oger_entropy: Sequence[float] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if teachers is None:
            raise DataError(
                "the dataset has no column 'teachers'; expected a list of correct solutions per prompt (make_oger_reward)."
            )
        rewards = torch.tensor(verdicts(checked, prompts, completions, columns))
        apart = _divergences(embeddings, centre, prompts, completions, teachers, similarity=similarity, clip=clip)
        entropy = torch.zeros(len(rewards)) if oger_entropy is None else torch.tensor(oger_entropy)
        totals = exploration_reward(apart, entropy, rewards, coef=coef)
        return [None if math.isnan(total) else total for total in totals.tolist()]

    return oger_reward


def _centre(embeddings: TeacherEmbeddings, dataset: Iterable[Mapping[str, Any]] | None) -> torch.Tensor | None:
    """The mean over the teachers of all rows."""
    if dataset is None:
        raise ConfigError(
            f"dataset=None, and the encoder {embeddings.encoder.identity} is centred: the mean over one prompt's teachers would "
            f"make every completion as far from them as any other. Expected the training data, or an encoder with centred=False."
        )
    prompts, texts, names = [], [], []
    for index, row in enumerate(dataset):
        for column in ("prompt", "teachers"):
            if column not in row:
                raise DataError(f"row {index} of dataset has no column {column!r}; expected prompt and teachers.")
        for text in _solutions(row["teachers"], f"row {index} of dataset"):
            prompts.append(text_of(row["prompt"]))
            texts.append(text)
            names.append(f"a teacher of row {index} of dataset")
    return embeddings.centre(prompts, texts, names)


def _solutions(teachers: Any, where: str) -> Sequence[str]:
    """One row's teachers; none for None."""
    if teachers is None:
        return []
    if not isinstance(teachers, (list, tuple)) or not all(isinstance(text, str) for text in teachers):
        raise DataError(f"teachers of {where} is {str(teachers)[:60]!r}; expected a list of texts.")
    return teachers


def _divergences(
    embeddings: TeacherEmbeddings,
    centre: torch.Tensor | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    teachers: Sequence[Sequence[str]],
    *,
    similarity: str,
    clip: bool,
) -> torch.Tensor:
    """(rows,): each completion against the teachers of its own row."""
    asked, written = [text_of(prompt) for prompt in prompts], [text_of(completion) for completion in completions]
    solutions = [_solutions(own, f"row {row}") for row, own in enumerate(teachers)]
    online = encode_checked(embeddings.encoder, asked, written, [f"completion {row}" for row in range(len(written))])
    flat = [(row, index, text) for row, own in enumerate(solutions) for index, text in enumerate(own)]
    found = embeddings.of(
        [asked[row] for row, _, _ in flat],
        [text for _, _, text in flat],
        [f"a teacher of row {row}" for row, _, _ in flat],
    )
    if not flat:
        return torch.zeros(len(written))
    check_dimensions(embeddings.encoder, online, found)
    if centre is not None:
        check_dimensions(embeddings.encoder, online, centre)
        empty = online.norm(dim=-1, keepdim=True) == 0
        online, found = (online - centre).masked_fill(empty, 0), found - centre
    most = max(index for _, index, _ in flat) + 1
    offline, mask = torch.zeros(len(written), most, online.shape[-1]), torch.zeros(len(written), most, dtype=torch.bool)
    for (row, index, _), vector in zip(flat, found, strict=True):
        offline[row, index], mask[row, index] = vector, True
    return divergence(online.unsqueeze(1), offline, mask=mask, reduce=similarity, clip=clip).squeeze(1)
