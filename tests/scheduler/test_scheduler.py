from __future__ import annotations

import random
import time
from array import array
from typing import Any

import msgspec
import pytest

from model.batch import ForwardBatch, Logprobs, SampledTokens
from scheduler.block_pool import BlockPool, InvariantError
from scheduler.messages import Finished, FinishReason, Grammar, Started
from scheduler.scheduler import Scheduler
from scheduler.step_result import StepResult
from tests.scheduler.fake_worker import (
    EOS,
    NAN_SEED_BIT,
    FakeWorker,
    logprobs_at,
    request_message,
    run_alone,
    worker_for,
)
from tests.scheduler.invariants import check

ABORT = Finished(reason=FinishReason.ABORT, message="gone")


class Bench:
    """A scheduler with blocks of 4 tokens and a fake worker; everything that came out, by request."""

    def __init__(self, num_blocks: int = 16, **options: Any) -> None:
        defaults = {
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 1000,
            "eos_token_ids": [EOS],
            "prefix_cache": True,
            "fingerprint": "test",
            "watermark_blocks": 0,
        }
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(pool=self.pool, **(defaults | options))  # type: ignore[arg-type]
        self.worker: FakeWorker = worker_for(self.scheduler, options.get("max_num_seqs", 4))
        self.output: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.cached: dict[str, int] = {}

    def add(self, request_id: str, prompt: list[int] | range, **options: Any) -> Finished | None:
        return self.scheduler.add(self.scheduler.make_request(request_message(request_id, prompt, **options)))

    def plan(self) -> tuple[ForwardBatch, SampledTokens]:
        batch = self.scheduler.schedule()
        assert batch is not None
        check(self.scheduler)
        return batch, self.worker.execute(batch)

    def process(self, sampled: SampledTokens) -> StepResult:
        self.worker.processed_step = sampled.step
        result = self.scheduler.update(sampled)
        check(self.scheduler)
        for request_id, token_ids in zip(result.request_ids, result.token_ids, strict=True):
            self.output.setdefault(request_id, []).extend(token_ids)
        assert not self.finished.keys() & result.finished.keys()
        assert not self.cached.keys() & result.started.keys()
        self.finished |= result.finished
        self.cached |= {request_id: started.cached_tokens for request_id, started in result.started.items()}
        return result

    def step(self) -> ForwardBatch:
        batch, sampled = self.plan()
        self.process(sampled)
        return batch

    def run(self, limit: int = 1000) -> int:
        """Steps until nothing is left."""
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < limit
        return steps


def shape(batch: ForwardBatch) -> list[tuple[int, int, int, bool]]:
    return [(row.row, row.start, row.num_tokens, row.sample) for row in batch.rows]


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


# Times, progress, log-probabilities


def test_started_tells_the_time_in_the_queue_and_until_the_first_token() -> None:
    bench = Bench(max_num_batched_tokens=4)
    scheduler = bench.scheduler
    scheduler.add(scheduler.make_request(request_message("a", range(6), max_tokens=2), 10.0))
    results = []
    for scheduled, processed in ((12.5, 13.0), (13.0, 16.5), (17.0, 18.0)):
        batch = scheduler.schedule(scheduled)
        assert batch is not None
        results.append(scheduler.update(bench.worker.execute(batch), processed))
    assert [result.started for result in results] == [{}, {"a": Started(0, 2.5, 4.0)}, {}]


def test_progress_is_told_to_those_who_ask_until_the_first_token() -> None:
    bench = Bench(max_num_batched_tokens=4)
    bench.add("other", range(50, 57), max_tokens=2)
    bench.run()
    bench.add("a", range(10), progress=True, max_tokens=3)
    told = []
    while bench.scheduler.has_work:
        told.append(bench.process(bench.plan()[1]).progress)
    assert told == [{"a": 4}, {"a": 8}, {}, {}, {}]


def test_prompt_logprobs_keep_a_request_from_what_is_cached() -> None:
    bench = Bench()
    bench.add("a", range(10), max_tokens=1)
    bench.run()
    bench.add("b", range(10), max_tokens=1, prompt_logprobs=0, logprobs=0)
    batch, sampled = bench.plan()
    result = bench.process(sampled)
    assert shape(batch) == [(0, 0, 10, True)]
    assert result.prompt_logprobs == {"b": logprobs_at(range(10), range(1, 10))}
    assert result.logprobs == {"b": Logprobs([bench.output["b"]], [[10.0]])}
    bench.add("c", range(10), max_tokens=1)
    bench.run()
    assert bench.cached == {"a": 0, "b": 0, "c": 8}, "what it computed is cached for others"


