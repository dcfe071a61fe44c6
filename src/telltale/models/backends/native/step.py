"""The backend behind the native step: the model's own weights by pointer, one C call per pass or per greedy loop.

A token's result is the same bits whatever the width of its pass, its row and the number of threads, because the step
fixes the order of every sum. In bfloat16 a processor's matrix tiles (AMX) compute passes of every width, prompts among them; so do
its vectors, in both dtypes, where it has AVX2 and no AVX-512. Elsewhere prompts longer than ``PREFILL_WIDTH`` go through the fused
PyTorch path (``prefill=True``), which has other bits.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import ConfigError, DataError, NumericalError
from telltale.models.attention import check_since
from telltale.models.backends.fused import FusedDecoder, fused_unavailable_reason
from telltale.models.backends.native import build
from telltale.models.backends.native.pointers import (
    ACTIVATIONS,
    LONG,
    POINTER,
    BlocksView,
    CacheView,
    DraftExitPointers,
    DraftExitView,
    ModelPointers,
    ModelView,
    activation_of,
    arithmetic_reason,
)
from telltale.models.cache import Cache
from telltale.models.families import parts_of
from telltale.models.int8_weights import ORDERS

PREFILL_WIDTH = 16
"""Tokens from which a prompt is worth handing to PyTorch's matrix products, where the native step has no such products."""
TILE_TOKENS = 256
"""Tokens of a prompt that go through all layers together by matrix tiles: the states of more leave the processor's cache."""
VECTOR_TOKENS = 96
"""The same by vectors, whose input are floats."""
SINGLE_THREAD_BYTES = 64 << 20
"""Below this weight size a second thread costs more in waiting than it saves."""


