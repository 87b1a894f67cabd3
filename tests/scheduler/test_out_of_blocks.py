"""What happens when the pool is too small: who waits, who is preempted, and that everything gets done."""

from __future__ import annotations

from typing import Any

import pytest

from model.batch import SampledTokens
from scheduler.messages import Grammar
from tests.scheduler.bench import ABORT, Bench
from tests.scheduler.fake_worker import (
    request_message,
    run_alone,
)


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