def test_each_prompt_logprob_comes_once_also_over_a_preemption() -> None:
    bench = Bench(num_blocks=50, max_num_batched_tokens=6)
    bench.add("a", range(21), max_tokens=1, prompt_logprobs=0, progress=True)
    delivered = Logprobs([], [])
    starts = []
    progress = []
    while bench.scheduler.has_work:
        batch, sampled = bench.plan()
        starts.append(batch.rows[0].start)
        result = bench.process(sampled)
        delivered.extend(result.prompt_logprobs.get("a", Logprobs([], [])))
        progress += result.progress.values()
        if len(starts) == 1:
            bench.scheduler._preempt(bench.scheduler._running[0])
    assert starts == [0, 4, 10, 16], "it starts again behind a full block, two tokens before what was delivered"
    assert delivered == logprobs_at(range(21), range(1, 21))
    assert progress == [6, 10, 16]
    assert bench.scheduler.stats().prompt_tokens == 21


def test_a_resumed_request_finds_no_more_than_it_has_delivered() -> None:
    bench = Bench(num_blocks=50, max_num_batched_tokens=6)
    bench.add("a", range(21), max_tokens=1, prompt_logprobs=0)
    bench.step()
    bench.scheduler._preempt(bench.scheduler._running[0])
    bench.add("b", range(21), max_tokens=1, priority=-1)
    bench.run()
    assert [len(new.block_table) for new in bench.worker.bound] == [0, 1, 1]


def test_prompt_tokens_are_counted_once_when_they_are_computed_again() -> None:
    bench = Bench(prefix_cache=False, max_num_batched_tokens=6)
    bench.add("a", range(20), max_tokens=2)
    bench.step()
    bench.step()
    bench.scheduler._preempt(bench.scheduler._running[0])
    bench.step()
    assert bench.scheduler.stats().prompt_tokens == 12
    bench.run()
    assert bench.scheduler.stats().prompt_tokens == 20


def test_broken_logits_of_a_prompt_end_its_request() -> None:
    bench = Bench(max_num_batched_tokens=6)
    bench.add("a", range(21), max_tokens=1, prompt_logprobs=0)
    _, sampled = bench.plan()
    sampled.prompt_logprobs[0].logprobs[2] = [float("nan")]
    result = bench.process(sampled)
    assert result.finished["a"].code == "nan_logits"
    assert not result.prompt_logprobs
    assert bench.scheduler.stats().cached_blocks == 0


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


def test_after_a_reset_nothing_older_is_found() -> None:
    bench = Bench()
    bench.add("a", range(10), max_tokens=1)
    bench.run()
    bench.scheduler.reset_prefix_cache()
    bench.add("b", range(10), max_tokens=1)
    bench.run()
    assert bench.cached == {"a": 0, "b": 0}


# Prefix cache


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


# Out of blocks


def test_the_newest_running_request_is_preempted_and_resumes_from_the_cache() -> None:
    bench = Bench(num_blocks=5)
    bench.add("old", range(7), max_tokens=8)
    bench.add("new", range(100, 107), max_tokens=6)
    bench.run()
    assert list(bench.finished) == ["old", "new"]
    assert bench.scheduler.stats().num_preemptions == 1
    resumed = bench.worker.bound[-1]
    assert resumed.num_prompt_tokens == 7
    assert len(resumed.tokens) > 7
    assert resumed.block_table
    for request_id, prompt, max_tokens in (("old", range(7), 8), ("new", range(100, 107), 6)):
        message = request_message(request_id, prompt, max_tokens=max_tokens)
        assert bench.output[request_id] == run_alone(prompt, message.params, 1000)[0]
    assert bench.pool.free_count == 5


def test_lower_priority_is_preempted_before_later_arrival() -> None:
    bench = Bench(num_blocks=5)
    bench.add("background", range(7), max_tokens=8, priority=1)
    bench.step()
    bench.add("urgent", range(100, 107), max_tokens=8)
    bench.run()
    assert list(bench.finished) == ["urgent", "background"]
    assert bench.scheduler.stats().num_preemptions == 1


