"""A real ``.gguf`` file from end to end: its tokens beside llama.cpp's, its decoding beside Transformers', its server.

Tokens: 200 strings (scripts, code, white space, digits, emoji, every kind of special token, rendered chats) are tokenised by
``telltale.load``'s tokenizer and by llama.cpp (``xllamacpp``, special tokens parsed and added). Decoding: greedy tokens of
Transformers' ``generate`` in float32 and of each backend, plain and self-speculative. Server: ``telltale serve FILE``, a
completion and a chat, greedy, beside the same ``generate``.

    python benchmarks/gguf_files.py smollm2-135m-instruct-q4_1.gguf gemma-3-270m-q4_k_m.gguf
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import telltale
from measurement import RESULTS, write_result
from peers import plain
from telltale.decode import Autoregressive, SelfSpeculative
from telltale.errors import TelltaleError
from telltale.models import open_decoder

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time there was a lighthouse keeper who",
)
TEXTS = (
    "Hello world",
    " leading and trailing ",
    "two  three   four    spaces",
    "\ttab\n\nnewlines\r\n end",
    "12 345 6789 3.14159 1e-9 0x1F",
    "don't we'll I'VE they're",
    "naïve café Zürich Œuvre",
    "Привет, как дела?",
    "你好，世界。今天天气很好",
    "こんにちは世界、元気ですか",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂🚀👩‍👩‍👧‍👦🇫🇷 emoji",
    "e\u0301 combining, ﬁ ligature, ① ½ ²",
    "x = {'a': [1, 2, 3]}  # comment",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    '<html><body class="x">&nbsp;</body></html>',
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "https://example.org/a?b=c&d=%20e#f",
    "a\u00a0b\u200bc\u3000d",
    "...!!!???---___***",
    "ALL CAPS and MixedCase CamelCaseWord snake_case_word",
)
TIES = ("{0}", "{0}{1}", " {0}", "{0}\n{1}", "{0} {1}", "{1}\n\n{0}", "({0})", "{0}12{1}")
"""Ways to make a string of one or two texts; with 25 texts, 200 strings, every third with a special token put in."""


def strings(tokenizer: Any) -> list[str]:
    """The 200 strings for one tokenizer."""
    special = [token for token in tokenizer.all_special_tokens if token] or [""]
    found = []
    for index, text in enumerate(TEXTS):
        for way, tie in enumerate(TIES):
            one = tie.format(text, TEXTS[(index * 7 + way + 1) % len(TEXTS)])
            if way % 3 == 2:
                place = len(one) // 2
                one = one[:place] + special[(index + way) % len(special)] + one[place:]
            if way == 7 and tokenizer.chat_template:
                one = tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False)
            found.append(one)
    return found


class LlamaCpp:
    """llama.cpp's own tokenizer of a file, over the HTTP server that ``xllamacpp`` starts in this process."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = str(file), 256, 0, False
        params.port, params.cpuparams.n_threads = free_port(), 1
        self.server = xllamacpp.Server(params)

    def __call__(self, text: str) -> list[int]:
        asked = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in post(f"{self.server.listening_address}/tokenize", asked)["tokens"]]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def tokens_beside_llama_cpp(file: Path, tokenizer: Any) -> dict[str, Any]:
    asked, peer = strings(tokenizer), LlamaCpp(file)
    found = [(text, tokenizer(text)["input_ids"], peer(text)) for text in asked]
    other = [{"text": text, "ours": ours, "llama.cpp": theirs} for text, ours, theirs in found if ours != theirs]
    return {
        "strings": len(asked),
        "with_special_tokens": sum(any(token in text for token in tokenizer.all_special_tokens) for text in asked),
        "equal": len(asked) - len(other),
        "different": other[:10],
    }


def decoding_beside_transformers(model: Any, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """Whether each backend gives the tokens of ``generate``, alone and as rows of one ragged batch."""
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in PROMPTS]
    wanted = [plain(model, prompt, new_tokens=tokens).tolist() for prompt in prompts]
    found: dict[str, Any] = {"tokens": tokens, "prompts": len(prompts)}
    for backend in ("native", "fused", "module"):
        try:
            open_decoder(model, backend=backend)
        except TelltaleError as error:
            found[backend] = str(error)
            continue
        for name, decoder in (
            ("plain", Autoregressive(model, backend=backend)),
            ("self_speculative", SelfSpeculative(model, model.config.num_hidden_layers // 2, 3, backend=backend)),
        ):
            rows = decoder.generate([prompt.tolist() for prompt in prompts], max_new_tokens=tokens)
            ours = [row[:length].tolist() for row, length in zip(rows.tokens, rows.lengths.tolist(), strict=True)]
            found[f"{backend} {name}"] = [_same(a, b) for a, b in zip(ours, wanted, strict=True)]
    return found


def _same(ours: list[int], wanted: list[int]) -> bool:
    """Equal tokens; the end-of-text token may be given or left out."""
    length = min(len(ours), len(wanted))
    return ours[:length] == wanted[:length] and abs(len(ours) - len(wanted)) <= 1


def served(file: Path, model: Any, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """``telltale serve FILE``: a completion and a chat, beside ``generate``."""
    port = free_port()
    command = [sys.executable, "-m", "telltale", "serve", str(file), "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        name = _wait(port, process)
        address = f"http://127.0.0.1:{port}/v1"
        asked = {"model": name, "max_tokens": tokens, "temperature": 0}
        text = post(f"{address}/completions", asked | {"prompt": PROMPTS[0]})["choices"][0]["text"]
        result = {"completion_equal": text == _text(model, tokenizer, PROMPTS[0], tokens), "completion": text}
        chat = [{"role": "user", "content": "Name three colours of the rainbow."}]
        try:
            answer = post(f"{address}/chat/completions", asked | {"messages": chat})["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return result | {"chat_refused": json.load(error)["error"]["message"]}
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        wanted = _text(model, tokenizer, prompt, tokens, add_special_tokens=False)
        return result | {"chat_equal": answer == wanted, "chat": answer}
    finally:
        process.terminate()
        process.wait(30)


def _wait(port: int, process: Any) -> str:
    for _ in range(240):
        if process.poll() is not None:
            raise SystemExit(process.stderr.read())
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the server did not start")


def _text(model: Any, tokenizer: Any, prompt: str, tokens: int, **options: Any) -> str:
    ids = tokenizer(prompt, return_tensors="pt", **options)["input_ids"][0]
    return str(tokenizer.decode(plain(model, ids, new_tokens=tokens), skip_special_tokens=True))


def measure(file: Path, found: dict[str, Any], tokens: int) -> Iterator[None]:
    """Fill ``found`` part by part; parts that it has already are left alone."""
    start = time.process_time()
    model, tokenizer = telltale.load(file, dtype="float32")
    found.setdefault("family", model.config.model_type)
    found.setdefault("loading_cpu_seconds", round(time.process_time() - start, 2))
    parts: dict[str, Callable[[], Any]] = {
        "tokenisation": lambda: tokens_beside_llama_cpp(file, tokenizer),
        "decoding": lambda: decoding_beside_transformers(model, tokenizer, tokens),
        "served": lambda: served(file, model, tokenizer, tokens),
    }
    for name, part in parts.items():
        if name not in found:
            found[name] = part()
            yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = RESULTS / "gguf_files.json"
    found = json.loads(target.read_text())["files"] if target.is_file() else {}
    for file in options.files:
        for _ in measure(file, found.setdefault(file.name, {}), options.tokens):
            write_result("gguf_files", files=found)
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's server has no end of its own


if __name__ == "__main__":
    main()
