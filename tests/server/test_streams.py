from __future__ import annotations

import asyncio

import pytest

from model.batch import Logprobs
from scheduler.messages import Finished, FinishReason, Started
from server.streams import Delta, RequestStream

STOP = Finished(reason=FinishReason.STOP, stop_token_id=7)
HIT = Started(64, 0.5, 0.25)


def test_a_reader_gets_each_delta_as_it_comes_and_then_the_end() -> None:
    async def scenario() -> list[Delta]:
        stream = RequestStream("a")

        async def write() -> None:
            stream.push([1], started=HIT)
            await asyncio.sleep(0.001)
            stream.push([2, 3])
            await asyncio.sleep(0.001)
            stream.push([], finished=STOP)

        writer = asyncio.create_task(write())
        deltas = [delta async for delta in stream]
        await writer
        return deltas

    assert asyncio.run(scenario()) == [Delta([1], None, HIT), Delta([2, 3]), Delta([], STOP)]


def test_a_slow_reader_finds_everything_merged_into_one_delta() -> None:
    async def scenario() -> list[Delta]:
        stream = RequestStream("a")
        stream.push([1], started=HIT)
        for token in range(2, 1001):
            stream.push([token])
        stream.push([], finished=STOP)
        return [delta async for delta in stream]

    assert asyncio.run(scenario()) == [Delta(list(range(1, 1001)), STOP, HIT)]


def test_log_probabilities_merge_in_order_and_progress_keeps_the_latest() -> None:
    async def scenario() -> list[Delta]:
        stream = RequestStream("a")
        for position in (1, 2, 3):
            stream.push([], prompt_logprobs=Logprobs([[position]], [[-0.5 * position]]))
            stream.push([], progress=64 * position)
        stream.push([], started=HIT)
        stream.push([], logprobs=Logprobs([[7]], [[-1.0]]))
        stream.push([7])
        stream.push([], logprobs=Logprobs([[8]], [[-2.0]]))
        stream.push([8], finished=STOP)
        return [delta async for delta in stream]

    prompt_logprobs = Logprobs([[1], [2], [3]], [[-0.5], [-1.0], [-1.5]])
    logprobs = Logprobs([[7], [8]], [[-1.0], [-2.0]])
    assert asyncio.run(scenario()) == [Delta([7, 8], STOP, HIT, logprobs, prompt_logprobs, 192)]


def test_nothing_comes_after_the_end() -> None:
    async def scenario() -> list[Delta]:
        stream = RequestStream("a")
        stream.push([1], finished=STOP)
        stream.push([2])
        stream.push([], finished=Finished(reason=FinishReason.ERROR))
        deltas = [delta async for delta in stream]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return deltas

    assert asyncio.run(scenario()) == [Delta([1], STOP)]


def test_a_reader_that_gives_up_waiting_loses_nothing() -> None:
    async def scenario() -> Delta:
        stream = RequestStream("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)
        stream.push([1])
        return await anext(stream)

    assert asyncio.run(scenario()) == Delta([1])


def test_a_second_reader_is_refused() -> None:
    async def scenario() -> None:
        stream = RequestStream("a")
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already being read"):
            await anext(stream)
        stream.push([1], finished=STOP)
        assert (await first).token_ids == [1]

    asyncio.run(scenario())


def test_a_reader_that_never_pauses_still_gives_other_tasks_their_turn() -> None:
    """With data always ready, each delta but the first must cost a turn of the event loop."""

    async def scenario() -> int:
        stream = RequestStream("a")

        def produce(token: int) -> None:
            stream.push([token], finished=STOP if token == 100 else None)
            if token < 100:
                loop.call_soon(produce, token + 1)

        loop = asyncio.get_running_loop()
        loop.call_soon(produce, 1)
        return len([delta async for delta in stream])

    assert asyncio.run(scenario()) > 10