class NativeDecoder(FusedDecoder):
    """Families that the fused backend takes, on CPU in float32 or bfloat16.

    Weights are read in place; the model must not be moved meanwhile. Matrices in 8 bits
    (:mod:`telltale.models.int8_weights`) are read as long as they hold the model's own numbers, which is found out whenever a
    cache is made and when an engine gets a row while it has none; from then on the model's are read, with a warning.
    """

    backend = "native"

    def __init__(self, model: nn.Module, *, exact: bool = False, threads: int | None = None) -> None:
        super().__init__(model, exact=True, threads=threads)
        self._library = declared(build.library())
        self._tiles = self.dtype == torch.bfloat16 and bool(self._library.telltale_has_tiles())
        self._reads_prompts = self._tiles or bool(self._library.telltale_has_wide_products())
        # In bfloat16 AVX-512 reads half as fast as PyTorch with the processor's matrix units.
        self.reads_exactly = self.dtype == torch.float32 or self._reads_prompts
        self._order = ORDERS[self._library.telltale_int8_order(self.dtype == torch.bfloat16)]
        self._pointers = ModelPointers(self, tiles=self._tiles, order=self._order)
        self._draft_pointers: DraftExitPointers | None = None
        self._changed = 0
        if self.threads is None:
            size = sum(p.numel() * p.element_size() for p in self.model.parameters())
            self.threads = 1 if size < SINGLE_THREAD_BYTES else torch.get_num_threads()
        if not self._library.telltale_has_threads():
            self.threads = 1
        self.look_at_weights()

    def run(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        prefill: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.run`."""
        batch, width, _ = hidden.shape
        if prefill and width > PREFILL_WIDTH and not self._reads_prompts:
            return super().run(hidden, start, stop, cache, positions, prefill=True, lengths=lengths)
        self.check_capacity(max(positions) + width)
        together = TILE_TOKENS if self._tiles else VECTOR_TOKENS
        if not self._reads_prompts or batch * width <= together:
            return self._run_natively(hidden, start, stop, cache, positions, None)
        cache.reserve([first + width for first in positions])  # once: growing at each piece would copy the earlier ones
        done, found = 0, []
        for piece in hidden.split(max(1, together // batch), 1):
            found.append(self._run_natively(piece, start, stop, cache, [first + done for first in positions], None))
            done += piece.shape[1]
        return torch.cat(found, 1)

    def run_with_blocks(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        since: Sequence[int],
        first_layer: int,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`telltale.models.decoder.Decoder.run_with_blocks`; the weights are written where they are computed."""
        batch, width, _ = hidden.shape
        span = check_since(since, positions, width)
        self.check_capacity(max(positions) + width)
        layers = max(0, stop - max(first_layer, start))
        if not layers:
            empty = torch.zeros(0, batch, width, span)
            return self._run_natively(hidden, start, stop, cache, positions, None), empty
        weights = torch.zeros(layers, batch, width, self.heads, span)
        blocks = BlocksView(weights.data_ptr(), (LONG * batch)(*since), max(first_layer, start), span)
        hidden = self._run_natively(hidden, start, stop, cache, positions, blocks)
        return hidden, weights.mean(3)

    def _run_natively(
        self, hidden: Tensor, start: int, stop: int, cache: Cache, positions: Sequence[int], blocks: BlocksView | None
    ) -> Tensor:
        batch, width, _ = hidden.shape
        hidden = self._readable(hidden)
        out = torch.empty_like(hidden)
        view = self._prepare(cache, positions, width)
        cache.count(start, stop, batch * width)
        self._library.telltale_run(
            self._pointers.struct,
            view,
            batch,
            width,
            (LONG * batch)(*positions),
            start,
            stop,
            hidden.data_ptr(),
            out.data_ptr(),
            blocks,
            self.threads,
        )
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.head`."""
        return self.logits(hidden).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.logits`."""
        hidden = self._readable(hidden)
        rows = hidden.numel() // self.hidden_size
        logits = torch.empty(*hidden.shape[:-1], self.vocabulary_size, dtype=torch.float32)
        self._library.telltale_head(
            self._pointers.struct, hidden.data_ptr(), rows, logits.data_ptr(), None, self.threads
        )
        return logits

    def greedy(self, hidden: Tensor) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.greedy`."""
        hidden = self._readable(hidden)
        tokens = torch.empty(hidden.shape[:-1], dtype=torch.int64)
        _refuse_nan(
            self._library.telltale_head(
                self._pointers.struct, hidden.data_ptr(), tokens.numel(), None, tokens.data_ptr(), self.threads
            )
        )
        return tokens

    def draft_greedy(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        exit_layer: int,
        length: int,
        cache: Cache,
        stop_tokens: Collection[int] = (),
    ) -> tuple[list[list[int]], Tensor]:
        """See :meth:`telltale.models.decoder.Decoder.draft_greedy`; one call."""
        batch = len(tokens)
        states = torch.empty(batch, length + 1, self.hidden_size, dtype=self.dtype)
        drafts = self._greedy_steps(
            tokens,
            positions,
            stop=exit_layer,
            count=length,
            cache=cache,
            stop_tokens=stop_tokens,
            states=states,
            drafts=True,
        )
        steps = len(drafts[0]) + 1
        cache.count(0, exit_layer, batch * steps)
        return drafts, states[:, :steps]

    def decode_greedy(
        self, token: int, position: int, *, count: int, cache: Cache, stop_tokens: Collection[int] = ()
    ) -> list[int]:
        """See :meth:`telltale.models.decoder.Decoder.decode_greedy`; one call."""
        if count < 1:
            return []
        [tokens] = self._greedy_steps(
            [token], [position], stop=self.layers, count=count, cache=cache, stop_tokens=stop_tokens, states=None
        )
        cache.count(0, self.layers, len(tokens))
        return tokens

    def verify_greedy(
        self, states: Tensor, positions: Sequence[int], *, exit_layer: int, cache: Cache
    ) -> list[list[int]]:
        """See :meth:`telltale.models.decoder.Decoder.verify_greedy`; one call."""
        states = self._readable(states)
        batch, width, _ = states.shape
        return self._greedy_after(None, states, batch, width, positions, exit_layer, cache)

    def score_greedy(self, tokens: Sequence[int], position: int, *, cache: Cache) -> list[int]:
        """See :meth:`telltale.models.decoder.Decoder.score_greedy`; one call."""
        self._refuse_unknown(tokens)
        return self._greedy_after(tokens, None, 1, len(tokens), [position], 0, cache)[0]

    def open_draft_exits(self) -> None:
        """See :meth:`telltale.models.decoder.Decoder.open_draft_exits`."""
        super().open_draft_exits()
        if self.draft_heads is not None and self._draft_pointers is None:
            self._draft_pointers = DraftExitPointers(self.draft_heads, tiles=self._tiles, order=self._order)

    def exit_logits(
        self,
        states: Tensor,
        exit_layer: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        since: Sequence[int] | None = None,
        whole: bool = False,
    ) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.exit_logits`."""
        if whole or self.draft_heads is None or self._draft_view(exit_layer) is None:
            return super().exit_logits(states, exit_layer, cache, positions, since=since, whole=whole)
        short = torch.empty(*states.shape[:-1], len(self.draft_heads.shortlist), dtype=torch.float32)
        self._read_draft_exit(states, exit_layer, cache, positions, since, short, None)
        return self.draft_heads.spread(short)

    def exit_greedy(
        self,
        states: Tensor,
        exit_layer: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        since: Sequence[int] | None = None,
    ) -> Tensor:
        """See :meth:`telltale.models.decoder.Decoder.exit_greedy`."""
        if self._draft_view(exit_layer) is None:
            return super().exit_greedy(states, exit_layer, cache, positions, since=since)
        tokens = torch.empty(states.shape[:-1], dtype=torch.int64)
        _refuse_nan(self._read_draft_exit(states, exit_layer, cache, positions, since, None, tokens))
        return tokens

    def _read_draft_exit(
        self,
        states: Tensor,
        exit_layer: int,
        cache: Cache,
        positions: Sequence[int],
        since: Sequence[int] | None,
        logits: Tensor | None,
        tokens: Tensor | None,
    ) -> Any:
        states = self._readable(states)
        batch, width, _ = states.shape
        return self._library.telltale_draft_exit(
            self._pointers.struct,
            self._prepare(cache, positions, width),
            batch,
            width,
            (LONG * batch)(*positions),
            self._draft_view(exit_layer),
            None if since is None else (LONG * batch)(*since),
            states.data_ptr(),
            None if logits is None else logits.data_ptr(),
            None if tokens is None else tokens.data_ptr(),
            self.threads,
        )

    def _draft_view(self, exit_layer: int) -> Any:
        """The native step's view of a draft exit; None if the exit has no way of its own."""
        return None if self._draft_pointers is None else self._draft_pointers.views.get(exit_layer)

    def look_at_weights(self) -> None:
        """See :meth:`telltale.models.decoder.Decoder.look_at_weights`; reads all matrices that are in 8 bits, in both forms."""
        if not self._pointers.read_short:
            self._changed = 0
            return
        changed = self._library.telltale_look_at_matrices(self._pointers.struct, self.threads)
        if changed > self._changed:
            warnings.warn(
                f"{changed} matrices were written to after they had been put in 8 bits; they are read as the model has them, "
                f"which takes longer.",
                stacklevel=2,
            )
        self._changed = changed

    @property
    def weight_format(self) -> str:
        """See :attr:`telltale.models.decoder.Decoder.weight_format`."""
        long, wide = super().weight_format, self._pointers.read_long + self._changed
        if not self._pointers.read_short - self._changed:
            return long
        return f"int8 and {long}" if wide else "int8"

    def refresh(self) -> None:
        """See :meth:`telltale.models.backends.fused.FusedDecoder.refresh`; weights that moved get new pointers."""
        super().refresh()
        if hasattr(self, "_pointers"):
            self._pointers.fill()
            self.look_at_weights()

    @staticmethod
    def unavailable(model: nn.Module) -> str | None:
        """See :meth:`telltale.models.backends.fused.FusedDecoder.unavailable`."""
        return native_unavailable_reason(model)

    def _tables_changed(self) -> None:
        self._pointers.point_at_tables()

    def _greedy_steps(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        stop: int,
        count: int,
        cache: Cache,
        stop_tokens: Collection[int],
        states: Tensor | None,
        drafts: bool = False,
    ) -> list[list[int]]:
        batch = len(tokens)
        self._refuse_unknown(tokens)
        view = self._prepare(cache, positions, count + (states is not None))
        out = (LONG * (batch * count))()
        steps = self._library.telltale_greedy_steps(
            self._pointers.struct,
            view,
            batch,
            (LONG * batch)(*tokens),
            (LONG * batch)(*positions),
            stop,
            count,
            (LONG * len(stop_tokens))(*stop_tokens),
            len(stop_tokens),
            out,
            None if states is None else states.data_ptr(),
            self._draft_view(stop) if drafts else None,
            self.threads,
        )
        _refuse_nan(steps < 0)
        return [out[row * count : row * count + steps] for row in range(batch)]

    def _greedy_after(
        self,
        tokens: Sequence[int] | None,
        states: Tensor | None,
        batch: int,
        width: int,
        positions: Sequence[int],
        start: int,
        cache: Cache,
    ) -> list[list[int]]:
        view = self._prepare(cache, positions, width)
        cache.count(start, self.layers, batch * width)
        rows = batch * width
        out = (LONG * rows)()
        bad = self._library.telltale_greedy_after(
            self._pointers.struct,
            view,
            batch,
            width,
            (LONG * batch)(*positions),
            None if tokens is None else (LONG * rows)(*tokens),
            None if states is None else states.data_ptr(),
            start,
            out,
            self.threads,
        )
        _refuse_nan(bad)
        return [out[row * width : (row + 1) * width] for row in range(batch)]

    def _prepare(self, cache: Cache, positions: Sequence[int], width: int) -> CacheView:
        """Reserve the cache and the rotary tables for ``width`` tokens at ``positions``; the cache's pointers."""
        length = max(positions) + width
        self.check_capacity(length)
        cache.reserve([position + width for position in positions])
        if length > self.rotary.length:
            self.rotary.grow(length)
        if length > self._pointers.table_length:
            self._pointers.point_at_tables()
        state = (cache.generation, 0 if cache.prefix is None else cache.prefix.generation)
        known = cache.native_view
        if known is not None and known[0] == state:
            return known[1]
        view = CacheView(_addresses(cache.keys), _addresses(cache.values), cache.capacity)
        if cache.prefix is not None:
            view.prefix_keys, view.prefix_values = _addresses(cache.prefix.keys), _addresses(cache.prefix.values)
            view.prefix_capacity = cache.prefix.capacity
            view.prefix_lengths = (LONG * cache.batch)(*cache.prefix_lengths)
            view.prefix_rows = (LONG * cache.batch)(*cache.prefix_rows)
        if cache.own_rows is not None:
            view.own_rows = (LONG * cache.batch)(*cache.own_rows)
        cache.native_view = (state, view)
        return view

    def _readable(self, hidden: Tensor) -> Tensor:
        """States that C can read: contiguous and of the model's dtype."""
        if hidden.dtype is not self.dtype:
            raise ConfigError(f"states of {hidden.dtype} were given to a model of {self.dtype}; convert them first.")
        return hidden.contiguous()

    def _refuse_unknown(self, tokens: Sequence[int]) -> None:
        """The step looks tokens up unchecked: an id outside the embedding would read foreign memory."""
        if min(tokens) < 0 or max(tokens) >= self.vocabulary_size:
            raise DataError(f"token ids {list(tokens)} were given; the model knows 0..{self.vocabulary_size - 1}.")


def native_unavailable_reason(model: nn.Module) -> str | None:
    """Why ``model`` cannot be served by the native step, or None if it can."""
    reason = fused_unavailable_reason(model)
    if reason is not None:
        return reason
    parts = parts_of(model, listed=False)
    weight: Any = parts.embedding.weight
    if weight.device.type != "cpu":
        return f"the model is on {weight.device.type}; it runs on CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {weight.dtype}; it runs in float32 and bfloat16"
    for name, parameter in model.named_parameters():
        if parameter.dtype != weight.dtype or parameter.device != weight.device:
            return f"{name} is {parameter.dtype} on {parameter.device}, unlike the embedding"
        if not parameter.is_contiguous():
            return f"{name} is not contiguous in memory"
    if weight.shape[0] < parts.head.weight.shape[0]:
        return f"the head knows {parts.head.weight.shape[0]} tokens and the embedding {weight.shape[0]}"
    activations = {activation_of(layer) for layer in parts.layers}
    for activation in activations:
        if activation not in ACTIVATIONS:
            return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if len({ACTIVATIONS[activation] for activation in activations}) > 1:
        return f"its layers have several activations, {', '.join(sorted(activations))}"
    reason = arithmetic_reason(model)
    if reason is not None:
        return reason
    return build.unavailable_reason()


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (POINTER * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _refuse_nan(bad: Any) -> None:
    if bad:
        raise NumericalError(
            "the model's logits are NaN or infinite; expected finite numbers. Check the checkpoint's weights."
        )


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the argument types of its functions, so that ctypes checks and converts."""
    model, view, longs = ctypes.POINTER(ModelView), ctypes.POINTER(CacheView), ctypes.POINTER(LONG)
    draft_exit = ctypes.POINTER(DraftExitView)
    for name, arguments in {
        "telltale_has_threads": [],
        "telltale_has_tiles": [],
        "telltale_has_wide_products": [],
        "telltale_run": [
            model,
            view,
            LONG,
            LONG,
            longs,
            LONG,
            LONG,
            POINTER,
            POINTER,
            ctypes.POINTER(BlocksView),
            LONG,
        ],
        "telltale_head": [model, POINTER, LONG, POINTER, POINTER, LONG],
        "telltale_greedy_steps": [
            model,
            view,
            LONG,
            longs,
            longs,
            LONG,
            LONG,
            longs,
            LONG,
            longs,
            POINTER,
            draft_exit,
            LONG,
        ],
        "telltale_draft_exit": [model, view, LONG, LONG, longs, draft_exit, longs, POINTER, POINTER, POINTER, LONG],
        "telltale_greedy_after": [model, view, LONG, LONG, longs, longs, POINTER, LONG, longs, LONG],
        "telltale_look_at_matrices": [model, LONG],
        "telltale_int8_order": [LONG],
    }.items():
        function = getattr(library, name)
        function.restype, function.argtypes = LONG, arguments
    return library
