"""The engine client against real engine processes: in `tests.scheduler.fake_engine` only the model is not real."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import structs

from model.batch import Logprobs, SamplingParams
from scheduler.messages import EngineStats, Finished, FinishReason
from server import streams
from server.engine_client import (
    OVERRUN,
    EngineClient,
    EngineState,
    EngineUnavailable,
)
from server.errors import finished_error
from tests.scheduler.fake_engine import expected_tokens
from tests.server.engine_streams import add_request, read, until, with_engine


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_streams_get_their_own_tokens_then_one_end(loop: str) -> None:
    async def scenario(engine: EngineClient) -> None:
        prompts = {f"r{i}": list(range(1 + 40 * i)) for i in range(20)}
        streams = [engine.submit(add_request(request_id, prompt, 30)) for request_id, prompt in prompts.items()]
        assert engine.num_open == 20
        answers = await asyncio.gather(*map(read, streams))
        for prompt, (tokens, end) in zip(prompts.values(), answers, strict=True):
            assert tokens == expected_tokens(prompt, 30)
            assert end.reason is FinishReason.LENGTH
        assert engine.num_open == 0

    engine = with_engine(scenario, loop=loop)
    assert (engine.state, engine.failure) == (EngineState.STOPPED, None)


def test_log_probabilities_and_progress_reach_their_stream() -> None:
    async def scenario(engine: EngineClient) -> None:
        prompt = [1 + i % 900 for i in range(1200)]
        request = add_request("a", prompt, 3)
        params = structs.replace(request.params, logprobs=0, prompt_logprobs=0)
        token_ids: list[int] = []
        logprobs, prompt_logprobs, progress = Logprobs([], []), Logprobs([], []), []
        async for delta in engine.submit(structs.replace(request, params=params, progress=True)):
            token_ids += delta.token_ids
            logprobs.extend(delta.logprobs or Logprobs([], []))
            prompt_logprobs.extend(delta.prompt_logprobs or Logprobs([], []))
            progress += [delta.progress] * (delta.progress is not None)
        assert prompt_logprobs.token_ids == [[token] for token in prompt[1:]]
        assert prompt_logprobs.logprobs == [[-float(position)] for position in range(1, 1200)]
        assert logprobs == Logprobs([[token] for token in token_ids], [[-1200.0], [-1201.0], [-1202.0]])
        assert progress == sorted(progress)
        assert set(progress) <= {512, 1024}

    with_engine(scenario, max_num_batched_tokens=512)


def test_a_reset_of_the_prefix_cache_reaches_the_engine() -> None:
    async def scenario(engine: EngineClient) -> None:
        for request_id in "ab":
            deltas = [delta async for delta in engine.submit(add_request(request_id, [7] * 200, 2))]
            assert deltas[0].started is not None
            assert deltas[0].started.cached_tokens == 0
            engine.reset_prefix_cache()
        await engine.shutdown(0)
        with pytest.raises(EngineUnavailable):
            engine.reset_prefix_cache()

    with_engine(scenario)


def test_a_second_time_the_prompt_comes_from_the_cache() -> None:
    async def scenario(engine: EngineClient) -> None:
        first = [
            delta.started and delta.started.cached_tokens
            async for delta in engine.submit(add_request("a", [7] * 200, 2))
        ]
        second = [
            delta.started and delta.started.cached_tokens
            async for delta in engine.submit(add_request("b", [7] * 200, 2))
        ]
        assert (first[0], second[0]) == (0, 192)
        assert set(first[1:] + second[1:]) <= {None}

    with_engine(scenario)


def test_a_prompt_of_131072_tokens_crosses_the_channel() -> None:
    async def scenario(engine: EngineClient) -> None:
        prompt = [token % 1000 for token in range(131_072)]
        assert await read(engine.submit(add_request("a", prompt, 3))) == (
            expected_tokens(prompt, 3),
            Finished(reason=FinishReason.LENGTH),
        )

    with_engine(scenario, max_num_batched_tokens=8192)


def test_a_reader_who_lets_log_probabilities_gather_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_BEHIND", 1000)
    monkeypatch.setattr(streams, "PATIENCE", 0.0)

    async def scenario(engine: EngineClient) -> None:
        request = add_request("a", [1], 1_000_000)
        slow = engine.submit(structs.replace(request, params=SamplingParams(max_tokens=1_000_000, logprobs=0)))
        await until(lambda: engine.num_open == 0)
        await until(lambda: engine.stats.num_running == 0)
        tokens, end = await read(slow)
        assert end == OVERRUN
        assert 100 < len(tokens) < 200
        assert tokens == expected_tokens([1], len(tokens))
        error = finished_error(end, "id")
        assert error is not None
        assert (error.status, error.code) == (503, "slow_reader")

    with_engine(scenario)


def test_an_aborted_request_is_forgotten_at_once() -> None:
    async def scenario(engine: EngineClient) -> None:
        aborted = engine.submit(add_request("a", [1], 1_000_000))
        other = engine.submit(add_request("b", [2], 300))
        await anext(aborted)
        engine.abort("a")
        engine.abort("a")
        engine.abort("never there")
        assert engine.num_open == 1
        assert (await read(aborted))[1].reason is FinishReason.ABORT
        assert (await read(other))[0] == expected_tokens([2], 300)
        engine.abort("b")
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.unknown_ids == 0

    with_engine(scenario, "--step-seconds", "0.001")


def test_the_same_id_cannot_be_open_twice() -> None:
    async def scenario(engine: EngineClient) -> None:
        stream = engine.submit(add_request("a", [1], 50))
        with pytest.raises(ValueError, match="a is in use"):
            engine.submit(add_request("a", [2], 50))
        assert (await read(stream))[0] == expected_tokens([1], 50)

    with_engine(scenario)


def test_after_200_aborted_streams_the_pool_is_free_and_a_new_request_answers() -> None:
    """Aborted in every phase: most wait in the queue, some are in prefill, some in decode."""

    async def scenario(engine: EngineClient) -> None:
        async def start_and_leave(i: int) -> None:
            request_id = f"r{i}"
            stream = engine.submit(add_request(request_id, [i] * (1 + 97 * i % 3000), 10_000))
            try:
                async with asyncio.timeout(0.05 + 0.005 * i):
                    await read(stream)
            except TimeoutError:
                engine.abort(request_id)

        await asyncio.gather(*map(start_and_leave, range(200)))
        assert engine.num_open == 0
        await until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0, 2)
        assert engine.stats.free_blocks == engine.stats.num_blocks == 300
        assert engine.stats.generation_tokens > 0
        assert await read(engine.submit(add_request("new", [5, 6], 10))) == (
            expected_tokens([5, 6], 10),
            Finished(reason=FinishReason.LENGTH),
        )

    with_engine(scenario, "--step-seconds", "0.001", num_blocks=300, max_num_seqs=16)


def test_a_pool_that_is_far_too_small_costs_time_and_no_tokens() -> None:
    async def scenario(engine: EngineClient) -> None:
        prompts = [[i] * (20 + i) for i in range(32)]
        requests = [add_request(f"r{i}", prompt, 400) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(read(engine.submit(request)) for request in requests))
        assert [tokens for tokens, _ in answers] == [expected_tokens(prompt, 400) for prompt in prompts]
        assert engine.stats.num_preemptions >= 10
        assert engine.stats.free_blocks == 40

    with_engine(scenario, num_blocks=40)


def test_figures_of_steps_and_heartbeats_are_reported() -> None:
    async def scenario(engine: EngineClient) -> None:
        figures: list[EngineStats] = []
        engine.on_stats = figures.append
        await read(engine.submit(add_request("a", [1] * 10, 5)))
        assert figures[-1].generation_tokens == 5
        reported = len(figures)
        await until(lambda: len(figures) > reported, 2)
        assert engine.stats == figures[-1]
        assert (figures[-1].num_running, figures[-1].prompt_tokens) == (0, 10)
        assert engine.longest_step == max(figure.step_seconds for figure in figures) > 0

    with_engine(scenario)
