"""Verifiers by name: reward functions, as TRL calls them, for the tasks that have an exact check."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from telltale.errors import DataError
from telltale.tasks import routes
from telltale.tasks.arithmetic import number
from telltale.tasks.gsm8k import final_answer, same_number

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def verify_gsm8k(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the answer is the true one: of the line ``#### 42`` or ``A: 42`` if there is one, else the last number written.

    ``answer`` is the reference solution, or the number alone. Raises :class:`~telltale.errors.DataError` if it has no number.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        true = _answer(str(reference))
        if true is None:
            raise DataError(
                f"the answer {str(reference)[-40:]!r} holds no number; expected one, or a solution with '#### 42'."
            )
        given = _answer(text)
        rewards.append(float(given is not None and same_number(given, true)))
    return rewards


VERIFIERS: dict[str, Callable[..., list[float]]] = {
    "gsm8k": verify_gsm8k,
    "routes": routes.verify,
    "routes-answer": routes.verify_answer_only,
}


def _answer(text: str) -> Any:
    marked = final_answer(text)
    if marked is not None:
        return marked
    found = _NUMBER.findall(text)
    return number(found[-1]) if found else None
