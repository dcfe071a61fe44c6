"""The judge as a reward function of TRL's GRPOTrainer, plain or conversational, with every objective in the metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from telltale.errors import DataError

if TYPE_CHECKING:
    from telltale.align.judge.explanation import Explanation


class ExplainsCandidates(Protocol):
    """What the reward needs of a judge."""

    def explain_candidates(self, prompt: list[dict[str, str]], responses: list[str]) -> Sequence[Explanation]:
        """One explanation per response to ``prompt``."""
        ...


def trl_reward(judge: ExplainsCandidates) -> Callable[..., list[float | None]]:
    """``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]`` for ``reward_funcs=[...]``.

    A prompt is a user's text or a list of messages; a completion a text or the assistant's messages. The completions of one
    prompt stand next to each other, as GRPO generates them, and share its keys and values. None, which TRL leaves out of
    the mean, stands for a completion that holds no text to judge, such as a bare tool call. With ``log_metric`` in
    ``columns`` the batch means of all contributions and rewards become metrics ``judge/contribution/NAME`` and
    ``judge/reward/NAME``.
    Raises :class:`~telltale.errors.DataError` if prompts and completions do not pair up or a prompt is neither form.
    """

    def judge_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts for {len(completions)} completions; expected as many.")
        found: list[Explanation | None] = []
        pairs = zip(map(_prompt, prompts), map(_text, completions), strict=True)
        for prompt, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            texts = [text for _, text in group]
            told = [text for text in texts if text is not None]
            explained = iter(judge.explain_candidates(prompt, told) if told else [])
            found += [None if text is None else next(explained) for text in texts]
        _log([explanation for explanation in found if explanation is not None], columns.get("log_metric"))
        return [None if explanation is None else explanation.score for explanation in found]

    return judge_reward


def _prompt(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(message, dict) and "role" in message for message in prompt):
        return [{"role": message["role"], "content": _content(message) or ""} for message in prompt]
    raise DataError(f"a prompt is {type(prompt).__name__}; expected a text or a list of messages.")


def _text(completion: Any) -> str | None:
    """What the assistant said last, or None."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role") == "assistant"]
    return _content(said[-1]) if said else None


def _content(message: dict[str, Any]) -> str | None:
    """The text of a message whose content is a string or a list of typed parts, of which only text is read."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if part.get("type") == "text"]
        return "".join(parts) if parts else None
    return content if isinstance(content, str) else None


def _log(explanations: Sequence[Explanation], log_metric: Callable[[str, float], None] | None) -> None:
    if log_metric is None or not explanations:
        return
    for kind in ("reward", "contribution"):
        for terms in zip(*(explanation.terms for explanation in explanations), strict=True):
            mean = sum(getattr(term, kind) for term in terms) / len(terms)
            log_metric(f"judge/{kind}/{terms[0].objective}", mean)
