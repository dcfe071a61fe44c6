"""A text world model: states and actions as lines of bytes, the next state from any ``generate`` callable.

The wing imports no decoder. ``generate(prompts) -> completions`` may be one of telltale's decoders, a server, or a
function; :func:`corpus` writes the lines on which a byte-level causal language model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from telltale.errors import DataError
from telltale.world.protocol import Transition
from telltale.world.transitions import Transitions

Generate = Callable[[Sequence[str]], Sequence[str]]


class TextModel:
    """``states``: field names; ``actions``: action names. A completion that does not parse predicts no change, and counts."""

    stochastic = False

    def __init__(self, generate: Generate, *, columns: Sequence[str], actions: Sequence[str]) -> None:
        self.generate, self.columns, self.actions = generate, tuple(columns), tuple(actions)
        self.unparsed = 0
        self._seen: dict[tuple[Any, int], Any] = {}

    def step(self, belief: Any, action: int) -> Transition:
        """Ask for the line after ``state > action >``; answers are kept, since a search asks the same again."""
        key = (belief, int(action))
        if key not in self._seen:
            answer = next(iter(self.generate([prompt(belief, self.actions[int(action)])])))
            parsed = parse(answer, len(self.columns))
            self.unparsed += int(parsed is None)
            self._seen[key] = belief if parsed is None else parsed
        return Transition(self._seen[key])


def prompt(state: Any, action: str) -> str:
    """``4 2 9 0 0 0 0 0 > add a >``."""
    return f"{' '.join(map(str, state))} > {action} >"


def parse(answer: str, width: int) -> tuple[int, ...] | None:
    """The first line of a completion as a state; None if it is none."""
    words = answer.strip().split("\n", 1)[0].split()
    try:
        values = tuple(int(word) for word in words)
    except ValueError:
        return None
    return values if len(values) == width else None


def corpus(transitions: Transitions, actions: Sequence[str]) -> str:
    """One line per transition: the prompt and its answer. Raises :class:`~telltale.errors.DataError` for numeric states."""
    if not transitions.plain:
        raise DataError("a text corpus is written from plain states; these are numeric.")
    lines = [
        f"{prompt(before, actions[int(action)])} {' '.join(map(str, after))}"
        for before, action, after in zip(
            transitions.before, transitions.actions.tolist(), transitions.after, strict=True
        )
    ]
    return "\n".join(lines) + "\n"
