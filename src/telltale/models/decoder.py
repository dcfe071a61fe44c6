"""The layerwise view of a decoder-only LM: embed, run layers i..j, head, and one cache. Weights are never changed.

Three backends have this interface: ``module`` runs the family's own layers, ``fused`` is pure PyTorch for
Llama-like families, ``native`` the C++ step for them on CPU. :func:`open_decoder` chooses one and gives the reason. The position is
the mask: a token at position p attends to cache slots 0..p of its row (the last w of them under a sliding window).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.models.attention import PositionEmbeddings, rope_by_length, rope_kinds
from telltale.models.cache import Cache
from telltale.models.draft_exits import draft_exits_of
from telltale.models.draft_heads import DraftHeads
from telltale.models.families import Parts, parts_of, unwrap
from telltale.models.weights import Snapshot, unreadable_reason

BACKENDS = ("auto", "native", "fused", "module")


class Decoder:
    """Base of the backends. A decoder serves one thread at a time; open one per thread (they share the weights)."""

    backend = ""

    def __init__(self, model: nn.Module, *, exact: bool = False, threads: int | None = None) -> None:
        self.model = unwrap(model)
        self.parts: Parts = parts_of(model, listed=False)
        reason = unreadable_reason(self.model, self.parts.layers)
        if reason is not None:
            raise UnsupportedModelError(f"this {self.parts.family.name} model cannot be decoded: {reason}.")
        config: Any = self.model.config
        self.config = config
        self.family = self.parts.family.name
        self.layers = len(self.parts.layers)
        self.hidden_size = int(config.hidden_size)
        self.vocabulary_size = _tokens_of(self.parts.head)
        self.max_positions = _max_positions(config)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.hidden_size // self.heads)
        weight = self.parts.embedding.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.exact = exact
        """Whether a token's result is independent of how many tokens share its pass, to the last bit."""
        self.threads = threads
        self.reads_exactly = False
        """Whether a wide pass that is not ``prefill`` gives each token what a pass of its own would, at no more cost."""
        self.backend_reason = ""
        self.windows = [_window(config, index) for index in range(self.layers)]
        self.position_embeddings = PositionEmbeddings(self.parts.rotary) if self.parts.rotary is not None else None
        self.reads_alike = (
            self.parts.rotary is None or rope_by_length(getattr(self.parts.rotary, "config", None)) is None
        )
        """Whether a token is read alike whatever follows it: with rotary embeddings that look at a text's length it is not."""
        self.rereads_at: int | None = None
        """The position at which the family drops its cache and reads the whole row again (Phi-3 with ``longrope``), if any."""
        self.draft_heads: DraftHeads | None = None
        """The draft exits in use, see :meth:`open_draft_exits`."""
        self._snapshot = Snapshot(self.parts.modules)

    def open_draft_exits(self) -> None:
        """Use the draft exits beside the checkpoint that the model was loaded from, if there are any, from now on.

        Raises :class:`~telltale.errors.CheckpointError` for a file that is damaged or was made for other weights, and
        :class:`~telltale.errors.UnsupportedModelError` for a model that cannot have any.
        """
        exits = draft_exits_of(self.model)
        if exits is not None and self.draft_heads is None:
            self.draft_heads = DraftHeads(self, exits)

    @property
    def drafting_exits(self) -> list[int]:
        """Exit layers worth drafting from: those with a way of their own, or all where none has."""
        return list(range(1, self.layers)) if self.draft_heads is None else list(self.draft_heads.exits)

    def draft_head_weight(self, exit_layer: int) -> int:
        """Numbers that a draft step at ``exit_layer`` reads beside the layers below it."""
        if self.draft_heads is None or exit_layer not in self.draft_heads.exits:
            return self.vocabulary_size * self.hidden_size
        return self.draft_heads.parameters(exit_layer)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, width) -> states (batch, width, hidden), the family's scaling included."""
        with torch.inference_mode():
            return self.parts.embedding(ids)

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
        """Layers start..stop-1 on ``hidden`` (batch, width, hidden), and their keys and values into ``cache``.

        ``positions`` holds the position of each row's first token; the row's other tokens follow it. ``prefill`` allows
        kernels whose rounding depends on the width of the pass. ``lengths`` holds the length of the prompt of which each
        row is a part; None: it ends with this pass. Rotary embeddings that depend on the length look at it.

        Raises :class:`~telltale.errors.ConfigError` if the model has no such positions.
        """
        self._admit(cache, positions, start, stop, *hidden.shape[:2])
        with torch.inference_mode():
            if not self.exact or prefill or hidden.shape[0] * hidden.shape[1] == 1:
                return self._run(hidden, start, stop, cache, positions, prefill=prefill, lengths=lengths)
            return torch.cat(
                [self._run_row(hidden, row, start, stop, cache, first) for row, first in enumerate(positions)]
            )

    def _admit(self, cache: Cache, positions: Sequence[int], start: int, stop: int, batch: int, width: int) -> None:
        """Reserve storage for ``width`` tokens from ``positions`` on, and count them in the cache."""
        self.check_capacity(max(positions) + width)
        cache.reserve([position + width for position in positions])
        cache.count(start, stop, batch * width)

    def _run(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        prefill: bool,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def _run_row(self, hidden: Tensor, row: int, start: int, stop: int, cache: Cache, first: int) -> Tensor:
        """One token at a time: the only shape whose rounding cannot depend on what else is in the pass."""
        own = cache.row(row)
        tokens = hidden[row : row + 1].split(1, 1)
        return torch.cat(
            [self._run(token, start, stop, own, [first + index], prefill=False) for index, token in enumerate(tokens)],
            1,
        )

    def run_with_rows(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        rows: Collection[int],
        prefill: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """:meth:`run`, and the attention of the given layers for these tokens alone.

        Each is softmax(q k / sqrt(head dim)), (batch, heads, width, length) in float32; no full matrix is ever made.
        """
        from telltale.models.attention import attention_rows

        if not self.parts.family.listed:
            raise UnsupportedModelError(
                f"attention rows of family {self.family!r} are not known; expected another signal."
            )
        found = {}
        for layer in range(start, stop):
            entering = hidden
            hidden = self.run(hidden, layer, layer + 1, cache, positions, prefill=prefill)
            if layer in rows:
                found[layer] = attention_rows(self, layer, entering, cache, positions, prefill=prefill)
        return hidden, found

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
        """:meth:`run`, and how these tokens attend to positions ``since[b]``.. of their own row, averaged over heads.

        For each layer from ``first_layer`` on that is run: (layers, batch, width, span) float32, column c is position
        ``since[b] + c``; zero where a token does not look. With ``since`` = ``positions`` it is the block that
        :func:`telltale.signals.grounding.grounding_from_blocks` takes.

        Raises :class:`~telltale.errors.ConfigError` for a ``since`` behind the row's first position.
        """
        from telltale.models.attention import attention_since, check_since

        span = check_since(since, positions, hidden.shape[1])
        asked = range(max(first_layer, start), stop)
        hidden, rows = self.run_with_rows(hidden, start, stop, cache, positions, rows=asked)
        found = [attention_since(rows[layer].mean(1), since, span) for layer in asked]
        return hidden, torch.stack(found) if found else torch.zeros(0, *hidden.shape[:2], span)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: states (..., hidden) of any layer -> logits (..., vocabulary) in the model's dtype."""
        with torch.inference_mode():
            if not self.exact:
                return self.parts.head(self.parts.norm(hidden))
            states = hidden.reshape(-1, 1, 1, self.hidden_size)
            logits = torch.cat([self.parts.head(self.parts.norm(state)) for state in states])
            return logits.view(*hidden.shape[:-1], self.vocabulary_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """:meth:`head` in float32, before any rounding to the model's dtype where the backend has it: what :meth:`greedy` reads."""
        return self.head(hidden).float()

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
        """What the exit after ``exit_layer`` predicts, (batch, width, vocabulary) in float32, of states (batch, width, hidden).

        A draft exit gives -inf to tokens off its shortlist, unless the ``whole`` head is asked for. It looks at what the late
        layers have left of the token before ``since``, the row's first that is not verified, all rows being equally far from
        it; None: before each state's own. Other exits are read by final norm and head.
        """
        if self.draft_heads is None or exit_layer not in self.draft_heads.exits:
            return self.logits(states)
        with torch.inference_mode():
            normed = self.draft_heads.states(states, exit_layer, cache, positions, since)
            return self.draft_heads.logits(normed, whole=whole)

    def exit_greedy(
        self,
        states: Tensor,
        exit_layer: int,
        cache: Cache,
        positions: Sequence[int],
        *,
        since: Sequence[int] | None = None,
    ) -> Tensor:
        """The most likely token of :meth:`exit_logits`, (batch, width); raises what :meth:`greedy` does."""
        if self.draft_heads is None or exit_layer not in self.draft_heads.exits:
            return self.greedy(states)
        logits = self.exit_logits(states, exit_layer, cache, positions, since=since)
        check_finite(logits)
        return logits.argmax(-1)

    def greedy(self, hidden: Tensor) -> Tensor:
        """The most likely token after each state, (...); the lowest id wins a tie.

        Raises :class:`~telltale.errors.NumericalError` if a logit is NaN or +inf.
        """
        logits = self.head(hidden)
        check_finite(logits)
        return logits.argmax(-1)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for ``batch`` rows of at least ``capacity`` tokens.

        Notices weights that lie elsewhere than before or were written to, and modules that were replaced. Raises
        :class:`~telltale.errors.ConfigError` if this decoder cannot serve the model as it is now.
        """
        cache = self.new_storage(batch, capacity)
        self.look_at_weights()
        return cache

    def new_storage(self, batch: int, capacity: int) -> Cache:
        """:meth:`new_cache` for whoever looks at the weights before the first pass: that may take as long as some tokens."""
        reason = self.outdated_reason()
        if reason is not None:
            raise ConfigError(f"{reason}; open a new decoder.")
        return Cache(
            layers=self.layers,
            batch=batch,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def look_at_weights(self) -> None:
        """Notice what was written into the model's weights where they are. Only what is kept beside them can be out of date."""

    @property
    def weight_format(self) -> str:
        """How the weights are read: the name of a dtype, "int8", or both where only some matrices are read in 8 bits."""
        return str(self.dtype).removeprefix("torch.")

    def outdated_reason(self) -> str | None:
        """Why this decoder cannot serve its model any longer, or None; it follows the changes that it can follow."""
        self.parts = parts = parts_of(self.model, listed=False)
        change = self._snapshot.change(parts.modules)
        if change is None:
            return None
        weight: Any = parts.embedding.weight
        if (weight.device, weight.dtype) != (self.device, self.dtype):
            return f"the model is now {weight.dtype} on {weight.device}, its decoder was opened for {self.dtype} on {self.device}"
        if (len(parts.layers), _tokens_of(parts.head)) != (self.layers, self.vocabulary_size):
            return (
                f"the model now has {len(parts.layers)} layers and {_tokens_of(parts.head)} tokens, its decoder was opened for "
                f"{self.layers} and {self.vocabulary_size}"
            )
        before, self._snapshot = self._snapshot, Snapshot(parts.modules)
        reason = unreadable_reason(self.model, parts.layers) or self._follow(change)
        if reason is None:
            return None
        self._snapshot = before
        return f"the model has changed since its decoder was opened: {reason}"

    def _follow(self, change: str) -> str | None:
        """Take over the model's parts as they are now; the reason if that cannot be done."""
        if self.parts.rotary is not None:
            self.position_embeddings = PositionEmbeddings(self.parts.rotary)
        return None

    def check_capacity(self, length: int) -> None:
        """Raise :class:`~telltale.errors.ConfigError` if ``length`` tokens exceed the model's positions."""
        if length > self.max_positions:
            raise ConfigError(
                f"prompt and new tokens make {length} positions; the model has {self.max_positions}. Shorten the prompt "
                f"or lower max_new_tokens."
            )

    def forward(
        self,
        ids: Tensor,
        cache: Cache,
        positions: Sequence[int],
        *,
        prefill: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """All layers on ``ids`` (batch, width) -> states after the last layer, before the final norm. See :meth:`run`."""
        return self.run(self.embed(ids), 0, self.layers, cache, positions, prefill=prefill, lengths=lengths)

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
        """``length`` greedy draft steps through layers 0..E-1, and the early pass of the last drafted token.

        The late layers have processed what lies before ``positions``, which a draft exit looks at.
        ``tokens`` and ``positions`` hold one entry per row. Returns the drafts of each row and the exit states before
        the final norm, (batch, k+1, hidden), ready for ``run(E, layers)``. A single row stops early at a stop token.
        """
        token_column = torch.tensor(tokens, device=self.device).view(-1, 1)
        drafts: list[list[int]] = [[] for _ in tokens]
        states = []
        for index in range(length + 1):
            state = self.run(self.embed(token_column), 0, exit_layer, cache, [first + index for first in positions])
            states.append(state)
            if index == length or (len(tokens) == 1 and drafts[0] and drafts[0][-1] in stop_tokens):
                break
            places = [first + index for first in positions]
            token_column = self.exit_greedy(state, exit_layer, cache, places, since=positions)
            for draft, token in zip(drafts, token_column.view(-1).tolist(), strict=True):
                draft.append(token)
        return drafts, torch.cat(states, 1)

    def verify_greedy(
        self, states: Tensor, positions: Sequence[int], *, exit_layer: int, cache: Cache
    ) -> list[list[int]]:
        """Layers E..L-1 on exit states (batch, width, hidden) and the greedy token after each of them."""
        return self.greedy(self.run(states, exit_layer, self.layers, cache, positions)).tolist()

    def score_greedy(self, tokens: Sequence[int], position: int, *, cache: Cache) -> list[int]:
        """All layers on the given tokens of a single row, and the greedy token after each of them."""
        ids = torch.tensor([list(tokens)], device=self.device)
        return self.verify_greedy(self.embed(ids), [position], exit_layer=0, cache=cache)[0]

    def decode_greedy(
        self, token: int, position: int, *, count: int, cache: Cache, stop_tokens: Collection[int] = ()
    ) -> list[int]:
        """Up to ``count`` plain greedy steps of a single row; ends after a stop token. Step j's input is at position + j."""
        out: list[int] = []
        for index in range(count):
            token = self.score_greedy([token], position + index, cache=cache)[0]
            out.append(token)
            if token in stop_tokens:
                break
        return out


def check_finite(logits: Tensor) -> None:
    """Raise :class:`~telltale.errors.NumericalError` if a logit is NaN or +inf, or all are -inf."""
    # The largest is NaN if one is, +inf if one is, and -inf if all are.
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise NumericalError(
            "the model's logits are NaN or infinite; expected finite numbers. Check the checkpoint's weights."
        )


def _tokens_of(head: Any) -> int:
    """Tokens that an LM head knows; a quantised one has no plain weight."""
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def _max_positions(config: Any) -> int:
    """Positions that the model can have, in tokens: the configured ones, and what its rotary scaling stretches them to.

    Configurations differ in whether ``max_position_embeddings`` counts before or after scaling, so the larger is taken. A
    family without the field has no such limit.
    """
    configured = getattr(config, "max_position_embeddings", None)
    if not configured:
        return sys.maxsize
    limits = [int(configured)]
    for rope in rope_kinds(config):
        if rope.get("rope_type", "default") != "default":
            original = rope.get("original_max_position_embeddings") or configured
            limits.append(int(original * float(rope.get("factor") or 1.0)))
    return max(limits)


def _window(config: Any, layer: int) -> int | None:
    """Sliding window of a layer in tokens, or None, from the family's configuration."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return int(window) if kinds[layer] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window)
