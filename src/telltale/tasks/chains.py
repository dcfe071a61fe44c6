"""Multi-step arithmetic in words, generated from a seed, with a checker of every single step.

A problem states values modulo 7 (``Fay has 0 . Hal has Fay minus 2 . ... how many has Eve ?``); a solution computes them one step
a time (``Hal has Fay minus 2 = 0 minus 2 = 5``, a blank line, ...) and ends with ``answer 5``. In the variant "ordered" every
arithmetic step has 12 tokens, so that a step's length says nothing; in "shuffled" the statements are out of order with
one that is not needed, so that the order has to be found. The 31 words are the whole vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, DataError

MODULUS = 7
NAMES = ("Fay", "Hal", "Bob", "Eve", "Ida", "Leo", "Mia", "Ned", "Pam", "Roy")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: (a + b) % MODULUS,
    "minus": lambda a, b: (a - b) % MODULUS,
    "times": lambda a, b: (a * b) % MODULUS,
}
DELIMITER = "\n\n"
SPECIAL = ("<pad>", "<bos>", "<eos>")
VOCABULARY = (
    *SPECIAL,
    *(str(digit) for digit in range(MODULUS)),
    *NAMES,
    *OPERATIONS,
    *("has", "=", ".", "how", "many", "?", "answer", DELIMITER),
)
VARIANTS = ("ordered", "shuffled")
STEPS = {"ordered": (4, 6), "shuffled": (3, 5)}
"""Fewest and most computed values of a problem."""

Operand = str | int
Triple = tuple[str, int, int]
"""An operation and the values of its operands."""


@dataclass(frozen=True)
class Statement:
    """``name has left operation right``, or ``name has left`` for a value that is given."""

    name: str
    left: Operand
    operation: str | None = None
    right: Operand | None = None

    @property
    def expression(self) -> str:
        """The words after ``has``."""
        return str(self.left) if self.operation is None else f"{self.left} {self.operation} {self.right}"

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Names and digits that it is computed from."""
        return (self.left,) if self.right is None else (self.left, self.right)

    def __str__(self) -> str:
        return f"{self.name} has {self.expression}"


@dataclass(frozen=True)
class Problem:
    """Statements in the order of the text, and the name whose value is asked for."""

    statements: tuple[Statement, ...]
    question: str

    @property
    def prompt(self) -> str:
        """The problem in words, ending with a blank line."""
        statements = " . ".join(map(str, self.statements))
        return f"{statements} . how many has {self.question} ? {DELIMITER}"

    def statement(self, name: str) -> Statement | None:
        """The statement about ``name``; None without one."""
        return next((statement for statement in self.statements if statement.name == name), None)

    @property
    def given(self) -> dict[str, int]:
        """Values that the problem states directly."""
        return {s.name: int(s.left) for s in self.statements if s.operation is None}

    @property
    def needed(self) -> tuple[Statement, ...]:
        """The statements that the question needs, in an order in which they can be computed."""
        found: list[Statement] = []
        self._collect(self.question, found)
        return tuple(found)

    @property
    def values(self) -> dict[str, int]:
        """The true value of every name that the question needs, and of the given ones."""
        values = self.given
        for statement in self.needed:
            values[statement.name] = apply(statement, values)
        return values

    @property
    def answer(self) -> int:
        """The true answer."""
        return self.values[self.question]

    @property
    def steps(self) -> list[str]:
        """The true solution, step by step, each without its blank line."""
        values, found = self.given, []
        for statement in self.needed:
            values[statement.name] = apply(statement, values)
            found.append(step_text(statement, values))
        return [*found, f"answer {values[self.question]}"]

    @property
    def solution(self) -> str:
        """The true solution as one text."""
        return f" {DELIMITER} ".join(self.steps)

    def _collect(self, name: str, found: list[Statement]) -> None:
        statement = self.statement(name)
        if statement is None or statement.operation is None or statement in found:
            return
        for operand in statement.operands:
            if isinstance(operand, str):
                self._collect(operand, found)
        found.append(statement)


def apply(statement: Statement, values: dict[str, int]) -> int:
    """The value of ``statement`` under ``values``; raises :class:`~telltale.errors.DataError` for a name without one."""
    numbers = [number_of(operand, values) for operand in statement.operands]
    return numbers[0] if statement.operation is None else OPERATIONS[statement.operation](numbers[0], numbers[1])


def number_of(operand: Operand, values: dict[str, int]) -> int:
    """The digit itself, or a name's value."""
    if isinstance(operand, int):
        return operand
    if operand not in values:
        raise DataError(f"{operand} has no value yet; expected a statement whose names are known.")
    return values[operand]


