"""Multi-route arithmetic under a cap: one problem, several valid ways to solve it, and one way that does not always fit.

The prompt is ``a * b + c =`` and the completion a chain of true steps to ``a * b``, then ``= r`` with ``r = a * b + c``. A
completion has at most :data:`LONGEST` tokens, the end-of-sequence token among them, so that repeated addition fits only
``b <= 6``: the other prompts, the hard ones, need another route. The verifier checks every step and names the route, so the
number of different correct routes of a policy is exact. Numbers are single tokens.

The base policy is a recipe (:func:`pretrain`), not a file: it knows every route when a hint word asks for it and takes repeated
addition when none does.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import DataError

LONGEST = 8
"""Tokens of a completion, the end-of-sequence token counted."""
NUMBERS = 256
ROUTES = ("R", "S5", "S10", "D2", "X")
"""Repeated addition, splits at 5 and 10, doubling then a split, and the product at once."""
HINTS = tuple(f"by{route}" for route in ROUTES)
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
OPERATORS = ("*", "+", "-", "=")
VOCABULARY = (PAD, EOS, UNKNOWN, *map(str, range(NUMBERS)), *OPERATORS, *HINTS)
HELD_OUT = 300
"""Problems that no training, of base or policy, ever sees."""

_PROMPT = re.compile(r"(?:by\S+ )?(\d+) \* (\d+) \+ (\d+) =$")


@dataclass(frozen=True, order=True)
class Problem:
    """``a * b + c``, with a in 2..9, b in 2..12 and c in 0..49."""

    a: int
    b: int
    c: int

    @property
    def prompt(self) -> str:
        """As the policy reads it."""
        return f"{self.a} * {self.b} + {self.c} ="

    @property
    def answer(self) -> int:
        """The true result."""
        return self.a * self.b + self.c

    @property
    def hard(self) -> bool:
        """Whether repeated addition does not fit into :data:`LONGEST` tokens."""
        return self.b + 2 > LONGEST


def problems() -> list[Problem]:
    """All 4,400 problems, in order."""
    return [Problem(a, b, c) for a in range(2, 10) for b in range(2, 13) for c in range(50)]


def split(*, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Shuffled training problems, and the :data:`HELD_OUT` held-out ones. The held-out pool is the same for every seed."""
    pool = problems()
    random.Random("held out").shuffle(pool)
    training = pool[HELD_OUT:]
    random.Random(seed).shuffle(training)
    return training, pool[:HELD_OUT]


def solution(problem: Problem, route: str) -> str:
    """The completion that takes ``route`` (one of :data:`ROUTES`), without the end-of-sequence token.

    Raises :class:`~telltale.errors.ConfigError` for an unknown route.
    """
    check_choice("route", route, ROUTES)
    a, b, product = problem.a, problem.b, problem.a * problem.b
    chain: list[int | str]
    if route == "X":
        chain = [product]
    elif route == "R":
        chain = [a * times for times in range(2, b + 1)]
    else:
        start: list[int] = [2 * a, 4 * a] if route == "D2" else [int(route[1:]) * a]
        rest = product - start[-1]
        middle = [] if route == "D2" else ["="]
        chain = [*start, "+" if rest >= 0 else "-", abs(rest), *middle, product]
    return " ".join(map(str, [*chain, "=", problem.answer]))


def read_prompt(prompt: str) -> Problem:
    """The problem that ``prompt`` states. Raises :class:`~telltale.errors.DataError` for any other text."""
    found = _PROMPT.match(" ".join(prompt.split()))
    if found is None:
        raise DataError(f"the prompt {prompt!r} is no problem of this task; expected a text such as '7 * 8 + 12 ='.")
    return Problem(*map(int, found.groups()))


def check(problem: Problem, completion: str) -> str | None:
    """The route of a completion whose every step is true and whose answer is right, else None.

    Routes are named ``X``, ``R``, ``S<k>`` (k times a, then the rest) and ``D<x>`` (x times a, doubled, then the rest). A
    completion that does not leave room for the end-of-sequence token within :data:`LONGEST` tokens is wrong.
    """
    words = completion.split()
    if not 3 <= len(words) < LONGEST or words[-2] != "=" or words[-1] != str(problem.answer):
        return None
    return _route(problem, words[:-2])


def answers_right(problem: Problem, completion: str) -> bool:
    """Whether the last number is the answer, whatever stands before it: the check that can be cheated."""
    words = completion.split()
    return 2 <= len(words) < LONGEST and words[-2:] == ["=", str(problem.answer)]


