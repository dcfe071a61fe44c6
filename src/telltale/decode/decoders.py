"""The three public decoders. They differ in how they make rows of a request, and in what they count.

The prompt is run through all layers first, so that the first token streams before anything is drafted. The model's
weights, configuration and mode are never changed.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from telltale.config import check_choice, check_integer, check_range
from telltale.decode.drafting import DRAFTERS, FixedPlan, Plan
from telltale.decode.engine import BLOCK, Committed, Engine
from telltale.decode.model_state import LateLayersState, ModelState
from telltale.decode.planner import Plans
from telltale.decode.request import Request, checked_request
from telltale.decode.results import (
    DecodeResult,
    DecodeStatistics,
    SelfSpeculativeStatistics,
    StepVerifiedResult,
    StepVerifiedStatistics,
)
from telltale.decode.rows import Row, SharedPrompt, row_seeds
from telltale.decode.sampling import sampling_of_row
from telltale.decode.step_config import StepVerifiedConfig
from telltale.decode.steps import Encoder, encoder_named
from telltale.decode.stopping import StepText, StopConditions, TextReader
from telltale.decode.verification import Verifier
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.models.decoder import Decoder
from telltale.models.open import open_decoder

CommittedRounds = Generator[list[list[int]], None, Any]
"""Committed tokens per row, turn by turn; the return value is the result."""
Result = TypeVar("Result")


class Decoding:
    """Base of the decoders: opens the model, checks requests, runs the engine, streams and counts. One thread at a time."""

    def __init__(
        self, model: nn.Module | Decoder, *, backend: str = "auto", exactness: Literal["fast", "exact"] = "fast"
    ) -> None:
        self._reader: TextReader | None = None
        if exactness not in ("fast", "exact"):
            raise ConfigError(f"exactness={exactness!r}; expected 'fast' or 'exact'.")
        if isinstance(model, Decoder):
            if exactness == "exact" and not model.exact:
                raise ConfigError("exactness='exact' needs a decoder that was opened with exact=True; open it again.")
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
        return drained(self.steps(self.request(input_ids, **arguments), block=BLOCK))

    def stream(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> Iterator[Any]:
        """As :meth:`generate`, with the same arguments, but yields tokens as they are committed, never to be taken back.

        For one row each item is a list of new token ids; for a batch, one such list per row. The generator's return
        value (``StopIteration.value``) is the result of :meth:`generate`.
        """
        request = self.request(input_ids, **arguments)
        return _unbatched(self.steps(request), single=len(request.prompts) == 1)

    def request(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> Request:
        """The checked request that :meth:`generate` would run."""
        return checked_request(self.decoder, input_ids, **arguments)

    def steps(self, request: Request, *, block: int = 1) -> CommittedRounds:
        """Committed tokens per row, turn by turn, empty turns left out; a single greedy row gets ``block`` plain tokens a turn."""
        started, cpu = time.perf_counter(), time.process_time()
        paused, first_at = 0.0, None
        engine = self._engine(request)
        rows = self.rows(request)
        for row in rows:
            engine.admit(row)
        while engine.rows:
            committed = engine.advance(block)
            for one in committed:
                if one.failure is not None:
                    raise one.failure
            if not any(one.tokens for one in committed):
                continue
            if first_at is None:
                first_at = time.perf_counter() - started
            paused -= time.perf_counter()
            yield _by_row(committed, len(rows))
            paused += time.perf_counter()
        total = time.perf_counter() - started - paused
        stats = self._statistics(rows, engine)
        stats.prefill_seconds = total if first_at is None else first_at
        stats.decode_seconds = total - stats.prefill_seconds
        stats.cpu_seconds = time.process_time() - cpu
        stats.backend, stats.backend_reason = self.decoder.backend, self.decoder.backend_reason
        stats.exactness = "exact" if self.decoder.exact else "fast"
        stats.layer_executions = engine.target.layer_executions
        stats.tokens = sum(len(row.tokens) for row in rows)
        return self._result(request, rows, stats)

    def rows(self, request: Request) -> list[Row]:
        """The rows of a request, each with a seed of its own, so that its tokens do not depend on the other rows."""
        raise NotImplementedError

    def _engine(self, request: Request) -> Engine:
        longest = max(map(len, request.prompts))
        capacity = longest + min(request.max_new_tokens, 1024)
        return Engine(ModelState(self.decoder, slots=len(request.prompts), capacity=capacity), together=True)

    def _rows(self, request: Request, plan: Plan | None, stats: Any) -> list[Row]:
        """Rows without steps, which share ``stats``."""
        count = len(request.prompts)
        seeds = [0] * count
        if request.sampling.temperature > 0:
            seeds = row_seeds(_drawn_seed(request.generator), request.prompts)
        reader = self._reader_of(request)
        ends = request.ends
        return [
            Row(
                request.prompts[place],
                StopConditions(
                    request.max_new_tokens,
                    request.eos,
                    request.stop_strings,
                    reader,
                    criterion=None if ends is None else partial(ends, place),
                ),
                sampling_of_row(request.sampling, place, count),
                plan=plan,
                seed=seeds[place],
                seen_by_processors=request.seen_by_processors[place],
                stats=stats,
            )
            for place in range(count)
        ]

    def _reader_of(self, request: Request) -> TextReader | None:
        """What reads the request's stop strings; the last one is kept, since it learns about tokens."""
        if not request.stop_strings:
            return None
        if self._reader is None or self._reader.tokenizer is not request.tokenizer:
            self._reader = TextReader(request.tokenizer)
        return self._reader

    def _statistics(self, rows: Sequence[Row], engine: Engine) -> Any:
        return rows[0].stats

    def _result(self, request: Request, rows: Sequence[Row], stats: Any) -> Any:
        return DecodeResult(*_padded(rows, request, self.decoder), [row.reason or "length" for row in rows], stats)


