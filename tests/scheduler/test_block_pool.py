from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from scheduler.block_pool import BlockPool, InvariantError


def name(number: int) -> bytes:
    return number.to_bytes(32, "little")


def cached(pool: BlockPool, *numbers: int) -> list[int]:
    """Blocks computed, registered under `numbers` and released by one request."""
    blocks = pool.allocate(len(numbers))
    assert blocks is not None
    for block, number in zip(blocks, numbers, strict=True):
        pool.register(block, name(number))
    pool.release(blocks)
    pool.check()
    return blocks


def test_allocates_each_block_once_and_then_none() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(3), pool.allocate(2)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.free_count == 0
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.check()


def test_a_request_for_too_many_blocks_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    assert pool.allocate(3) is None
    assert pool.free_count == 2
    pool.check()


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_released_blocks_are_found_again_and_shared() -> None:
    pool = BlockPool(4)
    blocks = cached(pool, 1, 2)
    assert pool.match([name(1), name(2), name(3)]) == blocks
    assert pool.count_free(blocks) == 2
    pool.acquire(blocks)
    assert pool.free_count == 2
    pool.acquire(blocks[:1])
    assert [pool.ref_count(block) for block in blocks] == [2, 1]
    assert pool.count_free(blocks) == 0
    pool.release(blocks)
    assert pool.free_count == 3
    pool.release(blocks[:1])
    assert pool.free_count == 4
    assert pool.cached_count == 2
    pool.check()


def test_a_match_ends_at_the_first_gap() -> None:
    pool = BlockPool(4)
    blocks = cached(pool, 1, 2, 3)
    assert pool.match([name(1), name(9), name(3)]) == blocks[:1]
    assert pool.match([name(9), name(1)]) == []


def test_empty_blocks_are_reused_before_cached_ones() -> None:
    pool = BlockPool(4)
    kept = cached(pool, 1, 2)
    taken = pool.allocate(2)
    assert taken is not None
    assert not set(taken) & set(kept)
    assert pool.match([name(1), name(2)]) == kept


def test_tails_are_evicted_before_heads_and_old_chains_before_new_ones() -> None:
    pool = BlockPool(4)
    old = cached(pool, 1, 2)
    new = cached(pool, 3, 4)
    order = [pool.allocate(1) for _ in range(4)]
    assert order == [[old[1]], [old[0]], [new[1]], [new[0]]]
    assert pool.cached_count == 0
    assert pool.match([name(1)]) == []


def test_use_makes_a_chain_recent() -> None:
    pool = BlockPool(4)
    first, second = cached(pool, 1, 2), cached(pool, 3, 4)
    pool.acquire(pool.match([name(1), name(2)]))
    pool.release(first)
    assert [pool.allocate(1), pool.allocate(1)] == [[second[1]], [second[0]]]


def test_the_second_block_with_the_same_contents_stays_unindexed() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.register(blocks[0], name(1))
    pool.register(blocks[1], name(1))
    assert pool.cached_count == 1
    assert pool.match([name(1)]) == [blocks[0]]
    pool.release(blocks)
    pool.check()
    pool.allocate(2)
    assert pool.match([name(1)]) == [blocks[0]], "the duplicate is reused first"


def test_forgotten_blocks_are_not_found_while_in_use() -> None:
    pool = BlockPool(3)
    blocks = cached(pool, 1, 2)
    pool.acquire(blocks)
    pool.forget(blocks[1:])
    assert pool.match([name(1), name(2)]) == blocks[:1]
    pool.release(blocks)
    pool.check()
    with pytest.raises(InvariantError):
        pool.forget(blocks)


def test_reset_cache_forgets_all_contents_and_keeps_all_references() -> None:
    pool = BlockPool(4)
    free, used = cached(pool, 1), cached(pool, 2, 3)
    pool.acquire(used)
    pool.reset_cache()
    pool.check()
    assert pool.cached_count == 0
    assert pool.match([name(1)]) == pool.match([name(2)]) == []
    assert pool.free_count == 4 - len(used)
    assert free
    pool.release(used)
    pool.check()
    assert pool.free_count == 4


def test_misuse_is_refused() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.register(blocks[0], name(1))
    with pytest.raises(InvariantError):
        pool.register(blocks[0], name(2))
    pool.release(blocks)
    with pytest.raises(InvariantError, match="more often"):
        pool.release(blocks)
    with pytest.raises(InvariantError):
        BlockPool(1).register(0, name(1))
    with pytest.raises(KeyError):
        BlockPool(1).acquire([0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._refs.__setitem__(0, 1),
        lambda pool: pool._refs.__setitem__(3, 0),
        lambda pool: pool._refs.__setitem__(3, -1),
        lambda pool: pool._blank.append(pool._blank[0]),
        lambda pool: pool._blank.pop(),
        lambda pool: pool._cached.popitem(),
        lambda pool: pool._hashes.__setitem__(pool._blank[0], name(7)),
        lambda pool: pool._hashes.__setitem__(0, None),
        lambda pool: pool._hashes.__setitem__(0, name(2)),
        lambda pool: pool._index.clear(),
        lambda pool: pool._index.__setitem__(name(7), 0),
    ],
)
def test_check_finds_every_kind_of_damage(damage: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(6)
    assert cached(pool, 1, 2, 3) == [0, 1, 2]
    assert pool.allocate(1) == [3]
    pool.check()
    damage(pool)
    with pytest.raises(InvariantError):
        pool.check()


def test_a_hit_of_2048_blocks_in_a_large_pool_takes_less_than_a_millisecond() -> None:
    pool = BlockPool(57_000)
    names = [name(number) for number in range(57_000)]
    cached(pool, *range(57_000))
    hit = names[30_000:32_048]
    best = dict.fromkeys(("match", "count_free", "acquire", "release"), 1.0)

    def timed(operation: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        best[operation] = min(best[operation], time.perf_counter() - start)

    for _ in range(20):
        blocks = pool.match(hit)
        timed("match", lambda: pool.match(hit))
        timed("count_free", lambda blocks=blocks: pool.count_free(blocks))
        timed("acquire", lambda blocks=blocks: pool.acquire(blocks))
        timed("release", lambda blocks=blocks: pool.release(blocks))
    assert len(pool.match(hit)) == 2048
    assert best["match"] + best["count_free"] + best["acquire"] < 1e-3
    assert best["release"] < 1e-3
