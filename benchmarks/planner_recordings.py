"""Recordings of decodes on which plans are replayed: what every exit would have predicted, and what rounds cost.

They lie in ``benchmarks/recordings``. Costs are CPU seconds of one thread on the machine that recorded.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from telltale.decode import Autoregressive, SelfSpeculative
from telltale.decode.drafting import Choice
from telltale.decode.engine import BLOCK
from telltale.decode.model_state import ModelState, PassInput
from telltale.decode.ngrams import NgramIndex
from telltale.decode.pass_costs import measure_passes
from telltale.decode.replay import LONGEST_RUN, MeasuredRounds, RecordedText, Recording
from telltale.decode.rows import Row
from telltale.decode.sampling import Sampling
from telltale.decode.speculative import speculate
from telltale.decode.stopping import StopConditions
from telltale.models.decoder import Decoder

FOLDER = Path(__file__).parent / "recordings"
LENGTHS = (1, 2, 4, 8, 16)
MOST_EXITS = 4
"""Exits whose rounds are timed; between them seconds are interpolated, in which a round is linear."""
ROUNDS, REPEATS = 6, 3
"""Rounds of a timing, and timings of each exit and length, in turn; the least counts, as other work only ever adds."""
STATES_AT_ONCE = 512
"""States that the head reads at a time."""
CHAT = (
    "What is the capital of France, and what is it known for?",
    "Explain how a bicycle stays upright, in simple words.",
    "Write a short poem about the sea in winter.",
    "List five things to check before a long drive.",
    "Why is the sky blue? Answer in three sentences.",
    "Give me a recipe for tomato soup with quantities.",
    "Summarize the story of Cinderella in one paragraph.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email that asks to move a meeting to Friday.",
    "How do I teach a child to count to twenty?",
    "Describe the water cycle step by step.",
    "What should I consider when I choose a laptop for university?",
)
"""Prompts for a model that was trained to chat."""
CODE = (
    "argparse.py",
    "ast.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "datetime.py",
    "difflib.py",
    "heapq.py",
    "inspect.py",
    "pathlib.py",
    "random.py",
    "statistics.py",
)
"""Modules of the standard library whose middle is continued."""


def record(decoder: Decoder, kinds: Mapping[str, Sequence[Sequence[int]]], *, new_tokens: int) -> list[Recording]:
    """For each kind of ``kinds`` decode its prompts greedily and note how far the exits agree; whole rounds are timed once."""
    decoder.open_draft_exits()
    costs = min((measure_passes(decoder, 1) for _ in range(REPEATS)), key=lambda one: one.plain)
    rounds = _rounds(decoder, next(iter(kinds.values()))[0])
    return [
        Recording(
            about,
            decoder.drafting_exits,
            costs,
            rounds,
            [recorded(decoder, prompt, new_tokens=new_tokens) for prompt in prompts],
        )
        for about, prompts in kinds.items()
    ]


@torch.inference_mode()
def recorded(decoder: Decoder, prompt: Sequence[int], *, new_tokens: int) -> RecordedText:
    """What the model writes, and how far each exit's drafts stand: all layers once more over the whole text."""
    written = Autoregressive(decoder).generate(list(prompt), max_new_tokens=new_tokens, eos_token_id=[])
    tokens = written.tokens[0].tolist()
    text = torch.tensor([[*prompt, *tokens[:-1]]], device=decoder.device)
    cache, found = decoder.new_cache(1, text.shape[1]), {}
    hidden = decoder.embed(text)
    for layer in range(1, decoder.layers + 1):
        hidden = found[layer] = decoder.run(hidden, layer - 1, layer, cache, [0])
    # The prompt's last place gives the first new token, which nobody drafts.
    first = len(prompt)
    last = _read(decoder, hidden[0, first:])
    runs = {}
    for layer in decoder.drafting_exits:
        if decoder.draft_heads is None:
            agreed = [(_read(decoder, found[layer][0, first:]) == last).tolist()] * LONGEST_RUN
        else:
            # What an exit drafts depends on how many drafts there are before it.
            draft = decoder.draft_heads.drafts
            steps = range(LONGEST_RUN)
            agreed = [(draft(found[layer], layer, cache, step)[0, first:] == last).tolist() for step in steps]
        runs[layer] = [_stood(agreed, place) for place in range(len(last))]
    return RecordedText(list(prompt), tokens, runs)


