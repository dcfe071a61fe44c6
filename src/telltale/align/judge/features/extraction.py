"""Running a frozen backbone over conversations and keeping the features: resumable, sharded, one share per process."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from telltale.align.judge.features.pooling import batch_features
from telltale.align.judge.features.store import Features, FeatureStore, group_id
from telltale.align.judge.preferences import PairFeatures
from telltale.align.judge.records import Conversation, Pair
from telltale.align.judge.templating import Encoded, encode
from telltale.configuration import check_integer
from telltale.errors import DataError
from telltale.runs.atomic import remove_partial_writes
from telltale.runs.progress import ProgressBar

SHARD_ROWS = 256
"""What processes share out; inside of it rows of like length go through the backbone together."""
SECONDS_BETWEEN_PARTS = 5.0
"""The most work that a kill can lose."""
LONGEST_WAIT = datetime.timedelta(days=30)
"""For the slowest of several processes, whose shards may take hours longer than another's."""


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
    :class:`~telltale.align.judge.model.JudgeConfig`). Rows that are there already are kept, so a run that was killed goes
    on: it loses at most the rows of its last seconds. Under torchrun each process computes every world-size-th shard, and all
    wait for each other.

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
        "backbone": fingerprint(backbone),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    rank, world = _place()
    if rank == 0:
        FeatureStore.create(out, settings)
        remove_partial_writes(Path(out))
    _wait()
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
    _wait()
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


def fingerprint(backbone: Any) -> str:
    """Sixteen hexadecimal digits of the backbone's class, shapes, dtypes and a few of its weights."""
    digest = hashlib.blake2b(type(backbone).__name__.encode(), digest_size=8)
    for name, parameter in backbone.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        sample: Tensor = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)][:64].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hexadecimal digits of the tokenizer's vocabulary and rules, its special tokens and its chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are left over from the last call.
    rules = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    told = [rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


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
        torch.tensor([group_id(json.dumps(row.messages[:-1], sort_keys=True)) for row in rows]),
        [row.id for row in rows],
        torch.tensor([part.truncated for part in encoded]),
    )


def _check_finite(rows: Sequence[str], *states: Tensor) -> None:
    for part in states:
        bad = (~torch.isfinite(part)).any(1).nonzero()[:, 0]
        if len(bad):
            raise DataError(f"{rows[int(bad[0])]} has a feature that is NaN or infinite; expected finite features.")


def pad_id(tokenizer: Any) -> int:
    """An id to pad with; the mask hides it, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


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


def _place() -> tuple[int, int]:
    """Rank and world size; joins the processes that torchrun has started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
