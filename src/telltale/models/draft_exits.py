"""Early exits with a way of their own to the draft, trained beside a frozen model, in a small file beside its checkpoint.

An ordinary checkpoint's early layers say little about its output: SmolLM2's exits agree with its last layer on .15 to .23 of the
tokens. A draft exit adds what the *late* layers have already left in the cache: their values at the last token that is verified,
which say where the text was going (EAGLE, arXiv 2401.15077, takes the last layer's state there). A linear map of both, a gated MLP
(as in Kangaroo's adapter, arXiv 2404.18911) and a norm lead to the model's own head, cut down to a shortlist of the vocabulary (as
FR-Spec, arXiv 2502.14856). Drafts are checked by the whole model, so none of this can change what is decoded, only how fast.

This file holds the weights, their arithmetic in PyTorch and their file; :mod:`telltale.models.draft_heads` makes them ready for a
decoder, ``telltale layerskip retrofit`` trains them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from telltale.errors import CheckpointError
from telltale.models.gguf import is_gguf
from telltale.runs.files import write_atomically

FILE = "draft_exits.safetensors"
EPSILON = 1e-6
"""Of the exits' own norms, which are Llama's in every family."""
STEPS = 3
"""Draft steps that read the late layers by a map of their own: the further from the verified token, the less it says. Later
steps take the last map."""
READS = tuple(f"read_{step}" for step in range(STEPS))
MATRICES = ("state", *READS, "gate", "up", "down")
BIASES = tuple(f"{name}_bias" for name in READS)
NORMS = ("state_norm", "mlp_norm", "norm")
_FORMAT = "1"
_ATTRIBUTE = "draft_exits_source"
_BLOCK, _BLOCKS = 1 << 16, 1024
"""Bytes of a block, and blocks of a file, that a fingerprint reads."""


@dataclass(frozen=True)
class DraftExit:
    """The weights of the exit after layer ``exit_layer``.

    ``state`` (hidden, hidden); a ``read`` for each of the first steps (hidden, late layers x kv heads x head dim) with a bias;
    ``gate`` and ``up`` (width, hidden), ``down`` (hidden, width); three norms (hidden,).
    """

    exit_layer: int
    weights: Mapping[str, Tensor]

    @property
    def width(self) -> int:
        """Inner size of the MLP."""
        return self.weights["gate"].shape[0]


@dataclass(frozen=True)
class DraftExits:
    """Draft exits of one checkpoint: ``exits`` by layer, the ``late_layers`` whose values they read, and the ``shortlist``
    (tokens,) int64 of what they can draft, in ascending order.

    ``made_for``: :func:`checkpoint_fingerprint` of the checkpoint. ``report``: what they were measured to be worth.
    """

    exits: Mapping[int, DraftExit]
    late_layers: tuple[int, ...]
    shortlist: Tensor
    made_for: str
    report: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"shortlist": self.shortlist.to(torch.int32).contiguous()}
        for layer, one in self.exits.items():
            for name, weight in one.weights.items():
                tensors[f"exit.{layer}.{name}"] = weight.detach().to(torch.bfloat16).contiguous()
        metadata = {
            "format": _FORMAT,
            "made_for": self.made_for,
            "exits": json.dumps(sorted(self.exits)),
            "late_layers": json.dumps(self.late_layers),
            "report": json.dumps(dict(self.report)),
        }
        write_atomically(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> DraftExits:
        """Read what :meth:`save` wrote. Raises :class:`~telltale.errors.CheckpointError` for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != _FORMAT:
                raise CheckpointError(
                    f"{path} is of format {about.get('format')!r}; expected {_FORMAT!r}. Retrofit again."
                )
            names = (*MATRICES, *BIASES, *NORMS)
            exits = {
                layer: DraftExit(layer, {name: tensors[f"exit.{layer}.{name}"] for name in names})
                for layer in json.loads(about["exits"])
            }
            late, report = tuple(json.loads(about["late_layers"])), json.loads(about["report"])
            if not all(bool(one.isfinite().all()) for one in tensors.values()):
                raise ValueError("some of its numbers are not finite")
            return cls(exits, late, tensors["shortlist"].long(), about["made_for"], report)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} holds no draft exits or is damaged: {error}. Retrofit again, or delete it."
            ) from error


def draft_exits_path(checkpoint: str | Path) -> Path:
    """Where the draft exits of ``checkpoint`` lie: in its folder, or beside its GGUF file under that file's name."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}.{FILE}") if is_gguf(path) else path / FILE


def checkpoint_fingerprint(checkpoint: str | Path) -> str:
    """32 hexadecimal digits for the weights of ``checkpoint``, whatever dtype they are loaded in: sizes, and 64 MB of each file.

    Not every number is read, which would take seconds: drafts for weights that were edited here and there are checked all the same.
    """
    path = Path(checkpoint)
    files = [path] if is_gguf(path) else _weight_files(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}\0".encode())
        step = max(_BLOCK, size // _BLOCKS)
        with file.open("rb") as stream:
            for start in range(0, size, step):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    index, found = folder / "model.safetensors.index.json", set(folder.glob("model*.safetensors"))
    if index.is_file():
        found |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    return sorted(found)


def remember_source(model: Any, checkpoint: str | Path) -> None:
    """Have ``model``, just loaded from ``checkpoint``, know where its draft exits would be; nothing is read yet."""
    setattr(model, _ATTRIBUTE, Path(checkpoint).absolute())


def draft_exits_of(model: Any) -> DraftExits | None:
    """The draft exits beside the checkpoint that ``model`` was loaded from; None if there are none.

    Raises :class:`~telltale.errors.CheckpointError` for a damaged file, and for one that was made for other weights.
    """
    source = getattr(model, _ATTRIBUTE, None)
    if source is None:
        return None
    if isinstance(source, DraftExits):
        return source
    path = draft_exits_path(source)
    if not path.is_file():
        return None
    found = DraftExits.load(path)
    if found.made_for != checkpoint_fingerprint(source):
        raise CheckpointError(
            f"{path} was made for other weights than those of {source}; run `telltale layerskip retrofit` again, or delete it."
        )
    return found


@contextmanager
def attached(model: Any, exits: DraftExits) -> Iterator[None]:
    """Have decoders that are opened in the block find ``exits`` with ``model``, as if they lay beside its checkpoint."""
    before = getattr(model, _ATTRIBUTE, None)
    setattr(model, _ATTRIBUTE, exits)
    try:
        yield
    finally:
        setattr(model, _ATTRIBUTE, before)


def draft_states(weights: Mapping[str, Tensor], state: Tensor, values: Tensor, step: int) -> Tensor:
    """What a head reads for draft ``step`` (0 is the first), (..., hidden).

    ``state`` (..., hidden): the exit's layer's output; ``values`` (..., late layers x kv heads x head dim): the last verified
    token's.
    """
    read = READS[min(step, STEPS - 1)]
    hidden = functional.linear(rms_norm(state, weights["state_norm"]), weights["state"])
    hidden = hidden + functional.linear(values, weights[read], weights[f"{read}_bias"])
    inner = rms_norm(hidden, weights["mlp_norm"])
    gate = functional.silu(functional.linear(inner, weights["gate"]))
    hidden = hidden + functional.linear(gate * functional.linear(inner, weights["up"]), weights["down"])
    return rms_norm(hidden, weights["norm"])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) times ``weight``, computed in float32, in the dtype of ``x``."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * weight.float()).to(x.dtype)
