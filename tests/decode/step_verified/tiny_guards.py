"""Random pairs of models over the words of the task chains, and a labeler that finds about half of what they write right."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from models.tiny_models import tiny_model
from telltale.decode.calibration.trials import SamplingSettings
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.tasks import chains
from telltale.tasks.step_labels import StepLabel

SHORT = SamplingSettings(max_new_tokens=18, temperature=1.0, top_p=None)
SETTINGS = {
    "delimiter": "a",
    "max_step_tokens": 10,
    "fallback": "plain",
    "candidates": 1,
    "repetition_limit": None,
    "grounding_layers": 2,
}
"""Many words of the vocabulary have an "a", so that untrained models end their steps."""


@lru_cache(maxsize=4)
def model(seed: int) -> Any:
    return tiny_model("llama", seed=seed, vocab_size=32, max_position_embeddings=256)


def tiny_guard(*, draft: int | None = 1, **changes: Any) -> StepVerified:
    config = StepVerifiedConfig(**(SETTINGS | changes))
    return StepVerified(model(0), None if draft is None else model(draft), chains.tokenizer(), config)


def problems(count: int, seed: int = 0) -> list[Any]:
    return chains.generate(count, seed=seed)


class WordLabeler:
    """A step is right if its last word but one has an even number of letters; every third step cannot be told."""

    errors = ("odd", "short")
    exact = True

    def __init__(self, *, knows_all: bool = True) -> None:
        self.knows_all = knows_all
        self.seen = 0

    def label(self, problem: Any, accepted_steps: Any, step: str) -> StepLabel:
        self.seen += 1
        words = step.split()
        if not self.knows_all and len(accepted_steps) % 3 == 2:
            return StepLabel(None, None)
        if len(words) < 2:
            return StepLabel(False, "short")
        right = len(words[-2]) % 2 == 1
        return StepLabel(right, None if right else "odd")

    def answer_right(self, problem: Any, text: str) -> bool:
        return len(text) % 2 == 0
