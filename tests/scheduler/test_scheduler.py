from __future__ import annotations

import random
import time
from array import array
from typing import Any

import msgspec
import pytest

from model.batch import NONE_LEFT, ForwardBatch, SampledTokens
from scheduler.block_pool import BlockPool, InvariantError
from scheduler.messages import Finished, FinishReason, Grammar
from scheduler.scheduler import Scheduler
from tests.scheduler.bench import ABORT, Bench, shape
from tests.scheduler.fake_worker import (
    EOS,
    NAN_SEED_BIT,
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


def test_a_request_that_may_draw_no_token_is_refused_and_what_it_computed_stays_cached() -> None:
    bench = Bench()
    bench.add("a", range(9), max_tokens=3)
    _, sampled = bench.plan()
    sampled.token_ids[0] = NONE_LEFT
    finished = bench.process(sampled).finished["a"]
    assert (finished.reason, finished.code) == (FinishReason.REJECTED, "no_token_left")
    stats = bench.scheduler.stats()
    assert (stats.nan_logits, stats.free_blocks) == (0, stats.num_blocks)
    assert stats.cached_blocks > 0


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


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_request_that_ends_within_its_prompt_gives_everything_back(in_flight: bool) -> None:
    bench = Bench(max_num_seqs=1, max_num_batched_tokens=8)
    bench.add("a", range(30))
    bench.add("b", range(30, 33), max_tokens=1)
    bench.step()
    sampled = bench.plan()[1] if in_flight else None
    assert bench.scheduler.finish("a", ABORT)
    check(bench.scheduler)
    if sampled is not None:
        assert bench.pool.free_count < bench.pool.num_blocks
        bench.process(sampled)
    assert bench.pool.free_count == bench.pool.num_blocks
    bench.run()
    assert "a" not in bench.output
    assert len(bench.output["b"]) == 1
    assert bench.finished["a"] == ABORT


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
