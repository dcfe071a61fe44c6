"""Open a local checkpoint: a Hugging Face folder, or a ``.gguf`` file. Nothing is downloaded and no code from it runs.

Short digests of a model and of a tokenizer identify them in files that are valid for one pair only.

A model's digest covers its configuration and every number of its state, with names, shapes and dtypes: another architecture,
size, dtype or seed, a fine-tuned, merged, edited, pruned or quantised copy have other digests. It reads all weights, about a
second for each gigabyte. A change of the model's code is not seen. The device and the attention implementation do not count.

A tokenizer's digest covers its vocabulary with ids, its special tokens and its added tokens, not how text is split among them,
and not its chat template.

:func:`evaluating` runs a live model with dropout off and restores its modes. ``model.eval()`` followed by ``model.train()``
forgets which submodules a user had put in eval mode (a frozen backbone, say); here every flag is remembered. The model's
configuration and hooks are not touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from telltale.config import check_choice
from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.models.draft_exits import remember_source
from telltale.models.families import family_of, unwrap
from telltale.models.gguf import gguf_config, gguf_model, gguf_tokenizer, is_gguf, parsed_once
from telltale.models.int8_weights import quantize

LONGEST_LINE = 240
WEIGHTS = ("int8",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    weights: str | None = None,
    any_family: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (eval mode) and tokenizer of the checkpoint ``path``: a Hugging Face folder or a ``.gguf`` file.

    ``dtype`` None keeps the checkpoint's own; ``device`` None is the CPU. ``weights="int8"`` puts linear layers and head in 8
    bits with a scale for each 32 (:mod:`telltale.models.int8_weights`), which the native step reads; what a GGUF file has as
    Q8_0 is taken as it is. The model then holds the dequantised numbers. ``any_family`` takes every causal LM that
    Transformers knows, for those who need the model's own forward pass and nothing inside it.
    Raises :class:`~telltale.errors.CheckpointError` if the folder is missing or incomplete,
    :class:`~telltale.errors.UnsupportedModelError` for an encoder-decoder and for what cannot be put in 8 bits,
    :class:`~telltale.errors.ConfigError` for 8 bits in float16 or beside the CPU, and
    :class:`~telltale.errors.DataError` if the tokenizer is missing or knows more tokens than the model embeds.
    """
    with parsed_once() if is_gguf(path) else nullcontext():
        model = load_model(path, dtype=dtype, device=device, weights=weights, any_family=any_family)
        tokenizer = load_tokenizer(path)
    check_fit(tokenizer, model, path)
    return model, tokenizer


def load_draft(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    weights: str | None = None,
) -> PreTrainedModel:
    """The model of :func:`load`, to draft for a target whose tokenizer is ``tokenizer``.

    Raises :class:`~telltale.errors.DataError` unless its own tokenizer has the same vocabulary.
    """
    model, own = load(path, dtype=dtype, device=device, weights=weights)
    if own.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"the draft {path} has another vocabulary than the target; expected two models of one tokenizer."
        )
    return model


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    weights: str | None = None,
    any_family: bool = False,
) -> PreTrainedModel:
    """The model of :func:`load` alone."""
    if weights is not None:
        return _quantized(Path(path), dtype, device, weights)
    folder, wanted = Path(path), _dtype(dtype)
    if is_gguf(folder):
        with quietly(), parsed_once():
            config = load_config(folder, any_family=any_family)
            model, report = gguf_model(folder, config, wanted)
        return _whole(model, report, folder, device)
    config = load_config(folder, any_family=any_family)
    _check_weights(folder)
    try:
        with without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=wanted,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_a_line(error)}") from error
    return _whole(model, report, folder, device)


def _quantized(path: Path, dtype: torch.dtype | str | None, device: torch.device | str | None, weights: str) -> Any:
    """The model of ``path`` with weights in 8 bits, made from the checkpoint's own numbers whatever ``dtype`` is."""
    check_choice("weights", weights, WEIGHTS)
    if not str("cpu" if device is None else device).startswith("cpu"):
        raise ConfigError(
            f"weights={weights!r} is read by the native step, which runs on the CPU; device={str(device)!r} was given."
        )
    wanted = _dtype(dtype)
    model = load_model(path)
    quantize(model, model.dtype if wanted == "auto" else wanted)
    return model


