"""Messages between the ranks of a pipeline: activations down, gradients up, sent and received in the background.

Receives are posted ahead of need and sends are never waited for on the way, so transfers run while a stage computes. Each
direction has a process group of its own, so that backends that order messages per group cannot make the two wait for each
other. Shapes are sent once per pattern and link, in a small header; after that both ranks know them.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from telltale.errors import DataError
from telltale.train.pipeline.runtime.failures import FlightRecord

_HEADER_BYTES = 4096
_SLOTS = 16
"""Messages that may cross one cut for one minibatch, the digest last; part of the message tag."""
_HEADER_TAG = 1 << 30


@dataclass(frozen=True)
class TensorSpec:
    """What crosses a cut for minibatches of one pattern: shape, dtype, whether a gradient comes back, and the strides, since
    kernels round otherwise in another memory layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    strides: tuple[int, ...] = field(compare=False)

    @classmethod
    def of(cls, value: Tensor) -> TensorSpec:
        """The spec of ``value``."""
        strides = torch.empty_like(value, device="meta").stride()  # those of a copy: without gaps
        return cls(tuple(value.shape), value.dtype, value.requires_grad, strides)

    def flat(self, value: Tensor) -> Tensor:
        """The numbers of ``value`` in the order in which :meth:`shaped` reads them."""
        value = value.detach()
        if value.stride() != self.strides:
            value = value.new_empty_strided(self.shape, self.strides).copy_(value)
        return value.as_strided((value.numel(),), (1,))

    def shaped(self, flat: Tensor) -> Tensor:
        """:meth:`flat` undone."""
        return flat.as_strided(self.shape, self.strides)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Link:
    """One direction between this rank and a peer of a neighbouring stage."""

    def __init__(
        self, peer: int, group: dist.ProcessGroup, record: FlightRecord, device: torch.device, *, what: str
    ) -> None:
        self.peer, self.group, self.record, self.device, self.what = peer, group, record, device, what
        self.bytes = 0
        self._specs: dict[Hashable, tuple[TensorSpec, ...]] = {}
        self._sending: deque[tuple[int, dist.Work, Tensor]] = deque()
        self._digests: dict[int, tuple[dist.Work, Tensor]] = {}
        self._receiving: dict[int, list[tuple[dist.Work, Tensor]]] = {}

    def send_values(self, minibatch: int, pattern: Hashable, values: Sequence[Tensor], digest: int) -> None:
        """Send the digest of the minibatch and the outputs of its forward; the first of a pattern are preceded by a header.

        Raises :class:`~telltale.errors.DataError` if shapes or dtypes differ from the first ones of this pattern.
        """
        specs = tuple(TensorSpec.of(value) for value in values)
        if len(specs) > _SLOTS - 1:
            raise DataError(
                f"minibatch {minibatch} sends {len(specs)} tensors across a cut; expected at most {_SLOTS - 1}."
            )
        self._isend(minibatch, minibatch * _SLOTS + _SLOTS - 1, torch.tensor([digest], device=self.device))
        expected = self._specs.get(pattern)
        if expected is None:
            self._isend(minibatch, _HEADER_TAG + len(self._specs), _header(specs, self.device))
            self._specs[pattern] = specs
        elif expected != specs:
            raise DataError(
                f"minibatch {minibatch} sends {', '.join(map(str, specs))} to the next stage; expected "
                f"{', '.join(map(str, expected))} as in the first minibatch of its kind."
            )
        self.send(minibatch, values, self._specs[pattern])

    def send(self, minibatch: int, tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> None:
        """Start sending ``tensors`` as the receiver expects them; they are kept alive until :meth:`wait_sent`."""
        for slot, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
            self._isend(minibatch, minibatch * _SLOTS + slot, spec.flat(tensor))

    def wait_sent(self, through: int) -> None:
        """Let go of what was sent for minibatches up to ``through``; call it when the peer must have received them."""
        while self._sending and self._sending[0][0] <= through:
            minibatch, work, _ = self._sending.popleft()
            self._wait(work, f"rank {self.peer} to take the {self.what} of minibatch {minibatch}")

    def specs(self, minibatch: int, pattern: Hashable) -> tuple[TensorSpec, ...]:
        """The specs of ``pattern``, received from the peer if this is its first minibatch."""
        if pattern not in self._specs:
            buffer = torch.empty(_HEADER_BYTES, dtype=torch.uint8, device=self.device)
            work = self._irecv(buffer, _HEADER_TAG + len(self._specs), minibatch)
            self._wait(work, f"the shapes of the {self.what} of minibatch {minibatch} from rank {self.peer}")
            self._specs[pattern] = _read_header(buffer)
        return self._specs[pattern]

    def post_digest(self, minibatch: int) -> None:
        """Start receiving the digest of ``minibatch``."""
        if minibatch not in self._digests:
            buffer = torch.empty(1, dtype=torch.int64, device=self.device)
            self._digests[minibatch] = (
                self._irecv(buffer, minibatch * _SLOTS + _SLOTS - 1, minibatch),
                buffer,
            )

    def check_minibatch(self, minibatch: int, digest: int) -> None:
        """Raise :class:`~telltale.errors.DataError` unless the peer's minibatch of this number has ``digest``, too."""
        self.post_digest(minibatch)
        work, buffer = self._digests.pop(minibatch)
        self._wait(work, f"the {self.what} of minibatch {minibatch} from rank {self.peer}")
        if int(buffer) != digest:
            raise different_minibatches(self.peer, self.record.rank, minibatch)

    def knows(self, pattern: Hashable) -> bool:
        """Whether the specs of ``pattern`` need no header any more."""
        return pattern in self._specs

    def post_receive(self, minibatch: int, specs: Sequence[TensorSpec]) -> None:
        """Start receiving tensors of ``specs`` for ``minibatch``, into fresh buffers: autograd may keep an earlier one."""
        if minibatch in self._receiving:
            return
        buffers = [torch.empty(math.prod(spec.shape), dtype=spec.dtype, device=self.device) for spec in specs]
        self._receiving[minibatch] = [
            (self._irecv(buffer, minibatch * _SLOTS + slot, minibatch), buffer) for slot, buffer in enumerate(buffers)
        ]

    def receive(self, minibatch: int, specs: Sequence[TensorSpec]) -> list[Tensor]:
        """The tensors of ``minibatch``, once they are here."""
        self.post_receive(minibatch, specs)
        arrived = []
        for spec, (work, buffer) in zip(specs, self._receiving.pop(minibatch), strict=True):
            self._wait(work, f"the {self.what} of minibatch {minibatch} from rank {self.peer}")
            arrived.append(spec.shaped(buffer))
        return arrived

    def _isend(self, minibatch: int, tag: int, tensor: Tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()
        work = self._start(dist.isend, tensor, self.peer, tag, f"{self.what} of minibatch {minibatch}")
        self._sending.append((minibatch, work, tensor))

    def _irecv(self, buffer: Tensor, tag: int, minibatch: int) -> dist.Work:
        return self._start(dist.irecv, buffer, self.peer, tag, f"the {self.what} of minibatch {minibatch}")

    def _start(self, call: Any, tensor: Tensor, peer: int, tag: int, what: str) -> dist.Work:
        with self.record.waiting(what, peer):
            return call(tensor, peer, group=self.group, tag=tag)

    def _wait(self, work: dist.Work, what: str) -> None:
        with self.record.waiting(what, self.peer):
            work.wait()


def _header(specs: Sequence[TensorSpec], device: torch.device) -> Tensor:
    rows = [[spec.shape, str(spec.dtype).removeprefix("torch."), spec.requires_grad, spec.strides] for spec in specs]
    raw = json.dumps(rows).encode()
    if len(raw) > _HEADER_BYTES:
        raise DataError(f"the shapes of {len(specs)} tensors take {len(raw)} bytes; expected at most {_HEADER_BYTES}.")
    return torch.tensor(list(raw.ljust(_HEADER_BYTES)), dtype=torch.uint8, device=device)


def _read_header(buffer: Tensor) -> tuple[TensorSpec, ...]:
    rows = json.loads(bytes(buffer.tolist()).decode())
    return tuple(
        TensorSpec(tuple(shape), getattr(torch, dtype), grad, tuple(strides)) for shape, dtype, grad, strides in rows
    )


def different_minibatches(first: int, second: int, minibatch: int) -> DataError:
    """What to raise where two ranks have different data under the same number."""
    return DataError(
        f"ranks {first} and {second} were given different data as minibatch {minibatch}; expected the same minibatch under the "
        f"same number on every rank (a shuffled loader needs the same seed everywhere)."
    )


@dataclass(frozen=True)
class RankPlacement:
    """The stage and replica of a rank, and its links by the peer's replica number."""

    stage: int
    replica: int
    values_in: tuple[Link, ...]
    values_out: tuple[Link, ...]
    gradients_in: tuple[Link, ...]
    gradients_out: tuple[Link, ...]
