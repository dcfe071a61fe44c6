"""``StepVerified``: what users hold. It opens the models, checks that they fit together, and runs the engine over a batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from telltale.decode.generation import unbatched
from telltale.decode.request import Request, checked_request
from telltale.decode.step_verified.config import StepVerifiedConfig
from telltale.decode.step_verified.encoders import Encoder, encoder_named
from telltale.decode.step_verified.ends import Ends, StepText
from telltale.decode.step_verified.engine import Committed, StepEngine
from telltale.decode.step_verified.passes import WholeRows
from telltale.decode.step_verified.records import StepRecord, StepVerifiedResult, StepVerifiedStatistics
from telltale.decode.step_verified.rows import Job, row_seeds
from telltale.decode.step_verified.sides import Side
from telltale.decode.step_verified.upper_side import UpperSide
from telltale.decode.step_verified.verification import Verifier
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.models.decoder import Decoder
from telltale.models.open import open_decoder

Steps = Generator[list[list[int]], None, StepVerifiedResult]


class StepVerified:
    """SpecGuard (arXiv 2604.15244) and its relatives: a draft writes steps, the target redoes those that do not convince.

    ``target`` and ``draft``: Hugging Face causal LMs (or decoders already opened) with the same tokenizer. ``draft`` None has the
    first ``config.exit_layer`` layers of the target draft, over one cache. ``verifier`` scores steps for the policy "verifier";
    ``encoder`` replaces the one that ``config.encoder`` names. One thread at a time.

    Raises :class:`~telltale.errors.ConfigError` for a config that does not fit the models, :class:`~telltale.errors.DataError`
    for a tokenizer that does not, and :class:`~telltale.errors.UnsupportedModelError` for models it cannot open.
    """

    def __init__(
        self,
        target: nn.Module | Decoder,
        draft: nn.Module | Decoder | None,
        tokenizer: Any,
        config: StepVerifiedConfig | None = None,
        *,
        verifier: Verifier | None = None,
        encoder: Encoder | None = None,
        backend: str = "auto",
    ) -> None:
        self.config = StepVerifiedConfig() if config is None else config
        if not isinstance(self.config, StepVerifiedConfig):
            raise ConfigError(f"config is a {type(config).__name__}; expected a StepVerifiedConfig.")
        if not all(hasattr(tokenizer, name) for name in ("decode", "get_vocab")):
            raise DataError(f"tokenizer is a {type(tokenizer).__name__}; expected the tokenizer of both models.")
        if verifier is not None and not callable(verifier):
            raise ConfigError(f"verifier is a {type(verifier).__name__}; expected a callable that scores steps.")
        self.tokenizer = tokenizer
        self.verifier = verifier
        self.encoder = encoder_named(self.config.encoder) if encoder is None else encoder
        self.target = _opened(target, backend)
        self.draft: Decoder | None = None
        if draft is not None:
            self.draft = self.target if draft is target else _opened(draft, backend)
        self.exit_layer = self.config.exit_layer
        if self.draft is None and self.exit_layer is not None and self.exit_layer >= self.target.layers:
            raise ConfigError(
                f"exit_layer={self.exit_layer} is out of range; the model has {self.target.layers} layers, expected 1.."
                f"{self.target.layers - 1}."
            )
        if self.draft is None and self.exit_layer is None and self.config.policy != "target":
            raise ConfigError(
                f"policy={self.config.policy!r} needs a draft: pass a draft model, or exit_layer to have the target's first "
                f"layers draft."
            )
        if self.draft is not None and self.exit_layer is not None:
            raise ConfigError(
                f"exit_layer={self.exit_layer} was given together with a draft model; expected one of them."
            )
        self.vocabulary = self._shared_vocabulary()
        self._check_signals()
        self.steps_text = StepText(tokenizer, self.config.delimiter)

    def engine(self, *, slots: int = 1) -> StepEngine:
        """A new engine with room for ``slots`` rows (more are added as they come), for callers that serve."""
        layers = self._attention_layers()
        config = self.config
        whole_rows = None
        if config.whole_rows:
            whole_rows = WholeRows(config.sparsify, config.renormalise, config.exclude_sinks, config.residual)
        if self.exit_layer is not None and self.draft is None:
            lower = Side(
                self.target,
                stop=self.exit_layer,
                slots=slots,
                attention_layers=layers(self.exit_layer),
                vocabulary=self.vocabulary,
                whole_rows=whole_rows,
            )
            draft: Side | None = lower
            target: Side = UpperSide(lower, attention_layers=layers(self.target.layers))
        else:
            own: dict[str, Any] = {"slots": slots, "vocabulary": self.vocabulary, "whole_rows": whole_rows}
            target = Side(self.target, attention_layers=layers(self.target.layers), **own)
            draft = None
            if self.draft is not None:
                draft = Side(self.draft, attention_layers=layers(self.draft.layers), **own)
        return StepEngine(target, draft, self.steps_text, encoder=self.encoder, verifier=self.verifier)

    def generate(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> StepVerifiedResult:
        """Decode up to ``max_new_tokens`` tokens per row; arguments as in :meth:`telltale.decode.Autoregressive.generate`.

        The same seed gives the same steps for a prompt whatever stands beside it: each row has random numbers of its own,
        made from one number of ``generator`` and the prompt.
        """
        steps = self.rounds(self.request(input_ids, **arguments))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def stream(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> Iterator[Any]:
        """As :meth:`generate`, but yields tokens as they are committed: steps that have been accepted, never to be taken back.

        For one row each item is a list of new token ids; for a batch, one such list per row. The generator's return value
        (``StopIteration.value``) is the :class:`~telltale.decode.step_verified.records.StepVerifiedResult`.
        """
        return self._stream(self.request(input_ids, **arguments))

    def request(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> Request:
        """The checked request that :meth:`generate` would run."""
        arguments.setdefault("tokenizer", self.tokenizer)
        request = checked_request(self.target, input_ids, **arguments)
        longest = max(map(len, request.prompts)) + request.max_new_tokens
        if self.draft is not None:
            try:
                self.draft.check_capacity(longest)
            except ConfigError as error:
                raise ConfigError(f"draft model: {error}") from error
            self._check_tokens(request.prompts)
        if request.sampling.temperature == 0.0 and self.config.compares_candidates:
            raise ConfigError(self.config.needs_candidates("temperature=0"))
        if request.sampling.temperature == 0.0 and (self.config.candidates or 1) > 1 and self.config.drafts:
            warnings.warn(
                f"candidates={self.config.candidates} at temperature 0 are all the same; one is drafted.", stacklevel=3
            )
        return request

    def jobs(self, request: Request) -> list[Job]:
        """The rows of a request, each with a seed of its own."""
        generator = request.generator
        device = None if generator is None else generator.device
        first = int(torch.randint(2**31, (1,), generator=generator, device=device))
        return [
            Job(
                prompt=prompt,
                ends=self.ends(request),
                sampling=request.sampling,
                config=self.config,
                seed=seed,
                seen_by_processors=seen,
            )
            for prompt, seen, seed in zip(
                request.prompts, request.seen_by_processors, row_seeds(first, request.prompts), strict=True
            )
        ]

    def ends(self, request: Request) -> Ends:
        """What ends steps and outputs of a request."""
        return Ends(
            self.steps_text, request.eos, request.max_new_tokens, self.config.max_step_tokens, request.stop_strings
        )

    def rounds(self, request: Request) -> Steps:
        """Committed tokens per row, turn by turn, empty turns left out."""
        started, cpu = time.perf_counter(), time.process_time()
        paused, first_at = 0.0, None
        engine = self.engine(slots=len(request.prompts))
        rows = [engine.rows[engine.admit(job)] for job in self.jobs(request)]
        while engine.rows:
            committed = engine.advance()
            if not any(one.tokens for one in committed):
                continue
            if first_at is None:
                first_at = time.perf_counter() - started
            paused -= time.perf_counter()
            yield _by_row(committed, len(rows))
            paused += time.perf_counter()
        total = time.perf_counter() - started - paused
        stats = _summed([row.stats for row in rows])
        stats.prefill_seconds = first_at or total
        stats.decode_seconds = total - stats.prefill_seconds
        stats.cpu_seconds = time.process_time() - cpu
        stats.backend, stats.backend_reason = self.target.backend, self.target.backend_reason
        stats.exactness = "exact" if self.target.exact else "fast"
        stats.layer_executions = engine.target.layer_executions
        stats.target_passes = engine.target.passes
        if engine.draft is not None:
            stats.draft_passes = engine.draft.passes
            stats.draft_layer_executions = engine.draft.layer_executions
        longest = max(len(row.tokens) for row in rows)
        padded = [row.tokens + [request.pad_token_id] * (longest - len(row.tokens)) for row in rows]
        device = self.target.device
        return StepVerifiedResult(
            tokens=torch.tensor(padded, dtype=torch.int64, device=device),
            lengths=torch.tensor([len(row.tokens) for row in rows], device=device),
            stop_reason=[row.reason or "length" for row in rows],
            stats=stats,
            steps=[row.steps for row in rows],
        )

    def _stream(self, request: Request) -> Generator[Any, None, StepVerifiedResult]:
        return (yield from unbatched(self.rounds(request), single=len(request.prompts) == 1))

    def _shared_vocabulary(self) -> int:
        """Tokens that both models have logits for; padding rows of the larger head are left out."""
        highest = max(self.tokenizer.get_vocab().values(), default=-1)
        for name, decoder in (("target", self.target), ("draft", self.draft)):
            if decoder is not None and highest >= decoder.vocabulary_size:
                raise DataError(
                    f"the tokenizer has ids up to {highest}, the {name} has {decoder.vocabulary_size} logits; expected the "
                    f"tokenizer that both models were trained with."
                )
        sizes = [decoder.vocabulary_size for decoder in (self.target, self.draft) if decoder is not None]
        return min(sizes)

    def _check_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        assert self.draft is not None
        highest = max(max(prompt) for prompt in prompts)
        rows = self.draft.parts.embedding.weight.shape[0]
        if highest >= rows:
            raise DataError(
                f"token id {highest} stands in a prompt; the draft embeds {rows} tokens. Do the tokenizers differ?"
            )

    def _check_signals(self) -> None:
        config = self.config
        if not (config.reads_grounding or config.record_signals):
            return
        if config.grounding_layers is not None:
            for name, count in self._sizes():
                if count < config.grounding_layers:
                    warnings.warn(
                        f"the {name} has {count} layers to read attention from; grounding takes these instead of "
                        f"{config.grounding_layers}.",
                        stacklevel=3,
                    )

    def _sizes(self) -> list[tuple[str, int]]:
        """The sides whose attention is read, and the layers each has for it."""
        config = self.config
        if self.draft is not None:
            sizes = {"draft": self.draft.layers, "target": self.target.layers}
        elif self.exit_layer is not None:
            sizes = {"draft": self.exit_layer, "target": self.target.layers - self.exit_layer}
        else:
            sizes = {"target": self.target.layers}
        return [(name, size) for name, size in sizes.items() if config.record_signals or name == config.signal_model]

    def _attention_layers(self) -> Any:
        config = self.config
        if not (config.reads_grounding or config.record_signals):
            return lambda layers: 0
        return lambda layers: layers if config.grounding_layers is None else min(config.grounding_layers, layers)


def _opened(model: nn.Module | Decoder, backend: str) -> Decoder:
    if isinstance(model, Decoder):
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a {type(model).__name__} was given as a model; expected a Hugging Face causal LM."
        )
    return open_decoder(model, backend=backend)


def _by_row(committed: Sequence[Committed], rows: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(rows)]
    for one in committed:
        found[one.number] += one.tokens
    return found


def _summed(parts: Sequence[StepVerifiedStatistics]) -> StepVerifiedStatistics:
    total = StepVerifiedStatistics(calibrated=all(part.calibrated for part in parts))
    for field in fields(StepVerifiedStatistics):
        if field.type == "int":
            setattr(total, field.name, sum(getattr(part, field.name) for part in parts))
    return total


__all__ = ["StepRecord", "StepVerified"]
