"""Preference data that needs no file: rated solutions of arithmetic chains, and pairs whose labels like length too much.

Every objective is computed from the text by the task's checker. Prompts come in two kinds, one of which asks to be brief, so that
what counts depends on the prompt; the pairs' labels add a bonus for length, which the true preference does not have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from telltale.align.judge.labels import Scale, label_matrix
from telltale.align.judge.records import Conversation, Pair, Ratings
from telltale.tasks.chain_checker import ERRORS, check_solution, corrupted
from telltale.tasks.chains import DELIMITER, Problem, generate

OBJECTIVES = ("correct", "valid", "complete", "concise", "readable", "verbosity")
BRIEF = "please be brief ."
FULL = "please show every step ."
FILLER = ("so", "now", "let", "us", "look", "at", "this", "with", "care", "and", "go", "on")
EXTRA_WORDS = (*BRIEF.split(), *FULL.split(), *FILLER)
STEPS = (2, 3)
LONGEST = 80
"""Words from which a response's verbosity is 1."""
CONFOUND = 0.8
"""What the labels add for verbosity."""
SHORTER = 0.25
"""Difference of verbosity from which a pair counts as one of unequal lengths."""


@dataclass(frozen=True)
class Response:
    """One solution with what it is worth."""

    problem: Problem
    brief: bool
    text: str
    ratings: dict[str, float]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The user's turn."""
        return [{"role": "user", "content": f"{self.problem.prompt} {BRIEF if self.brief else FULL}"}]

    @property
    def worth(self) -> float:
        """The true preference: right, and in the style that is asked for: no idle words, or all steps on lines of their own."""
        rated = self.ratings
        style = rated["concise"] if self.brief else 0.5 * rated["complete"] + 0.5 * rated["readable"]
        return 0.5 * rated["correct"] + 0.5 * rated["valid"] + 1.5 * style


def responses(prompts: int, *, seed: int, per_prompt: int = 6) -> list[Response]:
    """``per_prompt`` different responses to each of ``prompts`` problems, prompt after prompt."""
    chance = random.Random(f"responses {seed}")
    found = []
    for problem in generate(prompts, seed=seed, steps=STEPS):
        brief = chance.random() < 0.5
        texts: list[str] = []
        while len(texts) < per_prompt:
            text = _text(problem, chance)
            if text not in texts:
                texts.append(text)
        found += [Response(problem, brief, text, rate(problem, text)) for text in texts]
    return found


def rate(problem: Problem, text: str) -> dict[str, float]:
    """Every objective of a response, in [0, 1]."""
    words = [word for word in text.replace(DELIMITER, f" {DELIMITER} ").split(" ") if word]
    spoken = [word for word in words if word != DELIMITER]
    body = " ".join(word for word in words if word not in FILLER)
    verdict = check_solution(problem, body.replace(f"; {DELIMITER}", DELIMITER).replace(" ;", f" {DELIMITER}"))
    breaks = words.count(DELIMITER)
    joints = breaks + words.count(";")
    return {
        "correct": float(verdict.correct),
        "valid": sum(step.right for step in verdict.steps) / max(1, len(verdict.steps)),
        "complete": verdict.complete,
        "concise": sum(word not in FILLER for word in spoken) / max(1, len(spoken)),
        "readable": breaks / joints if joints else 1.0,
        "verbosity": min(1.0, len(spoken) / LONGEST),
    }


def rated(found: Sequence[Response], *, missing: float = 0.2, seed: int = 0) -> Ratings:
    """Ratings of responses with a share of them missing at random, as people leave them."""
    chance = random.Random(f"missing {seed}")
    rows = [{name: value for name, value in r.ratings.items() if chance.random() >= missing} for r in found]
    conversations = [
        Conversation(f"response {index}", [*r.prompt, {"role": "assistant", "content": r.text}])
        for index, r in enumerate(found)
    ]
    scales = {name: Scale() for name in OBJECTIVES}
    return Ratings(conversations, label_matrix(rows, scales), scales)


def preferences(found: Sequence[Response], *, seed: int, confound: float = CONFOUND) -> list[Pair]:
    """Pairs of responses to one prompt, the better one by the true worth plus ``confound`` times verbosity."""
    chance = random.Random(f"pairs {seed}")
    by_prompt: dict[str, list[Response]] = {}
    for response in found:
        by_prompt.setdefault(response.problem.prompt, []).append(response)
    pairs: list[Pair] = []
    for group in by_prompt.values():
        order = chance.sample(group, len(group))
        for first, second in zip(order[0::2], order[1::2], strict=False):
            gain = first.worth - second.worth + confound * (first.ratings["verbosity"] - second.ratings["verbosity"])
            if abs(gain) < 1e-9:
                continue
            better, worse = (first, second) if gain > 0 else (second, first)
            pairs.append(Pair(f"pair {len(pairs)}", better.prompt, better.text, worse.text))
    return pairs


def _text(problem: Problem, chance: random.Random) -> str:
    steps = problem.steps
    if chance.random() < 0.5:
        steps = corrupted(problem, chance.choice([e for e in ERRORS if e != "order"]), chance).split(f" {DELIMITER} ")
    if chance.random() < 0.25:
        steps = [*steps[: chance.randrange(len(steps) - 1)], steps[-1]]
    joint = ";" if chance.random() < 0.25 else DELIMITER
    if chance.random() < 0.5:
        steps = [" ".join([*chance.choices(FILLER, k=chance.randrange(4, 14)), step]) for step in steps]
    return f" {joint} ".join(steps)
