"""Objectives that need no rater, for preferences that come without ratings: what can be counted in a response.

Length, structure, refusals and the overlap with the prompt are functions of the text, and "preferred" is the share of the votes
that a response got. None of them is a judgement of quality: an objective fitted on a count remains one, whatever the gate makes
of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch

from telltale.align.judge.auditing import MARKDOWN, REFUSALS
from telltale.align.judge.data import Pair, Ratings, Scale
from telltale.align.judge.features import pair_conversations

WORD = re.compile(r"[^\W_]+")
LONGEST, MOST_MARKS = 1000, 40
"""Words, and marks of structure, from which the two objectives are 1."""
SHORTEST_SHARED = 4
"""Letters of a word that counts as shared with the prompt."""
PREFERRED = "preferred"


def verbosity(prompt: str, response: str) -> float:
    """Words on a logarithmic scale, 1 from 1,000 on."""
    return min(1.0, math.log1p(len(WORD.findall(response))) / math.log1p(LONGEST))


def structure(prompt: str, response: str) -> float:
    """Lines and Markdown marks on a logarithmic scale, 1 from 40 on."""
    marks = response.strip().count("\n") + len(MARKDOWN.findall(response))
    return min(1.0, math.log1p(marks) / math.log1p(MOST_MARKS))


def refusal(prompt: str, response: str) -> float:
    """1 for a response that opens with a refusal."""
    return float(bool(REFUSALS.match(response)))


def overlap(prompt: str, response: str) -> float:
    """The share of the prompt's longer words that the response uses; 0 for a prompt without any."""
    asked, said = ({word.lower() for word in WORD.findall(text)} for text in (prompt, response))
    asked = {word for word in asked if len(word) >= SHORTEST_SHARED}
    return len(asked & said) / len(asked) if asked else 0.0


COUNTABLE: dict[str, Callable[[str, str], float]] = {
    "verbosity": verbosity,
    "structure": structure,
    "refusal": refusal,
    "overlap": overlap,
}
"""Name -> function of the last user's text and the response, in [0, 1]."""


def countable_ratings(pairs: Sequence[Pair]) -> Ratings:
    """Ratings of both responses of every pair, the chosen one first, as :func:`pair_conversations` has them.

    Objectives that are the same in all responses say nothing and are left out.
    """
    conversations = pair_conversations(pairs)
    columns = {
        name: [measure(c.messages[-2]["content"], c.messages[-1]["content"]) for c in conversations]
        for name, measure in COUNTABLE.items()
    }
    columns[PREFERRED] = [share for pair in pairs for share in _shares(pair)]
    kept = {name: values for name, values in columns.items() if min(values) < max(values)}
    labels = torch.tensor(list(kept.values()), dtype=torch.float64).T.contiguous()
    return Ratings(conversations, labels, {name: Scale() for name in kept})


def _shares(pair: Pair) -> tuple[float, float]:
    total = sum(pair.votes)
    return pair.votes[0] / total, pair.votes[1] / total
