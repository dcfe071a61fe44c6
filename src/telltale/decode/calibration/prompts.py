"""How a problem becomes a prompt, and what of it a calibration is bound to.

Worked examples, an instruction, a chat template: each changes what a model writes, and with it how often steps are wrong. So a
calibration keeps the form of its prompts, and the tokens that all of them begin and end with: a server knows other prompts by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telltale.config import check_choice
from telltale.errors import CalibrationError, ConfigError

FORMS = ("auto", "chat", "plain")
"""Of prompts: a chat if the tokenizer has a template for it, always one, never one."""
DELIMITER = "\n\n"
Encode = Callable[[Any, Any], list[int]]
"""Tokenizer, problem -> the prompt's token ids."""


@dataclass(frozen=True)
class Prompts:
    """Makes prompts. A problem has a ``prompt`` and perhaps ``messages`` (else its prompt is one user's turn).

    ``examples``: problems whose ``steps`` are shown ahead of each one, as turns of a chat or as text. ``instruction``: text behind
    every question of a chat.
    """

    form: str = "auto"
    examples: tuple[Any, ...] = ()
    instruction: str = ""

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)

    def chats(self, tokenizer: Any) -> bool:
        """Whether prompts are chats. Raises :class:`~telltale.errors.ConfigError` for a chat without a template."""
        has = bool(getattr(tokenizer, "chat_template", None))
        if self.form == "chat" and not has:
            raise ConfigError(
                "a chat was asked for, and the tokenizer has no chat template; expected the form 'plain'."
            )
        return has and self.form != "plain"

    def __call__(self, tokenizer: Any, problem: Any) -> list[int]:
        """The prompt of ``problem``, token ids."""
        if self.chats(tokenizer):
            messages = [message for example in self.examples for message in self._shown(example)]
            messages += self._asked(problem)
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        worked = "".join(f"{example.prompt}{DELIMITER.join(example.steps)}{DELIMITER}" for example in self.examples)
        return list(tokenizer(worked + problem.prompt)["input_ids"])

    def _asked(self, problem: Any) -> list[dict[str, str]]:
        messages = getattr(problem, "messages", None) or [{"role": "user", "content": problem.prompt}]
        if not self.instruction:
            return list(messages)
        last = messages[-1]
        return [*messages[:-1], last | {"content": f"{last['content']}{DELIMITER}{self.instruction}"}]

    def _shown(self, example: Any) -> list[dict[str, str]]:
        return [*self._asked(example), {"role": "assistant", "content": DELIMITER.join(example.steps)}]


prompt_ids = Prompts()
"""A problem alone: through the tokenizer's chat template if it has one, else as plain text."""


@dataclass(frozen=True)
class PromptForm:
    """The form of a calibration's prompts. ``form``: "chat", "plain", or the name of a callable of the user's."""

    form: str
    shots: int = 0
    """Worked examples ahead of the problem."""
    instruction: str = ""
    before: tuple[int, ...] = ()
    """The tokens that every prompt begins with: a template's first words, the worked examples."""
    after: tuple[int, ...] = ()
    """The tokens that every prompt ends with."""
    lengths: tuple[int, int] | None = None
    """Tokens of the shortest and of the longest prompt: worked examples and earlier turns that were not there make longer ones."""

    @staticmethod
    def of(encode: Encode, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> PromptForm:
        """The form of ``prompts``, which ``encode`` made; prompts that are all the same say nothing of a form."""
        form, shots, instruction = getattr(encode, "__qualname__", type(encode).__name__), 0, ""
        if isinstance(encode, Prompts):
            chats = encode.chats(tokenizer)
            form, shots = "chat" if chats else "plain", len(encode.examples)
            instruction = encode.instruction if chats else ""
        before = _common(prompts)
        after = _common([prompt[len(before) :][::-1] for prompt in prompts])[::-1]
        counts = [len(prompt) for prompt in prompts]
        return PromptForm(form, shots, instruction, before, after, (min(counts), max(counts)))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PromptForm:
        """What ``dataclasses.asdict`` gave. Raises :class:`~telltale.errors.ConfigError` for anything else."""
        try:
            before, after = (tuple(int(token) for token in values[name]) for name in ("before", "after"))
            shortest, longest = values["lengths"]
            found = str(values["form"]), int(values["shots"]), str(values["instruction"])
            return PromptForm(*found, before, after, (int(shortest), int(longest)))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the prompts' form cannot be read: {error}; expected what a calibration wrote."
            ) from error

    def covers(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` begins and ends like those that were calibrated on, and is about as long.

        Of prompts like them, at most two in n + 1 are outside the lengths of n.
        """
        if self.lengths is not None and not self.lengths[0] <= len(prompt) <= self.lengths[1]:
            return False
        start, end = len(self.before), len(self.after)
        return (
            len(prompt) >= start + end
            and tuple(prompt[:start]) == self.before
            and tuple(prompt[len(prompt) - end :]) == self.after
        )

    def check(self, other: PromptForm) -> None:
        """Raise :class:`~telltale.errors.CalibrationError`, naming what differs, unless ``other`` makes prompts in the same way."""
        for name, words in (("form", "form"), ("shots", "number of worked examples"), ("instruction", "instruction")):
            here, there = getattr(other, name), getattr(self, name)
            if here != there:
                raise CalibrationError(
                    f"the prompts' {words} is {here!r}, and the calibration was made with {there!r}; make prompts like "
                    f"those, or calibrate for these."
                )
        if self.shots and other.before[: len(self.before)] != self.before:
            raise CalibrationError(
                "the worked examples are others than those of the calibration; give the same, or calibrate for these."
            )

    def describe(self) -> dict[str, Any]:
        """As servers list it."""
        return {"form": self.form, "shots": self.shots, "instruction": self.instruction or None}


def _common(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all of ``sequences`` begin with."""
    whole = [tuple(sequence) for sequence in sequences]
    first, last = min(whole), max(whole)
    count = 0
    while count < min(len(first), len(last)) and first[count] == last[count]:
        count += 1
    return first[:count]
