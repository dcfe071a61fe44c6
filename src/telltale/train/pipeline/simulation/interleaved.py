"""The order of interleaved 1F1B: several chunks of the model per worker (Megatron-LM, arXiv 2104.04473, section 2.2).

Stage k of a plan with ``chunks`` = v runs on worker k mod W. Only the simulator uses this order; training runs on the
schedule of torch.distributed.pipelining. The bubble of equal stages is (W - 1) / (v m + W - 1).
"""

from __future__ import annotations

from telltale.errors import PlanError
from telltale.train.pipeline.schedule import BACKWARD, FORWARD, UPDATE, Operation


def interleaved_operations(
    workers: int, chunks: int, microbatches: int, worker: int, start: int, stop: int
) -> list[tuple[int, Operation]]:
    """(stage, operation) in the order of ``worker``, one drained batch of ``microbatches`` after the other.

    Raises :class:`~telltale.errors.PlanError` unless batches are multiples of the workers and the run is whole batches.
    """
    if microbatches % workers:
        raise PlanError(
            f"microbatches={microbatches} for {workers} workers; interleaved needs a multiple of the workers."
        )
    if start % microbatches or stop % microbatches or stop < start:
        raise PlanError(f"minibatches [{start}, {stop}) are no whole batches; expected multiples of {microbatches}.")
    total = microbatches * chunks
    ahead = min(2 * (workers - 1 - worker) + (chunks - 1) * workers, total)
    result: list[tuple[int, Operation]] = []

    def slot(index: int) -> tuple[int, int]:
        group, inside = divmod(index, workers * chunks)
        return inside // workers, group * workers + inside % workers

    for first in range(start, stop, microbatches):
        version = first // microbatches
        for index in range(total + ahead):
            if index < total:
                chunk, number = slot(index)
                result.append((chunk * workers + worker, Operation(FORWARD, first + number, version)))
            if index >= ahead:
                chunk, number = slot(index - ahead)
                stage = (chunks - 1 - chunk) * workers + worker
                result.append((stage, Operation(BACKWARD, first + number, version)))
        for chunk in range(chunks):
            done = Operation(UPDATE, first + microbatches - 1, version + 1)
            result.append((chunk * workers + worker, done))
    return result