def test_a_preempted_request_keeps_the_token_that_is_in_flight() -> None:
    bench = Bench(num_blocks=4)
    bench.add("old", range(7), max_tokens=8)
    bench.add("new", range(100, 107), max_tokens=6)
    outcomes = [bench.plan()[1]]
    while bench.scheduler.has_work or outcomes:
        if bench.scheduler.in_flight < 2 and (batch := bench.scheduler.schedule()) is not None:
            outcomes.append(bench.worker.execute(batch))
        else:
            bench.process(outcomes.pop(0))
    assert bench.scheduler.stats().num_preemptions > 0
    for request_id, prompt, max_tokens in (("old", range(7), 8), ("new", range(100, 107), 6)):
        message = request_message(request_id, prompt, max_tokens=max_tokens)
        assert bench.output[request_id] == run_alone(prompt, message.params, 1000)[0]


@pytest.mark.parametrize("options", [{"grammar": Grammar("regex", "x")}, {"bad_words": ((1, 2),)}])
def test_what_follows_known_tokens_alone_waits_for_the_one_in_flight(options: dict[str, Any]) -> None:
    bench = Bench(max_num_batched_tokens=5)
    bench.add("follows", range(7), max_tokens=3, **options)
    bench.add("free", [1], max_tokens=9)
    bench.add("word", [1], max_tokens=9, bad_words=((2,),))
    planned = []
    outcomes: list[SampledTokens] = []
    for _ in range(6):
        batch, sampled = bench.plan()
        planned.append([row.num_tokens for row in batch.rows])
        outcomes.append(sampled)
        if len(outcomes) == 2:
            bench.process(outcomes.pop(0))
    # A prompt's next chunk does not depend on the one in flight.
    assert planned == [[5], [2, 1, 1], [1, 1], [1, 1, 1], [1, 1], [1, 1, 1]]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_two_big_requests_in_a_pool_for_one_and_a_half_take_turns_without_thrashing(
    depth: int, prefix_cache: bool
) -> None:
    """Each ends with 60 blocks, the pool has 90, and they start together: the newer one has to give way."""
    bench = Bench(num_blocks=90, max_num_batched_tokens=32, prefix_cache=prefix_cache)
    bench.add("a", [token % 16 for token in range(140)], max_tokens=100)
    bench.add("b", [token % 13 for token in range(140)], max_tokens=100)
    outcomes: list[SampledTokens] = []
    steps = 0
    while bench.scheduler.has_work or outcomes:
        batch = bench.scheduler.schedule() if len(outcomes) < depth else None
        if batch is not None:
            outcomes.append(bench.worker.execute(batch))
            steps += 1
        else:
            bench.process(outcomes.pop(0))
    assert bench.finished.keys() == {"a", "b"}
    assert {len(output) for output in bench.output.values()} == {100}
    assert 1 <= bench.scheduler.stats().num_preemptions <= 2
    # Prompts 9 + 9 steps, 100 + 100 tokens at most one after the other, one recomputation.
    assert steps < 240
    assert bench.pool.free_count == 90


def test_an_admission_leaves_the_blocks_that_running_requests_need_next() -> None:
    bench = Bench(num_blocks=4)
    bench.add("a", range(7), max_tokens=4)
    bench.step()
    bench.add("b", range(100, 108), max_tokens=1)
    assert len(bench.step().rows) == 1, "two blocks are free, and the next token of `a` needs one of them"
    bench.run()
    assert list(bench.finished) == ["a", "b"]
    assert bench.scheduler.stats().num_preemptions == 0


def test_a_prompt_is_admitted_only_if_all_of_it_fits() -> None:
    """Half a prompt in the pool would be preempted half-way: `b` waits although its first chunk would fit."""
    bench = Bench(num_blocks=6, max_num_batched_tokens=9)
    bench.add("a", range(7), max_tokens=4)
    bench.add("b", range(100, 120), max_tokens=1)
    bench.run()
    assert list(bench.finished) == ["a", "b"]
    assert bench.scheduler.stats().num_preemptions == 0


def test_no_more_is_preempted_than_has_to_be_while_blocks_are_on_their_way_back() -> None:
    bench = Bench(num_blocks=6)
    for request_id in "abc":
        bench.add(request_id, [ord(request_id)] * 5, max_tokens=8)
    _, first = bench.plan()
    for _ in range(3):
        _, second = bench.plan()
        bench.process(first)
        first = second
    assert bench.scheduler.schedule() is None, "the blocks of `c` return with the step in flight"
    assert bench.scheduler.stats().num_preemptions == 1
    bench.process(first)
    assert [row.row for row in bench.step().rows] == [0, 1]
    bench.run()
    assert bench.finished.keys() == {"a", "b", "c"}


