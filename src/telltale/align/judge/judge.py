"""The fitted judge: score, explain, compare, reweight, choose the best of several responses, reward a policy.

Every score is that of an :class:`~telltale.align.judge.explanation.Explanation`, so it is always the sum of its contributions. The
backbone runs as it was saved; head and gate run in float32. :meth:`Judge.reweight` changes how much an objective counts, and
neither rewards nor the gate.

Responses to one prompt share their first tokens, and in a causal backbone keys and values of these do not depend on what follows.
They are computed once and repeated over the batch, and only the rest of each response goes through the layers.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, cast, overload

import torch
from torch import Tensor
from transformers import DynamicCache

from telltale.align.judge.explanation import Comparison, Explanation
from telltale.align.judge.features import is_causal
from telltale.align.judge.model import JudgeModel
from telltale.align.judge.official_checkpoint import load_judge_model, save
from telltale.align.judge.templates import Encoded, encode
from telltale.config import check_integer, check_range
from telltale.errors import ConfigError, DataError
from telltale.models.conversations import Messages, read_prompt
from telltale.models.loading import check_fit, load_tokenizer

LARGE_BATCH_TOKENS = 256
"""Tokens from which a larger batch hardly makes each of them cheaper."""


class Judge:
    """A reward model with named objectives, its tokenizer, and factors of :meth:`reweight`.

    ``model`` is a :class:`~telltale.align.judge.model.JudgeModel`; ``batch_size`` conversations go through it together.
    """

    def __init__(
        self, model: JudgeModel, tokenizer: Any, *, batch_size: int = 16, factors: Mapping[str, float] | None = None
    ) -> None:
        check_integer("batch_size", batch_size, low=1)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.factors = dict(factors or {})
        check_factors(self.factors, self.objectives, model.head.reward_transform_matrix)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 16,
    ) -> Judge:
        """The judge saved in the folder ``path``, of telltale's or the official layout; no code of the folder runs.

        Raises :class:`~telltale.errors.CheckpointError`, :class:`~telltale.errors.UnsupportedModelError` (a look-alike) or
        :class:`~telltale.errors.DataError` (no tokenizer, or one that does not fit).
        """
        model = load_judge_model(path, dtype=dtype, device=device)
        tokenizer = load_tokenizer(path)
        check_fit(tokenizer, model, path)
        return cls(model, tokenizer, batch_size=batch_size)

    def save(self, path: str | Path, *, layout: str = "telltale") -> None:
        """Write model and tokenizer to the folder ``path``; ``layout`` is ``"telltale"`` or ``"official"``.

        Factors of :meth:`reweight` go into the transform matrix (column i times factor i), so scores stay bit-equal; the
        calibration, which was of other scores, is left out then. Raises
        :class:`~telltale.errors.CheckpointError` for a folder that holds something else, or cannot be written.
        """
        own = self.model.head.reward_transform_matrix
        kept, config = own.detach().clone(), self.model.config
        calibration = config.calibration
        try:
            config.calibration = None if self.factors else calibration
            with torch.no_grad():
                own.copy_(self.model.head.scaled_transform(self.factors))
            save(self.model, path, layout=layout, tokenizer=self.tokenizer)
        finally:
            config.calibration = calibration
            with torch.no_grad():
                own.copy_(kept)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of terms."""
        return tuple(self.model.head.objectives)

    @overload
    def score(self, messages: Messages) -> float: ...
    @overload
    def score(self, messages: list[Messages]) -> list[float]: ...
    def score(self, messages: Messages | list[Messages]) -> float | list[float]:
        """The score of one conversation, or of each of a list of them; the last message is the response that is judged.

        Raises :class:`~telltale.errors.DataError` for a conversation that is none, or for a tokenizer without chat template.
        """
        if _is_one(messages):
            return self.explain_all([messages])[0].score
        return [explanation.score for explanation in self.explain_all(cast(list[Messages], messages))]

    @overload
    def explain(self, messages: Messages) -> Explanation: ...
    @overload
    def explain(self, messages: list[Messages]) -> list[Explanation]: ...
    def explain(self, messages: Messages | list[Messages]) -> Explanation | list[Explanation]:
        """What the score of one conversation, or of each of a list, is made of. Raises what :meth:`score` raises."""
        if _is_one(messages):
            return self.explain_all([messages])[0]
        return self.explain_all(cast(list[Messages], messages))

    def compare(self, first: Messages, second: Messages) -> Comparison:
        """What sets the scores of two conversations apart, per objective; of a calibrated judge with the probability that the
        first is better, and whether the difference is large enough to answer at all.

        A judge that was reweighted is not calibrated any more.
        """
        one, other = self.explain_all([first, second])
        told = None if self.factors else self.model.config.calibration
        if told is None:
            return Comparison(one, other)
        margin, least = one.score - other.score, told["threshold"]
        probability = 0.5 * (1.0 + math.tanh(0.5 * float(told["slope"]) * margin))
        return Comparison(one, other, probability, least is not None and abs(margin) >= float(least))

    def reweight(self, factors: Mapping[str, float]) -> Judge:
        """A judge that counts an objective ``factors[name]`` times as much; this one stays as it is.

        The gate's weight g_i of the decorrelated reward (r T)_i is multiplied, so decorrelation holds and no reward changes.
        Raises ``UnknownObjective`` (ConfigError, KeyError) with the nearest name, and
        :class:`~telltale.errors.ConfigError` for a nuisance that decorrelation has taken out of the score.
        """
        check_factors(factors, self.objectives, self.model.head.reward_transform_matrix)
        merged = {name: self.factors.get(name, 1.0) * factors.get(name, 1.0) for name in (*self.factors, *factors)}
        return Judge(self.model, self.tokenizer, batch_size=self.batch_size, factors=merged)

    def best_of(self, prompt: str | Messages, responses: Sequence[str]) -> BestOf:
        """The response with the highest score (the first of equals); a decoder backbone reads the prompt once.

        ``prompt`` is a user's text or the whole conversation so far. Raises :class:`~telltale.errors.DataError` for no
        responses.
        """
        if not responses:
            raise DataError("responses is empty; expected at least one candidate.")
        explanations = self.explain_candidates(prompt, responses)
        index = max(range(len(responses)), key=lambda candidate: explanations[candidate].score)
        return BestOf(index, responses[index], tuple(explanations))

    def explain_candidates(self, prompt: str | Messages, responses: Sequence[str]) -> list[Explanation]:
        """Explanations of several responses to one prompt, equal to those of :meth:`explain` up to rounding."""
        rows = [self._encode(conversation(prompt, response)) for response in responses]
        if not self._shares(rows):
            return self._explain_rows(rows)
        with torch.inference_mode():
            hidden, gating = candidate_features(
                self.model.backbone, [row.ids for row in rows], rows[0].gating_index, batch_size=self.batch_size
            )
            return self._explanations(hidden, gating.expand(len(rows), -1), rows)

    def as_trl_reward(self) -> Callable[..., list[float | None]]:
        """A reward function for TRL's GRPOTrainer, see :func:`~telltale.align.judge.trl.trl_reward`."""
        from telltale.align.judge.trl import trl_reward

        return trl_reward(self)

    def explain_all(self, conversations: Sequence[Messages]) -> list[Explanation]:
        """:meth:`explain` for a list, whatever its length. Conversations of similar length share a batch."""
        return self._explain_rows([self._encode(messages) for messages in conversations])

    def _encode(self, messages: Messages) -> Encoded:
        return encode(self.tokenizer, messages, self.model.config)

    def _explain_rows(self, rows: Sequence[Encoded]) -> list[Explanation]:
        found: list[Explanation | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            with torch.inference_mode():
                hidden, prompts = self.model.features([rows[index] for index in chosen])
                explained = self._explanations(hidden, prompts, [rows[index] for index in chosen])
            for index, explanation in zip(chosen, explained, strict=True):
                found[index] = explanation
        return [explanation for explanation in found if explanation is not None]

    def _explanations(self, hidden: Tensor, prompts: Tensor, rows: Sequence[Encoded]) -> list[Explanation]:
        """From features (n, d) of responses and (n, dg) of prompts."""
        out = self.model.head(hidden.float(), prompts.float(), factors=self.factors)
        known = self.model.head.feature_range
        outside = [None] * len(rows) if known is None else known.outside(hidden).tolist()
        columns = (out.rewards.tolist(), out.weights.tolist(), out.coefficients.tolist(), rows, outside)
        return [
            Explanation.of(
                self.objectives,
                rewards,
                weights,
                coefficients,
                truncated=row.truncated,
                response_truncated=row.response_truncated,
                unfamiliar=far,
            )
            for rewards, weights, coefficients, row, far in zip(*columns, strict=True)
        ]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _keeps_prefixes(self) -> bool:
        return supports_prefix_cache(self.model.backbone)

    def _shares(self, rows: Sequence[Encoded]) -> bool:
        """Whether the prompt can be computed once for all ``rows``."""
        if len(rows) < 2 or self.model.config.pooling != "last" or not self._keeps_prefixes:
            return False
        gating = {row.gating_index for row in rows}
        return len(gating) == 1 and gating.pop() < shared_length([row.ids for row in rows])


@dataclass(frozen=True)
class BestOf:
    """The best of several responses: its ``index``, its text, and the explanation of every candidate in the given order."""

    index: int
    response: str
    explanations: tuple[Explanation, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """Score of every candidate."""
        return tuple(explanation.score for explanation in self.explanations)


def conversation(prompt: str | Messages, response: str) -> Messages:
    """The messages of ``prompt`` (a user's text, or the conversation so far) and the assistant's ``response``."""
    return [*read_prompt(prompt), {"role": "assistant", "content": response}]


class UnknownObjective(ConfigError, KeyError):
    """An objective that the judge does not have; the message names the nearest one that it has."""

    def __init__(self, name: str, objectives: Sequence[str]) -> None:
        near = difflib.get_close_matches(name, objectives, n=1, cutoff=0.0)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"objective {name!r} is unknown; expected one of {', '.join(objectives)}.{hint}")

    def __str__(self) -> str:
        # KeyError would show the message's repr.
        return str(self.args[0])


def check_factors(factors: Mapping[str, float], objectives: Sequence[str], transform: Tensor) -> None:
    """Check factors of objectives against the judge's names and its transform T (K, K).

    Raises :class:`UnknownObjective` with the nearest name, and :class:`~telltale.errors.ConfigError` for a factor that is
    not a finite number >= 0 and for an objective whose decorrelated reward (r T)_i is zero, where no factor does anything.
    """
    for name, factor in factors.items():
        if name not in objectives:
            raise UnknownObjective(name, objectives)
        check_range(f"reweight[{name!r}]", factor, low=0.0, below=float("inf"))
        if not bool(transform[:, list(objectives).index(name)].any()):
            raise ConfigError(
                f"objective {name!r} is a nuisance that decorrelation takes out of every reward; its factor would do nothing. "
                f"Expected an objective that the gate weighs."
            )


def candidate_features(
    backbone: Any, rows: Sequence[Sequence[int]], gating_index: int, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Last-token hidden states (n, d) of the n ``rows`` of token ids, and the hidden state (d,) at ``gating_index``.

    Equal to a pass over every whole row up to rounding. ``gating_index`` has to lie in what the rows share, see
    :func:`shared_length`; ``batch_size`` rows go through the backbone together, those of similar length.
    """
    shared = shared_length(rows)
    device = next(backbone.parameters()).device
    cache = DynamicCache(config=backbone.config)
    prefix = torch.tensor([list(rows[0][:shared])], device=device)
    states = backbone(input_ids=prefix, use_cache=True, **{str(cache_argument_name(backbone)): cache}).last_hidden_state
    hidden = states.new_empty(len(rows), states.shape[-1])
    for chosen in batches_by_length([len(row) - shared for row in rows], batch_size):
        hidden[chosen] = _continue(backbone, cache, [rows[index][shared:] for index in chosen], shared)
    return hidden, states[0, gating_index]


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many leading token ids all ``rows`` share, leaving at least one token to each."""
    ordered = sorted(map(list, rows))
    # What the first and the last in order share, all between them share.
    first, last = ordered[0], ordered[-1]
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(0, min(common, min(map(len, rows)) - 1))


def supports_prefix_cache(backbone: Any) -> bool:
    """Whether ``backbone`` keeps keys and values that do not depend on later tokens."""
    return (
        cache_argument_name(backbone) is not None
        and not getattr(backbone, "_is_stateful", False)
        and is_causal(backbone)
    )


def cache_argument_name(backbone: Any) -> str | None:
    """What ``backbone.forward`` calls its cache of keys and values; None if it takes none."""
    taken = inspect.signature(backbone.forward).parameters
    # Transformers 5.24 renamed it for most families.
    return next((name for name in ("past_key_values", "cache") if name in taken), None)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices into ``lengths`` in batches of at most ``batch_size``, the longest first.

    A batch that is worth a pass of its own is closed before a row that would be an eighth padding or more.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        worth = bool(batches) and longest * len(batches[-1]) >= LARGE_BATCH_TOKENS
        if not batches or len(batches[-1]) == batch_size or (worth and lengths[index] <= longest * 7 / 8):
            batches.append([])
        batches[-1].append(index)
    return batches


def _is_one(messages: Messages | list[Messages]) -> TypeGuard[Messages]:
    return bool(messages) and isinstance(messages[0], dict)


def _continue(backbone: Any, cache: DynamicCache, rests: Sequence[Sequence[int]], shared: int) -> Tensor:
    """Hidden states (n, d) of the last token of every rest, after ``shared`` cached tokens."""
    device = next(backbone.parameters()).device
    lengths = torch.tensor([len(rest) for rest in rests], device=device)
    width = int(lengths.max())
    ids = torch.zeros(len(rests), width, dtype=torch.long, device=device)
    for row, rest in enumerate(rests):
        ids[row, : len(rest)] = torch.tensor(list(rest), device=device)
    columns = torch.arange(width, device=device)
    mask = torch.cat([torch.ones(len(rests), shared, device=device), columns < lengths[:, None]], dim=1).long()
    # A copy: the pass appends to it, and the next chunk starts from the prompt again.
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(len(rests))
    states = backbone(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(shared + columns).expand(len(rests), width),
        use_cache=True,
        **{str(cache_argument_name(backbone)): own},
    ).last_hidden_state
    return states[torch.arange(len(rests), device=device), lengths - 1]
