"""Real source code as a text corpus: Python's own standard library, or the user's files.

The standard library is on every machine that can run this package, so nothing is downloaded. The tokenizer is a
byte-level BPE trained on the spot by ``tokenizers``. Files are split whole into training and held-out parts.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from telltale.errors import DataError
from telltale.runs.files import atomic_directory

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (
    ".py",
    ".txt",
    ".md",
    ".rst",
    ".c",
    ".h",
    ".cpp",
    ".js",
    ".ts",
    ".java",
    ".go",
    ".rs",
    ".toml",
    ".yaml",
)
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "ensurepip",
}


_NOT_THE_USERS_OWN = {"node_modules", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class CodeCorpus:
    """A tokenised corpus: ``train`` and ``held_out`` are 1-D int64 token tensors, files joined by the end-of-text token."""

    train: Tensor
    held_out: Tensor
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    """SHA-256 of the text and the vocabulary: two corpora with the same one hold the same tokens."""

    @classmethod
    def from_standard_library(
        cls,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocabulary_size: int = 1024,
        seed: int = 0,
        held_out_fraction: float = 0.04,
    ) -> CodeCorpus:
        """The running interpreter's standard library sources, tests left out (about 9 MB)."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            path for path in _source_files(root, (".py",)) if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        ]
        return cls._from_files(files, root, vocabulary_size, seed, held_out_fraction, tokenizer=tokenizer)

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocabulary_size: int = 1024,
        seed: int = 0,
        held_out_fraction: float = 0.04,
    ) -> CodeCorpus:
        """The user's own text: one file, or every text file below a folder; ``tokenizer`` None trains one on it.

        Raises :class:`~telltale.errors.DataError` if there is no text at ``path``.
        """
        root = Path(path)
        if not root.exists():
            raise DataError(f"{root} does not exist; expected a text file or a folder of text files.")
        files = [root] if root.is_file() else _source_files(root, TEXT_SUFFIXES)
        return cls._from_files(files, root, vocabulary_size, seed, held_out_fraction, tokenizer=tokenizer)

    @classmethod
    def from_texts(
        cls,
        train: Sequence[str],
        held_out: Sequence[str],
        *,
        source: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocabulary_size: int = 1024,
    ) -> CodeCorpus:
        """From texts already split. Raises :class:`~telltale.errors.DataError` if either side is empty."""
        if not any(train) or not any(held_out):
            raise DataError(f"{source} is empty; expected text for training and for the held-out part.")
        fitted = tokenizer or train_tokenizer(train, vocabulary_size=vocabulary_size)
        digest = hashlib.sha256()
        for text in (*train, *held_out):
            digest.update(text.encode(errors="surrogatepass") + b"\0")
        digest.update(json.dumps(sorted(fitted.get_vocab().items())).encode())
        return cls(_encode(fitted, train), _encode(fitted, held_out), fitted, source, digest.hexdigest())

    def save(self, path: str | Path) -> None:
        """Write tokens and tokenizer to a folder, atomically."""
        with atomic_directory(path) as aside:
            np.save(aside / "train.npy", self.train.numpy().astype(np.int32))
            np.save(aside / "held_out.npy", self.held_out.numpy().astype(np.int32))
            self.tokenizer.save_pretrained(aside / "tokenizer")
            (aside / "corpus.json").write_text(json.dumps({"source": self.source, "fingerprint": self.fingerprint}))

    @classmethod
    def load(cls, path: str | Path) -> CodeCorpus:
        """Read what :meth:`save` wrote. Raises :class:`~telltale.errors.DataError` if it is not all there."""
        root = Path(path)
        try:
            about = json.loads((root / "corpus.json").read_text())
            parts = [torch.from_numpy(np.load(root / f"{name}.npy").astype(np.int64)) for name in ("train", "held_out")]
            tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{root} is not a saved corpus: {error}") from error
        return cls(parts[0], parts[1], tokenizer, about["source"], about["fingerprint"])

    def prompts(self, count: int, *, length: int, seed: int = 0) -> list[Tensor]:
        """``count`` held-out prompts of ``length`` tokens each (1-D), at places drawn from ``seed``.

        Raises :class:`~telltale.errors.DataError` if the held-out part is shorter than one prompt.
        """
        starting_places = self.held_out.numel() - length
        if starting_places < 1:
            raise DataError(
                f"the held-out part of {self.source} has {self.held_out.numel()} tokens; a prompt needs {length + 1}."
            )
        starts = torch.randint(starting_places, (count,), generator=torch.Generator().manual_seed(seed))
        return [self.held_out[start : start + length].clone() for start in starts.tolist()]

    @classmethod
    def _from_files(
        cls,
        files: Sequence[Path],
        root: Path,
        vocabulary_size: int,
        seed: int,
        held_out_fraction: float,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> CodeCorpus:
        texts = [text for text in map(_read, files) if text]
        if not texts:
            raise DataError(f"{root} holds no readable text; expected files ending in {', '.join(TEXT_SUFFIXES)}.")
        if len(texts) < 8:
            train, held_out = _split_one("\n".join(texts), held_out_fraction)
        else:
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
            cut = max(1, round(len(texts) * held_out_fraction))
            held_out, train = [texts[i] for i in order[:cut]], [texts[i] for i in order[cut:]]
        return cls.from_texts(train, held_out, source=str(root), tokenizer=tokenizer, vocabulary_size=vocabulary_size)


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips exactly, whatever it was trained on."""
    if vocabulary_size < 257:
        raise DataError(f"vocabulary_size={vocabulary_size} cannot hold 256 bytes and {END_OF_TEXT}; expected >= 257.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def read_tokens(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All text at ``path`` (a file, or the text files below a folder) as one 1-D int64 tensor of ``tokenizer``'s tokens.

    Raises :class:`~telltale.errors.DataError` if there is none.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root} does not exist; expected a text file or a folder of text files.")
    texts = [text for text in map(_read, [root] if root.is_file() else _source_files(root, TEXT_SUFFIXES)) if text]
    if not texts:
        raise DataError(f"{root} holds no readable text; expected UTF-8 files ending in {', '.join(TEXT_SUFFIXES)}.")
    return _encode(tokenizer, texts)


def read_texts(path: str | Path, *, also: tuple[str, ...] = ()) -> dict[Path, str]:
    """Every text at ``path`` by its file: a file of any name, or below a folder those of a known suffix or one of ``also``.

    Raises :class:`~telltale.errors.DataError` if there is none.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root} does not exist; expected a text file or a folder of text files.")
    files = [root] if root.is_file() else _source_files(root, (*TEXT_SUFFIXES, *also))
    found = {file: text for file in files if (text := _read(file)).strip()}
    if not found:
        known = ", ".join((*TEXT_SUFFIXES, *also))
        raise DataError(f"{root} holds no readable text; expected UTF-8 files ending in {known}.")
    return found


def parses(source: str) -> bool:
    """The verifier: is ``source`` a whole Python file that compiles? Nothing of it is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            compile(source, "<text>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _source_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    def wanted(path: Path) -> bool:
        folders = path.relative_to(root).parts[:-1]
        return not any(name.startswith(".") or name in _NOT_THE_USERS_OWN for name in folders)

    return sorted(path for path in root.rglob("*") if path.suffix in suffixes and wanted(path) and path.is_file())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _split_one(text: str, fraction: float) -> tuple[list[str], list[str]]:
    """Too few files to hold one out: the tail of the text is held out instead."""
    cut = len(text) - max(1, int(len(text) * max(fraction, 0.1)))
    return [text[:cut]], [text[cut:]]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        ids.extend(encoded)
        if end is not None:
            ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)
