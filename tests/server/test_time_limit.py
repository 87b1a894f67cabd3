from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from server.time_limit import run_within


def run_each(*functions: object, seconds: float = 0.1) -> list[object]:
    async def run() -> list[object]:
        results: list[object] = []
        with ThreadPoolExecutor(1) as executor:
            for function in functions:
                try:
                    results.append(await run_within(seconds, executor, function))  # type: ignore[arg-type]
                except Exception as error:
                    results.append(type(error))
        return results

    return asyncio.run(run())


def endless() -> None:
    for _ in itertools.count():
        try:
            sum(range(100))
        except Exception:
            continue


def test_what_does_not_end_is_ended_and_the_thread_goes_on() -> None:
    assert run_each(endless, lambda: 1, endless, lambda: 2) == [TimeoutError, 1, TimeoutError, 2]


def test_only_time_on_a_processor_counts() -> None:
    assert run_each(lambda: time.sleep(0.5) or 1, seconds=0.1) == [1]


def test_errors_and_results_are_the_functions() -> None:
    assert run_each(lambda: 1 / 0, lambda: "x", seconds=5) == [ZeroDivisionError, "x"]


def test_a_caller_that_is_cancelled_ends_the_function() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        try:
            endless()
        finally:
            ended.set()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            task = asyncio.create_task(run_within(60, executor, work))
            await asyncio.to_thread(begun.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended.wait, 5)

    asyncio.run(run())


def test_ends_that_meet_the_limit_lose_no_thread() -> None:
    """Whichever comes first: the function's end or the exception."""

    def short() -> int:
        return sum(range(2_000))

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            for index in range(300):
                with suppress(TimeoutError):
                    assert await run_within(index * 1e-6, executor, short) == sum(range(2_000))
            assert await run_within(5, executor, lambda: 1) == 1

    asyncio.run(run())
