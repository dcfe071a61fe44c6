"""Labels of drafted steps without a checker: from the target's roll-outs, or from whether it writes the same step.

A task's checker (:mod:`telltale.tasks.step_labels`) is exact and comes first. These labelers run the target, so they
are limited by it: a step that the target cannot continue to a right answer counts as wrong even if it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from telltale.config import check_integer, check_range
from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import StepVerifiedConfig
from telltale.models.decoder import Decoder
from telltale.tasks.step_labels import StepLabel, StepLabeler


@dataclass(frozen=True)
class Drafted:
    """A drafted step in its context, as token ids (for labelers that run a model) and as texts."""

    problem: Any
    prompt: tuple[int, ...]
    before: tuple[int, ...]
    """Committed tokens ahead of it, the prompt not included."""
    accepted: tuple[str, ...]
    """The committed steps' texts."""
    tokens: tuple[int, ...]
    text: str


@runtime_checkable
class BatchLabeler(Protocol):
    """A labeler that takes many steps at a time and sees their token ids, as labelers that run a model do."""

    def label_all(self, drafted: Sequence[Drafted]) -> list[StepLabel]:
        """A label for each step."""


AnyLabeler = StepLabeler[Any] | BatchLabeler
Same = Callable[[str, str], bool]


def labels_of(labeler: AnyLabeler, drafted: Sequence[Drafted]) -> list[StepLabel]:
    """``labeler``'s labels of ``drafted`` steps, one each."""
    if isinstance(labeler, BatchLabeler):
        return labeler.label_all(drafted)
    return [labeler.label(one.problem, one.accepted, one.text) for one in drafted]


class AgreementLabeler:
    """A step is right if the target, greedily, writes the same one from the same prefix.

    ``same`` compares two texts (default: equal but for white space). Strict: another right step counts as wrong.
    ``answer_right(problem, text)`` judges whole solutions, where that is needed.
    """

    errors = ("disagreement",)
    exact = False
    called = "agreement with the target"
    """What a policy that accepts by these labels is called."""

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        *,
        same: Same | None = None,
        answer_right: Callable[[Any, str], bool] | None = None,
        max_step_tokens: int = 256,
        delimiter: str = "\n\n",
    ) -> None:
        config = StepVerifiedConfig(policy="target", delimiter=delimiter, max_step_tokens=max_step_tokens)
        self.decoder = StepVerified(target, None, tokenizer, config)
        self.same = same or _equal_words
        self.settings = f"{getattr(self.same, '__qualname__', self.same)} {max_step_tokens} {delimiter!r}"
        """What its labels depend on besides the target, for those who keep them."""
        if answer_right is not None:
            self.answer_right = answer_right

    def label_all(self, drafted: Sequence[Drafted]) -> list[StepLabel]:
        """See :class:`BatchLabeler`."""
        if not drafted:
            return []
        limit = self.decoder.config.max_step_tokens
        by_limit: dict[int, list[int]] = {}
        for place, one in enumerate(drafted):
            by_limit.setdefault(_free_positions(self.decoder.target, one, limit, behind=False), []).append(place)
        texts = [""] * len(drafted)
        for room, places in by_limit.items():
            result = self.decoder.generate(
                [[*drafted[place].prompt, *drafted[place].before] for place in places],
                max_new_tokens=room,
                stop_strings=self.decoder.config.delimiter,
            )
            for place, steps in zip(places, result.steps, strict=True):
                texts[place] = steps[0].text if steps else ""
        return [_label(self.same(text, one.text), "disagreement") for text, one in zip(texts, drafted, strict=True)]


