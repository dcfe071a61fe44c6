"""Scoring N responses to one prompt: the prompt computed once against every conversation by itself.

All ways use one judge: a decoder with random weights (speed does not depend on them), the paper's gate of 3 x 1,024 and 19
objectives. "shared" is ``Judge.best_of``; "independent" is ``Judge.score`` on all conversations as one batch; "one by one"
is ``Judge.score`` in a loop. Scores have to agree to 1e-5 before anything is timed. Templating is inside all times.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from measurement import interleave, quartiles, ratio, write_result
from telltale.align.judge.head import Head
from telltale.align.judge.judge import Judge, conversation
from telltale.align.judge.model import JudgeModel
from telltale.models.presets import build

TARGETS = {"speed": 1.5, "agreement": 1e-5}
"""What the shared prompt has to reach at 8 responses with a prompt at least as long as a response."""
WORDS = [f"w{index}" for index in range(500)]
CONTROLS = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>")


def judge_on(preset: str, candidates: int) -> Judge:
    """A judge with 19 objectives on a randomly initialised ``preset``."""
    vocabulary = {word: index for index, word in enumerate([*CONTROLS, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    backbone = build(preset, vocabulary_size=len(vocabulary), pad_token_id=0).model
    torch.manual_seed(0)
    head = Head([f"objective {index}" for index in range(19)], backbone.config.hidden_size)
    head.set_regression(torch.randn(19, backbone.config.hidden_size) * backbone.config.hidden_size**-0.5)
    return Judge(JudgeModel.assembled(backbone, head), tokenizer, batch_size=candidates)


def contestants(judge: Judge, prompt: str, responses: list[str]) -> dict[str, Callable[[], list[float]]]:
    chats = [conversation(prompt, response) for response in responses]
    return {
        "shared": lambda: list(judge.best_of(prompt, responses).scores),
        "independent": lambda: judge.score(chats),
        "one by one": lambda: [judge.score(chat) for chat in chats],
    }


def measure(preset: str, prompt_words: int, response_words: int, candidates: int, rounds: int) -> dict[str, Any]:
    """One setting; responses have ``response_words`` words or up to a quarter less."""
    judge, generator = judge_on(preset, candidates), random.Random(0)
    prompt = " ".join(generator.choices(WORDS, k=prompt_words))
    lengths = [response_words - generator.randint(0, response_words // 4) for _ in range(candidates)]
    runs = contestants(judge, prompt, [" ".join(generator.choices(WORDS, k=length)) for length in lengths])
    scores = {name: torch.tensor(run(), dtype=torch.float64) for name, run in runs.items()}
    apart = {name: float((found - scores["shared"]).abs().max()) for name, found in scores.items() if name != "shared"}
    if max(apart.values()) > TARGETS["agreement"]:
        raise SystemExit(f"scores differ by {apart}; nothing was timed.")

    def timed(run: Callable[[], list[float]]) -> Callable[[], int]:
        return lambda: len(run())

    timings = interleave({name: timed(run) for name, run in runs.items()}, rounds=rounds)
    return {
        "preset": preset,
        "prompt_words": prompt_words,
        "response_words": lengths,
        "candidates": candidates,
        "largest_difference": apart,
        "cpu_seconds": {name: quartiles(timing.cpu) for name, timing in timings.items()},
        "speed_over": {name: ratio(timings[name], timings["shared"]) for name in apart},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--candidates", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for prompt_words, response_words in ((64, 64), (128, 128), (256, 128), (512, 128), (128, 256)):
        found = measure(arguments.preset, prompt_words, response_words, arguments.candidates, arguments.rounds)
        results.append(found)
        speed = found["speed_over"]["independent"]["cpu"]
        print(
            f"prompt {prompt_words}, responses {response_words}: {speed:.2f}x, {found['largest_difference']}",
            flush=True,
        )
    write_result("judge_best_of", targets=TARGETS, settings=results)


if __name__ == "__main__":
    main()
