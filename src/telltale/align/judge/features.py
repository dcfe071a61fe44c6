"""Hidden states of a frozen backbone: opening it, running it over conversations, and pooling; resumable and sharded.

Any local decoder or encoder in the Hugging Face layout works, without its head. A conversation gives one vector for the response
and one for its prompt. Decoders: the last token under the attention mask, and the gating token. Encoders: the mean over the mask,
in two passes. The pad id is never looked for, since it may be the end-of-sequence id and then occurs in the text.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel

from telltale.align.judge.data import Conversation, Pair
from telltale.align.judge.feature_store import PROMPT_IDS, Features, FeatureStore, prompt_id
from telltale.align.judge.gate_fit import PairFeatures
from telltale.align.judge.templates import TEMPLATE_DATE, Encoded, dated, encode, freeze_template_date, template_pattern
from telltale.config import check_integer
from telltale.errors import CheckpointError, DataError, UnsupportedModelError
from telltale.models.gguf import is_gguf
from telltale.models.loading import check_fit, in_a_line, load, load_tokenizer, moved, quietly
from telltale.runs.files import remove_partial_writes
from telltale.runs.progress import ProgressBar

SHORTEST = 8
"""Tokens that a judge has to read at least: the first, the gating token and the header after it, and something to judge."""
SHARD_ROWS = 256
"""The unit that processes divide; within it, rows of similar length go through the backbone together."""
SECONDS_BETWEEN_PARTS = 5.0
"""The most seconds of work that a kill can lose."""
LONGEST_WAIT = datetime.timedelta(days=30)
"""Timeout of barriers: one process's shards may take hours longer than another's."""
POOLINGS = ("last", "mean")
UNLIMITED = 10**9
"""From here on a tokenizer's ``model_max_length`` means that it knows of none."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model with its tokenizer, and how it reads conversations (what ``encode`` asks for)."""

    model: Any
    tokenizer: Any
    pooling: str
    """``last`` for a decoder, ``mean`` for an encoder."""
    context_length: int | None
    """Tokens of a conversation; longer prompts lose their beginning."""
    gating: str = "template"
    gating_pattern: tuple[int, ...] | None = None
    """The ids that open the assistant's turn, for trainers that judge token ids."""


def open_backbone(
    path: str | Path, *, dtype: str | None = None, device: str | None = None, context_length: int | None = None
) -> Backbone:
    """Open the checkpoint ``path`` (a folder or a ``.gguf`` file); no code of it runs. ``context_length`` None: the model's own.

    Raises :class:`~telltale.errors.CheckpointError` for a folder that is no checkpoint, or an incomplete one,
    :class:`~telltale.errors.UnsupportedModelError` for an encoder-decoder, and :class:`~telltale.errors.DataError` for a
    tokenizer that is missing, does not fit, or (for decoders) has no chat template.
    """
    folder = Path(path)
    if context_length is not None:
        check_integer("context_length", context_length, low=SHORTEST)
    if is_gguf(folder):
        whole, tokenizer = load(folder, dtype=dtype, device=device, any_family=True)
        return as_backbone(whole.base_model, tokenizer, context_length=context_length)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a local Hugging Face checkpoint.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{folder} is an encoder-decoder ({config.model_type}); expected a decoder or an encoder."
            )
        with quietly():
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=dtype or "auto", output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_a_line(error)}") from error
    # A pooler on top of an encoder is not read.
    absent = sorted(name for name in report.get("missing_keys") or [] if "pooler" not in name)
    if absent:
        raise CheckpointError(f"{folder} lacks {absent[0]} ({len(absent)} in all); expected a whole checkpoint.")
    tokenizer = load_tokenizer(folder)
    check_fit(tokenizer, model, folder)
    return as_backbone(moved(model, device), tokenizer, context_length=context_length)


