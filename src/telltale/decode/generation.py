"""What all decoders share: one ``generate`` and one ``stream`` around a prefill and a method-specific continuation.

The prompt is run through all layers first, so that the first token streams before anything is drafted. The model's
weights, configuration and mode are never changed.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from telltale.decode.outputs import Outputs
from telltale.decode.request import Request, checked_request
from telltale.decode.result import DecodeResult, DecodeStatistics
from telltale.decode.sampling import sample
from telltale.errors import ConfigError
from telltale.models.cache import Cache
from telltale.models.decoder import Decoder
from telltale.models.open import open_decoder

Steps = Generator[list[list[int]], None, DecodeResult]
Rounds = Iterator[list[list[int]]]
Result = TypeVar("Result")


@dataclass
class Run:
    """The state of one request under way. ``rows[slot]`` is the request row that stands in the cache's row ``slot``."""

    request: Request
    decoder: Decoder
    cache: Cache
    outputs: Outputs
    stats: Any
    rows: list[int]

    def last_tokens(self) -> list[int]:
        """Per slot, the newest token: emitted, not processed yet."""
        return [self.outputs.tokens[row][-1] for row in self.rows]

    def positions(self) -> list[int]:
        """Per slot, the position of the newest token, which is also how many tokens the cache holds of the row."""
        prompts, tokens = self.request.prompts, self.outputs.tokens
        return [len(prompts[row]) + len(tokens[row]) - 1 for row in self.rows]

    def prefix(self, slot: int) -> list[int]:
        """All tokens of a slot's row, as logits processors see them."""
        row = self.rows[slot]
        return self.request.seen_by_processors[row] + self.outputs.tokens[row]

    def commit(self, emitted: Sequence[Sequence[int]]) -> list[list[int]]:
        """Commit tokens per slot; finished rows leave the cache. Returns what was committed per request row."""
        committed: list[list[int]] = [[] for _ in self.outputs.tokens]
        for row, new in zip(self.rows, emitted, strict=True):
            committed[row] = self.outputs.commit(row, new)
        going = [slot for slot, row in enumerate(self.rows) if self.outputs.reasons[row] is None]
        if len(going) < len(self.rows):
            if going:
                self.cache.keep(going)
            self.rows = [self.rows[slot] for slot in going]
        if self.rows:
            self.cache.truncate(self.positions())
        return committed

    def choose(self, hidden: Tensor) -> list[int]:
        """The next token of each slot from final states (slots, hidden)."""
        if self.request.sampling.plain_greedy:
            return self.decoder.greedy(hidden).tolist()
        prefixes = [self.prefix(slot) for slot in range(len(self.rows))]
        law = self.request.sampling.distribution(self.decoder.head(hidden), prefixes)
        return sample(law, self.request.generator).tolist()

    def plain_step(self) -> list[list[int]]:
        """One token for every row, through all layers."""
        ids = torch.tensor(self.last_tokens(), device=self.decoder.device).view(-1, 1)
        hidden = self.decoder.forward(ids, self.cache, self.positions())
        return [[token] for token in self.choose(hidden[:, 0])]