class RolloutLabeler:
    """A step is right if the target, continuing from it, reaches the true answer often enough (Math-Shepherd, arXiv 2312.08935).

    ``answer_right(problem, text)`` judges whole solutions, so that no step checker is needed. A step is right if at least
    ``share`` of ``rollouts`` continuations end well; 1/rollouts is the paper's hard estimate. The noise of a few roll-outs, and
    what the target cannot do, go into the labels.
    """

    errors = ("rollouts",)
    exact = False
    called = "roll-outs"
    """What a policy that accepts by these labels is called."""

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        answer_right: Callable[[Any, str], bool],
        *,
        rollouts: int = 8,
        share: float = 0.5,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float | None = 0.8,
        seed: int = 0,
        delimiter: str = "\n\n",
    ) -> None:
        check_integer("rollouts", rollouts, low=1)
        check_range("share", share, low=0.0, high=1.0)
        check_integer("max_new_tokens", max_new_tokens, low=1)
        self.decoder = StepVerified(target, None, tokenizer, StepVerifiedConfig(policy="target", delimiter=delimiter))
        self._answer_right = answer_right
        self.rollouts, self.share = rollouts, share
        self.max_new_tokens = max_new_tokens
        self.sampling = {"temperature": temperature, "top_p": top_p}
        self.seed = seed
        self.settings = f"{rollouts} {share} {max_new_tokens} {temperature} {top_p} {seed} {delimiter!r}"
        """What its labels depend on besides the target and who judges answers, for those who keep them."""

    def answer_right(self, problem: Any, text: str) -> bool:
        """Whether a whole solution is right, as it was given."""
        return self._answer_right(problem, text)

    def label_all(self, drafted: Sequence[Drafted]) -> list[StepLabel]:
        """See :class:`BatchLabeler`."""
        shares = self.shares(drafted)
        return [_label(share >= self.share, "rollouts") for share in shares]

    def shares(self, drafted: Sequence[Drafted]) -> list[float]:
        """For each step the share of roll-outs from it that end in the true answer."""
        eos = self._eos
        # Each row has a limit of its own: a longer step in the batch must not shorten its roll-outs.
        by_limit: dict[int, list[int]] = {}
        for place, one in enumerate(drafted):
            ended = bool(one.tokens) and one.tokens[-1] in eos
            by_limit.setdefault(
                0 if ended else _free_positions(self.decoder.target, one, self.max_new_tokens), []
            ).append(place)
        found = [0.0] * len(drafted)
        for room, places in by_limit.items():
            for place, share in zip(places, self._hits([drafted[place] for place in places], room), strict=True):
                found[place] = share
        return found

    def _hits(self, drafted: Sequence[Drafted], room: int) -> list[float]:
        if room == 0:
            # A step that ended the output, or the model's positions, leaves nothing to roll out: it is judged as it is.
            return [float(self._answer_right(one.problem, self._text(one))) for one in drafted]
        prompts = [[*one.prompt, *one.before, *one.tokens] for one in drafted for _ in range(self.rollouts)]
        result = self.decoder.generate(
            prompts,
            max_new_tokens=room,
            generator=torch.Generator().manual_seed(self.seed),
            **self.sampling,
        )
        ends = [tokens[:count] for tokens, count in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)]
        found = []
        for place, one in enumerate(drafted):
            own = ends[place * self.rollouts : (place + 1) * self.rollouts]
            found.append(sum(self._answer_right(one.problem, self._text(one, end)) for end in own) / self.rollouts)
        return found

    def _text(self, one: Drafted, end: Sequence[int] = ()) -> str:
        """The solution up to a step, and what follows it, read as a whole."""
        tokens = [*one.before, *one.tokens, *end]
        return self.decoder.steps_text.step(tokens, "eos" if tokens[-1] in self._eos else None)

    @property
    def _eos(self) -> frozenset[int]:
        return self.decoder.request([[0]], max_new_tokens=1).eos


def _label(right: bool, error: str) -> StepLabel:
    return StepLabel(right, None if right else error)


def _free_positions(target: Decoder, drafted: Drafted, wanted: int, *, behind: bool = True) -> int:
    """Tokens, up to ``wanted``, that ``target`` has positions for behind a step, or in its place."""
    before = len(drafted.prompt) + len(drafted.before) + (len(drafted.tokens) if behind else 0)
    return min(wanted, target.max_positions - before)


def _equal_words(left: str, right: str) -> bool:
    return left.split() == right.split()
