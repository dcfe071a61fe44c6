"""The cache forgets by lowering a length, grows without losing anything and shares a prefix without copying it."""

from __future__ import annotations

import pytest
import torch
from tests.models.tiny_models import counted

from telltale.errors import ConfigError
from telltale.models.cache import Cache, lazy_zeros


def new_cache(batch: int = 1, capacity: int = 4) -> Cache:
    return Cache(
        layers=2,
        batch=batch,
        kv_heads=3,
        head_dim=5,
        capacity=capacity,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def entries(batch: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 3, width, 5, generator=generator) for _ in range(2))
    return keys, values


def test_growing_doubles_keeps_the_content_and_is_noticed():
    cache = new_cache()
    keys, values = entries(1, 4, 0)
    cache.write(1, keys, values, [0])
    cache.reserve(4)
    assert (cache.capacity, cache.generation) == (4, 0)
    cache.reserve(9)
    assert (cache.capacity, cache.generation) == (16, 1)
    kept_keys, kept_values = cache.read(1, 4)
    assert torch.equal(kept_keys, keys)
    assert torch.equal(kept_values, values)


def test_rows_are_written_at_their_own_positions():
    cache = new_cache(batch=2, capacity=8)
    keys, values = entries(2, 2, 1)
    cache.write(0, keys, values, [1, 5])
    assert torch.equal(cache.keys[0][0, :, 1:3], keys[0])
    assert torch.equal(cache.values[0][1, :, 5:7], values[1])
    assert cache.keys[0].count_nonzero() == keys.numel()


def test_truncating_touches_no_tensor():
    cache = new_cache(batch=2, capacity=8)
    cache.write(0, *entries(2, 8, 2), [0, 0])
    before = cache.keys[0].clone()
    counted(cache, 7)
    counted(cache, [3, 0])
    assert cache.lengths == [3, 0]
    assert torch.equal(cache.keys[0], before)
    assert cache.generation == 0


@pytest.mark.parametrize("length", [-1, 9])
def test_impossible_lengths_are_refused_and_change_nothing(length):
    cache = new_cache(batch=2, capacity=8)
    counted(cache, [2, 3])
    with pytest.raises(ConfigError):
        cache.truncate(1, length)
    assert cache.lengths == [2, 3]


def test_a_row_that_moves_takes_what_it_holds_along():
    cache = new_cache(batch=3, capacity=4)
    keys, values = entries(3, 4, 3)
    cache.write(0, keys, values, [0, 0, 0])
    counted(cache, [0, 1, 2])
    cache.move(2, 0)
    assert (cache.batch, cache.lengths, cache.generation) == (3, [2, 1, 0], 0)
    assert torch.equal(cache.row(0).read(0, 2)[0], keys[2:, :, :2])
    assert torch.equal(cache.row(0).read(0, 2)[1], values[2:, :, :2])


@pytest.mark.parametrize("rows", [[1, 2], [2], [0, 1, 2, 3], [3, 1], [1, 3]])
def test_chosen_rows_are_a_batch_of_their_own_and_grow_with_the_others(rows):
    cache = new_cache(batch=4, capacity=2)
    keys, values = entries(4, 2, 5)
    cache.write(0, keys, values, [0] * 4)
    chosen = cache.select(rows)
    assert torch.equal(chosen.read(0, 2)[0], keys[rows])
    chosen.reserve(6)
    assert cache.capacity == chosen.capacity == 8
    more, others = entries(len(rows), 3, 7)
    chosen.write(0, more, others, [2 + place for place in range(len(rows))])
    for place, row in enumerate(rows):
        assert torch.equal(cache.keys[0][row, :, 2 + place : 5 + place], more[place])
        assert torch.equal(cache.values[0][row, :, 2 + place : 5 + place], others[place])
    inner = chosen.select([len(rows) - 1])
    assert torch.equal(inner.read(0, 2)[1], values[rows[-1] :][:1])


def test_a_fork_reads_the_shared_prefix_and_its_own_tail():
    cache = new_cache(capacity=4)
    prefix_keys, prefix_values = entries(1, 3, 4)
    cache.write(0, prefix_keys, prefix_values, [0])
    counted(cache, 3)
    fork = cache.fork(2, capacity=2)
    assert fork.lengths == [3, 3]
    assert fork.prefix.keys[0].data_ptr() == cache.keys[0].data_ptr()
    tail_keys, tail_values = entries(2, 2, 5)
    fork.write(0, tail_keys, tail_values, [3, 3])
    keys, values = fork.read(0, 5)
    assert torch.equal(keys, torch.cat([prefix_keys.expand(2, -1, -1, -1), tail_keys], 2))
    assert torch.equal(values, torch.cat([prefix_values.expand(2, -1, -1, -1), tail_values], 2))
    fork.reserve(9)
    assert fork.capacity == 8
    assert torch.equal(fork.read(0, 5)[0], keys)
    assert torch.equal(fork.select([1]).read(0, 5)[0], keys[1:])


