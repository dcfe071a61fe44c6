"""A decode that was recorded, and what any plan would have made of it: no model and no clock, so always the same.

Where decoding is greedy, an exit's draft stands exactly as far as the exit predicts, place by place, what the whole model
writes. So a recording needs only the text, how far each exit's draft would stand from every place on, and what rounds cost. They
cost what was measured of whole rounds (``measured``); the plan is given the predictions (``costs``), as it would be live.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from telltale.decode.drafting import PLAIN, Choice, Plan
from telltale.decode.engine import BLOCK
from telltale.decode.ngrams import NgramIndex
from telltale.decode.pass_costs import PassCosts
from telltale.errors import DataError
from telltale.runs.files import write_atomically

VERSION = 2
LONGEST_RUN = 16
"""Drafts that are looked at from each place."""
_DIGITS = "0123456789abcdefg"


@dataclass(frozen=True)
class RecordedText:
    """A prompt and the ``tokens`` that the model wrote behind it, greedily.

    ``runs[E][i]``: how many drafts of exit E, at most :data:`LONGEST_RUN`, stand behind ``tokens[i]``.
    """

    prompt: list[int]
    tokens: list[int]
    runs: dict[int, list[int]]


@dataclass(frozen=True)
class MeasuredRounds:
    """Seconds of whole rounds at the exits and lengths that were run, ``exits[E][k]`` and ``ngrams[k]``, and of a ``plain`` step.
    What lies between is interpolated."""

    plain: float
    exits: dict[int, dict[int, float]]
    ngrams: dict[int, float]

    def seconds(self, choice: Choice) -> float:
        """Seconds of a round."""
        if choice.source == "plain":
            return self.plain
        if choice.source == "ngram":
            return _between(self.ngrams, choice.length)
        return _between({layer: _between(own, choice.length) for layer, own in self.exits.items()}, choice.exit_layer)


@dataclass(frozen=True)
class Recording:
    """Texts of one model with what their rounds cost. ``exits``: those that can draft; ``about``: where it comes from, in words."""

    about: str
    exits: list[int]
    costs: PassCosts
    measured: MeasuredRounds
    texts: list[RecordedText]

    def half(self, which: int) -> Recording:
        """Every other text: the first half (0) or the second one (1)."""
        return Recording(self.about, self.exits, self.costs, self.measured, self.texts[which::2])

    def save(self, path: str | Path) -> None:
        """Write it as compressed JSON, the same bytes for the same recording."""
        document = {
            "version": VERSION,
            "about": self.about,
            "exits": self.exits,
            "costs": asdict(self.costs),
            "measured": asdict(self.measured),
            "texts": [
                {
                    "prompt": text.prompt,
                    "tokens": text.tokens,
                    "runs": {layer: _packed(own) for layer, own in text.runs.items()},
                }
                for text in self.texts
            ],
        }
        write_atomically(path, gzip.compress(json.dumps(document).encode(), 9, mtime=0))

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what :meth:`save` wrote. Raises :class:`~telltale.errors.DataError` for anything else."""
        try:
            found = json.loads(gzip.decompress(Path(path).read_bytes()))
            if found["version"] != VERSION:
                raise DataError(
                    f"{path} is a recording of version {found['version']}; expected {VERSION}. Record it anew."
                )
            costs: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found["costs"].items()}
            costs["draft_heads"] = tuple((layer, weight) for layer, weight in costs["draft_heads"])
            measured = found["measured"]
            exits = {int(layer): _by_length(own) for layer, own in measured["exits"].items()}
            return cls(
                found["about"],
                found["exits"],
                PassCosts(**costs),
                MeasuredRounds(measured["plain"], exits, _by_length(measured["ngrams"])),
                [_text(one) for one in found["texts"]],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no recording of a decode ({error}); expected a file that Recording.save wrote."
            ) from error


@dataclass(frozen=True)
class Replay:
    """What a plan made of a recording: ``seconds`` and ``tokens`` in all, prompts left out, and its ``decisions``, a choice a round
    with the tokens that it gave."""

    seconds: float
    tokens: int
    decisions: list[tuple[Choice, int]]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def replay(recording: Recording, plan: Plan, *, noise: Callable[[], float] | None = None) -> Replay:
    """Have ``plan`` decode the texts of ``recording``, one after another; it learns from them.

    ``noise`` gives a factor for the time of each round, 1 if None.
    """
    seconds, tokens, decisions = 0.0, 0, []
    for text in recording.texts:
        plan.begin(1)
        spent, own = _decoded(recording, text, plan, noise)
        seconds += spent
        tokens += len(text.tokens) - 1
        decisions += own
    return Replay(seconds, tokens, decisions)


def _decoded(
    recording: Recording, text: RecordedText, plan: Plan, noise: Callable[[], float] | None
) -> tuple[float, list[tuple[Choice, int]]]:
    """One text behind its first token, which is the prompt's: seconds, and the choices with their tokens."""
    copies = plan.drafter in ("ngram", "both")
    ngrams = NgramIndex([*text.prompt, text.tokens[0]]) if copies else None
    seconds, place, decisions = 0.0, 0, []
    while place < len(text.tokens) - 1:
        remaining = len(text.tokens) - 1 - place
        match = ngrams.match if ngrams is not None else 0
        choice = plan.next(match)
        length = min(choice.length, remaining - 1)
        factor = 1.0 if noise is None else noise()
        if length < 1:
            step = 1 if copies else min(BLOCK, remaining)
            taken = step * factor * recording.measured.plain
            plan.learn_plain(step, taken)
            decisions.append((PLAIN, step))
        else:
            if choice.source == "ngram":
                assert ngrams is not None
                draft = ngrams.draft(length)
                following = text.tokens[place + 1 : place + 1 + length]
                stood = next(
                    (i for i, pair in enumerate(zip(draft, following, strict=True)) if pair[0] != pair[1]), length
                )
            else:
                stood = min(text.runs[choice.exit_layer][place], length)
            taken = factor * recording.measured.seconds(choice._replace(length=length))
            plan.learn(choice, match, [length], [stood], taken)
            step = stood + 1
            decisions.append((choice, step))
        seconds += taken
        if ngrams is not None:
            ngrams.extend(text.tokens[place + 1 : place + 1 + step])
        place += step
    return seconds, decisions


def _between(known: dict[int, float], at: int) -> float:
    """The value at a place between known ones, on a straight line; beyond the last one the line goes on."""
    places = sorted(known)
    if len(places) == 1:
        return known[places[0]]
    above = min(max(bisect_right(places, at), 1), len(places) - 1)
    low, high = places[above - 1], places[above]
    return known[low] + (known[high] - known[low]) * (at - low) / (high - low)


def _packed(runs: Sequence[int]) -> str:
    """A digit a place; what is above nine is a letter."""
    return "".join(_DIGITS[run] for run in runs)


def _text(found: dict[str, Any]) -> RecordedText:
    runs = {int(layer): [_DIGITS.index(digit) for digit in own] for layer, own in found["runs"].items()}
    return RecordedText(found["prompt"], found["tokens"], runs)


def _by_length(found: dict[str, float]) -> dict[int, float]:
    return {int(length): seconds for length, seconds in found.items()}
