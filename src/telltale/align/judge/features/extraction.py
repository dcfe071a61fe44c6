"""Running a frozen backbone over conversations and keeping the features: resumable, sharded, one share per process."""

from __future__ import annotations

import hashlib
import json
import os
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
from telltale.runs.progress import ProgressBar

SHARD_ROWS = 1024


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
    :class:`~telltale.align.judge.model.JudgeConfig`). Shards that are there already are kept, so a run that was killed goes
    on; under torchrun each process computes every world-size-th shard, and all wait for each other.

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
        "context_length": config.context_length,
        "conversations": _digest(conversations),
        "backbone": fingerprint(backbone),
    }
    rank, world = _place()
    if rank == 0:
        FeatureStore.create(out, settings)
    _wait()
    store = FeatureStore.create(out, settings)
    backbone.eval()
    todo = store.missing()[rank::world] if world == 1 else [s for s in store.missing() if s % world == rank]
    done = 0
    for shard in todo:
        rows = [conversations[index] for index in store.rows_of(shard)]
        store.write(shard, _shard(backbone, tokenizer, rows, config, batch_size, dtype))
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
    """Sixteen hexadecimal digits of the backbone's class, shapes and a few of its weights."""
    digest = hashlib.blake2b(type(backbone).__name__.encode(), digest_size=8)
    for name, parameter in backbone.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        sample: Tensor = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)][:64].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _shard(
    backbone: Any, tokenizer: Any, rows: Sequence[Conversation], config: Any, batch_size: int, dtype: torch.dtype
) -> Features:
    """Longest first, so that a batch pads little and the largest one comes first."""
    encoded = [_encoded(tokenizer, row, config) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (-len(encoded[index].ids), index))
    responses: list[Tensor | None] = [None] * len(rows)
    prompts: list[Tensor | None] = [None] * len(rows)
    pad = pad_id(tokenizer)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with torch.inference_mode():
            found = batch_features(backbone, [encoded[index] for index in chosen], pooling=config.pooling, pad=pad)
        for index, response, prompt in zip(chosen, *found, strict=True):
            responses[index], prompts[index] = response.to(dtype).cpu().clone(), prompt.to(dtype).cpu().clone()
    return Features(
        torch.stack([part for part in responses if part is not None]),
        torch.stack([part for part in prompts if part is not None]),
        torch.tensor([group_id(json.dumps(row.messages[:-1], sort_keys=True)) for row in rows]),
        [row.id for row in rows],
        torch.tensor([part.truncated for part in encoded]),
    )


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
        dist.init_process_group("gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
