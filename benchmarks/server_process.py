"""``telltale serve`` as a process of its own, for the server's benchmarks, and a small checkpoint with tools in its template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from telltale.models.loading import without_progress_bars
from telltale.models.presets import build

CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'Calls: <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>\n{% endif %}'
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n'
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def checkpoint(folder: Path, *, preset: str = "tiny", max_positions: int = 2048) -> Path:
    """A model of random weights with a byte-level tokenizer: a token a byte, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(["<e>", *alphabet])}
    tokenizer = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    wrapped.chat_template = CHAT_TEMPLATE
    model = build(preset, vocabulary_size=len(vocabulary), seed=0, max_positions=max_positions, eos_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    with without_progress_bars():
        model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[str, psutil.Process, dict[str, Any]]]:
    """The server's URL, its process, and what it says of itself; it ends with the block."""
    command = [sys.executable, "-m", "telltale", "serve", str(model), "--name", "m", "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    try:
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            lines.append(line)
        told = json.loads("".join(lines))
        yield told["url"], psutil.Process(process.pid), told
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def metrics(url: str) -> dict[str, float]:
    """The server's numbers by name."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and line[0] != "#"}
