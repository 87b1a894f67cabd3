from __future__ import annotations

import asyncio

import pytest

from model.batch import Logprobs
from scheduler.messages import Finished, FinishReason, Started
from server import streams
from server.streams import AT_ONCE, Delta, RequestStream

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


def test_log_probabilities_of_a_prompt_merge_in_order_and_progress_keeps_the_latest() -> None:
    async def scenario() -> list[Delta]:
        stream = RequestStream("a")
        for position in (1, 2, 3):
            stream.push([], prompt_logprobs=Logprobs([[position]], [[-0.5 * position]]))
            stream.push([], progress=64 * position)
        stream.push([], started=HIT)
        stream.push([7], logprobs=Logprobs([[7]], [[-1.0]]))
        stream.push([], finished=STOP)
        return [delta async for delta in stream]

    prompt_logprobs = Logprobs([[1], [2], [3]], [[-0.5], [-1.0], [-1.5]])
    assert asyncio.run(scenario()) == [Delta([7], STOP, HIT, Logprobs([[7]], [[-1.0]]), prompt_logprobs, 192)]


@pytest.mark.parametrize("num_tokens", [1, 2, AT_ONCE, AT_ONCE + 1, AT_ONCE + 2, 5 * AT_ONCE])
@pytest.mark.parametrize("with_last", [True, False])
def test_log_probabilities_wait_in_turn_for_a_slow_reader(num_tokens: int, with_last: bool) -> None:
    """The end comes with the last token or after it."""

    async def scenario() -> list[Delta]:
        stream = RequestStream("a")
        for token in range(num_tokens):
            finished = STOP if with_last and token == num_tokens - 1 else None
            stream.push([token], logprobs=Logprobs([[token, 9]], [[-0.5 * token, -3.0]]), finished=finished)
        if not with_last:
            stream.push([], finished=STOP)
        assert stream.ended
        return [delta async for delta in stream]

    deltas = asyncio.run(scenario())
    assert [token for delta in deltas for token in delta.token_ids] == list(range(num_tokens))
    assert [delta.finished for delta in deltas] == [None] * (len(deltas) - 1) + [STOP]
    for delta in deltas:
        assert delta.logprobs == Logprobs(
            [[t, 9] for t in delta.token_ids], [[-0.5 * t, -3.0] for t in delta.token_ids]
        )
        assert len(delta.token_ids) <= AT_ONCE


def test_a_reader_is_overrun_who_stays_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stream = RequestStream("a")

        def push() -> None:
            for _ in range(1000):
                stream.push([7], logprobs=Logprobs([[7] * 21], [[-1.0] * 21]))

        push()
        assert not stream.is_overrun
        assert not stream.is_overrun  # much waits, but not for long
        monkeypatch.setattr(streams, "PATIENCE", 0.0)
        assert stream.is_overrun
        for _ in range(1000 // AT_ONCE):
            await anext(stream)
        assert not stream.is_overrun
        push()
        assert not stream.is_overrun  # the wait begins anew
        assert stream.is_overrun

    asyncio.run(scenario())


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
