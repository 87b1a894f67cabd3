from __future__ import annotations

import random
import time
from array import array
from typing import Any

import pytest

from model.batch import ForwardBatch, SampledTokens
from scheduler.block_pool import BlockPool, InvariantError
from scheduler.messages import FinishReason, Grammar
from scheduler.scheduler import Scheduler
from tests.scheduler.bench import ABORT, Bench, shape
from tests.scheduler.fake_worker import (
    EOS,
    request_message,
    run_alone,
)
from tests.scheduler.invariants import check

# The one rule


def test_prompts_are_computed_in_chunks_beside_decoding_rows() -> None:
    bench = Bench(max_num_batched_tokens=6)
    bench.add("a", range(3))
    bench.add("b", range(100, 110))
    assert shape(bench.step()) == [(0, 0, 3, True), (1, 0, 3, False)]
    assert shape(bench.step()) == [(0, 3, 1, True), (1, 3, 5, False)]
    assert shape(bench.step()) == [(0, 4, 1, True), (1, 8, 2, True)]
    assert shape(bench.step()) == [(0, 5, 1, True), (1, 10, 1, True)]
    bench.run()
    for request_id, prompt in (("a", range(3)), ("b", range(100, 110))):
        message = request_message(request_id, prompt)
        assert bench.output[request_id] == run_alone(prompt, message.params, 1000)[0]


def test_blocks_are_taken_as_they_are_needed() -> None:
    bench = Bench(max_num_batched_tokens=6)
    bench.add("a", range(10), max_tokens=3)
    assert [len(bench.step().rows[0].new_blocks) for _ in range(2)] == [2, 1]
    assert [len(bench.step().rows[0].new_blocks) for _ in range(2)] == [0, 0]
    assert not bench.scheduler.has_work


def test_waiting_requests_start_in_order_of_priority_then_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    for request_id, priority in (("low", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        bench.add(request_id, [1, 2], priority=priority, max_tokens=1)
    bench.run()
    assert list(bench.finished) == ["urgent", "first", "second", "low"]


def test_the_next_step_is_planned_before_the_tokens_of_this_one_are_known() -> None:
    bench = Bench()
    bench.add("a", range(5), max_tokens=3)
    first, sampled_first = bench.plan()
    second, sampled_second = bench.plan()
    assert bench.scheduler.in_flight == 2
    assert bench.scheduler.ids_in_flight == ["a"]
    assert shape(first) == [(0, 0, 5, True)]
    assert shape(second) == [(0, 5, 1, True)]
    assert bench.process(sampled_first).token_ids == [sampled_first.token_ids]
    third, sampled_third = bench.plan()
    assert shape(third) == [(0, 6, 1, True)]
    assert bench.scheduler.schedule() is None, "the third token is the last one, known or not"
    bench.process(sampled_second)
    bench.process(sampled_third)
    assert bench.finished["a"].reason is FinishReason.LENGTH
    assert not bench.scheduler.in_flight


def test_the_same_events_give_the_same_batches_whatever_is_sampled() -> None:
    def batches(token_id: int) -> list[ForwardBatch]:
        bench = Bench(num_blocks=7, prefix_cache=False)
        for index in range(6):
            bench.add(str(index), range(index + 3), max_tokens=6, priority=index % 2)
        planned = []
        while (batch := bench.scheduler.schedule()) is not None:
            planned.append(batch)
            rows = [row.row for row in batch.rows if row.sample]
            bench.scheduler.update(SampledTokens(batch.step, rows, [token_id] * len(rows)))
        return planned

    ones, twos = batches(1), batches(2)
    assert len(ones) > 10
    assert [shape(batch) for batch in ones] == [shape(batch) for batch in twos]
    assert [[row.new_blocks for row in batch.rows] for batch in ones] == [
        [row.new_blocks for row in batch.rows] for batch in twos
    ]
    assert [batch.released_rows for batch in ones] == [batch.released_rows for batch in twos]


# Fairness


def test_a_long_chunk_leaves_room_for_decoding_and_short_requests_whichever_came_first() -> None:
    bench = Bench(num_blocks=100, max_num_batched_tokens=16)
    bench.add("long", range(200), max_tokens=1)
    assert shape(bench.step()) == [(0, 0, 16, False)]
    bench.add("short", range(300, 303), max_tokens=5)
    assert shape(bench.step()) == [(0, 16, 13, False), (1, 0, 3, True)]
    assert shape(bench.step()) == [(0, 29, 15, False), (1, 3, 1, True)]
    bench.add("second", [1], max_tokens=5)
    assert shape(bench.step()) == [(0, 44, 14, False), (1, 4, 1, True), (2, 0, 1, True)]
    bench.run()
    assert list(bench.finished) == ["short", "second", "long"]


def test_the_chunks_of_a_deep_prompt_grow_while_nobody_is_held_up() -> None:
    bench = Bench(num_blocks=200, max_num_batched_tokens=16, max_lone_chunk=64)
    bench.add("long", range(400), max_tokens=1)
    chunks = [shape(bench.step())[0][2] for _ in range(8)]
    assert chunks == [16, 16, 16, 24, 36, 54, 64, 64]
    bench.add("short", range(500, 503), max_tokens=3)
    assert shape(bench.step()) == [(0, 290, 13, False), (1, 0, 3, True)]
    assert shape(bench.step()) == [(0, 303, 15, False), (1, 3, 1, True)]


def test_short_requests_that_wait_get_at_most_half_of_a_step_beside_a_long_one() -> None:
    bench = Bench(num_blocks=100, max_num_batched_tokens=16, max_num_seqs=8)
    bench.add("long", range(200), max_tokens=1)
    bench.step()
    for index in range(4):
        bench.add(str(index), [index] * 3, max_tokens=9)
    assert shape(bench.step()) == [(0, 16, 8, False), (1, 0, 3, True), (2, 0, 3, True), (3, 0, 2, False)]
    # What is left of the third is short as well, and the fourth waits no longer than that.
    assert shape(bench.step()) == [
        *((0, 24, 10, False), (1, 3, 1, True), (2, 3, 1, True), (3, 2, 1, True)),
        (4, 0, 3, True),
    ]


def test_long_prompts_are_served_one_after_the_other_and_share_their_prefix() -> None:
    bench = Bench(num_blocks=100, max_num_batched_tokens=16)
    for request_id in "ab":
        bench.add(request_id, range(100), max_tokens=1)
    bench.run()
    assert bench.cached == {"a": 0, "b": 96}


def test_no_room_is_kept_for_requests_that_cannot_be_admitted() -> None:
    bench = Bench(num_blocks=24, max_num_batched_tokens=16)
    bench.add("long", range(96), max_tokens=1)  # all blocks
    bench.step()
    bench.add("short", range(300, 303), max_tokens=1)
    assert shape(bench.step()) == [(0, 16, 16, False)]


def test_the_oldest_long_chunk_gets_on_however_many_decode() -> None:
    bench = Bench(num_blocks=100, max_num_batched_tokens=4, max_num_seqs=5)
    bench.add("long", range(9), max_tokens=1)
    bench.step()
    for index in range(4):
        bench.add(str(index), [index], max_tokens=30)
    for _ in range(20):
        bench.step()
    assert "long" in bench.finished


def test_rows_that_need_a_bitmask_are_those_that_sample_under_a_grammar() -> None:
    bench = Bench(max_num_batched_tokens=6)
    for request_id in "ab":
        bench.add(request_id, range(4), max_tokens=3, grammar=Grammar("regex", "a*") if request_id == "b" else None)
    needed = []
    while bench.scheduler.has_work:
        _, sampled = bench.plan()
        needed.append(bench.scheduler.grammar_rows)
        bench.process(sampled)
    assert needed == [[], [(1, "b")], [(1, "b")], [(1, "b")]]


# Figures and sizes


def test_stats_tell_what_is_there_and_what_was_done() -> None:
    bench = Bench(max_num_seqs=1, num_blocks=16)
    bench.add("a", range(6), max_tokens=3)
    bench.add("b", range(50, 57), max_tokens=1)
    bench.step()
    stats = bench.scheduler.stats(step_seconds=0.5)
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens) == (1, 1, 7)
    assert (stats.num_blocks, stats.free_blocks, stats.cached_blocks) == (16, 14, 1)
    assert (stats.num_steps, stats.step_tokens, stats.step_seconds) == (1, 6, 0.5)
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_preemptions) == (13, 4, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s._holdings._free_rows.append(0),
        lambda s: s._running[0].block_table.pop(),
        lambda s: s.pool.acquire(s.pool.allocate(1)),
        lambda s: setattr(s._running[0], "num_tokens", 50),
        lambda s: setattr(s._running[0], "num_computed_tokens", 0),
        lambda s: setattr(s._running[0], "steps_in_flight", 1),
        lambda s: s._requests.pop("waiting"),
        lambda s: setattr(s._waiting, "num_tokens", 1),
        lambda s: s._finished.update(running=ABORT),
        lambda s: s._running[0].block_hashes.append(b"x"),
    ],
)
def test_check_finds_every_kind_of_damage(damage: Any) -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("running", range(5))
    bench.add("waiting", range(5))
    bench.step()
    damage(bench.scheduler)
    with pytest.raises(InvariantError):
        check(bench.scheduler)