def as_backbone(model: Any, tokenizer: Any, *, context_length: int | None = None) -> Backbone:
    """A model and tokenizer that are in memory already, as :func:`open_backbone` gives them."""
    model.eval().requires_grad_(False)
    freeze_template_date(tokenizer)
    # Some models (RoBERTa) have positions that no token takes; their tokenizer knows better.
    known = (context_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min((value for value in known if value and value < UNLIMITED), default=None)
    if not is_causal(model):
        return Backbone(model, tokenizer, "mean", limit)
    try:
        pattern = template_pattern(tokenizer)
    except DataError:
        # Without a chat template `encode` says so; without a generation prompt only judging token ids is not possible.
        pattern = None
    return Backbone(model, tokenizer, "last", limit, gating_pattern=pattern)


@torch.inference_mode()
def is_causal(backbone: Any) -> bool:
    """Whether a token's state is independent of later tokens: a decoder, not an encoder.

    Tested on three tokens, since names do not say: encoders of some families take a cache as well.
    """
    device = next(backbone.parameters()).device
    states = [
        backbone(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0, 0] for ids in ([1, 2, 3], [1, 2, 4])
    ]
    return torch.allclose(states[0].float(), states[1].float(), rtol=1e-3, atol=1e-5)


def extract(
    backbone: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    out: str | Path,
    config: Any,
    *,
    batch_size: int = 16,
    shard_rows: int = SHARD_ROWS,
    dtype: torch.dtype = torch.float32,
    progress: ProgressBar | None = None,
) -> FeatureStore:
    """Features of ``conversations`` in the folder ``out``, in their order.

    ``config`` says how a conversation is read (pooling, gating, context_length: a
    :class:`~telltale.align.judge.model.JudgeConfig`). Rows that are there already are kept, so a run that was killed resumes; it
    loses at most the rows of its last seconds. Under torchrun each process computes every world-size-th shard, and all wait for
    each other.

    Raises :class:`~telltale.errors.ConfigError` if ``out`` holds features of other rows or another backbone, and
    :class:`~telltale.errors.DataError` naming the conversation for one that cannot be read.
    """
    check_integer("batch_size", batch_size, low=1)
    check_integer("shard_rows", shard_rows, low=1)
    if not conversations:
        raise DataError("there are no conversations to compute features of; expected at least one.")
    settings = {
        "rows": len(conversations),
        "shard_rows": shard_rows,
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "pooling": config.pooling,
        "gating": config.gating,
        "gating_pattern": list(config.gating_pattern or ()) if config.gating == "pattern" else None,
        "context_length": config.context_length,
        "conversations": _digest(conversations),
        "prompt_ids": PROMPT_IDS,
        "backbone": fingerprint(backbone),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    rank, world = _rank_and_world()
    if rank == 0:
        FeatureStore.create(out, settings)
        remove_partial_writes(Path(out))
    _barrier()
    store = FeatureStore.create(out, settings)
    backbone.eval()
    todo = store.missing()[rank::world] if world == 1 else [s for s in store.missing() if s % world == rank]
    done = 0
    for shard in todo:
        rows = [conversations[index] for index in store.rows_of(shard)]
        store.write(shard, _shard(backbone, tokenizer, rows, config, batch_size, dtype, store, shard))
        done += len(rows)
        if progress is not None:
            progress.update(done, f"shard {shard + 1} of {store.shards}")
    _barrier()
    return store


def pair_conversations(pairs: Sequence[Pair]) -> list[Conversation]:
    """Both responses of every pair as conversations, the chosen one first."""
    found = []
    for pair in pairs:
        found.append(Conversation(f"{pair.id} (chosen)", [*pair.prompt, {"role": "assistant", "content": pair.chosen}]))
        found.append(
            Conversation(f"{pair.id} (rejected)", [*pair.prompt, {"role": "assistant", "content": pair.rejected}])
        )
    return found


def pair_features(features: Features) -> PairFeatures:
    """Features of :func:`pair_conversations` as pairs. Raises :class:`~telltale.errors.DataError` for an odd number of rows."""
    if len(features) % 2:
        raise DataError(f"{len(features)} rows are no pairs; expected the chosen and the rejected response in turn.")
    return PairFeatures(
        features.responses[0::2], features.responses[1::2], features.prompts[0::2], features.groups[0::2]
    )


def batch_features(
    backbone: Any, rows: Sequence[Encoded], *, pooling: str, pad: int, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Features of responses (B, d) and of their prompts (B, d) for encoded conversations; ``left`` is for decoders."""
    device = next(backbone.parameters()).device
    left = left and pooling == "last"
    ids, mask = padded([row.ids for row in rows], pad=pad, device=device, left=left)
    if pooling == "mean":
        # Responses to one prompt share its pass.
        places: dict[tuple[int, ...], int] = {}
        own = [places.setdefault(tuple(row.prompt_ids), len(places)) for row in rows]
        prompts, prompt_mask = padded(list(places), pad=pad, device=device)
        states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        before = backbone(input_ids=prompts, attention_mask=prompt_mask).last_hidden_state
        return mean_of(states, mask), mean_of(before, prompt_mask)[own]
    options: dict[str, Any] = {"use_cache": False}
    if left:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    states = backbone(input_ids=ids, attention_mask=mask, **options).last_hidden_state
    shift = mask.shape[1] - mask.sum(1) if left else torch.zeros(len(rows), dtype=torch.long, device=device)
    gating = torch.tensor([row.gating_index for row in rows], device=device) + shift
    return last_token(states, mask), states[torch.arange(len(rows), device=device), gating]


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's last token under ``mask``: (B, L, d) and (B, L) -> (B, d); padding on either side.

    Raises :class:`~telltale.errors.DataError` for a row without any token.
    """
    _check_mask(mask)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.bool() * places).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row's tokens under ``mask``: (B, L, d) and (B, L) -> (B, d), summed up in float32 at least.

    Sums of thousands of tokens overflow float16, and lose digits in bfloat16.
    """
    _check_mask(mask)
    wide = states if states.dtype == torch.float64 else states.float()
    weight = mask.to(wide.dtype).unsqueeze(-1)
    return (wide * weight).sum(1) / weight.sum(1)


def padded(rows: Sequence[Sequence[int]], *, pad: int, device: Any, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of ids as (B, L) and their mask, padded on the right (or left)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, part] = torch.tensor(list(row), dtype=torch.long)
        mask[index, part] = 1
    return ids.to(device), mask.to(device)


def padded_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L) with what the mask hides moved behind what it shows.

    Encoders with absolute positions count padding on the left, and not every family of decoders takes positions from outside.
    """
    order = mask.bool().to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def pad_id(tokenizer: Any) -> int:
    """An id to pad with; the mask hides it, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def fingerprint(backbone: Any) -> str:
    """Sixteen hexadecimal digits of the backbone's class, shapes, dtypes and a few of its weights."""
    digest = hashlib.blake2b(type(backbone).__name__.encode(), digest_size=8)
    for name, parameter in backbone.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        sample: Tensor = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)][:64].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hexadecimal digits of the tokenizer's vocabulary and rules, its special tokens, and its chat template with the
    date that it is shown."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are left over from the last call.
    rules = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    template = tokenizer.chat_template
    if isinstance(template, str):
        template = dated(template, TEMPLATE_DATE)  # what is rendered with
    identity = [rules, tokenizer.bos_token_id, tokenizer.eos_token_id, template]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _shard(
    backbone: Any,
    tokenizer: Any,
    rows: Sequence[Conversation],
    config: Any,
    batch_size: int,
    dtype: torch.dtype,
    store: FeatureStore,
    shard: int,
) -> Features:
    """Longest first, so that a batch pads little and the largest one comes first; what parts hold is not computed again."""
    encoded = [_encoded(tokenizer, row, config) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (-len(encoded[index].ids), index))
    found = store.parts(shard)
    kept, last = set(found), time.monotonic()
    pad = pad_id(tokenizer)

    def keep() -> None:
        new = [index for index in found if index not in kept]
        if new:
            store.write_part(shard, new, *(torch.stack([found[index][side] for index in new]) for side in (0, 1)))
            kept.update(new)

    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if all(index in found for index in chosen):
                continue
            with torch.inference_mode():
                states = batch_features(backbone, [encoded[index] for index in chosen], pooling=config.pooling, pad=pad)
            responses, prompts = (side.to(dtype).cpu() for side in states)
            _check_finite([rows[index].id for index in chosen], responses, prompts)
            found |= {index: (a.clone(), b.clone()) for index, a, b in zip(chosen, responses, prompts, strict=True)}
            if time.monotonic() - last > SECONDS_BETWEEN_PARTS:
                keep()
                last = time.monotonic()
    except BaseException:
        keep()
        raise
    return Features(
        torch.stack([found[index][0] for index in range(len(rows))]),
        torch.stack([found[index][1] for index in range(len(rows))]),
        torch.tensor([prompt_id(row.messages[:-1]) for row in rows]),
        [row.id for row in rows],
        torch.tensor([part.truncated for part in encoded]),
        torch.tensor([part.response_truncated for part in encoded]),
    )


def _check_finite(rows: Sequence[str], *states: Tensor) -> None:
    for part in states:
        bad = (~torch.isfinite(part)).any(1).nonzero()[:, 0]
        if len(bad):
            raise DataError(f"{rows[int(bad[0])]} has a feature that is NaN or infinite; expected finite features.")


def _encoded(tokenizer: Any, row: Conversation, config: Any) -> Encoded:
    try:
        return encode(tokenizer, row.messages, config)
    except DataError as error:
        raise DataError(f"{row.id}: {error}") from error


def _digest(conversations: Sequence[Conversation]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in conversations:
        digest.update(json.dumps([row.id, row.messages], sort_keys=True).encode())
    return digest.hexdigest()


def _rank_and_world() -> tuple[int, int]:
    """Rank and world size; joins the processes that torchrun has started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _check_mask(mask: Tensor) -> None:
    empty = (mask.sum(1) == 0).nonzero()[:, 0]
    if len(empty):
        raise DataError(f"row {int(empty[0])} has no token; expected at least one under the attention mask.")