def test_an_admission_leaves_the_watermark_free() -> None:
    bench = Bench(num_blocks=8, watermark_blocks=2)
    bench.add("a", range(15), max_tokens=2)
    bench.add("b", range(100, 112), max_tokens=2)
    assert len(bench.step().rows) == 1, "4 + 3 blocks leave one free"
    bench.run()
    bench.add("c", range(15), max_tokens=2)
    bench.add("d", range(100, 108), max_tokens=2)
    assert len(bench.step().rows) == 2, "4 + 2 blocks leave two free"


def test_a_request_that_is_alone_may_use_the_whole_pool() -> None:
    bench = Bench(num_blocks=4, watermark_blocks=4)
    bench.add("a", range(16), max_tokens=1)
    bench.add("b", range(100, 110), max_tokens=5)
    bench.run()
    assert bench.finished.keys() == {"a", "b"}


def test_the_default_watermark_is_a_hundredth_of_the_pool_and_at_least_a_block() -> None:
    for num_blocks, watermark in ((8, 1), (500, 5)):
        bench = Bench(num_blocks=num_blocks, watermark_blocks=None, max_num_batched_tokens=4096, max_model_len=4000)
        bench.add("a", [1], max_tokens=9)
        bench.step()
        bench.add("b", range((num_blocks - 1 - watermark) * 4 + 1), max_tokens=1)
        assert len(bench.step().rows) == 1
        assert bench.scheduler.finish("b", ABORT)
        bench.add("c", range((num_blocks - 1 - watermark) * 4), max_tokens=1)
        assert len(bench.step().rows) == 2


# Refusals and limits


@pytest.mark.parametrize(
    ("max_model_len", "num_blocks", "longest"), [(10, 16, 9), (1000, 4, 16), (17, 4, 16), (16, 4, 15)]
)
def test_a_prompt_that_can_never_fit_is_refused(max_model_len: int, num_blocks: int, longest: int) -> None:
    bench = Bench(num_blocks=num_blocks, max_model_len=max_model_len)
    refused = bench.add("a", range(longest + 1))
    assert refused is not None
    assert (refused.reason, refused.code) == (FinishReason.REJECTED, "context_length_exceeded")
    assert (
        refused.message
        == f"the prompt has {longest + 1} tokens; at most {longest + 1} tokens fit, prompt and output together"
    )
    assert not bench.scheduler.has_work
    assert bench.scheduler.take_finished() == {}
    assert bench.add("b", range(longest), max_tokens=500) is None
    bench.run()
    assert bench.finished["b"].reason is FinishReason.LENGTH
    assert len(bench.output["b"]) == 1


@pytest.mark.parametrize(("max_model_len", "num_blocks", "tokens"), [(10, 16, 5), (1000, 4, 12), (1000, 16, 20)])
def test_max_tokens_is_cut_to_what_fits(max_model_len: int, num_blocks: int, tokens: int) -> None:
    bench = Bench(num_blocks=num_blocks, max_model_len=max_model_len)
    bench.add("a", range(5), max_tokens=20)
    bench.run()
    assert len(bench.output["a"]) == tokens
    assert bench.finished["a"] == Finished(reason=FinishReason.LENGTH)


def test_an_empty_prompt_and_no_tokens_to_make_are_refused() -> None:
    bench = Bench()
    for prompt, max_tokens in (([], 4), ([1], 0)):
        refused = bench.add("a", prompt, max_tokens=max_tokens)
        assert refused is not None
        assert (refused.reason, refused.code) == (FinishReason.REJECTED, "invalid_request")
    with pytest.raises(ValueError, match="multiple"):
        bench.scheduler.make_request(msgspec.structs.replace(request_message("a", [1]), prompt=b"12345"))


def test_an_id_is_taken_until_its_terminal_event_was_delivered() -> None:
    bench = Bench()
    assert bench.add("a", [1, 2]) is None
    for _ in range(2):
        refused = bench.add("a", [1, 2])
        assert refused is not None
        assert (refused.reason, refused.code) == (FinishReason.REJECTED, "duplicate_request_id")
        bench.scheduler.finish("a", ABORT)
    assert bench.scheduler.take_finished() == {"a": ABORT}
    assert bench.add("a", [1, 2]) is None


