"""The judge as a reward function of TRL's GRPOTrainer, plain or conversational, with every objective in the metrics."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from telltale.errors import DataError
from telltale.models.conversations import Messages, json_kind, read_content, read_exchange

if TYPE_CHECKING:
    from telltale.align.judge.explanation import Explanation


RECENT, TOO_MANY = 100, 0.05
"""Completions that are looked back on, and the share of unfamiliar ones from which a warning is given."""


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
    The share of completions that are unlike what the judge was fitted on is ``judge/unfamiliar``; a warning is given once where
    it is well above what it was on held-out prompts.
    Raises :class:`~telltale.errors.DataError` if prompts and completions do not pair up or a prompt is neither form.
    """

    recent: deque[bool] = deque(maxlen=RECENT)
    told = [False]

    def judge_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts for {len(completions)} completions; expected as many.")
        found: list[Explanation | None] = []
        chats = [_conversation(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        for before, group in itertools.groupby(chats, key=lambda chat: None if chat is None else chat[:-1]):
            judged = list(group)
            if before is None:
                found += [None] * len(judged)
            else:
                found += judge.explain_candidates(before, [chat[-1]["content"] for chat in judged if chat is not None])
        judged_ones = [explanation for explanation in found if explanation is not None]
        _log(judged_ones, columns.get("log_metric"))
        recent.extend(explanation.unfamiliar for explanation in judged_ones if explanation.unfamiliar is not None)
        if len(recent) >= RECENT and sum(recent) > TOO_MANY * len(recent) and not told[0]:
            told[0] = True
            warnings.warn(
                f"{sum(recent)} of the last {len(recent)} completions are unlike what the judge was fitted on, where one in a "
                f"hundred responses is; their rewards are extrapolations.",
                stacklevel=2,
            )
        return [None if explanation is None else explanation.score for explanation in found]

    return judge_reward


def _conversation(prompt: Any, completion: Any) -> Messages | None:
    """Everything up to the last text that the assistant said, or None if it said nothing."""
    if isinstance(completion, str):
        return read_exchange(prompt, completion, name="completion", null_content=True)
    if not isinstance(completion, (list, tuple)):
        raise DataError(f"a completion is {json_kind(completion)}; expected a text or a list of messages.")
    places = [place for place, message in enumerate(completion) if _is_assistants(message)]
    if not places or read_content(completion[places[-1]].get("content"), "completion.content") is None:
        return None
    return read_exchange(prompt, completion[: places[-1] + 1], name="completion", null_content=True)


def _is_assistants(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _log(explanations: Sequence[Explanation], log_metric: Callable[[str, float], None] | None) -> None:
    if log_metric is None or not explanations:
        return
    known = [explanation.unfamiliar for explanation in explanations if explanation.unfamiliar is not None]
    if known:
        log_metric("judge/unfamiliar", sum(known) / len(known))
    for kind in ("reward", "contribution"):
        for terms in zip(*(explanation.terms for explanation in explanations), strict=True):
            mean = sum(getattr(term, kind) for term in terms) / len(terms)
            log_metric(f"judge/{kind}/{terms[0].objective}", mean)
