"""Weights in 8 bits: groups of 32 along a row share a scale in half precision, as in llama.cpp's Q8_0.

A weight is the number nearest to ``scale * value`` in the model's dtype. :func:`quantize` writes these numbers into the model, so
every backend, PyTorch and training see a plain model; the short form goes along as an attribute of the parameter. It is a faster
way to read the same numbers and never the truth: the native step compares both and reads the short form only where they are
equal to the bit. Activations are not quantised; they stay in the model's dtype.

Numbers that are ``scale * value`` already, with some value of a group at 127, come out as they were: so weights that a GGUF file
has as Q8_0 are taken as they are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models.families import parts_of

GROUP = 32
"""Weights that share a scale."""
ROWS = 4
"""Rows that lie together, as the native step reads them."""
TILE = 16
"""Rows that lie together where it reads them by a processor's matrix tiles."""
LEAD = 64
"""Bytes before the first value that may be read: some processors take the bytes of a word from four places, one byte apart."""
ORDERS = ("rows", "tiles", "pairs", "eights")
"""Orders of the values (see :meth:`Int8Weights.arrange`), by the numbers that the native step has for them."""
LARGEST = 127
_ON_A_GRID = 0.5
"""A matrix of which so many groups are on a grid of Q8_0 is one: for the others all steps of such a grid are tried."""
_NAME = "int8_weights"
_ARRANGING = threading.Lock()
_AT_ONCE = 1 << 24
"""Weights that are worked on at a time."""


