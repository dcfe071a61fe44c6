"""The binary frames between edge and server: a request, an answer, a refusal. Byte-exact, versioned, checked.

A request is 26 bytes, the index set and the payload::

    magic 0x54 1 | version 1 | flags 1 | request 4 | model 2 | codec 1 | setting 1 | budget 4 | deadline ms 2
    rows 1 | columns 1 | patch 1 | count 2 | index set | payload | CRC-32 4        (little-endian)

Everything that a receiver allocates is bounded by what it has checked first. NumPy only; no PyTorch.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from telltale.edge.codecs import codec_named, codec_number, codec_of_number
from telltale.edge.index_coding import decode_indices, encode_indices, index_form
from telltale.errors import DataError

MAGIC, VERSION = 0x54, 1
REQUEST, ANSWER, REFUSAL = 0, 1, 2
_HEAD = struct.Struct("<BBBIHBBIHBBBH")
_ANSWER = struct.Struct("<BBBIHH")
_REFUSAL = struct.Struct("<BBBIB")
_CHECK = struct.Struct("<I")
OVERHEAD = _HEAD.size + _CHECK.size
"""Bytes of a request beside index set and payload."""
LARGEST_MESSAGE = 1 << 20
LARGEST_IMAGE = 1 << 22
"""Pixels of the largest image that a request may describe."""
LARGEST_CLASSES = 65_535

REFUSALS = {
    "malformed": 1,
    "version": 2,
    "checksum": 3,
    "grid": 4,
    "codec": 5,
    "indices": 6,
    "payload": 7,
    "model": 8,
    "too_large": 9,
    "busy": 10,
    "closing": 11,
    "late": 12,
    "failed": 13,
    "over_budget": 14,
}
"""Kinds of refusal and their codes."""


class FrameError(DataError):
    """A frame that cannot be read; ``kind`` is one of :data:`REFUSALS`, ``request`` its number or 0 if that is lost."""

    def __init__(self, kind: str, message: str, *, request: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.request = request


@dataclass(frozen=True)
class Frame:
    """A request. ``indices``: patches in rising order, empty for codecs of whole images. ``deadline``: milliseconds left, 0: none.

    ``model``: the server's number of grid and labels (:func:`model_number`). ``budget``: bytes that the request was allowed.
    """

    request: int
    model: int
    codec: str
    setting: int
    budget: int
    deadline: int
    rows: int
    columns: int
    patch: int
    indices: tuple[int, ...]
    payload: bytes

    def encode(self) -> bytes:
        """The frame's bytes. Raises DataError for a field that does not fit."""
        try:
            head = _HEAD.pack(
                *(
                    MAGIC,
                    VERSION,
                    REQUEST,
                    self.request,
                    self.model,
                    codec_number(self.codec),
                    self.setting,
                    self.budget,
                ),
                *(self.deadline, self.rows, self.columns, self.patch, len(self.indices)),
            )
        except struct.error as error:
            raise DataError(f"a field of the frame is out of range: {error}.") from error
        body = head + encode_indices(self.indices, self.rows * self.columns) + self.payload
        return body + _CHECK.pack(crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> Frame:
        """Read a request. Raises :class:`FrameError`, whose kind tells what is wrong, for anything that is none."""
        head = _opened(data, REQUEST, _HEAD)
        request, model, codec, setting, budget, deadline, rows, columns, patch, count = head[3:]
        if rows < 1 or columns < 1 or patch < 1 or rows * columns * patch * patch > LARGEST_IMAGE:
            raise FrameError(
                "grid", f"a grid of {rows} x {columns} patches of {patch} is not allowed.", request=request
            )
        try:
            name = codec_of_number(codec)
        except DataError as error:
            raise FrameError("codec", str(error), request=request) from error
        kind = codec_named(name)
        if setting >= kind.settings:
            raise FrameError("codec", f"codec {name} has no setting {setting}.", request=request)
        if count > rows * columns or (count == 0) == kind.uses_patches:
            raise FrameError(
                "indices", f"{count} patches of {rows * columns} do not go with codec {name}.", request=request
            )
        border = _HEAD.size + index_form(rows * columns, count)[1]
        if border > len(data) - _CHECK.size:
            raise FrameError("malformed", "the frame ends inside its index set.", request=request)
        try:
            indices = decode_indices(data[_HEAD.size : border], rows * columns, count)
        except DataError as error:
            raise FrameError("indices", str(error), request=request) from error
        payload = data[border : -_CHECK.size]
        return cls(request, model, name, setting, budget, deadline, rows, columns, patch, tuple(indices), payload)

    def image(self) -> np.ndarray:
        """The pixels (height, width, 3) uint8, 0 where none were sent. Raises FrameError for a foreign payload."""
        shape = (self.rows * self.patch, self.columns * self.patch)
        try:
            return codec_named(self.codec).decode(self.payload, self.indices, shape, self.patch, self.setting)
        except DataError as error:
            raise FrameError("payload", str(error), request=self.request) from error

    @property
    def framing(self) -> int:
        """Bytes beside index set and payload."""
        return OVERHEAD


@dataclass(frozen=True)
class Answer:
    """What the server says: log-probabilities (classes,) float32 of one request, and how long its model took, in microseconds."""

    request: int
    log_probabilities: np.ndarray
    model_microseconds: int = 0

    def encode(self) -> bytes:
        """The frame's bytes."""
        values = np.asarray(self.log_probabilities, dtype="<f4")
        taken = min(self.model_microseconds // 100, 65_535)
        body = _ANSWER.pack(MAGIC, VERSION, ANSWER, self.request, taken, len(values)) + values.tobytes()
        return body + _CHECK.pack(crc32(body))


@dataclass(frozen=True)
class Refusal:
    """Why the server gives no answer. ``kind``: one of :data:`REFUSALS`."""

    request: int
    kind: str
    message: str = ""

    def encode(self) -> bytes:
        """The frame's bytes; the message is cut at 200 of them."""
        text = self.message.encode()[:200]
        body = _REFUSAL.pack(MAGIC, VERSION, REFUSAL, self.request, REFUSALS[self.kind]) + text
        return body + _CHECK.pack(crc32(body))


def decode_reply(data: bytes) -> Answer | Refusal:
    """Read what a server sent. Raises :class:`FrameError` for anything else, for NaN too."""
    if len(data) >= 3 and data[2] == REFUSAL:
        _, _, _, request, code = _opened(data, REFUSAL, _REFUSAL)
        names = {number: name for name, number in REFUSALS.items()}
        text = data[_REFUSAL.size : -_CHECK.size].decode(errors="replace")
        return Refusal(request, names.get(code, "failed"), text)
    _, _, _, request, taken, classes = _opened(data, ANSWER, _ANSWER)
    body = data[_ANSWER.size : -_CHECK.size]
    if classes == 0 or len(body) != 4 * classes:
        raise FrameError("malformed", f"an answer for {classes} classes has {len(body)} bytes.", request=request)
    values = np.frombuffer(body, dtype="<f4")
    if (
        np.isnan(values).any()
        or values.max() > 1e-3
        or not abs(float(np.exp(values.astype(np.float64)).sum()) - 1) < 1e-2
    ):
        raise FrameError("malformed", "an answer holds no log-probabilities.", request=request)
    return Answer(request, values, 100 * taken)


def model_number(rows: int, columns: int, patch: int, labels: tuple[str, ...]) -> int:
    """16 bits that two models share if grid and labels are the same."""
    return crc32(repr((rows, columns, patch, list(labels))).encode()) & 0xFFFF


def websocket_header(length: int, *, masked: bool = True) -> int:
    """Bytes that RFC 6455 puts before a message of ``length`` bytes; a client masks."""
    return (2 if length < 126 else 4 if length < 65_536 else 10) + 4 * masked


def _opened(data: bytes, kind: int, head: struct.Struct) -> tuple[int, ...]:
    """The header's fields, after length, magic, version, kind and checksum have been checked."""
    if len(data) > LARGEST_MESSAGE:
        raise FrameError("too_large", f"the frame has {len(data)} bytes; at most {LARGEST_MESSAGE} are allowed.")
    if len(data) < head.size + _CHECK.size or data[0] != MAGIC:
        raise FrameError("malformed", f"{len(data)} bytes are no frame of telltale.")
    if data[1] != VERSION:
        raise FrameError("version", f"the frame has version {data[1]}; expected {VERSION}.")
    if data[2] != kind:
        raise FrameError("malformed", f"the frame is of kind {data[2]}; expected {kind}.")
    if crc32(data[: -_CHECK.size]) != _CHECK.unpack(data[-_CHECK.size :])[0]:
        raise FrameError(
            "checksum", "the frame's checksum does not match its bytes.", request=int.from_bytes(data[3:7], "little")
        )
    return head.unpack_from(data)
