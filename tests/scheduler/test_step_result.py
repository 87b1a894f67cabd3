"""What requests are told beside their tokens: times, progress, log-probabilities of prompts."""

from __future__ import annotations

from model.batch import Logprobs
from scheduler.messages import Started
from tests.scheduler.bench import Bench, shape
from tests.scheduler.fake_worker import (
    logprobs_at,
    request_message,
)


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