class Autoregressive(Decoding):
    """Token by token through all layers: the floor that every other decoder is measured against.

    ``model``: a Hugging Face causal LM, or a decoder already opened.
    """

    def rows(self, request: Request) -> list[Row]:
        """See :meth:`Decoding.rows`."""
        return self._rows(request, None, DecodeStatistics())


class SelfSpeculative(Decoding):
    """LayerSkip's self-speculative decoding: draft with layers 0..E-1, verify with E..L-1 over one shared cache.

    arXiv 2404.16710, section 4.3. Output is that of plain decoding: token-identical when greedy (bit for bit if ``exactness`` is
    "exact", else up to rounding at near-ties), equal in distribution when sampling. Every layer executes
    ``prompt + sum(k_i + 1)`` tokens.

    ``exit_layer``: E in 1..L-1, or "auto". ``draft_length``: drafts per round (0 is plain decoding), or "auto". What is "auto"
    is chosen online from measured pass costs and running acceptance, which persist across calls on the same object;
    where no draft would pay it decodes plainly. ``drafter``: "exit", "ngram" (drafts copied from the text, no early exit),
    or "both". ``confidence``: stop a draft before a token whose exit probability is below this. Under sampling,
    "auto" draws depend on timing (their distribution does not), and with "both" on what was
    accepted so far; fixed numbers and one drafter make them reproducible, whatever other rows are decoded along.
    """

    def __init__(
        self,
        model: nn.Module | Decoder,
        exit_layer: int | str = "auto",
        draft_length: int | str = "auto",
        *,
        drafter: Literal["exit", "ngram", "both"] = "exit",
        exactness: Literal["fast", "exact"] = "fast",
        confidence: float | None = None,
        backend: str = "auto",
    ) -> None:
        check_choice("drafter", drafter, DRAFTERS)
        if draft_length != "auto":
            check_integer("draft_length", draft_length, low=0)
        if exit_layer != "auto":
            check_integer("exit_layer", exit_layer, low=1)
        if confidence is not None:
            check_range("confidence", confidence, above=0.0, below=1.0)
        super().__init__(model, backend=backend, exactness=exactness)
        if drafter != "ngram":
            self.decoder.open_draft_exits()
        self.largest_exit = self.decoder.layers - 1
        if exit_layer != "auto":
            check_integer("exit_layer", exit_layer, low=1, high=self.largest_exit)
        elif self.largest_exit < 1 and drafter != "ngram":
            raise ConfigError("the model has a single layer, so no layer can draft; use drafter='ngram'.")
        self.plans = Plans(self.decoder, exit_layer, draft_length, drafter, confidence)

    def rows(self, request: Request) -> list[Row]:
        """See :meth:`Decoding.rows`."""
        plans = self.plans
        stats = SelfSpeculativeStatistics(exit_layer=plans.exit_layer, draft_length=plans.draft_length)
        plan = None
        if plans.draft_length != 0:
            plan = plans.plan(len(request.prompts), request.sampling.plain_greedy, request.token_by_token)
        return self._rows(request, plan, stats)

    def _statistics(self, rows: Sequence[Row], engine: Engine) -> SelfSpeculativeStatistics:
        stats: SelfSpeculativeStatistics = rows[0].stats
        if rows[0].plan is not None:
            stats.planner = rows[0].plan.describe()
        return stats