def test_a_fork_survives_the_growth_of_what_it_was_forked_from():
    cache = new_cache(capacity=4)
    keys, values = entries(1, 3, 4)
    cache.write(0, keys, values, [0])
    counted(cache, 3)
    fork = cache.fork(1)
    storage = fork.prefix.keys[0].data_ptr()
    cache.reserve(100)
    cache.write(0, *entries(1, 20, 6), [3])
    assert fork.prefix.keys[0].data_ptr() == storage
    assert torch.equal(fork.read(0, 3)[0], keys)


def test_a_fork_cannot_give_up_what_it_shares():
    cache = new_cache(capacity=4)
    counted(cache, 3)
    with pytest.raises(ConfigError, match=r"3\.\."):
        cache.fork(2).truncate(0, 2)


def test_a_fork_cannot_be_forked():
    with pytest.raises(ConfigError):
        new_cache().fork(1).fork(2)


def test_rows_of_different_lengths_fork_each_from_its_own_prefix():
    cache = new_cache(batch=3, capacity=8)
    keys, values = entries(3, 5, 8)
    cache.write(0, keys, values, [0, 0, 0])
    counted(cache, [2, 5, 4])
    fork = cache.fork(2, rows=[2, 0], capacity=2)
    assert (fork.lengths, fork.prefix_rows) == ([4, 4, 2, 2], [2, 2, 0, 0])
    fork.reserve([6, 6, 4, 4])
    assert fork.capacity == 2
    tail_keys, tail_values = entries(4, 2, 9)
    fork.write(0, tail_keys, tail_values, [4, 4, 2, 2])
    read_keys, read_values = fork.read(0, 6)
    for row, (origin, length) in enumerate([(2, 4), (2, 4), (0, 2), (0, 2)]):
        assert torch.equal(read_keys[row, :, : length + 2], torch.cat([keys[origin, :, :length], tail_keys[row]], 1))
        assert torch.equal(
            read_values[row, :, : length + 2], torch.cat([values[origin, :, :length], tail_values[row]], 1)
        )
    chosen = fork.select([3, 1])
    assert torch.equal(chosen.read(0, 4)[0][0], torch.cat([keys[0, :, :2], tail_keys[3]], 1))
    assert chosen.row(1).prefix_rows == [2]


def test_absorbing_a_candidate_copies_its_tail_into_its_origin():
    cache = new_cache(batch=2, capacity=5)
    keys, values = entries(2, 4, 10)
    cache.write(1, keys, values, [0, 0])
    counted(cache, [4, 3])
    fork = cache.fork(3)
    tail_keys, tail_values = entries(6, 3, 11)
    fork.write(1, tail_keys, tail_values, [4, 4, 4, 3, 3, 3])
    counted(fork, [7, 6, 5, 3, 5, 6])
    cache.absorb(fork, [1, 5])
    assert cache.lengths == [6, 6]
    found_keys, found_values = cache.read(1, 6)
    assert torch.equal(found_keys[0], torch.cat([keys[0], tail_keys[1, :, :2]], 1))
    assert torch.equal(found_values[1], torch.cat([values[1, :, :3], tail_values[5]], 1))
    with pytest.raises(ConfigError, match="forked off"):
        cache.absorb(fork, [0])
    with pytest.raises(ConfigError, match="one for each origin"):
        cache.absorb(cache.fork(2), [0, 1])
    with pytest.raises(ConfigError, match="storage of its own"):
        cache.absorb(new_cache(), [0])


def test_a_row_is_a_view():
    cache = new_cache(batch=2, capacity=4)
    keys, values = entries(1, 2, 7)
    cache.row(1).write(1, keys, values, [2])
    assert torch.equal(cache.keys[1][1:, :, 2:], keys)
    assert not cache.keys[1][0].any()


def test_executions_are_counted_per_layer():
    cache = new_cache()
    cache.count(0, 2, 5)
    cache.count(0, 1, 3)
    cache.count(1, 2, 2)
    assert cache.layer_executions() == [8, 7]


def test_growing_keeps_what_a_pass_has_written_and_nobody_has_counted_yet():
    """A draft's early layers write behind a row's length; another row may need more places before that counts."""
    cache = new_cache(batch=4)
    view = cache.select([1, 3])
    view.reserve([3, 2])
    keys, values = entries(2, 2, 0)
    view.write(0, keys, values, [1, 0])
    assert cache.lengths == [0] * 4
    cache.select([2]).reserve([40])
    assert cache.capacity == 64
    for row, place, start in ((1, 0, 1), (3, 1, 0)):
        assert torch.equal(cache.keys[0][row, :, start : start + 2], keys[place])
        assert torch.equal(cache.values[0][row, :, start : start + 2], values[place])


@pytest.mark.parametrize("count", [3, 1 << 19])
def test_zeros_that_are_handed_out_late_are_zeros_of_ones_own(count):
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (lazy_zeros((2, count), dtype=dtype, device=torch.device("cpu")) for _ in range(2))
        one[1, -1] = 1.0
        assert (one.dtype, one.shape) == (dtype, (2, count))
        assert one.sum() == 1
        assert not other.any()
