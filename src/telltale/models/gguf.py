"""A checkpoint in one file of llama.cpp's format (GGUF): model, tokenizer and chat template, through Transformers' own reader.

Quantised weights are unpacked when they are read, so the model is a plain one that can be trained, saved and decoded like any
other; the file's own precision is gone from then on. A tokenizer is taken only where its way of splitting text is known to be
llama.cpp's: the file names the way, and a name that nobody here knows is refused, because text would be split in another way
without a word.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from telltale.errors import CheckpointError, DataError, MissingExtraError

MAGIC = b"GGUF"
_GPT2_SPLITS = ("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling")
"""Names of ``tokenizer.ggml.pre`` that split as GPT-2 does."""
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names that split digits one by one first, and the rest as GPT-2 does."""
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_loading = threading.RLock()
_depth = 0


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` is a file of this format, by its first bytes, or by its name if it cannot be read."""
    file = Path(path)
    if file.is_dir():
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(4) == MAGIC or file.suffix == ".gguf"
    except OSError:
        return file.suffix == ".gguf"


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Have the ``gguf`` package remember what it parses until the outermost block ends. Threads that load wait for each other.

    A header is parsed in Python, seconds for a large vocabulary, and Transformers asks for it anew for configuration, weights
    and tokenizer; the package's table of names it makes once a module.
    """
    global _depth
    with _loading:
        try:
            gguf: Any = importlib.import_module("gguf")
        except ImportError:  # whoever needs it says what to install
            yield
            return
        own = gguf.GGUFReader, gguf.get_tensor_name_map
        if _depth == 0:
            gguf.GGUFReader, gguf.get_tensor_name_map = _remembered(own[0]), functools.lru_cache(maxsize=8)(own[1])
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            gguf.GGUFReader, gguf.get_tensor_name_map = own


def _remembered(reader: Any) -> Any:
    """``reader``, which parses a file that has not changed once."""
    # A mapped file's slices cost three times what a plain array's do, and there are several for each token.
    plain = property(lambda self: self._bytes, lambda self, given: setattr(self, "_bytes", np.asarray(given)))
    kind = type("PlainReader", (reader,), {"data": plain})
    known: dict[Any, Any] = {}

    def parse(path: Any, mode: str = "r") -> Any:
        found = Path(path).stat()
        key = str(path), mode, found.st_size, found.st_mtime_ns
        if key not in known:
            known[key] = kind(path, mode)
        return known[key]

    return parse


def gguf_config(file: Path) -> Any:
    """The configuration of the model in ``file``.

    Raises :class:`~telltale.errors.CheckpointError` for a file that is damaged or of an architecture that Transformers cannot
    read, and :class:`~telltale.errors.MissingExtraError` if the ``gguf`` extra is not installed.
    """
    _check(file)
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # the reader has errors of many kinds
        raise CheckpointError(f"{file} cannot be understood: {_line(error)}") from error
    vars(config).pop("quantization_config", None)
    return config


def gguf_model(file: Path, config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The model of ``config`` in ``file``, its weights unpacked to ``dtype`` ("auto": the file's own, float32 if they are
    quantised), and Transformers' report of its keys. Raises what :func:`gguf_config` raises."""
    _check(file)
    options: dict[str, Any] = {}
    quantization = importlib.import_module("transformers.utils.quantization_config")
    if hasattr(quantization, "GgufConfig"):
        options["quantization_config"] = quantization.GgufConfig(gguf_file=file.name, dequantize=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader has a bar that cannot be turned off
            model, report = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                config=config,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise CheckpointError(f"{file} cannot be loaded: {_line(error)}") from error
    # What is unpacked is no quantised model: without these it can be saved and converted.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    metadata = _metadata(file)
    ends = [metadata[f"tokenizer.ggml.{key}"] for key in _END_KEYS if f"tokenizer.ggml.{key}" in metadata]
    if ends:
        model.generation_config.eos_token_id = list(dict.fromkeys(map(int, ends)))
    return model, report


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer in ``file``, with its chat template.

    Raises :class:`~telltale.errors.DataError` if there is none, or one whose way of splitting text is not known.
    """
    _check(file)
    metadata = _metadata(file)
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind is None:
        raise DataError(f"{file} has no tokenizer; expected a file with tokenizer.ggml.model.")
    if kind == "gpt2" and split not in _known_splits():
        raise DataError(
            f"{file} splits text the way {split!r} (tokenizer.ggml.pre); that way is not known here. Expected one of "
            f"{', '.join(sorted(_known_splits()))}; or use the model's Hugging Face folder."
        )
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if kind == "llama" and not gemma and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        raise DataError(
            f"{file} puts no space before the text (tokenizer.ggml.add_space_prefix), which its tokenizer would do when it "
            f"is read from the file; use the model's Hugging Face folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise DataError(f"the tokenizer in {file} cannot be read: {_line(error)}") from error
    _drop_added(tokenizer, int(metadata["tokenizer.ggml.tokens"]))
    if kind == "gpt2" and split in _DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if tokenizer.chat_template is None and isinstance(metadata.get("tokenizer.chat_template"), str):
        tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer


def _drop_added(tokenizer: Any, count: int) -> None:
    """Take back tokens that the reader adds to the file's own ``count``: the model has no embedding for them."""
    extra = {token for token, index in tokenizer.get_vocab().items() if index >= count}
    if not extra:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if getattr(tokenizer, name, None) in extra:
            setattr(tokenizer, name, None)


def _known_splits() -> set[str]:
    mapping = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    return {*_GPT2_SPLITS, *_DIGIT_SPLITS, *mapping.GGUF_PRE_TOKENIZER_SPLITS}


def _metadata(file: Path) -> dict[str, Any]:
    """Keys and values of the header; long arrays are counts."""
    reader = importlib.import_module("transformers.integrations.gguf.reader")
    try:
        found: dict[str, Any] = reader.read_gguf_metadata(str(file))[0]
    except Exception as error:
        raise CheckpointError(f"{file} is truncated or damaged: {_line(error)}") from error
    return found


def _check(file: Path) -> None:
    """Find out about absent packages and damaged files before anything is allocated."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not there; expected a .gguf file.")
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("reading a .gguf file needs: pip install 'telltale[gguf]'")
    if importlib.util.find_spec("transformers.integrations.gguf") is None:
        raise MissingExtraError("reading a .gguf file needs Transformers 5.24: pip install 'transformers>=5.24'")
    with file.open("rb") as stream:
        head = stream.read(24)
    if len(head) < 24 or head[:4] != MAGIC:
        raise CheckpointError(f"{file} does not begin as a GGUF file does; expected one.")
    version = struct.unpack("<I", head[4:8])[0]
    if version not in (2, 3):
        raise CheckpointError(f"{file} is of version {version} of the format; expected 2 or 3.")
    found = file.stat()
    end = _end_of_tensors(str(file), found.st_size, found.st_mtime_ns)
    if end > found.st_size:
        raise CheckpointError(f"{file} is truncated: it has {found.st_size} bytes of {end}.")


@functools.lru_cache(maxsize=8)
def _end_of_tensors(path: str, size: int, changed: int) -> int:
    """Where the last tensor ends, in bytes. The package takes seconds for a large vocabulary, so an unchanged file is read once."""
    from gguf import GGUFReader

    try:
        return max((tensor.data_offset + tensor.n_bytes for tensor in GGUFReader(path).tensors), default=0)
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
