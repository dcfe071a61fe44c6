"""The replicas of a plan of one stage have no neighbour to compare minibatches with: they compare them with each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from telltale.errors import DataError
from telltale.train.pipeline.runtime.worker import Batches, Worker


def compare(rank: int, *sources: list[tuple[Tensor, Tensor]]) -> None:
    """What ``rank`` does at the start of a run when the replicas read ``sources``."""
    all_batches = [Batches(source, lambda batch: 1.0) for source in sources]

    def gathered(own: Tensor) -> list[Tensor]:
        assert own.tolist() == [all_batches[rank].digest(0), rank]
        return [torch.tensor([batches.digest(0), other]) for other, batches in enumerate(all_batches)]

    worker: Any = SimpleNamespace(
        place=SimpleNamespace(stage=0, replica=rank),
        policy=SimpleNamespace(replicas=(len(sources),)),
        record=SimpleNamespace(rank=rank),
        exchange=SimpleNamespace(gathered=gathered),
        _batches=all_batches[rank],
    )
    Worker._compare_replicas(worker, 0, 4)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_replicas_with_other_data_are_named_on_every_rank(rank: int) -> None:
    data = [(torch.ones(4, 2), torch.arange(4))]
    shuffled = [(torch.ones(4, 2), torch.arange(4).flip(0))]
    compare(rank, data, list(data), data)
    with pytest.raises(DataError, match="ranks 0 and 2 were given different data as minibatch 0"):
        compare(rank, data, data, shuffled)
