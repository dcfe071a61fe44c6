"""Which patches a frame holds, in as few bytes as their number allows: a list, a bitmap, or the set's rank among all sets.

Sender and receiver know the patches N and the count, and so agree on the form without a byte for it. The rank
(enumerative coding, Cover 1973) takes ceil(log2 C(N, count)) bits, the least possible for sets that are equally likely.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import comb

import numpy as np

from telltale.errors import DataError

LARGEST_GRID = 1 << 16
LARGEST_ENUMERATED = 4096
"""Above so many patches ranks would be slow to compute (numbers of that many bits), and the others are used."""


def encode_indices(indices: Iterable[int], n: int) -> bytes:
    """The set ``indices`` of patches 0..n-1 as bytes; order is not kept (patches travel in raster order).

    Raises :class:`~telltale.errors.DataError` for an index out of range or given twice, or more than 65,536 patches.
    """
    _check_grid(n)
    ordered = sorted(int(index) for index in indices)
    if ordered and not 0 <= ordered[0] <= ordered[-1] < n:
        raise DataError(f"indices reach from {ordered[0]} to {ordered[-1]}; expected 0 to {n - 1}.")
    if len(set(ordered)) != len(ordered):
        raise DataError("indices name a patch twice; expected distinct patches.")
    form, size = index_form(n, len(ordered))
    if form == "list":
        width = _list_width(n)
        number = sum(index << (width * place) for place, index in enumerate(ordered))
    elif form == "bitmap":
        number = sum(1 << index for index in ordered)
    else:
        number = sum(comb(index, place + 1) for place, index in enumerate(ordered))
    return number.to_bytes(size, "little")


def decode_indices(data: bytes, n: int, count: int) -> list[int]:
    """The ``count`` indices in rising order that :func:`encode_indices` wrote.

    Raises :class:`~telltale.errors.DataError` for anything that it cannot have written.
    """
    _check_grid(n)
    if not 0 <= count <= n:
        raise DataError(f"{count} of {n} patches cannot be; expected 0 to {n}.")
    form, size = index_form(n, count)
    if len(data) != size:
        raise DataError(f"the index set has {len(data)} bytes; expected {size} for {count} of {n} patches.")
    number = int.from_bytes(data, "little")
    if form == "list":
        width = _list_width(n)
        indices = [(number >> (width * place)) & ((1 << width) - 1) for place in range(count)]
        if number >> (width * count):
            raise DataError("the index list has bits beyond its last index.")
    elif form == "bitmap":
        if number >> n:
            raise DataError(f"the bitmap has a patch beyond {n - 1}.")
        # One shift for each patch would copy the whole bitmap each time: seconds of work for a hostile frame of 8 KiB.
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        indices = np.flatnonzero(bits).tolist()
    else:
        indices = _from_rank(number, n, count)
    rising = all(low < high for low, high in pairwise(indices))
    if len(indices) != count or not rising or (indices and indices[-1] >= n):
        raise DataError(f"the index set does not hold {count} distinct patches of {n}.")
    return indices


def index_form(n: int, count: int) -> tuple[str, int]:
    """Form (``list``, ``bitmap`` or ``rank``) and bytes of a set: the shortest; at equal length the first of these."""
    sizes = {"list": (count * _list_width(n) + 7) // 8, "bitmap": (n + 7) // 8}
    if n <= LARGEST_ENUMERATED:
        sizes["rank"] = ((comb(n, count) - 1).bit_length() + 7) // 8
    form = min(sizes, key=lambda name: sizes[name])
    return form, sizes[form]


def _from_rank(rank: int, n: int, count: int) -> list[int]:
    """Invert rank = sum_i C(c_i, i) for c_1 < c_2 < ...; binomials are carried along, not computed anew."""
    if rank >= comb(n, count):
        raise DataError(f"the rank of the index set is beyond C({n}, {count}).")
    indices = []
    candidate, remaining = n - 1, count
    ways = comb(candidate, remaining) if count else 0
    while remaining:
        if ways <= rank:
            rank -= ways
            indices.append(candidate)
            # C(c - 1, r - 1) = C(c, r) r / c; for c < r C(c, r) is 0 and has to be computed.
            ways = ways * remaining // candidate if ways else comb(max(candidate - 1, 0), remaining - 1)
            remaining -= 1
        else:
            ways = ways * (candidate - remaining) // candidate
        candidate -= 1
    return indices[::-1]


def _list_width(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _check_grid(n: int) -> None:
    if not 1 <= n <= LARGEST_GRID:
        raise DataError(f"a grid of {n} patches is not allowed; expected 1 to {LARGEST_GRID}.")