def _read(decoder: Decoder, states: Tensor) -> Tensor:
    return torch.cat([decoder.greedy(part) for part in states.split(STATES_AT_ONCE)])


def _stood(agreed: Sequence[Sequence[bool]], place: int) -> int:
    """How many drafts stand from a place on, ``agreed[step]`` being what draft ``step`` is worth at every place."""
    limit = min(len(agreed), len(agreed[0]) - place)
    return next((step for step in range(limit) if not agreed[step][place + step]), limit)


def _rounds(decoder: Decoder, prompt: Sequence[int]) -> MeasuredRounds:
    """Seconds of whole rounds in the engine."""
    layers = decoder.drafting_exits
    layers = sorted({layers[round(place * (len(layers) - 1) / (MOST_EXITS - 1))] for place in range(MOST_EXITS)})
    contestants: dict[Any, Callable[[], float]] = {
        (layer, length): partial(_round, SelfSpeculative(decoder, layer, length), prompt)
        for layer in layers
        for length in LENGTHS
    }
    contestants |= {length: partial(_copied, decoder, prompt, length) for length in LENGTHS}
    contestants["plain"] = partial(_plain, Autoregressive(decoder), prompt)
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(REPEATS):
        for name, run in contestants.items():
            best[name] = min(best[name], run())
    # No round is dearer than a longer one.
    exits = {layer: {k: min(best[layer, n] for n in LENGTHS if n >= k) for k in LENGTHS} for layer in layers}
    copies = {k: min(best[n] for n in LENGTHS if n >= k) for k in LENGTHS}
    return MeasuredRounds(best["plain"], exits, copies)


def _round(method: Any, prompt: Sequence[int]) -> float:
    """Seconds of a round, behind the first token, which is the prompt's."""
    stream = method.stream(list(prompt), max_new_tokens=(max(LENGTHS) + 1) * (ROUNDS + 1), eos_token_id=[])
    next(stream)
    began = time.thread_time()
    for _ in range(ROUNDS):
        next(stream)
    seconds = time.thread_time() - began
    stream.close()
    return seconds / ROUNDS


def _copied(decoder: Decoder, prompt: Sequence[int], length: int) -> float:
    """Seconds of a round that drafts ``length`` copies, without the engine around it: copies cannot be had on demand there."""
    state = ModelState(decoder, slots=1, capacity=len(prompt) + max(LENGTHS) + 2)
    state.feed([PassInput(0, list(prompt))])
    row = Row(list(prompt), StopConditions(max(LENGTHS) + 2), Sampling())
    row.tokens, row.slot = [int(prompt[0])], 0
    row.ngrams = NgramIndex([*prompt, *prompt, int(prompt[0])])
    choice, seconds = Choice("ngram", 0, length), float("inf")
    for _ in range(ROUNDS):
        state.truncate(0, len(prompt))
        began = time.thread_time()
        done = speculate(state, None, [row], choice)
        seconds = min(seconds, time.thread_time() - began)
        assert done.drafted == [length]
    return seconds


def _plain(method: Any, prompt: Sequence[int]) -> float:
    """Seconds of a plain step, in blocks as a plan has it."""
    began = time.thread_time()
    method.generate(list(prompt), max_new_tokens=1, eos_token_id=[])
    first = time.thread_time()
    method.generate(list(prompt), max_new_tokens=1 + 2 * BLOCK, eos_token_id=[])
    return (time.thread_time() - first - (first - began)) / (2 * BLOCK)


def chat_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """The first of :data:`CHAT` under the model's template."""
    prompts = []
    for question in CHAT[:count]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompts.append(tokenizer(ids, add_special_tokens=False)["input_ids"])
    return prompts


def code_prompts(tokenizer: Any, count: int, *, length: int) -> list[list[int]]:
    """The first tokens behind the head of modules of the standard library, for any tokenizer."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [(folder / name).read_text(encoding="utf-8") for name in CODE[:count]]
    return [tokenizer(text[len(text) // 3 :][: 8 * length])["input_ids"][:length] for text in texts]


def listed(prompts: Sequence[Tensor]) -> list[list[int]]:
    """Token tensors as lists."""
    return [[int(token) for token in prompt] for prompt in prompts]
