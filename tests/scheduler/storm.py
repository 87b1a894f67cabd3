"""The state machine behind the property tests: anything may happen to a scheduler, at any moment."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.batch import Logprobs, SampledTokens, SamplingParams
from scheduler.block_pool import BlockPool
from scheduler.messages import AddRequest, Finished, FinishReason
from scheduler.scheduler import Scheduler
from scheduler.step_result import StepResult
from tests.scheduler.fake_worker import (
    EOS,
    NAN_SEED_BIT,
    REPEAT_SEED_BIT,
    VOCAB_SIZE,
    FakeWorker,
    logprobs_at,
    request_message,
    run_alone,
)
from tests.scheduler.invariants import check

ABORT = Finished(reason=FinishReason.ABORT)
OUT_OF_MEMORY = Finished(reason=FinishReason.ERROR, code="out_of_memory")
PROMPTS = st.builds(
    lambda family, length, tail: [(family * 7 + i * i) % VOCAB_SIZE for i in range(length)] + tail,
    st.integers(0, 1),
    st.integers(1, 24),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)
"""Two families of prompts that share prefixes of every length."""
ARRIVALS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "max_tokens": st.sampled_from([1, 4, 12, 30]),
        "priority": st.sampled_from([0, 0, 0, 1, 2]),
        "cache_salt": st.sampled_from(["", "", "", "tenant"]),
        "tenant": st.sampled_from(["", "", "other"]),
        "seed": st.sampled_from(
            [0, 1, 2, 3, *(REPEAT_SEED_BIT + i for i in range(4)), NAN_SEED_BIT, NAN_SEED_BIT + REPEAT_SEED_BIT]
        ),
        "stop_token_ids": st.sampled_from([(), (), (3,)]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 0]),
        "prompt_logprobs": st.sampled_from([None, None, 0]),
        "progress": st.booleans(),
    }
)


class SchedulerStorm(RuleBasedStateMachine):
    """Random add, schedule, update, abort and preempt, one or two steps in flight, tiny pools, shared prefixes, drafts.

    The fake worker checks every step as it runs; here, what clients see is compared with what each
    request gives alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accepted: dict[str, AddRequest] = {}
        self.output: dict[str, list[int]] = {}
        self.terminal: dict[str, Finished] = {}
        self.cached: dict[str, int] = {}
        self.prompt_logprobs: dict[str, Logprobs] = {}
        self.progress: dict[str, int] = {}
        self.results: deque[SampledTokens] = deque()

    @initialize(
        depth=st.integers(1, 2),
        num_blocks=st.sampled_from([1, 3, 5, 8, 12, 16]),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.sampled_from([1, 2, 4, 6]),
        budget=st.sampled_from([1, 3, 7, 20, 64]),
        lone_chunk=st.sampled_from([0, 30]),
        max_model_len=st.sampled_from([6, 24, 1000]),
        watermark=st.sampled_from([None, 0, 3]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        speculative=st.booleans(),
    )
    def start(
        self,
        depth: int,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        lone_chunk: int,
        max_model_len: int,
        watermark: int | None,
        prefix_cache: bool,
        speculative: bool,
    ) -> None:
        self.depth = depth
        self.prefix_cache = prefix_cache
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            pool=self.pool,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_token_ids=[EOS],
            prefix_cache=prefix_cache,
            fingerprint="storm",
            speculative=speculative,
            watermark_blocks=watermark,
            max_lone_chunk=lone_chunk,
        )
        self.worker = FakeWorker(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(budget, lone_chunk),
        )
        self.limit = min(max_model_len, num_blocks * block_size + 1)

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=6))
    def add(self, arrivals: list[dict[str, Any]]) -> None:
        for arrival in arrivals:
            message = request_message(f"r{len(self.accepted)}", **arrival)
            refused = self.scheduler.add(self.scheduler.make_request(message))
            if len(arrival["prompt"]) >= self.limit:
                assert refused is not None
                assert refused.code == "context_length_exceeded"
            else:
                assert refused is None
                self.accepted[message.request_id] = message
                self.output[message.request_id] = []
                self.prompt_logprobs[message.request_id] = Logprobs([], [])

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.accepted.keys() - self.terminal.keys()) or [""]))
        if request_id:
            refused = self.scheduler.add(self.scheduler.make_request(self.accepted[request_id]))
            assert refused is not None
            assert refused.code == "duplicate_request_id"

    @rule()
    def schedule(self) -> None:
        if self.scheduler.in_flight == self.depth:
            return
        batch = self.scheduler.schedule()
        if batch is not None:
            self.results.append(self.worker.execute(batch))
        else:
            # With nothing in flight there is always something to do.
            assert self.scheduler.in_flight or not self.scheduler.has_work

    @precondition(lambda self: self.results)
    @rule()
    def update(self) -> None:
        sampled = self.results.popleft()
        self.worker.processed_step = sampled.step
        self.deliver(self.scheduler.update(sampled))

    @rule(times=st.integers(1, 12))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.schedule()
            check(self.scheduler)
            if self.results and (len(self.results) == self.depth or times % 2):
                self.update()
                check(self.scheduler)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.accepted)))
        live = request_id in {r.request_id for r in (*self.scheduler._running, *self.scheduler._waiting)}
        unknown = self.scheduler.stats().unknown_ids
        assert self.scheduler.finish(request_id, ABORT) is live
        assert not self.scheduler.finish(request_id, ABORT)
        assert self.scheduler.stats().unknown_ids == unknown + 1 + (not live)

    @precondition(lambda self: len(self.scheduler._running))
    @rule()
    def preempt(self) -> None:
        self.scheduler._preempt(self.scheduler._running[-1])

    @rule(is_early=st.booleans())
    def run_out_of_memory(self, is_early: bool) -> None:
        """The steps in flight fail, one of them perhaps before the worker has done anything."""
        if is_early and self.scheduler.in_flight < self.depth and (batch := self.scheduler.schedule()) is not None:
            self.worker.last_step = batch.step
        if self.scheduler.in_flight:
            self.results.clear()
            self.worker.rows.clear()
            culprit = self.scheduler.abandon()
            if culprit is not None:
                assert self.scheduler.finish(culprit, OUT_OF_MEMORY)

    @rule()
    def take_finished(self) -> None:
        self.deliver(StepResult(finished=self.scheduler.take_finished()))

    @rule()
    def reset_cache(self) -> None:
        self.pool.reset_cache()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "scheduler"):
            check(self.scheduler)

    def deliver(self, result: StepResult) -> None:
        for request_id, done in result.progress.items():
            message = self.accepted[request_id]
            assert message.progress
            assert not self.output[request_id]
            assert request_id not in self.terminal
            assert self.progress.get(request_id, 0) < done <= len(message.prompt) // 4
            self.progress[request_id] = done
        for request_id, logprobs in result.prompt_logprobs.items():
            assert self.accepted[request_id].params.prompt_logprobs is not None
            assert request_id not in self.terminal
            self.prompt_logprobs[request_id].extend(logprobs)
        for request_id in result.started:
            if self.accepted[request_id].params.prompt_logprobs is not None:
                num_prompt_tokens = len(self.accepted[request_id].prompt) // 4
                assert len(self.prompt_logprobs[request_id].token_ids) == num_prompt_tokens - 1, "not before its text"
        asking = [r for r in result.request_ids if self.accepted[r].params.logprobs is not None]
        assert list(result.logprobs) == asking
        for request_id, token_ids in zip(result.request_ids, result.token_ids, strict=True):
            assert request_id not in self.terminal, "a token after the end"
            assert (request_id in result.started) == (not self.output[request_id])
            self.output[request_id] += token_ids
            if request_id in result.logprobs:
                end = len(self.accepted[request_id].prompt) // 4 + len(self.output[request_id])
                places = range(end - len(token_ids), end)
                assert result.logprobs[request_id] == Logprobs(
                    [[token_id] for token_id in token_ids], [[float(place)] for place in places]
                )
        for request_id, started in result.started.items():
            cached = started.cached_tokens
            assert 0 <= cached < len(self.accepted[request_id].prompt) // 4
            assert cached == 0 or self.prefix_cache
        for request_id, finished in result.finished.items():
            assert request_id in self.accepted
            assert request_id not in self.terminal, "two terminal events"
            self.terminal[request_id] = finished

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        while self.scheduler.has_work or self.scheduler.in_flight:
            self.steps(1)
            steps += 1
            assert steps < 20_000, "livelock"
        self.take_finished()
        assert self.pool.free_count == self.pool.num_blocks
        assert self.terminal.keys() == self.accepted.keys()
        for request_id, message in self.accepted.items():
            self.check_prompt_logprobs(message, self.prompt_logprobs[request_id])
            self.check_text(message, self.output[request_id], self.terminal[request_id])

        assert self.scheduler.stats().prompt_tokens <= sum(len(m.prompt) // 4 for m in self.accepted.values())

    def check_prompt_logprobs(self, message: AddRequest, delivered: Logprobs) -> None:
        """Each token's exactly once and in order (that they are complete at the first token was seen there)."""
        prompt = array("I", message.prompt)
        assert delivered == logprobs_at(prompt, range(1, len(delivered.token_ids) + 1))

    def check_text(self, message: AddRequest, output: list[int], finished: Finished) -> None:
        params: SamplingParams = message.params
        prompt = [int.from_bytes(message.prompt[i : i + 4], "little") for i in range(0, len(message.prompt), 4)]
        alone, reason = run_alone(prompt, params, self.limit)
        if finished in (ABORT, OUT_OF_MEMORY):
            assert output == alone[: len(output)]
            return
        assert (output, finished.reason) == (alone, reason)
        if reason is FinishReason.STOP:
            assert finished.stop_token_id == output[-1]
        if reason is FinishReason.ERROR:
            assert finished.code == "nan_logits"
