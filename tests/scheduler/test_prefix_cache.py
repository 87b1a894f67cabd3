"""What a request finds of what others computed before it."""

from __future__ import annotations

import pytest

from tests.scheduler.bench import Bench, shape


def test_after_a_reset_nothing_older_is_found() -> None:
    bench = Bench()
    bench.add("a", range(10), max_tokens=1)
    bench.run()
    bench.scheduler.reset_prefix_cache()
    bench.add("b", range(10), max_tokens=1)
    bench.run()
    assert bench.cached == {"a": 0, "b": 0}


def test_a_second_request_starts_behind_the_blocks_of_the_first() -> None:
    bench = Bench()
    bench.add("a", range(10), max_tokens=1)
    bench.run()
    bench.add("b", [*range(9), 77], max_tokens=1)
    batch = bench.step()
    assert shape(batch) == [(0, 8, 2, True)]
    assert len(batch.new_rows[0].block_table) == 2
    assert bench.cached == {"a": 0, "b": 8}
    stats = bench.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (20, 8, 12)


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8)])
def test_at_least_the_last_token_is_computed(length: int, hit: int) -> None:
    bench = Bench()
    for request_id in "ab":
        bench.add(request_id, range(length), max_tokens=1)
        bench.run()
    assert bench.cached["b"] == hit
    assert bench.output["a"] == bench.output["b"]


def test_output_tokens_are_cached_too() -> None:
    bench = Bench()
    bench.add("a", range(6), max_tokens=7)
    bench.run()
    bench.add("b", [*range(6), *bench.output["a"]], max_tokens=1)
    bench.run()
    assert bench.cached["b"] == 12


def test_a_block_can_be_found_only_after_its_step_was_processed() -> None:
    bench = Bench()
    bench.add("a", range(9), max_tokens=2)
    _, sampled = bench.plan()
    bench.add("b", range(9), max_tokens=2)
    second, sampled_second = bench.plan()
    assert second.new_rows[0].block_table == []
    assert bench.scheduler.stats().cached_blocks == 0
    bench.process(sampled)
    assert bench.scheduler.stats().cached_blocks == 2
    bench.process(sampled_second)
    bench.add("c", range(9), max_tokens=2)
    assert len(bench.step().new_rows[0].block_table) == 2


def test_requests_share_blocks_only_under_the_same_salt() -> None:
    bench = Bench()
    for request_id, salt in (("a", ""), ("b", "tenant"), ("c", "tenant")):
        bench.add(request_id, range(9), max_tokens=1, cache_salt=salt)
        bench.run()
    assert bench.cached == {"a": 0, "b": 0, "c": 8}


def test_without_prefix_cache_nothing_is_found_or_kept() -> None:
    bench = Bench(prefix_cache=False)
    for request_id in "ab":
        bench.add(request_id, range(9), max_tokens=1)
        bench.run()
    assert bench.cached == {"a": 0, "b": 0}
    assert bench.scheduler.stats().cached_blocks == 0


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    bench = Bench(num_blocks=5)
    bench.add("old", range(7), max_tokens=8)
    bench.add("new", range(100, 107), max_tokens=6)
    bench.run()
    assert bench.scheduler.stats().num_preemptions > 0
    assert any(new_row.block_table for new_row in bench.worker.bound), "the resumption hit the cache"
    assert bench.cached == {"old": 0, "new": 0}


def test_a_request_preempted_before_its_first_token_reports_its_first_admission() -> None:
    bench = Bench(num_blocks=5, max_num_batched_tokens=5)
    bench.add("old", range(7), max_tokens=8)
    bench.add("new", range(100, 112), max_tokens=1)
    bench.run()
    assert bench.scheduler.stats().num_preemptions == 1
    assert bench.worker.bound[-1].num_prompt_tokens == len(bench.worker.bound[-1].tokens) == 12
    assert bench.worker.bound[-1].block_table, "the resumption hit the cache"
    assert bench.cached == {"old": 0, "new": 0}
    assert (bench.scheduler.stats().prefix_queries, bench.scheduler.stats().prefix_hits) == (19, 0)
