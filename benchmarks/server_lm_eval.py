"""lm-evaluation-harness against the server: log-likelihoods of its ``local-completions`` beside Transformers' own.

A small Llama of random weights in float32, served under each decode; pairs of contexts and continuations of 1 to 120 tokens go
through the harness' client, as token ids in batches. The same pairs are scored by one forward pass each of the model in
Transformers. Random weights of this size have sharper distributions than a fresh initialisation: they are scaled up.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import uvicorn
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from measurement import write_result
from telltale.serve.connections import guarded_protocol
from telltale.serve.open_model import open_served
from telltale.serve.openai_app import create_app

DECODES: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "self-speculative": {"exit_layer": 2, "draft_length": 3},
    "step-verified": {"exit_layer": 2, "settings": {"threshold": -1.0, "beta": 1.0}},
}
WORDS = [
    "the",
    "sum",
    "of",
    "two",
    "and",
    "three",
    "is",
    "five",
    "so",
    "we",
    "add",
    "one",
    "more",
    "to",
    "get",
    "six",
    ",",
    "and",
    "then",
    "eleven",
    "pens",
    "are",
    "left",
]


def checkpoint(folder: Path) -> LlamaForCausalLM:
    """A model and a byte-level tokenizer in ``folder``."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: place for place, letter in enumerate(["<e>", *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    return model


def pairs(count: int) -> list[tuple[str, str]]:
    """Contexts of up to 600 characters and their continuations."""
    chance = random.Random(0)

    def words(most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, most)))

    return [(words(120), " " + words(24)) for _ in range(count)]


def own(model: LlamaForCausalLM, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Transformers' log-likelihood, nats, and whether every token is the most likely one."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        values = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
    chosen = torch.tensor(ids[start:])
    found = values.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return float(found.sum()), bool((values.argmax(-1) == chosen).all())


def measured(folder: Path, model: LlamaForCausalLM, decode: str, asked: list[tuple[str, str]]) -> dict[str, Any]:
    """The largest difference over all pairs, and per token, under one decode."""
    app = create_app(open_served(folder, name="m", decode=decode, **DECODES[decode]))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=guarded_protocol(), log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"
    client = LocalCompletionsAPI(
        base_url=url,
        model="m",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        batch_size=8,
        max_length=1024,
    )
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place) for place, pair in enumerate(asked)
    ]
    began = time.perf_counter()
    found = client.loglikelihood(requests, disable_tqdm=True)
    seconds = time.perf_counter() - began
    server.should_exit = True
    thread.join(30)
    wanted = [own(model, client.tokenizer, *pair) for pair in asked]
    tokens = [len(continuation) for _, continuation in asked]
    gaps = [abs(a[0] - b[0]) for a, b in zip(found, wanted, strict=True)]
    return {
        "largest_difference": max(gaps),
        "largest_difference_per_token": max(gap / count for gap, count in zip(gaps, tokens, strict=True)),
        "greedy_agrees": sum(bool(a[1]) == b[1] for a, b in zip(found, wanted, strict=True)),
        "seconds": seconds,
    }


def main() -> None:
    """Run every decode and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    count = parser.parse_args().pairs
    torch.set_num_threads(1)
    asked = pairs(count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = checkpoint(folder)
        found = {decode: measured(folder, model, decode, asked) for decode in DECODES}
    write_result("server_lm_eval", lm_eval=version("lm_eval"), pairs=count, decodes=found)


if __name__ == "__main__":
    main()
