"""Frozen encoders of whole traces: from texts to vectors whose cosine says how alike two solutions are.

An encoder never trains: embeddings of teachers are kept, and a drifting encoder would make them worthless in silence. Each one
has an ``identity`` under which embeddings are kept, and ``checksum()``, which must not change in a run. The default reads an early
layer of the initial policy: no other weights, no download, and a price of a few per cent of the policy's own forward pass.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from telltale.config import check_integer
from telltale.errors import ConfigError, DataError, MissingExtraError, TelltaleError, UnsupportedModelError

SHARE_OF_DEPTH = 8
"""The default layer of :class:`HiddenStateEncoder` is the model's depth divided by this, at least 1."""


@runtime_checkable
class Encoder(Protocol):
    """What a trainer needs of an encoder; any class with these three members is one."""

    identity: str
    """Under which embeddings are kept on disk; other weights or settings have another one."""
    centred: bool
    """Whether the mean embedding of the teachers is to be taken off before cosines are computed."""

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Vectors (n, d), float32, on the CPU; no gradient. An empty completion may have length 0."""

    def checksum(self) -> str:
        """Of the weights; the same as long as nothing trains them."""


class HiddenStateEncoder:
    """Mean of the hidden states of a frozen copy of the first ``layer`` layers of ``model`` over a trace's tokens.

    layer: None takes an eighth of the depth, at least 1. centred: hidden states share a large common part, which makes raw
    cosines all alike; leave it on. with_prompt: let the trace's tokens see the prompt. The copy is made here, before training;
    for a PEFT model it is made with the adapter off.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        layer: int | None = None,
        centred: bool = True,
        with_prompt: bool = True,
        batch_size: int = 64,
    ) -> None:
        check_integer("batch_size", batch_size, low=1)
        self.tokenizer, self.centred, self.with_prompt, self.batch_size = tokenizer, centred, with_prompt, batch_size
        depth = int(model.config.get_text_config().num_hidden_layers)
        self.layer = max(1, depth // SHARE_OF_DEPTH) if layer is None else layer
        check_integer("layer", self.layer, low=1, high=depth)
        self.body: Any = _first_layers(model, self.layer)
        setting = f"hidden/{self.layer}/{'with' if with_prompt else 'without'}-prompt"
        self.identity = f"{setting}/{self.checksum()[:16]}"

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Vectors (n, d). Batches are sorted by length; padding does not change a vector by more than rounding."""
        before = self._tokens(prompts) if self.with_prompt else [[] for _ in prompts]
        rows = list(zip(before, self._tokens(completions), strict=True))
        order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
        vectors = torch.zeros(len(rows), self.body.config.get_text_config().hidden_size)
        for start in range(0, len(rows), self.batch_size):
            chosen = order[start : start + self.batch_size]
            vectors[chosen] = self._pooled([rows[index] for index in chosen])
        return vectors

    def checksum(self) -> str:
        """SHA-256 of the weights."""
        return weights_checksum(self.body)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; every different one is tokenised once, all in one call."""
        unique = list(dict.fromkeys(texts))
        found = self.tokenizer(unique, add_special_tokens=False)["input_ids"] if unique else []
        ids = dict(zip(unique, found, strict=True))
        return [ids[text] for text in texts]

    @torch.no_grad()
    def _pooled(self, rows: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
        longest = max(max(len(before) + len(own) for before, own in rows), 1)
        device = next(self.body.parameters()).device
        tokens, kept = (
            torch.zeros(len(rows), longest, dtype=torch.long),
            torch.zeros(len(rows), longest, dtype=torch.bool),
        )
        attended = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, (before, own) in enumerate(rows):
            end = len(before) + len(own)
            tokens[index, :end] = torch.tensor(before + own, dtype=torch.long)
            kept[index, len(before) : end] = True
            attended[index, : max(end, 1)] = 1
        hidden = self.body(
            input_ids=tokens.to(device), attention_mask=attended.to(device), use_cache=False
        ).last_hidden_state.float()
        share = kept.to(device).unsqueeze(-1).float()
        return ((hidden * share).sum(1) / share.sum(1).clamp(min=1)).cpu()


class HashedNGramEncoder:
    """Counts of the words' n-grams, hashed to signed places of a vector: exact, without weights, for symbolic traces."""

    def __init__(self, *, dimensions: int = 1024, longest: int = 3) -> None:
        check_integer("dimensions", dimensions, low=8)
        check_integer("longest", longest, low=1)
        self.dimensions, self.longest, self.centred = dimensions, longest, False
        self.identity = f"ngrams/{longest}/{dimensions}"

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Vectors (n, dimensions) of the completions alone."""
        vectors = torch.zeros(len(completions), self.dimensions)
        for row, text in enumerate(completions):
            words = text.split()
            for size in range(1, self.longest + 1):
                for start in range(len(words) - size + 1):
                    digest = hashlib.blake2b(" ".join(words[start : start + size]).encode(), digest_size=8).digest()
                    place = int.from_bytes(digest, "big")
                    vectors[row, (place >> 1) % self.dimensions] += 1.0 if place & 1 else -1.0
        return vectors

    def checksum(self) -> str:
        """There are no weights; the identity says all."""
        return self.identity


class CallableEncoder:
    """Any function from a list of texts to vectors (n, d) as an encoder.

    ``name`` stands for it on disk: change it with the function.
    """

    def __init__(self, function: Callable[[list[str]], Any], *, name: str, centred: bool = False) -> None:
        self.function, self.centred, self.identity = function, centred, f"callable/{name}"
        self.module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Vectors (n, d) of the completions alone."""
        with torch.no_grad():
            return torch.as_tensor(self.function(list(completions)))

    def checksum(self) -> str:
        """Of the weights, if the function is a module or a method of one; else its name."""
        return weights_checksum(self.module) if isinstance(self.module, nn.Module) else self.identity


class SentenceEncoder:
    """A local sentence-transformers model. A text longer than the model reads is encoded in chunks of words, never cut in silence.

    The vector of a chunked text is the mean of its chunks' unit vectors, weighted by their words.
    """

    def __init__(self, path: str | Path, *, device: str | None = None) -> None:
        try:
            sentence_transformers = importlib.import_module("sentence_transformers")
        except ImportError as error:
            raise MissingExtraError("a sentence encoder needs: pip install sentence-transformers") from error
        if not Path(path).is_dir():
            raise ConfigError(f"encoder={str(path)!r} is no folder; expected a local sentence-transformers model.")
        self.model: Any = sentence_transformers.SentenceTransformer(
            str(path), device=device or "cpu", local_files_only=True
        ).eval()
        self.centred = False
        self.limit = int(self.model.max_seq_length or 512)
        self.identity = f"sentence/{self.checksum()[:16]}"
        self._warned = False

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Vectors (n, d) of the completions alone."""
        pieces = [self._chunks(text) for text in completions]
        chunked = sum(len(parts) > 1 for parts in pieces)
        if chunked and not self._warned:
            self._warned = True
            warnings.warn(
                f"{chunked} of {len(pieces)} traces are longer than the {self.limit} tokens that the encoder reads; they are "
                f"encoded in chunks.",
                stacklevel=2,
            )
        flat = [part for parts in pieces for part in parts]
        encoded = torch.as_tensor(self.model.encode(flat, normalize_embeddings=True, show_progress_bar=False)).float()
        vectors, start = [], 0
        for parts in pieces:
            words = torch.tensor([max(len(part.split()), 1) for part in parts], dtype=torch.float32)
            vectors.append((encoded[start : start + len(parts)] * words[:, None]).sum(0) / words.sum())
            start += len(parts)
        return torch.stack(vectors)

    def checksum(self) -> str:
        """SHA-256 of the weights."""
        return weights_checksum(self.model)

    def _chunks(self, text: str) -> list[str]:
        """Texts of at most ``limit`` tokens each, cut between words where that is possible."""
        chunks: list[str] = []
        rest = re.findall(r"\s*\S+", text) or [text]
        while rest:
            low, high = 1, len(rest)
            while low < high:  # the most words that fit
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self._fits("".join(rest[:middle])) else (low, middle - 1)
            piece, rest = "".join(rest[:low]), rest[low:]
            if low == 1 and not self._fits(piece):  # one endless word
                half = len(piece) // 2
                rest = [piece[:half], piece[half:], *rest]
                continue
            chunks.append(piece)
        return chunks

    def _fits(self, text: str) -> bool:
        return len(self.model.tokenizer(text, truncation=False)["input_ids"]) <= self.limit


def open_encoder(given: Any, *, model: Any = None, tokenizer: Any = None) -> Encoder:
    """The encoder that ``given`` names: "hidden" (of ``model``), "ngrams", the path of a local sentence encoder, or one itself.

    Raises :class:`~telltale.errors.ConfigError` for anything else.
    """
    if given == "hidden":
        if model is None:
            raise ConfigError(
                "encoder='hidden' reads a policy's hidden states; expected a checkpoint to read them from."
            )
        return HiddenStateEncoder(model, tokenizer)
    if given == "ngrams":
        return HashedNGramEncoder()
    if isinstance(given, (str, Path)):
        if Path(given).is_dir():
            return SentenceEncoder(given)
    elif isinstance(given, Encoder):
        return given
    raise ConfigError(
        f"encoder={given!r} is unknown; expected 'hidden', 'ngrams', a folder with a sentence encoder, or an object with identity, "
        f"centred, encode and checksum (CallableEncoder makes one of a function)."
    )


def encode_checked(
    encoder: Encoder, prompts: Sequence[str], completions: Sequence[str], names: Sequence[str]
) -> torch.Tensor:
    """``encoder.encode``, every different pair once. Raises :class:`~telltale.errors.DataError` with the name of a bad row.

    Bad is a vector that is not finite, or has length 0 though the text is not empty. An encoder that fails or returns another
    shape than (n, d) is named too.
    """
    places: dict[tuple[str, str], int] = {}
    index = [places.setdefault(pair, len(places)) for pair in zip(prompts, completions, strict=True)]
    if not places:
        return torch.zeros(0, 1)
    unique = list(places)
    vectors = _encoded(encoder, [prompt for prompt, _ in unique], [text for _, text in unique])[index]
    lengths = vectors.norm(dim=-1)
    for row in torch.nonzero(~torch.isfinite(lengths) | (lengths == 0)).flatten().tolist():
        if completions[row].strip() or not torch.isfinite(lengths[row]):
            raise DataError(
                f"the encoder {encoder.identity} gave {names[row]} a vector of length {lengths[row].item()}; expected a finite one "
                f"above 0. The text begins {completions[row][:60]!r}."
            )
    return vectors


def _encoded(encoder: Encoder, prompts: list[str], texts: list[str]) -> torch.Tensor:
    """What ``encoder`` returns as (n, d), float32, on the CPU."""
    try:
        vectors = torch.as_tensor(encoder.encode(prompts, texts)).detach().float().cpu()
    except TelltaleError:
        raise
    except Exception as error:
        raise DataError(
            f"the encoder {encoder.identity} failed on {len(texts)} texts, {type(error).__name__}: {error}. Expected vectors "
            f"({len(texts)}, d)."
        ) from error
    if vectors.dim() != 2 or len(vectors) != len(texts):
        raise DataError(
            f"the encoder {encoder.identity} returned shape {tuple(vectors.shape)} for {len(texts)} texts; expected "
            f"({len(texts)}, d)."
        )
    return vectors


def weights_checksum(module: nn.Module) -> str:
    """SHA-256 over all parameters and buffers of ``module``, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _first_layers(model: Any, count: int) -> Any:
    """A frozen copy of the backbone of ``model`` with only its first ``count`` layers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = base.base_model
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(base).__name__} has no list of decoder layers at base_model.layers; expected such a decoder. Give "
            f"encoder='ngrams' or an encoder of your own."
        )
    memo: dict[int, Any] = {id(layers): nn.ModuleList()}  # nothing of the layers is copied twice
    body = copy.deepcopy(backbone, memo)
    body.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers[:count])
    if isinstance(getattr(body, "norm", None), nn.Module):
        body.norm = nn.Identity()  # it belongs to the last layer's states
    _remove_adapters(body)
    body.config = copy.deepcopy(backbone.config)
    body.config.get_text_config().num_hidden_layers = count
    if getattr(body.config.get_text_config(), "layer_types", None):
        body.config.get_text_config().layer_types = body.config.get_text_config().layer_types[:count]
    return body.eval().requires_grad_(False)


def _remove_adapters(module: nn.Module) -> None:
    """Replace every PEFT wrapper inside ``module`` by what it wraps."""
    for parent in list(module.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, child in children:
            if hasattr(child, "get_base_layer") and hasattr(child, "base_layer"):
                setattr(parent, name, child.get_base_layer())
