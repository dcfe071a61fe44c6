"""Which model is this? Short digests of a model and of a tokenizer, for files that hold for one pair alone.

A model's digest covers its configuration, the name, shape and dtype of every tensor of its state, and up to 64 numbers of each,
taken at even strides. So another architecture, size, dtype, seed, a fine-tuned or merged model, an adapter and a pruned or
quantised copy are told apart; a change that leaves all sampled numbers alone (some rows of one matrix edited by hand) is not, and
neither is code of the model's that differs. Where the model runs and how its attention is computed do not count. Nothing here is
a defence against somebody who wants two models to look the same.

A tokenizer's digest covers its vocabulary with ids, its special tokens and its added tokens, not how text is split among them,
and not its chat template.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import DataError
from telltale.models.families import unwrap

SAMPLES = 64
"""Numbers of each tensor that the digest covers."""
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
"""Fields of a configuration that say where it came from or what a call returns, not what is computed."""


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits for ``model``; a wrapper (DDP, a compiled module) has its inner model's."""
    inner = unwrap(model)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_plain(_configuration(inner)))
    for name, tensor in sorted(inner.state_dict().items()):
        digest.update(_plain([name, list(tensor.shape), str(tensor.dtype)]))
        digest.update(_sampled(tensor.detach()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """32 hexadecimal digits for ``tokenizer``. Raises :class:`~telltale.errors.DataError` for what has no vocabulary."""
    if not hasattr(tokenizer, "get_vocab"):
        raise DataError(f"tokenizer is a {type(tokenizer).__name__}; expected one with a vocabulary.")
    special = getattr(tokenizer, "special_tokens_map", {})
    added = {index: str(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    known = [
        sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        sorted((name, _words(value)) for name, value in special.items()),
        sorted(added.items()),
    ]
    return hashlib.blake2b(_plain(known), digest_size=16).hexdigest()


def _configuration(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        return {"class": type(model).__name__}
    known = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return {name: value for name, value in known.items() if name not in NOT_THE_MODEL}


def _sampled(tensor: Tensor) -> bytes:
    if tensor.numel() == 0 or tensor.is_meta:
        return b""
    flat = torch.linspace(0, tensor.numel() - 1, min(SAMPLES, tensor.numel()), dtype=torch.float64).round().long()
    # Indexed in place: flattening a tensor that is not contiguous would copy all of it.
    picked = tensor[tuple(torch.unravel_index(flat.to(tensor.device), tensor.shape))] if tensor.ndim else tensor.view(1)
    return picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _words(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