def _whole(model: Any, report: Any, folder: Path, device: torch.device | str | None) -> Any:
    """``model`` on its device, if the report of its keys says that all its weights were there."""
    absent = sorted(report.get("missing_keys") or [])
    if absent:
        raise CheckpointError(
            f"{folder} lacks weights that its config.json calls for, {absent[0]} among {len(absent)}; expected a whole "
            f"checkpoint."
        )
    mismatched = report.get("mismatched_keys")
    if mismatched:
        raise CheckpointError(f"{folder}: the weights' shapes do not fit config.json: {sorted(mismatched)[0]}.")
    remember_source(model, folder)
    return moved(model, device).eval()


def moved(model: Any, device: torch.device | str | None) -> Any:
    """``model`` on ``device`` (None: the CPU). Raises :class:`~telltale.errors.ConfigError` if that cannot be used."""
    try:
        return model.to(device or "cpu")
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        raise ConfigError(f"device={str(device)!r} cannot be used: {in_a_line(error)}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Transformers' bars and its report of keys off the terminal: the loader reads the report and raises an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep Transformers' own loading and saving bars off the terminal inside the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint ``path``. Raises :class:`~telltale.errors.DataError` if there is none."""
    folder = Path(path)
    if is_gguf(folder):
        with quietly(), parsed_once():
            return gguf_tokenizer(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise DataError(f"{folder} has no tokenizer (tokenizer.json); save one there with save_pretrained.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a bad file
        raise DataError(f"the tokenizer in {folder} cannot be read: {in_a_line(error)}") from error


def check_fit(tokenizer: PreTrainedTokenizerBase, model: Any, path: str | Path) -> None:
    """Raise :class:`~telltale.errors.DataError` if ``tokenizer`` can produce ids that ``model`` has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise DataError(
            f"the tokenizer of {path} has ids up to {highest}, the model embeds {rows} tokens; expected the tokenizer "
            f"that the model was trained with."
        )


def load_config(folder: Path, *, any_family: bool = False) -> Any:
    """The configuration of the checkpoint ``folder``, checked; nothing is loaded. Raises what :func:`load` raises for it."""
    if is_gguf(folder):
        with quietly(), parsed_once():
            config = gguf_config(folder)
        if not any_family:
            family_of(config, listed=False)
        return config
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a local Hugging Face checkpoint.")
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a local Hugging Face checkpoint.")
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. The checkpoint may be half-written.") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise CheckpointError(f"{file} names no model_type; expected the configuration of a Hugging Face model.")
    if not any_family:
        family_of(SimpleNamespace(**raw), listed=False)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configuration classes have their own validation errors
        raise CheckpointError(f"{file} cannot be understood: {in_a_line(error)}") from error


def _check_weights(folder: Path) -> None:
    """Find out about absent and truncated weight files before anything is allocated."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a valid shard index: {error}") from error
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].is_file() and (folder / "pytorch_model.bin").is_file():
            raise CheckpointError(
                f"{folder} has weights only as pytorch_model.bin, a pickle; expected safetensors. Convert it with "
                f"save_pretrained."
            )
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}; expected a whole checkpoint in safetensors.")
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or damaged: {in_a_line(error)}") from error


def _dtype(dtype: torch.dtype | str | None) -> Any:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def in_a_line(error: BaseException) -> str:
    """The message of another library's error, in one short line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + "..."


NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a configuration about its origin or what a call returns, not about what is computed."""


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits for ``model``; a wrapper (DDP, a compiled module) has its inner model's."""
    inner = unwrap(model)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_plain(_configuration(inner)))
    for name, tensor in sorted(inner.state_dict().items()):
        digest.update(_plain([name, list(tensor.shape), str(tensor.dtype)]))
        for piece in _pieces(tensor.detach()):
            digest.update(piece)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """32 hexadecimal digits for ``tokenizer`` and its chat template, which makes the prompts of chats.

    Raises :class:`~telltale.errors.DataError` for what has no vocabulary.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise DataError(f"tokenizer is a {type(tokenizer).__name__}; expected one with a vocabulary.")
    special = getattr(tokenizer, "special_tokens_map", {})
    added = {index: str(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    known = [
        sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        sorted((name, _words(value)) for name, value in special.items()),
        sorted(added.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.blake2b(_plain(known), digest_size=16).hexdigest()


def _configuration(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        return {"class": type(model).__name__}
    known = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return {name: value for name, value in known.items() if name not in NOT_THE_MODEL}


def _pieces(tensor: Tensor) -> Iterator[Any]:
    """The bytes of ``tensor``, in place where they lie in order in the CPU's memory, else a slice at a time."""
    if tensor.numel() == 0 or tensor.is_meta:
        return
    whole = tensor.is_contiguous() and tensor.device.type == "cpu"
    for part in (tensor,) if whole or tensor.ndim < 2 else tensor.unbind(0):
        yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _words(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is in the mode it had."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
