import itertools
import struct
from math import comb, log2
from zlib import crc32

import numpy as np
import pytest

from telltale.edge.index_coding import decode_indices, encode_indices, index_form
from telltale.edge.wire import OVERHEAD, Answer, Frame, FrameError, Refusal, decode_reply, websocket_header
from telltale.errors import DataError


def frame(**changed):
    fields = {
        "request": 7,
        "model": 9,
        "codec": "raw8",
        "setting": 0,
        "budget": 4000,
        "deadline": 250,
        "rows": 8,
        "columns": 8,
        "patch": 4,
        "indices": (1, 5, 60),
        "payload": bytes(range(144)),
        **changed,
    }
    return Frame(**fields)


def resealed(data, position, values):
    """The frame with other bytes at ``position`` and a checksum that fits them."""
    body = data[:position] + values + data[position + len(values) : -4]
    return body + struct.pack("<I", crc32(body))


def test_every_subset_of_ten_comes_back():
    for count in range(11):
        for subset in itertools.combinations(range(10), count):
            assert decode_indices(encode_indices(subset, 10), 10, count) == list(subset)


@pytest.mark.parametrize("n", [1, 2, 64, 196, 577, 4096, 5000])
def test_random_subsets_come_back(n):
    generator = np.random.default_rng(n)
    for count in {0, 1, n // 3, n - 1, n}:
        subset = generator.permutation(n)[:count].tolist()
        assert decode_indices(encode_indices(subset, n), n, count) == sorted(subset)


def test_the_index_set_takes_its_entropy():
    for count, bits in ((16, 77), (32, 123), (48, 154), (64, 175), (96, 192)):
        assert log2(comb(196, count)) <= bits < log2(comb(196, count)) + 1
        assert index_form(196, count)[1] == (bits + 7) // 8
    assert index_form(196, 1) == ("list", 1)
    assert index_form(5000, 2500)[0] == "bitmap"


def test_what_no_sender_wrote_is_refused():
    with pytest.raises(DataError, match="twice"):
        encode_indices([1, 1], 4)
    with pytest.raises(DataError, match="0 to 3"):
        encode_indices([4], 4)
    with pytest.raises(DataError, match="grid"):
        encode_indices([0], 1 << 17)
    with pytest.raises(DataError, match="bytes"):
        decode_indices(b"\0\0\0", 196, 48)
    with pytest.raises(DataError, match="beyond"):
        decode_indices(b"\xff" * index_form(196, 48)[1], 196, 48)
    with pytest.raises(DataError):
        decode_indices(b"\xff" * index_form(5000, 2)[1], 5000, 2)
    with pytest.raises(DataError):
        decode_indices(b"\xff" * 625, 5000, 2500)


def test_a_frame_comes_back_bit_for_bit():
    sent = frame()
    data = sent.encode()
    assert Frame.decode(data) == sent
    assert len(data) == OVERHEAD + index_form(64, 3)[1] + 144
    assert OVERHEAD + websocket_header(len(data)) <= 40
    image = sent.image()
    assert image[0, 4].tolist() == [0, 1, 2]
    assert (image[0, :4] == 0).all()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "malformed"),
        (b"hello there, this is no frame", "malformed"),
        (frame().encode()[:20], "malformed"),
        (frame().encode()[:-1], "checksum"),
        (frame().encode()[:-1] + b"\0", "checksum"),
        (b"\x54\x09" + frame().encode()[2:], "version"),
        (resealed(frame().encode(), 9, b"\xc8"), "codec"),
        (resealed(frame().encode(), 10, b"\x63"), "codec"),
        (resealed(frame().encode(), 17, b"\0"), "grid"),
        (resealed(frame().encode(), 17, b"\xff\xff\xff"), "grid"),
        (resealed(frame().encode(), 20, b"\0\0"), "indices"),
        (resealed(frame().encode(), 20, b"\x41\0"), "indices"),
        (resealed(frame().encode(), 22, b"\xff\xff"), "indices"),
        (bytes(1 << 21), "too_large"),
    ],
)
def test_each_damage_has_its_name(data, kind):
    with pytest.raises(FrameError) as caught:
        Frame.decode(data)
    assert caught.value.kind == kind


def test_a_duplicate_index_cannot_be_written_nor_read():
    big = frame(rows=100, columns=50, patch=1, indices=(3, 9), payload=bytes(6)).encode()
    assert index_form(5000, 2)[0] == "list"
    twice = (3 | 3 << 13).to_bytes(4, "little")
    with pytest.raises(FrameError, match="distinct"):
        Frame.decode(resealed(big, 22, twice))


def test_a_payload_of_another_size_is_refused():
    short = Frame.decode(frame(payload=bytes(143)).encode())
    with pytest.raises(FrameError, match="143 bytes"):
        short.image()


def test_random_and_mutated_bytes_are_read_or_refused():
    generator = np.random.default_rng(0)
    whole = frame().encode()
    for number in range(10_000):
        if number % 3 == 0:
            data = generator.bytes(int(generator.integers(0, 300)))
        else:
            mutated = bytearray(whole)
            for place in generator.integers(0, len(whole), int(generator.integers(1, 6))):
                mutated[place] = int(generator.integers(256))
            data = bytes(mutated)
            if number % 3 == 2:
                data = resealed(data, 0, b"\x54\x01\x00")
        try:
            Frame.decode(data).image()
        except FrameError:
            continue


def test_replies_come_back_and_lies_do_not():
    logs = np.log(np.array([0.7, 0.2, 0.1], dtype=np.float32))
    answer = decode_reply(Answer(3, logs, 12_345).encode())
    assert answer.request == 3
    assert answer.log_probabilities.tolist() == logs.tolist()
    assert answer.model_microseconds == 12_300
    refusal = decode_reply(Refusal(4, "busy", "come again").encode())
    assert refusal == Refusal(4, "busy", "come again")
    for lie in (logs * np.nan, logs + 5, logs - 3, np.zeros(0)):
        with pytest.raises(FrameError):
            decode_reply(Answer(3, lie).encode())
    for garbage in (b"", b"\x54\x01\x01", bytes(40), Answer(3, logs).encode()[:-2]):
        with pytest.raises(FrameError):
            decode_reply(garbage)