class StepVerified(Decoding):
    """SpecGuard (arXiv 2604.15244) and its relatives: a draft writes steps, and the target redoes those that are rejected.

    ``target`` and ``draft``: Hugging Face causal LMs (or decoders already opened) with the same tokenizer. ``draft`` None has the
    first ``config.exit_layer`` layers of the target draft, over one cache. ``verifier`` scores steps for the policy "verifier";
    ``encoder`` replaces the one that ``config.encoder`` names. ``plan``: how greedy rows of the policy "speculative" draft, in
    place of the configuration's exit layer and draft length. One thread at a time.

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
        plan: Plan | None = None,
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
        super().__init__(_opened(target, backend))
        self.draft: Decoder | None = None
        if draft is not None:
            self.draft = self.target if draft is target else _opened(draft, backend)
        self.exit_layer = self.config.exit_layer
        self.plan = plan
        self._plans: dict[int, Plan] = {}
        if self.draft is None and self.exit_layer is not None and self.exit_layer >= self.target.layers:
            raise ConfigError(
                f"exit_layer={self.exit_layer} is out of range; the model has {self.target.layers} layers, expected 1.."
                f"{self.target.layers - 1}."
            )
        if self.draft is None and self.exit_layer is None and plan is None and self.config.policy != "target":
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

    @property
    def target(self) -> Decoder:
        """The target's decoder."""
        return self.decoder

    def engine(
        self, *, slots: int = 1, serving: bool = True, prefix_cache: int | None = None, shared: bool = True
    ) -> Engine:
        """A new engine with room for ``slots`` rows (more are added as they come), for callers that serve.

        ``serving``: give storage back when no row is left. ``prefix_cache``: bytes for keys and values of texts that were read
        before, so that rows which begin with the same tokens do not read them again; None for none. Outputs do not depend on it.
        ``shared``: whether others hold the models, too, and may write into their weights in ways that PyTorch does not count; then
        these are read whole before what was read earlier is used.
        """
        layers = self._attention_layers()
        own: dict[str, Any] = {"slots": slots, "vocabulary": self.vocabulary}
        draft: ModelState | None = None
        if self.draft is not None:
            draft = ModelState(self.draft, attention_layers=layers(self.draft.layers), **own)
        elif self.exit_layer is not None:
            draft = ModelState(self.decoder, stop=self.exit_layer, attention_layers=layers(self.exit_layer), **own)
        if draft is None or self.draft is not None:
            target = ModelState(self.decoder, attention_layers=layers(self.decoder.layers), **own)
        else:
            target = LateLayersState(draft, attention_layers=layers(self.decoder.layers))
        for state in (target, draft):
            if state is not None:
                state.reads_exactly = state.decoder.reads_exactly
                state.shared = shared
        return Engine(
            target,
            draft,
            steps=self.steps_text,
            encoder=self.encoder,
            verifier=self.verifier,
            serving=serving,
            prefix_cache=prefix_cache,
        )

    def generate(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> StepVerifiedResult:
        """Decode up to ``max_new_tokens`` tokens per row; arguments as in :meth:`telltale.decode.Autoregressive.generate`.

        The same seed gives the same steps for a prompt, whatever other rows are decoded: each row has random numbers of its own,
        made from one number of ``generator`` and the prompt.
        """
        return drained(self.steps(self.request(input_ids, **arguments), block=BLOCK))

    def request(self, input_ids: Tensor | Sequence[Any], **arguments: Any) -> Request:
        """See :meth:`Decoding.request`; ``tokenizer`` need not be given."""
        if arguments.get("tokenizer") is None:
            arguments["tokenizer"] = self.tokenizer
        request = super().request(input_ids, **arguments)
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

    def rows(self, request: Request, config: StepVerifiedConfig | None = None) -> list[Row]:
        """See :meth:`Decoding.rows`. ``config`` takes the place of the decoder's own, for callers that serve.

        Seeds are made from one number of ``request.generator`` and the prompts.
        """
        config = self.config if config is None else config
        stopping = StopConditions(
            request.max_new_tokens,
            request.eos,
            request.stop_strings,
            self.steps_text if request.stop_strings else None,
            steps=self.steps_text,
            longest_step=config.max_step_tokens,
        )
        plan = self._plan(config, greedy=request.sampling.plain_greedy)
        seeds = row_seeds(_drawn_seed(request.generator), request.prompts)
        counts = Counter(map(tuple, request.prompts))
        shared = {prompt: SharedPrompt() for prompt, count in counts.items() if count > 1}
        return [
            Row(
                prompt,
                stopping,
                sampling_of_row(request.sampling, place, len(request.prompts)),
                config=config,
                plan=plan,
                seed=seed,
                seen_by_processors=seen,
                stats=StepVerifiedStatistics(calibrated=config.normaliser.fitted),
                shared=shared.get(tuple(prompt)),
            )
            for place, (prompt, seen, seed) in enumerate(
                zip(request.prompts, request.seen_by_processors, seeds, strict=True)
            )
        ]

    def _plan(self, config: StepVerifiedConfig, *, greedy: bool) -> Plan | None:
        """The plan by which rows under ``config`` speculate token by token, or redo a step that way; None if they do neither."""
        redoes = config.drafts and config.fallback == "spec"
        if config.policy != "speculative" and not redoes:
            return None
        # The proposals of an adaptive plan depend on earlier requests, and so would the draws; those of a seed must not.
        if self.plan is not None and greedy and not redoes and config.draft_length == self.config.draft_length:
            return self.plan
        length = config.draft_length
        if length not in self._plans:
            drafter = "model" if self.draft is not None else "exit" if self.exit_layer is not None else "ngram"
            self._plans[length] = FixedPlan(self.exit_layer or 0, length, drafter)
        return self._plans[length]

    def _engine(self, request: Request) -> Engine:
        return self.engine(slots=len(request.prompts), serving=False)

    def _statistics(self, rows: Sequence[Row], engine: Engine) -> StepVerifiedStatistics:
        stats = _summed([row.stats for row in rows])
        stats.target_passes = engine.target.passes
        if engine.draft is not None:
            stats.draft_passes = engine.draft.passes
            stats.draft_layer_executions = engine.draft.layer_executions
        return stats

    def _result(self, request: Request, rows: Sequence[Row], stats: Any) -> StepVerifiedResult:
        tokens, lengths = _padded(rows, request, self.decoder)
        reasons = [row.reason or "length" for row in rows]
        return StepVerifiedResult(tokens, lengths, reasons, stats, steps=[row.steps for row in rows])

    def _shared_vocabulary(self) -> int:
        """Tokens that both models have logits for; padding rows of the larger head are left out."""
        highest = max(self.tokenizer.get_vocab().values(), default=-1)
        for name, decoder in (("target", self.decoder), ("draft", self.draft)):
            if decoder is not None and highest >= decoder.vocabulary_size:
                raise DataError(
                    f"the tokenizer has ids up to {highest}, the {name} has {decoder.vocabulary_size} logits; expected the "
                    f"tokenizer that both models were trained with."
                )
        sizes = [decoder.vocabulary_size for decoder in (self.decoder, self.draft) if decoder is not None]
        return min(sizes)

    def _check_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        assert self.draft is not None
        highest = max(max(prompt) for prompt in prompts)
        rows = self.draft.parts.embedding.weight.shape[0]
        if highest >= rows:
            raise DataError(
                f"token id {highest} is in a prompt; the draft embeds {rows} tokens. Do the tokenizers differ?"
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
        """The models whose attention is read, and the layers each has for it."""
        config = self.config
        if self.draft is not None:
            sizes = {"draft": self.draft.layers, "target": self.decoder.layers}
        elif self.exit_layer is not None:
            sizes = {"draft": self.exit_layer, "target": self.decoder.layers - self.exit_layer}
        else:
            sizes = {"target": self.decoder.layers}
        return [(name, size) for name, size in sizes.items() if config.record_signals or name == config.signal_model]

    def _attention_layers(self) -> Any:
        config = self.config
        if not (config.reads_grounding or config.record_signals):
            return lambda layers: 0
        return lambda layers: layers if config.grounding_layers is None else min(config.grounding_layers, layers)


def drained(steps: Generator[Any, None, Result]) -> Result:
    """The return value of a generator; its items are dropped."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _unbatched(steps: CommittedRounds, *, single: bool) -> Generator[Any, None, Any]:
    """``steps`` as users see them: for a ``single`` row its tokens alone, for a batch one list per row; the same return value."""
    try:
        while True:
            committed = next(steps)
            yield committed[0] if single else committed
    except StopIteration as end:
        return end.value


def _opened(model: nn.Module | Decoder, backend: str) -> Decoder:
    if isinstance(model, Decoder):
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a {type(model).__name__} was given as a model; expected a Hugging Face causal LM."
        )
    return open_decoder(model, backend=backend)


def _drawn_seed(generator: torch.Generator | None) -> int:
    device = None if generator is None else generator.device
    return int(torch.randint(2**31, (1,), generator=generator, device=device))


def _by_row(committed: Sequence[Committed], rows: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(rows)]
    for one in committed:
        found[one.number] += one.tokens
    return found


def _padded(rows: Sequence[Row], request: Request, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Tokens (batch, longest) with the request's padding, and lengths (batch,)."""
    lengths = [len(row.tokens) for row in rows]
    longest = max(lengths)
    padded = [row.tokens + [request.pad_token_id] * (longest - len(row.tokens)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=decoder.device), torch.tensor(lengths, device=decoder.device)


def _summed(parts: Sequence[StepVerifiedStatistics]) -> StepVerifiedStatistics:
    total = StepVerifiedStatistics(calibrated=all(part.calibrated for part in parts))
    for field in fields(StepVerifiedStatistics):
        if field.type == "int":
            setattr(total, field.name, sum(getattr(part, field.name) for part in parts))
    return total