def verify(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for every completion that :func:`check` passes, else 0.0; a reward function as TRL calls it."""
    return [float(_checked(check, prompt, text) is not None) for prompt, text in zip(prompts, completions, strict=True)]


def verify_answer_only(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for every right last number (:func:`answers_right`): for the reward-hacking control."""
    pairs = zip(prompts, completions, strict=True)
    return [float(_checked(answers_right, prompt, text)) for prompt, text in pairs]


def route_of(prompt: Any, completion: Any) -> str | None:
    """The route of a correct completion, else None; both plain or conversational."""
    return _checked(check, prompt, completion)


def teacher_rows(chosen: Sequence[Problem], routes: Sequence[str] = ("S5", "S10", "D2")) -> Iterator[dict[str, str]]:
    """Rows of ``teachers.jsonl``: one program per route solves every problem."""
    for problem in chosen:
        for route in routes:
            yield {"prompt_id": problem.prompt, "teacher": route, "text": solution(problem, route)}


def prompt_rows(chosen: Sequence[Problem]) -> list[dict[str, str]]:
    """Rows of ``prompts.jsonl``."""
    return [{"id": problem.prompt, "prompt": problem.prompt, "answer": str(problem.answer)} for problem in chosen]


def token_ids() -> dict[str, int]:
    """Ids by word."""
    return {word: index for index, word in enumerate(VOCABULARY)}


def build_tokenizer() -> Any:
    """A word-level tokenizer of :data:`VOCABULARY` with padding on the left, as generation needs it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(token_ids(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )


@dataclass(frozen=True)
class BaseRecipe:
    """How the base policy is trained. The defaults give the policy of the documented table in about 300 CPU seconds.

    hinted: share of prompts that ask for a route; the others are answered by repeated addition, but for ``other``.
    other: share of unhinted prompts that are answered by a route drawn evenly: what exploration can find.
    """

    steps: int = 1200
    batch_size: int = 256
    learning_rate: float = 4e-3
    hinted: float = 0.7
    other: float = 0.004
    width: int = 96
    layers: int = 2
    heads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "layers", "heads"):
            check_integer(name, getattr(self, name), low=1)
        check_range("learning_rate", self.learning_rate, low=0.0)
        check_range("hinted", self.hinted, low=0.0, high=1.0)
        check_range("other", self.other, low=0.0, high=1.0)


def build_policy(recipe: BaseRecipe | None = None) -> Any:
    """A freshly initialised Llama of the recipe's shape (0.3 million parameters by default)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = recipe or BaseRecipe()
    ids = token_ids()
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.width,
        intermediate_size=math.ceil(recipe.width * 8 / 3 / 32) * 32,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def pretrain(recipe: BaseRecipe | None = None, *, progress: Callable[[int, float], None] | None = None) -> Any:
    """The base policy: ``recipe.steps`` AdamW steps on hinted and plain problems of the training pool.

    ``progress`` is told step and loss (nats per token). Deterministic for a recipe on one machine and thread count.
    """
    recipe = recipe or BaseRecipe()
    model = build_policy(recipe)
    draws = random.Random(recipe.seed)
    ids = token_ids()
    training, _ = split()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    model.train()
    for step in range(recipe.steps):
        rows = [_example(draws.choice(training), recipe, draws, ids) for _ in range(recipe.batch_size)]
        loss = supervised_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
    return model.eval()


def supervised_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Nats per completion token of (prompt ids, completion ids) rows under ``model``."""
    pad = VOCABULARY.index(PAD)
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for index, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[index, :end] = torch.tensor(prompt + completion)
        labels[index, len(prompt) : end] = torch.tensor(completion)
    logits = model(input_ids=tokens, attention_mask=(tokens != pad).long()).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def encoded(prompt: str, completion: str, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the completion with its end of sequence; ``ids`` maps words to them."""
    return [ids[word] for word in prompt.split()], [*(ids[word] for word in completion.split()), ids[EOS]]


def _checked(judge: Callable[[Problem, str], Any], prompt: Any, completion: Any) -> Any:
    return judge(read_prompt(_text(prompt)), _text(completion))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value[-1]["content"])


def _route(problem: Problem, chain: Sequence[str]) -> str | None:
    a, product = problem.a, problem.a * problem.b
    if not all(word in ("+", "-", "=") or word.isdecimal() for word in chain):
        return None
    if "+" in chain or "-" in chain:
        return _split_route(a, product, chain)
    values = [int(word) for word in chain if word.isdecimal()]
    if len(values) != len(chain) or not values or values[-1] != product:
        return None
    if len(values) == 1:
        return "X"
    return "R" if values == [a * times for times in range(2, problem.b + 1)] else None


def _split_route(a: int, product: int, chain: Sequence[str]) -> str | None:
    """``ka + ja = ab`` is S<k>; ``xa 2xa + ja ab`` is D<x>, one token longer, so that it goes without the middle sign."""
    shape = ["n" if word.isdecimal() else "o" if word in "+-" else "=" for word in chain]
    if shape == list("non=n"):
        start, operator, rest, end = [int(chain[0])], chain[1], int(chain[2]), int(chain[4])
    elif shape == list("nnonn"):
        start, operator, rest, end = [int(chain[0]), int(chain[1])], chain[2], int(chain[3]), int(chain[4])
    else:
        return None
    total = start[-1] + rest if operator == "+" else start[-1] - rest
    if not end == product == total or rest % a or any(value % a or value == 0 for value in start):
        return None
    if len(start) == 1:
        return f"S{start[0] // a}"
    return f"D{start[0] // a}" if start[1] == 2 * start[0] else None


def _example(
    problem: Problem, recipe: BaseRecipe, draws: random.Random, ids: dict[str, int]
) -> tuple[list[int], list[int]]:
    prompt, route = problem.prompt, "R"
    if draws.random() < recipe.hinted:
        route = draws.choice(ROUTES)
        prompt = f"by{route} {prompt}"
    elif draws.random() < recipe.other:
        route = draws.choice(ROUTES)
    return encoded(prompt, solution(problem, route), ids)