def step_text(statement: Statement, values: dict[str, int]) -> str:
    """``Hal has Fay minus 2 = 0 minus 2 = 5`` for values that hold the statement's own name, too."""
    left, right = (number_of(operand, values) for operand in statement.operands)
    return f"{statement} = {left} {statement.operation} {right} = {values[statement.name]}"


def generate(
    count: int,
    *,
    seed: int,
    variant: str = "ordered",
    steps: tuple[int, int] | None = None,
    variables: float = 0.5,
    without: Callable[[Triple], bool] | None = None,
) -> list[Problem]:
    """``count`` problems of a ``variant``, the same for the same arguments.

    ``steps``: fewest and most computed values. ``variables``: how often the second operand is a name as well, whose value has
    to be looked up, and not a digit; in [0, 1]. ``without`` says which (operation, value, value) must not occur in a problem,
    which is how a draft model gets a gap in its knowledge: see :func:`withheld`.

    Raises :class:`~telltale.errors.ConfigError` for numbers that cannot be had with ten names.
    """
    check_integer("count", count, low=1)
    check_integer("seed", seed, low=0)
    check_choice("variant", variant, VARIANTS)
    check_range("variables", variables, low=0.0, high=1.0)
    low, high = STEPS[variant] if steps is None else steps
    if not 1 <= low <= high <= len(NAMES) - 2:
        raise ConfigError(f"steps={steps!r} is out of range; expected 1 <= fewest <= most <= {len(NAMES) - 2}.")
    chance = random.Random(f"chains {variant} {seed}")
    found: list[Problem] = []
    tries = 0
    while len(found) < count:
        tries += 1
        if tries > 1000 * count + 10_000:
            raise ConfigError(
                f"only {len(found)} of {count} problems avoid what `without` forbids; expected it to leave more."
            )
        problem = _draw(chance, chance.randint(low, high), shuffled=variant == "shuffled", variables=variables)
        if without is None or not any(map(without, triples(problem))):
            found.append(problem)
    return found


def triples(problem: Problem) -> list[Triple]:
    """What the true solution has to compute: operation and values, step by step."""
    values = problem.values
    return [
        (s.operation, number_of(s.operands[0], values), number_of(s.operands[1], values))
        for s in problem.needed
        if s.operation is not None
    ]


def withheld(share: float, *, seed: int = 0) -> Callable[[Triple], bool]:
    """A rule that holds for about ``share`` of all triples, decided by each triple and the seed alone."""
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"share={share!r} is out of range; expected 0 <= share < 1.")

    def rule(triple: Triple) -> bool:
        return random.Random(f"withheld {seed} {triple}").random() < share

    return rule


def segment(text: str) -> list[str]:
    """The steps of a solution: the texts between blank lines, without the spaces around them; empty ones are kept."""
    return [part.strip(" ") for part in text.split(DELIMITER)]


def tokenizer(extra_words: Iterable[str] = ()) -> Any:
    """A word-level tokenizer of the vocabulary (and ``extra_words``), made in memory: ids are places in :data:`VOCABULARY`.

    It has a chat template (a user's turn is the prompt, the assistant's the solution), ``<bos>``, ``<eos>`` and ``<pad>``. A
    word that it does not know raises in ``tokenizers``; text decodes with spaces between words.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys([*VOCABULARY, *extra_words, "<unk>"]))
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }} <eos>"
    "{% else %} {{ message['content'] }}{% endif %}{% endfor %}"
)


def _draw(chance: random.Random, steps: int, *, shuffled: bool, variables: float) -> Problem:
    names = chance.sample(NAMES, len(NAMES))
    statements = [Statement(names.pop(), chance.randrange(MODULUS))]
    for _ in range(steps):
        last = statements[-1].name
        other: Operand = (
            chance.choice([s.name for s in statements]) if chance.random() < variables else chance.randrange(MODULUS)
        )
        operation = chance.choice(list(OPERATIONS))
        # The newest value is always used, so that every statement is needed and the question is the last one.
        operands = (last, other) if chance.random() < 0.7 else (other, last)
        statements.append(Statement(names.pop(), operands[0], operation, operands[1]))
    question = statements[-1].name
    if shuffled:
        known = chance.choice(statements[:-1]).name
        statements.append(Statement(names.pop(), known, chance.choice(list(OPERATIONS)), chance.randrange(MODULUS)))
        chance.shuffle(statements)
    return Problem(tuple(statements), question)