# Ends


def test_a_stop_token_ends_the_request_and_is_part_of_its_output() -> None:
    prompt = list(range(6))
    free_running, _ = run_alone(prompt, request_message("a", prompt, max_tokens=40).params, 1000)
    stop = free_running[3]
    bench = Bench()
    bench.add("a", prompt, max_tokens=40, stop_token_ids=(stop,))
    bench.run()
    assert bench.output["a"] == free_running[: free_running.index(stop) + 1]
    assert bench.finished["a"] == Finished(reason=FinishReason.STOP, stop_token_id=stop)


def test_eos_ends_a_request_unless_it_is_ignored() -> None:
    prompt = list(range(6))
    free_running, _ = run_alone(prompt, request_message("a", prompt, max_tokens=40).params, 1000)
    bench = Bench(eos_token_ids=[free_running[2], 99])
    bench.add("a", prompt, max_tokens=40, ignore_eos=False)
    bench.add("b", prompt, max_tokens=40)
    bench.run()
    assert bench.finished["a"] == Finished(reason=FinishReason.STOP, stop_token_id=free_running[2])
    assert bench.output["a"] == free_running[: free_running.index(free_running[2]) + 1]
    assert bench.output["b"] == free_running


def test_broken_logits_end_one_request_and_leave_nothing_in_the_cache() -> None:
    bench = Bench()
    bench.add("broken", range(9), max_tokens=8, seed=NAN_SEED_BIT)
    bench.add("sound", range(100, 109), max_tokens=8)
    bench.run()
    assert bench.finished["broken"].reason is FinishReason.ERROR
    assert bench.finished["broken"].code == "nan_logits"
    assert len(bench.output["broken"]) == 2
    assert bench.finished["sound"].reason is FinishReason.LENGTH
    bench.add("again", range(9), max_tokens=1)
    bench.run()
    assert bench.cached["again"] == 0


def test_finish_is_idempotent_and_counts_unknown_ids() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("running", [1, 2])
    bench.add("waiting", [1, 2])
    bench.step()
    for request_id in ("running", "waiting"):
        assert bench.scheduler.finish(request_id, ABORT)
        assert not bench.scheduler.finish(request_id, ABORT)
        check(bench.scheduler)
    assert not bench.scheduler.finish("never seen", ABORT)
    assert bench.scheduler.stats().unknown_ids == 3
    assert not bench.scheduler.has_work
    assert bench.scheduler.take_finished() == {"running": ABORT, "waiting": ABORT}
    assert bench.scheduler.take_finished() == {}
    assert bench.pool.free_count == bench.pool.num_blocks


def test_row_and_blocks_return_when_the_last_step_that_refers_to_them_was_processed() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", range(6), max_tokens=8)
    _, first = bench.plan()
    _, second = bench.plan()
    bench.add("b", range(6), max_tokens=1)
    assert bench.scheduler.finish("a", ABORT)
    held = bench.pool.num_blocks - bench.pool.free_count
    assert held == 2
    assert bench.scheduler.schedule() is None, "the only row is still referred to"
    result = bench.process(first)
    assert (result.request_ids, result.finished) == ([], {"a": ABORT})
    assert bench.pool.num_blocks - bench.pool.free_count == held
    assert bench.scheduler.schedule() is None
    assert bench.process(second).request_ids == []
    assert bench.pool.free_count == bench.pool.num_blocks
    batch = bench.step()
    assert batch.released_rows == [0]
    assert [new_row.row for new_row in batch.new_rows] == [0]


def test_the_tail_of_an_ended_request_is_evicted_before_its_head() -> None:
    bench = Bench(num_blocks=4)
    bench.add("a", range(16), max_tokens=1)
    bench.run()
    bench.add("b", range(100, 108), max_tokens=1)
    bench.run()
    bench.add("c", range(16), max_tokens=1)
    bench.run()
    assert bench.cached["c"] == 8


def test_the_outcome_of_another_step_is_refused() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="does not belong"):
        bench.scheduler.update(SampledTokens(0, [], []))
    bench.add("a", [1, 2])
    _, sampled = bench.plan()
    for wrong in (
        SampledTokens(sampled.step + 1, sampled.rows, sampled.token_ids),
        SampledTokens(sampled.step, [3], sampled.token_ids),
    ):
        with pytest.raises(ValueError, match="does not belong"):
            bench.scheduler.update(wrong)
    bench.process(sampled)


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
