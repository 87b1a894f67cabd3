"""Whom the scheduler refuses, how requests end, and that they give everything back."""

from __future__ import annotations

import msgspec
import pytest

from model.batch import NONE_LEFT, SampledTokens
from scheduler.messages import Finished, FinishReason
from tests.scheduler.bench import ABORT, Bench
from tests.scheduler.fake_worker import (
    NAN_SEED_BIT,
    request_message,
    run_alone,
)
from tests.scheduler.invariants import check

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
