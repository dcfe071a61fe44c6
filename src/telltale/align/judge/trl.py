"""The judge as a reward function of TRL's GRPOTrainer, plain or conversational, with every objective in the metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from telltale.errors import DataError
from telltale.models.conversations import json_kind, read_content, read_prompt

if TYPE_CHECKING:
    from telltale.align.judge.explanation import Explanation


class ExplainsCandidates(Protocol):
    """What the reward needs of a judge."""

    def explain_candidates(self, prompt: list[dict[str, str]], responses: list[str]) -> Sequence[Explanation]:
        """One explanation per response to ``prompt``."""
        ...


def trl_reward(judge: ExplainsCandidates) -> Callable[..., list[float | None]]:
    """``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]`` for ``reward_funcs=[...]``.

    A prompt is a user's text or a list of messages; a completion a text or the assistant's messages. Completions of one prompt that
    follow each other, as GRPO generates them, share its keys and values. A completion without text, such as a bare tool call,
    is not judged: its reward is None, which TRL leaves out of the mean. With ``log_metric`` in ``columns`` the batch means of all
    contributions and rewards become metrics ``judge/contribution/NAME`` and ``judge/reward/NAME``.
    Raises :class:`~telltale.errors.DataError` if prompts and completions do not pair up or a prompt is neither form.
    """

    def judge_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts for {len(completions)} completions; expected as many.")
        found: list[Explanation | None] = []
        pairs = zip(
            (read_prompt(prompt, null_content=True) for prompt in prompts), map(_text, completions), strict=True
        )
        for prompt, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            texts = [text for _, text in group]
            judged = [text for text in texts if text is not None]
            explained = iter(judge.explain_candidates(prompt, judged) if judged else [])
            found += [None if text is None else next(explained) for text in texts]
        _log([explanation for explanation in found if explanation is not None], columns.get("log_metric"))
        return [None if explanation is None else explanation.score for explanation in found]

    return judge_reward


def _text(completion: Any) -> str | None:
    """The text of the assistant's last message, or None."""
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, (list, tuple)):
        raise DataError(f"a completion is {json_kind(completion)}; expected a text or a list of messages.")
    for message in reversed(completion):
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            return read_content(message.get("content"), "completion.content")
    return None


def _log(explanations: Sequence[Explanation], log_metric: Callable[[str, float], None] | None) -> None:
    if log_metric is None or not explanations:
        return
    for kind in ("reward", "contribution"):
        for terms in zip(*(explanation.terms for explanation in explanations), strict=True):
            mean = sum(getattr(term, kind) for term in terms) / len(terms)
            log_metric(f"judge/{kind}/{terms[0].objective}", mean)