class Decoding:
    """Base of the decoders: opens the model, checks requests, prefills, streams and counts. One thread at a time."""

    def __init__(
        self, model: nn.Module | Decoder, *, backend: str = "auto", exactness: Literal["fast", "exact"] = "fast"
    ) -> None:
        if exactness not in ("fast", "exact"):
            raise ConfigError(f"exactness={exactness!r}; expected 'fast' or 'exact'.")
        if isinstance(model, Decoder):
            if exactness == "exact" and not model.exact:
                raise ConfigError(
                    "exactness='exact' was asked of a decoder opened without exact=True; open it with it."
                )
            self.decoder = model
        else:
            self.decoder = open_decoder(model, backend=backend, exact=exactness == "exact")

    def generate(
        self,
        input_ids: Tensor | Sequence[Any],
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
        logits_processor: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
    ) -> DecodeResult:
        """Decode up to ``max_new_tokens`` tokens per row.

        ``input_ids``: (batch, length) or (length,) token ids, or lists of them; rows may be padded on either side if
        ``attention_mask`` says so. ``eos_token_id`` None takes the model's ``generation_config``; an empty list means
        none. ``temperature`` 0 is greedy. ``logits_processor``: a Transformers list, applied before temperature, top-k and
        top-p, at every position with that position's own prefix. A row ends with the token that completes one of
        ``stop_strings`` in the new text (``tokenizer`` reads it). ``pad_token_id`` None takes the model's, else the
        smallest end token, else 0.

        Raises :class:`~telltale.errors.ConfigError` before any compute for an argument that cannot be served, and
        :class:`~telltale.errors.NumericalError` if the model's logits are NaN.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "input_ids", "__class__")}
        return self.finish(checked_request(self.decoder, input_ids, **arguments))

    def stream(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> Iterator[Any]:
        """As :meth:`generate`, with the same arguments, but yields tokens as they are committed.

        For one row each item is a list of new token ids; for a batch, one such list per row. The generator's return
        value (``StopIteration.value``) is the :class:`~telltale.decode.result.DecodeResult`.
        """
        return self._stream(checked_request(self.decoder, input_ids, **arguments))

    def finish(self, request: Request) -> DecodeResult:
        """Decode a request that :func:`~telltale.decode.request.checked_request` made."""
        steps = self.steps(request, block=16)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    @torch.inference_mode()
    def steps(self, request: Request, *, block: int = 1) -> Steps:
        """Committed tokens per row, round by round; ``block`` plain tokens may come in one round where that is faster."""
        started, cpu = time.perf_counter(), time.process_time()
        paused = 0.0
        stats = self._statistics()
        decoder = self.decoder
        longest = max(map(len, request.prompts))
        cache = decoder.new_cache(len(request.prompts), longest + min(request.max_new_tokens, 1024))
        rows = list(range(len(request.prompts)))
        run = Run(request, decoder, cache, Outputs(request), stats, rows)
        committed = run.commit([[token] for token in run.choose(self._prefill(run))])
        stats.prefill_seconds = time.perf_counter() - started
        paused -= time.perf_counter()
        yield committed
        paused += time.perf_counter()
        for committed in self._continue(run, block):
            paused -= time.perf_counter()
            yield committed
            paused += time.perf_counter()
        stats.decode_seconds = time.perf_counter() - started - stats.prefill_seconds - paused
        stats.cpu_seconds = time.process_time() - cpu
        stats.backend, stats.backend_reason = decoder.backend, decoder.backend_reason
        stats.exactness = "exact" if decoder.exact else "fast"
        stats.layer_executions = run.cache.layer_executions()
        tokens, lengths = run.outputs.padded(decoder.device)
        stats.tokens = sum(map(len, run.outputs.tokens))
        return DecodeResult(
            tokens.clone(), lengths.clone(), [reason or "length" for reason in run.outputs.reasons], stats
        )

    def _stream(self, request: Request) -> Generator[Any, None, DecodeResult]:
        return (yield from unbatched(self.steps(request), single=len(request.prompts) == 1))

    def _prefill(self, run: Run) -> Tensor:
        """All layers on the prompts; the state of each row's last token, (batch, hidden)."""
        ids, last = padded_prompts(run)
        hidden = run.decoder.forward(ids, run.cache, [0] * len(last), prefill=True)
        return hidden[torch.arange(len(last), device=hidden.device), last]

    def _statistics(self) -> DecodeStatistics:
        raise NotImplementedError

    def _continue(self, run: Run, block: int) -> Rounds:
        raise NotImplementedError


def unbatched(steps: Generator[list[list[int]], None, Result], *, single: bool) -> Generator[Any, None, Result]:
    """``steps`` as users see them: for a ``single`` row its tokens alone, for a batch one list per row; the same return value."""
    while True:
        try:
            committed = next(steps)
        except StopIteration as end:
            return end.value
        yield committed[0] if single else committed


def padded_prompts(run: Run) -> tuple[Tensor, Tensor]:
    """Prompts (batch, longest), filled up on the right, where the position hides it, and the index of each last token."""
    prompts = run.request.prompts
    longest = max(map(len, prompts))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in prompts], device=run.decoder.device)
    return ids, torch.tensor([len(row) - 1 for row in prompts], device=run.decoder.device)


def plain_rounds(run: Run, block: int) -> Rounds:
    """Autoregressive decoding of what is left: blocks of greedy steps for a single row, else a token per row and round."""
    request = run.request
    while run.rows:
        if request.sampling.plain_greedy and len(request.prompts) == 1:
            count = 1 if request.token_by_token else min(block, run.outputs.remaining(0))
            yield run.commit([greedy_block(run, count)])
        else:
            yield run.commit(run.plain_step())


def greedy_block(run: Run, count: int) -> list[int]:
    """Up to ``count`` plain greedy tokens of the only row."""
    return run.decoder.decode_greedy(
        run.outputs.tokens[0][-1], run.positions()[0], count=count, cache=run.cache, stop_tokens=run.request.eos
    )
