"""The exploration reward alone, as a reward function for a trainer that stays as it is.

This is not OGER: a reward function cannot put a trace into a group, and sees no entropies unless the trainer hands them over. What
remains is the bonus for correct rollouts that are unlike the teachers. :class:`OGERTrainer` has the whole method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from telltale.align.oger.embeddings import TeacherEmbeddings, check_dimensions, mean_vector
from telltale.align.oger.encoders import Encoder, encode_checked, open_encoder
from telltale.align.oger.reward import SIMILARITIES, divergence, exploration_reward
from telltale.align.oger.verification import Verifier, checked_verifier, text_of, verdicts
from telltale.config import check_choice, check_range
from telltale.errors import DataError


def make_oger_reward(
    verifier: Verifier,
    encoder: str | Encoder,
    *,
    coef: float = 1.0,
    similarity: str = "mean",
    clip: bool = True,
) -> Callable[..., list[float | None]]:
    """A TRL reward function: ``verifier``'s reward and, for correct completions, ``coef D exp(-H)``.

    The dataset needs a column ``teachers``: per prompt a list of correct solutions, which may be empty. H is taken from
    ``oger_entropy`` [nats] if the trainer passes it, else exp(-H) is 1. The encoder's mean over the teachers seen so far is not
    known here, so a centred encoder takes off the mean of the batch's teachers, if they are not all alike.

    Raises :class:`~telltale.errors.DataError` in training if the column is missing.
    """
    check_range("coef", coef, low=0.0)
    check_choice("similarity", similarity, SIMILARITIES)
    checked, opened = checked_verifier(verifier), open_encoder(encoder)
    embeddings = TeacherEmbeddings(opened)

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
        apart = _divergences(embeddings, prompts, completions, teachers, similarity=similarity, clip=clip)
        entropy = torch.zeros(len(rewards)) if oger_entropy is None else torch.tensor(oger_entropy)
        totals = exploration_reward(apart, entropy, rewards, coef=coef)
        return [None if math.isnan(total) else total for total in totals.tolist()]

    return oger_reward


def _divergences(
    embeddings: TeacherEmbeddings,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    teachers: Sequence[Sequence[str]],
    *,
    similarity: str,
    clip: bool,
) -> torch.Tensor:
    """(rows,): each completion against the teachers of its own row."""
    asked, written = [text_of(prompt) for prompt in prompts], [text_of(completion) for completion in completions]
    for row, own in enumerate(teachers):
        if own is not None and (isinstance(own, str) or not all(isinstance(text, str) for text in own)):
            raise DataError(f"teachers of row {row} is {str(own)[:60]!r}; expected a list of texts.")
    online = encode_checked(embeddings.encoder, asked, written, [f"completion {row}" for row in range(len(written))])
    flat = [(row, index, text) for row, own in enumerate(teachers) for index, text in enumerate(own or ())]
    found = embeddings.of(
        [asked[row] for row, _, _ in flat],
        [text for _, _, text in flat],
        [f"a teacher of row {row}" for row, _, _ in flat],
    )
    if not flat:
        return torch.zeros(len(written))
    check_dimensions(embeddings.encoder, online, found)
    centre = mean_vector(found) if embeddings.encoder.centred else None
    if centre is not None:
        empty = online.norm(dim=-1, keepdim=True) == 0
        online, found = (online - centre).masked_fill(empty, 0), found - centre
    most = max(index for _, index, _ in flat) + 1
    offline, mask = torch.zeros(len(written), most, online.shape[-1]), torch.zeros(len(written), most, dtype=torch.bool)
    for (row, index, _), vector in zip(flat, found, strict=True):
        offline[row, index], mask[row, index] = vector, True
    return divergence(online.unsqueeze(1), offline, mask=mask, reduce=similarity, clip=clip).squeeze(1)