@dataclass(eq=False)
class Int8Weights:
    """A matrix (rows, columns) in 8 bits, its edges filled up with zeros.

    ``values`` int8 (blocks of 4 rows, groups, 4, 32), behind ``LEAD`` bytes more; ``scales`` float16, flat: (blocks, groups, 4),
    and 16 more at the end. ``order``: which of :data:`ORDERS` they are in; all take the same memory.
    """

    values: Tensor
    scales: Tensor
    rows: int
    columns: int
    order: str = "rows"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.values.nbytes + self.scales.nbytes

    def dequantized(self) -> Tensor:
        """``scale * value`` (rows, columns) in float32, exactly."""
        values, scales = self.by_row()
        return (values.float() * scales.float().unsqueeze(-1)).flatten(1)[: self.rows, : self.columns]

    def by_row(self) -> tuple[Tensor, Tensor]:
        """Copies of values (rows, groups, 32) and scales (rows, groups), with rows that fill the last block."""
        with _ARRANGING:
            blocks, groups = self.values.shape[:2]
            values = _natural(self.values, self.order)
            values = values.transpose(1, 2).reshape(blocks * ROWS, groups, GROUP).clone()
            scales = self.scales[: blocks * groups * ROWS].view(blocks, groups, ROWS)
            scales = scales.transpose(1, 2).reshape(-1, groups).clone()
            if self.order == "tiles":
                tiled_values, tiled_scales = self._tiles()
                values[: self._in_tiles] = (tiled_values.permute(0, 3, 1, 2, 4) ^ -128).reshape(-1, groups, GROUP)
                scales[: self._in_tiles] = tiled_scales.permute(0, 3, 2, 4, 1).reshape(-1, groups)
        return values, scales

    def addresses(self, first_row: int, rows: int, order: str) -> tuple[int, int] | None:
        """Where values and scales of ``rows`` rows from ``first_row`` on begin; None if they begin or end inside of a block, or
        are in another order."""
        tiled = order == "tiles"
        ends = rows % TILE == 0 or first_row + rows == self.rows or not tiled
        if order != self.order or first_row % (TILE if tiled else ROWS) or not ends:
            return None
        groups = self.values.shape[1]
        return (
            self.values.data_ptr() + first_row * groups * GROUP,
            self.scales.data_ptr() + first_row * groups * self.scales.element_size(),
        )

    def arrange(self, order: str) -> None:
        """Put values from the order ``rows`` in another one, in place; in any other they stay as they are.

        ``pairs``: of the 32 values of a group (2, 8, 2) those at one place of all eight pairs are eight steps of four bytes apart,
        (8, 2, 2): the eight neighbours of a register, of even or of odd columns. ``eights``: the same of eight neighbours, (4, 8)
        as (8, 4). ``tiles``: 16 rows at a time in the order in which matrix tiles take them, but for a rest of fewer: values
        (tiles, groups, 16 pairs of columns, 16 rows, 2) as ``value + 128``, scales (tiles, groups, 16 rows) of which unpacking
        makes neighbours.
        """
        with _ARRANGING:
            if self.order != "rows" or order == "rows":
                return
            if order == "tiles":
                self._arrange_tiles()
            else:
                step = max(1, _AT_ONCE // (ROWS * self.values.shape[1] * GROUP))
                for part in self.values.split(step):
                    part.copy_(_interleaved(part, order))
            self.order = order

    def _arrange_tiles(self) -> None:
        groups = self.values.shape[1]
        tiled_values, tiled_scales = self._tiles()
        values = self.values[: self._in_tiles // ROWS].view(-1, TILE // ROWS, groups, ROWS, GROUP // 2, 2)
        scales = self.scales[: self._in_tiles * groups].view(-1, TILE // ROWS, groups, ROWS)
        step = max(1, _AT_ONCE // (TILE * groups * GROUP))
        for first in range(0, len(values), step):
            part = slice(first, first + step)
            tiled_values[part] = values[part].permute(0, 2, 4, 1, 3, 5).flatten(3, 4) ^ -128
            by_row = scales[part].transpose(1, 2).reshape(-1, groups, 2, 4, 2)
            tiled_scales[part] = by_row.transpose(2, 3).clone()

    @property
    def _in_tiles(self) -> int:
        return self.rows // TILE * TILE

    def _tiles(self) -> tuple[Tensor, Tensor]:
        """The memory of the rows that fill tiles: values (tiles, groups, 16, 16, 2), scales (tiles, groups, 4, 2, 2)."""
        groups = self.values.shape[1]
        values, scales = self.values[: self._in_tiles // ROWS], self.scales[: self._in_tiles * groups]
        return values.view(-1, groups, GROUP // 2, TILE, 2), scales.view(-1, groups, 4, 2, 2)


def _interleaved(values: Tensor, order: str) -> Tensor:
    """A copy of values (..., 32) in the order ``pairs`` or ``eights``."""
    if order == "pairs":
        return values.unflatten(-1, (2, 8, 2)).transpose(-3, -2).flatten(-3)
    return values.unflatten(-1, (4, 8)).transpose(-2, -1).flatten(-2)


def _natural(values: Tensor, order: str) -> Tensor:
    """:func:`_interleaved` the other way; values in any other order as they are."""
    if order == "pairs":
        return values.unflatten(-1, (8, 2, 2)).transpose(-3, -2).flatten(-3)
    return values.unflatten(-1, (8, 4)).transpose(-2, -1).flatten(-2) if order == "eights" else values


def _empty(blocks: int, groups: int) -> Tensor:
    """Room for values (blocks, groups, 4, 32) behind ``LEAD`` bytes, all zero."""
    return torch.zeros(LEAD + blocks * groups * ROWS * GROUP, dtype=torch.int8)[LEAD:].view(blocks, groups, ROWS, GROUP)


def gathered(short: Int8Weights, rows: Tensor) -> Int8Weights:
    """The given ``rows`` (n,) of a matrix in 8 bits, as one of its own."""
    groups = short.values.shape[1]
    kept, count = len(rows), -(-len(rows) // ROWS)
    rows = functional.pad(rows, (0, count * ROWS - len(rows)))
    values, scales = (numbers[rows] for numbers in short.by_row())
    own = scales.view(count, ROWS, groups).transpose(1, 2).reshape(-1)
    whole = _empty(count, groups)
    whole.copy_(values.view(count, ROWS, groups, GROUP).transpose(1, 2))
    return Int8Weights(whole, functional.pad(own, (0, 16)), kept, short.columns)


def int8_of(parameter: Any) -> Int8Weights | None:
    """The short form that goes along with ``parameter``, if it has one."""
    found = getattr(parameter, _NAME, None)
    return found if isinstance(found, Int8Weights) else None


def quantize(model: Any, dtype: torch.dtype) -> None:
    """Put the linear layers of ``model``, its head among them, on grids of 8 bits, and all of it in ``dtype``, in place.

    Raises :class:`~telltale.errors.ConfigError` for another dtype than float32 and bfloat16 and for a model that is not on the
    CPU, and :class:`~telltale.errors.UnsupportedModelError` naming what cannot be put in 8 bits.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"weights='int8' was asked for in {str(dtype).removeprefix('torch.')}; expected float32 or bfloat16, in which the "
            f"native step computes."
        )
    matrices = _matrices(model)
    short = {name: packed(name, matrix.weight.detach()) for name, matrix in matrices.items()}
    model.to(dtype)
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.weight.copy_(short[name].dequantized())
            setattr(matrix.weight, _NAME, short[name])


def _matrices(model: Any) -> dict[str, nn.Linear]:
    """Linear layers by name, those of the layers and the head; a weight that two of them share once."""
    parts = parts_of(model, listed=False)
    inside = {id(module) for module in parts.layers.modules()} | {id(parts.head)}
    found: dict[str, nn.Linear] = {}
    seen = set()
    for name, module in model.named_modules():
        if id(module) not in inside:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            kind = type(module).__name__
            if parameter.device.type != "cpu":
                raise ConfigError(f"weights='int8' is for models on the CPU; {name}.{own} is on {parameter.device}.")
            if type(module) is nn.Linear and own == "weight" and type(parameter) is nn.Parameter:
                if id(parameter) not in seen:
                    found[name] = module
                seen.add(id(parameter))
            elif parameter.ndim > 1 and "norm" not in kind.lower():
                raise UnsupportedModelError(
                    f"weights='int8' was asked for, and {name}.{own} of shape {tuple(parameter.shape)} is part of a {kind}; "
                    f"expected plain linear layers."
                )
    return found


def packed(name: str, weight: Tensor) -> Int8Weights:
    """``weight`` (rows, columns) in 8 bits. Raises :class:`~telltale.errors.UnsupportedModelError` with its ``name`` if it has
    numbers that are not finite."""
    rows, columns = weight.shape
    blocks, groups = -(-rows // ROWS), -(-columns // GROUP)
    values = _empty(blocks, groups)
    scales = torch.zeros(blocks * groups * ROWS + 16, dtype=torch.float16)
    by_block = scales[: blocks * groups * ROWS].view(blocks, groups, ROWS)
    step = max(1, _AT_ONCE // (ROWS * groups * GROUP))
    for first in range(0, blocks, step):
        part = weight[first * ROWS : (first + step) * ROWS].float()
        if not bool(torch.isfinite(part).all()):
            raise UnsupportedModelError(f"weights='int8' was asked for, and {name}.weight has NaN or infinite numbers.")
        count = -(-len(part) // ROWS)
        part = functional.pad(part, (0, groups * GROUP - columns, 0, count * ROWS - len(part)))
        own, scale = _on_grids(part.view(count * ROWS, groups, GROUP))
        if bool(torch.isinf(scale).any()):
            raise UnsupportedModelError(
                f"weights='int8' was asked for, and {name}.weight has numbers up to {float(part.abs().max()):.3g}, whose scale "
                f"half precision does not hold."
            )
        values[first : first + count] = own.view(count, ROWS, groups, GROUP).transpose(1, 2)
        by_block[first : first + count] = scale.view(count, ROWS, groups).transpose(1, 2)
    return Int8Weights(values, scales, rows, columns)


def _on_grids(given: Tensor) -> tuple[Tensor, Tensor]:
    """Values (..., 32) int8 and scales (...) float16 of groups (..., 32) float32."""
    most = given.abs().amax(-1)
    values, scales = _rounded(given, most / LARGEST)
    off = _off(given, values, scales)
    if 0 < int(off.sum()) < _ON_A_GRID * int((most > 0).sum()):
        # Who made the grid may have left its largest value free, or have used -128.
        for step in (128, *range(LARGEST - 1, 0, -1)):
            groups = given[off]
            own, scale = _rounded(groups, most[off] / step)
            hit = ~_off(groups, own, scale)
            place = off.nonzero()[hit].unbind(-1)
            values[place], scales[place] = own[hit], scale[hit]
            off[place] = False
            if not bool(off.any()):
                break
    return values, scales


def _rounded(given: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    # The smallest scales are multiples of 2^-24, to be rounded up: the group's largest value has to fit.
    scales = torch.where(scale < 2.0**-14, (scale * 2.0**24).ceil() * 2.0**-24, scale).half()
    divisor = torch.where(scales > 0, scales.float(), torch.ones(())).unsqueeze(-1)
    return (given / divisor).round().clamp(-128, LARGEST).to(torch.int8), scales


def _off(given: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Which groups (...) their grids do not give back."""
    return (values.float() * scales.float().unsqueeze(-1) != given).any(-1)
