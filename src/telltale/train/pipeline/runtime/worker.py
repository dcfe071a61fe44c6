"""What one rank does during a run: its schedule, operation by operation, with receives posted ahead and sends behind.

F(t): values in, forward under version(t), values out. B(t): gradient in, backward under the same version, gradient out.
U: gradients of the round together, one optimizer step, a new version. (PipeDream, section 3.2 and 3.3.)

Minibatches by number: every rank asks for the same one and reads what it needs of it.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from telltale.errors import DataError, NumericalError
from telltale.train.pipeline.layers import Values, share_of_terms
from telltale.train.pipeline.runtime.collectives import GradientExchange, Pending
from telltale.train.pipeline.runtime.failures import FlightRecord
from telltale.train.pipeline.runtime.links import RankPlacement, TensorSpec, different_minibatches
from telltale.train.pipeline.runtime.norm_statistics import NormStatistics
from telltale.train.pipeline.runtime.optimizer import StageOptimizer, clip, gradient_norms
from telltale.train.pipeline.runtime.stage import Stage, Weights, WeightVersions
from telltale.train.pipeline.schedule import BACKWARD, FORWARD, Operation, Policy, operations

CHECKED_EVERY = 100
"""Updates between two comparisons of replicas, and of the copies of shared weights."""
_SAMPLED = 4096
"""Entries of each tensor of a minibatch that its digest reads."""
_EVALUATED_AHEAD = 4
"""Minibatches whose activations a rank keeps for a slower receiver during an evaluation."""


@dataclass(frozen=True)
class Span:
    """One recorded operation: times in seconds of ``time.perf_counter``."""

    kind: str
    minibatch: int
    version: int
    start: float
    end: float


@dataclass
class _InFlight:
    weights: Weights
    inputs: Values
    outputs: Values


class Worker:
    """The moving parts of one rank. :meth:`run` executes one drained span of minibatches."""

    def __init__(
        self,
        stage: Stage,
        place: RankPlacement,
        policy: Policy,
        versions: WeightVersions,
        optimizer: StageOptimizer,
        exchange: GradientExchange,
        record: FlightRecord,
        *,
        across_stages: bool,
        grad_clip: float | None,
        prefetch: int,
        check_equal: Callable[[], None],
    ) -> None:
        self.stage, self.place, self.policy = stage, place, policy
        self.versions, self.optimizer, self.exchange, self.record = versions, optimizer, exchange, record
        self._across_stages, self._grad_clip, self._prefetch = across_stages, grad_clip, prefetch
        self.spans: list[Span] | None = None
        self.losses: dict[int, float] = {}
        self.weights: dict[int, float] = {}
        """Terms of the losses of an evaluation."""
        self.trace: list[Operation] = []
        self.most_versions = 0
        self.broken = False
        """Whether a run ended by an error, with minibatches and messages still under way."""
        self.check_equal = check_equal
        self._statistics = NormStatistics.where_needed(stage, policy.replicas[place.stage])
        self._totals: dict[int, Callable[[], float]] = {}
        self._counted = 0
        self._cuda = any(parameter.is_cuda for parameter in stage.parameters())
        self._live: dict[int, _InFlight] = {}
        self._pending: deque[Pending] = deque()

    def run(self, batches: Batches, start: int, stop: int) -> None:
        """Minibatches [start, stop), drained. Losses are left in ``losses`` on the last stage."""
        place = self.place
        self._batches, self._stop, self.losses = batches, stop, {}
        self._counted, self._totals = start, {}
        todo = operations(self.policy, place.stage, place.replica, start, stop)
        sides = ((FORWARD, self.stage.is_first), (BACKWARD, self.stage.is_last))
        self._expected = {
            kind: deque(op.minibatch for op in todo if op.kind == kind and not alone) for kind, alone in sides
        }
        self._taken_by_peer = self._upstream_order(start, stop)
        self.broken = True
        self._compare_replicas(start, stop)
        for operation in todo:
            self.record.note(f"{operation.kind}{operation.minibatch} (version {operation.version})")
            if operation.kind == FORWARD:
                self._forward(operation)
            elif operation.kind == BACKWARD:
                self._backward(operation)
            else:
                with self._timed(operation):
                    self._update(operation)
            self.most_versions = max(self.most_versions, len(self.versions.alive))
        self._settle(None)
        for link in (*place.values_out, *place.gradients_out):
            link.wait_sent(stop)
        self.broken = False

    @torch.no_grad()
    def evaluate(self, batches: Batches, count: int) -> None:
        """Forward alone, with the newest weights, over the minibatches [0, count)."""
        place, stage = self.place, self.stage
        self._batches, self.losses, self.weights = batches, {}, {}
        for t in range(place.replica, count, self.policy.replicas[place.stage]):
            self.record.note(f"evaluation of minibatch {t}")
            batch = batches(t)
            if stage.is_first:
                inputs = stage.model.value.inputs(batch)
            else:
                link = place.values_in[t % len(place.values_in)]
                link.check_minibatch(t, batches.digest(t))
                inputs = tuple(link.receive(t, link.specs(t, self.pattern(t))))
            outputs = stage(inputs, batch, t, self._terms_if_last(t))
            if stage.is_last:
                self.losses[t] = float(outputs[0])
                self.weights[t] = batches.terms(t)
            else:
                link = place.values_out[t % len(place.values_out)]
                link.send_values(t, self.pattern(t), outputs, batches.digest(t))
                # Nothing comes back here, so waiting for a slower receiver cannot make a circle.
                link.wait_sent(t - _EVALUATED_AHEAD * len(place.values_out) * self.policy.replicas[place.stage])
            batches.release(t)
        for link in place.values_out:
            link.wait_sent(count)

    def _compare_replicas(self, start: int, stop: int) -> None:
        """The replicas of a stage that has no neighbour, which would tell, look at the first minibatch of the run together."""
        place, replicas = self.place, self.policy.replicas
        if len(replicas) > 1 or replicas[0] == 1 or start == stop:
            return
        own = torch.tensor([self._batches.digest(start), self.record.rank])
        if place.replica:
            self._batches.release(start)
        (wanted, first), *others = (given.tolist() for given in self.exchange.gathered(own))
        for digest, rank in others:
            if digest != wanted:
                raise different_minibatches(first, rank, start)

    def pattern(self, minibatch: int) -> Hashable:
        """Minibatches of the same pattern move tensors of the same shapes."""
        return self.stage.model.value.pattern(minibatch), self._batches.shapes(minibatch), self.stage.training

    def _forward(self, operation: Operation) -> None:
        t, stage = operation.minibatch, self.stage
        batch = self._batches(t)
        self._count_terms(t)
        inputs = stage.model.value.inputs(batch) if stage.is_first else self._arrived_values(t)
        self._post_ahead()
        self._settle(operation.version)
        weights = self.versions.at(operation.version)
        with self._timed(operation), self._statistics.noting(t) if self._statistics else nullcontext():
            outputs = stage.run_forward(weights, inputs, batch, t, self._terms_if_last(t))
            if stage.is_last:
                self._judge(outputs[0], operation)
            self._live[t] = _InFlight(weights, inputs, outputs)
        self.trace.append(operation)
        if not stage.is_last:
            links = self.place.values_out
            links[t % len(links)].send_values(t, self.pattern(t), outputs, self._batches.digest(t))

    def _backward(self, operation: Operation) -> None:
        t, stage = operation.minibatch, self.stage
        flight = self._live.pop(t)
        gradients = [self._seed(flight.outputs[0], t)] if stage.is_last else self._arrived_gradients(t, flight.outputs)
        self._post_ahead()
        with self._timed(operation):
            stage.run_backward(flight.weights, flight.outputs, gradients)
        if stage.is_last:
            stage.check_reached(flight.weights, flight.inputs, t)
        self.trace.append(operation)
        if not stage.is_first:
            wanted = [x for x in flight.inputs if x.requires_grad]
            links = self.place.gradients_out
            found = [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted]
            links[t % len(links)].send(t, found, [TensorSpec.of(x) for x in wanted])
        if self.policy.synchronous or self.policy.replicas[self.place.stage] == 1:
            self._batches.release(t)

    def _update(self, operation: Operation) -> None:
        """Average over the replicas; step now, or once the other stages have contributed where they must."""
        t, policy, number = operation.minibatch, self.policy, self.place.stage
        size = policy.round_size(number)
        first = t // size * size
        read = policy.backward_version(number, first)
        self._settle(read)
        self.versions.take_gradients(read)
        if policy.synchronous:
            self._count_terms(t)
            if self.stage.is_last:
                share_of_terms(0.0, self._totals.pop(first)(), first, t)
            self.exchange.average()
        elif policy.replicas[number] > 1:
            mine = first + self.place.replica
            self.exchange.average(self._batches.terms(mine) if mine <= t else 0.0, (first, t))
            self._batches.release(mine)
        self._move_statistics(first, t)
        self.trace.append(operation)
        if self._across_stages:
            limit = bool(self._grad_clip)
            self._pending.append(self.exchange.start(operation.version, t, clip=limit))
            if policy.drains:
                self._settle(None)
                self._check_now_and_then(operation.version)
            return
        if self._grad_clip:
            gradients = [parameter.grad for parameter in self.optimizer.parameters]
            clip(gradients, gradient_norms(gradients), self._grad_clip)
        self.versions.advance(lambda: self.optimizer.step(t, operation.version))
        self._check_now_and_then(operation.version)

    def _check_now_and_then(self, version: int) -> None:
        """Compare what must be equal on several ranks, where all of them have just made ``version``. Under 2bw and vertical with
        sums across stages they have not: there the end of a run compares."""
        if version % CHECKED_EVERY == 0:
            self.check_equal()

    def _count_terms(self, minibatch: int) -> None:
        """On the last stage, where several minibatches make one update: tell the other replicas how many terms the own minibatches
        have, of every batch up to that of ``minibatch``, in the order of the batches."""
        size = self.policy.microbatches
        while self.policy.synchronous and self.stage.is_last and self._counted <= minibatch:
            first, self._counted = self._counted, (self._counted // size + 1) * size
            own = [t for t in range(first, min(self._counted, self._stop)) if self._is_mine(t)]
            terms = sum(self._batches.terms(t) for t in own)
            self._totals[first // size * size] = self.exchange.count(terms)

    def _terms_if_last(self, minibatch: int) -> float | None:
        return self._batches.terms(minibatch) if self.stage.is_last else None

    def _move_statistics(self, first: int, last: int) -> None:
        """Running statistics of a replicated stage move by the minibatches of the round, in their order."""
        if self._statistics is None:
            return
        replicas = self.policy.replicas[self.place.stage]
        rows = -(-(last - first + 1) // replicas) + 1
        notes = torch.zeros(rows, self._statistics.size, dtype=torch.float64)
        order = [[t for t in range(first, last + 1) if t % replicas == replica] for replica in range(replicas)]
        for row, t in enumerate(order[self.place.replica]):
            notes[row] = self._statistics.note_of(t)
        gathered = self.exchange.gathered(notes)
        for t in range(first, last + 1):
            self._statistics.apply(gathered[t % replicas][order[t % replicas].index(t)])

    def _settle(self, version: int | None) -> None:
        """Apply pending updates, oldest first, until ``version`` is there; all of them for None."""
        while self._pending and (version is None or self.versions.current < version):
            pending = self._pending.popleft()
            norms = self.exchange.finish(pending)
            if self._grad_clip and norms is not None:
                clip([parameter.grad for parameter in self.optimizer.parameters], norms, self._grad_clip)
            self.versions.advance(lambda p=pending: self.optimizer.step(p.minibatch, p.version))  # type: ignore[misc]

    def _judge(self, loss: Tensor, operation: Operation) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericalError(
                f"the loss of minibatch {operation.minibatch} is {value} (weight version {operation.version}, policy "
                f"{self.policy.name}); expected a finite number. Lower the learning rate or use a policy with a smaller delay."
            )
        self.losses[operation.minibatch] = value

    def _seed(self, loss: Tensor, minibatch: int) -> Tensor:
        """The loss's own gradient: 1, or where a batch of minibatches makes one update, this one's share of its terms."""
        if not self.policy.synchronous:
            return torch.ones_like(loss)
        size = self.policy.microbatches
        first = minibatch // size * size
        last = min(first + size, self._stop) - 1
        share = share_of_terms(self._batches.terms(minibatch), self._totals[first](), first, last)
        return torch.full_like(loss, share)

    def _arrived_values(self, minibatch: int) -> Values:
        links = self.place.values_in
        link = links[minibatch % len(links)]
        link.check_minibatch(minibatch, self._batches.digest(minibatch))
        specs = link.specs(minibatch, self.pattern(minibatch))
        arrived = link.receive(minibatch, specs)
        self._expected[FORWARD].popleft()
        # What the sender did with our gradients before it sent this, it has certainly received.
        upstream = self.place.gradients_out[minibatch % len(links)]
        upstream.wait_sent(self._taken_by_peer[minibatch % len(links)].get(minibatch, -1))
        return tuple(x.requires_grad_(spec.requires_grad) for x, spec in zip(arrived, specs, strict=True))

    def _arrived_gradients(self, minibatch: int, outputs: Values) -> list[Tensor | None]:
        links = self.place.gradients_in
        which = minibatch % len(links)
        sent = self.place.values_out[which].specs(minibatch, self.pattern(minibatch))
        specs = [spec for spec in sent if spec.requires_grad]
        arrived = iter(links[which].receive(minibatch, specs))
        self._expected[BACKWARD].popleft()
        self.place.values_out[which].wait_sent(minibatch)
        return [next(arrived) if y.requires_grad else None for y in outputs]

    def _post_ahead(self) -> None:
        """Post the receives of the next minibatches, up to one whose shapes are not known yet: some backends match
        messages by their order alone, and a header would come in between."""
        place = self.place
        for t in islice(self._expected[FORWARD], self._prefetch):
            link = place.values_in[t % len(place.values_in)]
            if not link.knows(self.pattern(t)):
                break
            link.post_digest(t)
            link.post_receive(t, link.specs(t, self.pattern(t)))
        for t in islice(self._expected[BACKWARD], self._prefetch):
            which = t % len(place.gradients_in)
            if not place.values_out[which].knows(self.pattern(t)):
                break
            specs = place.values_out[which].specs(t, self.pattern(t))
            place.gradients_in[which].post_receive(t, [spec for spec in specs if spec.requires_grad])

    def _upstream_order(self, start: int, stop: int) -> list[dict[int, int]]:
        """Per upstream replica: minibatch of each of its forwards -> last minibatch of ours it ran backward before."""
        if self.stage.is_first:
            return []
        stage, orders = self.place.stage - 1, []
        for replica in range(self.policy.replicas[stage]):
            done, order = -1, {}
            for operation in operations(self.policy, stage, replica, start, stop):
                if operation.kind == BACKWARD and self._is_mine(operation.minibatch):
                    done = operation.minibatch
                elif operation.kind == FORWARD:
                    order[operation.minibatch] = done
            orders.append(order)
        return orders

    def _is_mine(self, minibatch: int) -> bool:
        return minibatch % self.policy.replicas[self.place.stage] == self.place.replica

    @contextmanager
    def _timed(self, operation: Operation) -> Iterator[None]:
        if self.spans is None:
            yield
            return
        began = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self.spans.append(Span(operation.kind, operation.minibatch, operation.version, began, time.perf_counter()))


class Batches:
    """A sequence of minibatches, or a function of their number, kept while they are in flight, with the terms of their losses.

    ``weight`` is the model's: minibatch -> terms in its mean loss.
    """

    def __init__(
        self,
        source: Callable[[int], Any] | Sequence[Any],
        weight: Callable[[Any], float],
        device: torch.device | None = None,
    ) -> None:
        if not callable(source) and not hasattr(source, "__getitem__"):
            raise DataError(
                f"batches is {type(source).__name__}; expected a function of the minibatch number, or a sequence."
            )
        self._source, self._weight = source, weight
        self._device = device
        self._terms: dict[int, float] = {}
        self._kept: dict[int, Any] = {}
        self._digests: dict[int, int] = {}

    def __call__(self, minibatch: int) -> Any:
        """Minibatch ``minibatch``, on this rank's device. Raises :class:`~telltale.errors.DataError` past the end."""
        if minibatch not in self._kept:
            if callable(self._source):
                batch = self._source(minibatch)
            else:
                try:
                    batch = self._source[minibatch]
                except (IndexError, KeyError) as error:
                    count = len(self._source) if hasattr(self._source, "__len__") else "ones"
                    raise DataError(f"minibatch {minibatch} is past the end of the {count} given.") from error
            device = self._device
            self._kept[minibatch] = batch if device is None else tree_map(lambda leaf: _moved(leaf, device), batch)
        return self._kept[minibatch]

    def shapes(self, minibatch: int) -> Hashable:
        """Shapes and dtypes of the minibatch's tensors, the same on every rank."""
        leaves = tree_leaves(self(minibatch))
        return tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor))

    def terms(self, minibatch: int) -> float:
        """How many terms the mean loss of the minibatch is over; counted once."""
        if minibatch not in self._terms:
            self._terms[minibatch] = self._weight(self(minibatch))
        return self._terms[minibatch]

    def digest(self, minibatch: int) -> int:
        """A number that equal minibatches have in common: a checksum of the tensors' shapes and of up to 4,096 evenly spaced
        entries of each, and of numbers, texts and arrays beside them."""
        if minibatch not in self._digests:
            found = zlib.crc32(repr(self.shapes(minibatch)).encode())
            for leaf in tree_leaves(self(minibatch)):
                if isinstance(leaf, torch.Tensor) and leaf.numel():
                    flat = leaf.detach().reshape(-1)
                    sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
                    found = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), found)
                elif isinstance(leaf, (bool, int, float, complex, str, bytes)):
                    found = zlib.crc32(repr(leaf).encode(), found)
                elif hasattr(leaf, "__array__") and not isinstance(leaf, torch.Tensor):
                    array = np.asarray(leaf)
                    entries = array.reshape(-1)[:: max(1, array.size // _SAMPLED)].tolist()
                    found = zlib.crc32(repr((array.shape, str(array.dtype), entries)).encode(), found)
            self._digests[minibatch] = found
        return self._digests[minibatch]

    def release(self, minibatch: int) -> None:
        """Let go of a minibatch that is not needed any more."""
        self._kept.pop(minibatch, None)
        self._digests.pop(minibatch, None)
        self._terms.pop(minibatch, None)


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf
