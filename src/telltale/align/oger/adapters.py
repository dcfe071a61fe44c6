"""The exploration reward alone for verl and for verifiers, in the form in which each of them calls a reward function.

Neither can put a teacher's trace into a group from a reward function, so this is :func:`make_oger_reward` and not OGER. Nothing of
either library is imported; the calls are those of verl's ``BatchRewardManager`` and of verifiers' ``Rubric`` (group functions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from telltale.align.oger.encoders import Encoder
from telltale.align.oger.reward_only import make_oger_reward
from telltale.align.oger.verification import Verifier
from telltale.errors import DataError


def verl_reward(verifier: Verifier, encoder: str | Encoder, **options: Any) -> Callable[..., list[float]]:
    """A ``compute_score`` for verl with ``reward_model.reward_manager=batch``.

    Each row's ``extra_info`` needs ``prompt`` and ``teachers``, a list of correct solutions, which may be empty. The verifier gets
    ``prompts``, ``completions`` (texts), ``answer`` (verl's ground truths) and ``data_source``. options: of
    :func:`make_oger_reward`. A row without a verdict is worth 0, since verl takes numbers only.
    """
    reward = make_oger_reward(verifier, encoder, **options)

    def compute_score(
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Mapping[str, Any] | None],
        **_: Any,
    ) -> list[float]:
        rewards = reward(
            prompts=[_plain(prompt) for prompt in _column(extra_infos, "extra_info", "prompt")],
            completions=list(solution_strs),
            teachers=[_listed(own) for own in _column(extra_infos, "extra_info", "teachers")],
            answer=list(ground_truths),
            data_source=list(data_sources),
        )
        return [0.0 if value is None else value for value in rewards]

    return compute_score


def verifiers_reward(verifier: Verifier, encoder: str | Encoder, **options: Any) -> Callable[..., list[float]]:
    """A group reward function for ``Rubric(funcs=[...])`` of verifiers.

    Each row's ``info`` needs ``teachers``, a list of correct solutions, which may be empty. The verifier gets ``prompts``,
    ``completions`` (as verifiers has them, messages as dictionaries) and ``answer``. options: of :func:`make_oger_reward`. A row
    without a verdict is worth 0. A Rubric logs what a reward function raises and goes on with zeros, so look at its log.
    """
    reward = make_oger_reward(verifier, encoder, **options)

    def oger_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answers: Sequence[Any],
        infos: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        rewards = reward(
            prompts=[_plain(prompt) for prompt in prompts],
            completions=[_plain(completion) for completion in completions],
            teachers=[_listed(own) for own in _column(infos, "info", "teachers")],
            answer=list(answers),
        )
        return [0.0 if value is None else value for value in rewards]

    return oger_reward


def _column(rows: Sequence[Mapping[str, Any] | None], called: str, name: str) -> list[Any]:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or name not in row:
            found = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)
            raise DataError(f"{called} of row {index} has no {name!r} (but {found}); expected it in every row.")
    return [row[name] for row in rows if row is not None]


def _listed(teachers: Any) -> Any:
    """A list that came through a table as an array."""
    return teachers.tolist() if hasattr(teachers, "tolist") else teachers


def _plain(value: Any) -> Any:
    """A text, or messages as dictionaries whatever their class."""
    value = _listed(value)
    if isinstance(value, str):
        return value
    return [
        message
        if isinstance(message, Mapping)
        else {"role": getattr(message, "role", None), "content": getattr(message, "content", None)}
        for message in value
    ]