def test_128k_tokens_take_2048_blocks_and_a_second_request_computes_at_most_a_block() -> None:
    pool = BlockPool(2048)
    scheduler = Scheduler(
        pool=pool,
        block_size=64,
        max_num_seqs=4,
        max_num_batched_tokens=8192,
        max_model_len=131_072,
        eos_token_ids=[EOS],
        prefix_cache=True,
        fingerprint="test",
    )
    rng = random.Random(0)
    prompt = array("I", [rng.randrange(100_000) for _ in range(131_000)])
    computed = []
    for request_id in ("first", "second"):
        message = request_message(request_id, prompt, max_tokens=72)
        assert scheduler.add(scheduler.make_request(message)) is None
        tokens = 0
        fewest_free = pool.num_blocks
        while (batch := scheduler.schedule()) is not None:
            tokens += sum(row.num_tokens for row in batch.rows if row.start < len(prompt))
            fewest_free = min(fewest_free, pool.free_count)
            rows = [row.row for row in batch.rows if row.sample]
            scheduler.update(SampledTokens(batch.step, rows, [7] * len(rows)))
        computed.append(tokens)
        assert fewest_free == 0
    assert computed == [131_000, 131_000 % 64]
    check(scheduler)
    assert pool.free_count == 2048


def test_ten_thousand_waiting_requests_are_ordinary() -> None:
    bench = Bench(num_blocks=64, max_num_seqs=1)
    start = time.process_time()
    for index in range(10_000):
        bench.add(str(index), [1, 2, 3], priority=index % 3)
    bench.step()
    for index in random.Random(0).sample(range(10_000), 10_000):
        assert bench.scheduler.finish(str(index), ABORT)
    assert time.process_time() - start < 2.0
    assert not bench.scheduler.has_work
    assert len(bench.scheduler.take_finished()) == 10_000
    check(bench.scheduler)
