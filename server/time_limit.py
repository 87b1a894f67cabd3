"""Python code that may not come to an end, in a thread that can be made to."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")


async def run_within(seconds: float, executor: Executor, function: Callable[[], T]) -> T:
    """`function()` in a thread of `executor`. Raises TimeoutError when it has taken so many seconds of a processor:
    on a busy machine it may take longer by the clock.

    Then, or when the caller is cancelled, the function is ended by an exception between two of its bytecodes: that
    works for Python's loops, and not within one call of something written in C.
    """
    call = _Call(function)
    result = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        while not result.done():
            left = seconds - call.cpu_seconds
            if left <= 0:
                raise TimeoutError
            await asyncio.wait({result}, timeout=max(left, 0.01))
        return result.result()
    finally:
        call.stop()
        result.cancel()


class _Stopped(BaseException):
    """Passes every `except Exception` of the function."""


class _Call(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._began = 0.0
        self._is_stopped = False

    @property
    def cpu_seconds(self) -> float:
        """What the function has taken so far; 0 before it begins."""
        with self._lock:
            return 0.0 if self._thread is None else _cpu_seconds(self._thread) - self._began

    def __call__(self) -> T:
        try:
            with self._lock:
                if self._is_stopped:
                    raise _Stopped
                self._thread = threading.get_ident()
                self._began = _cpu_seconds(self._thread)
            try:
                return self._function()
            finally:
                with self._lock:
                    self._thread = None
        except _Stopped:
            raise TimeoutError from None

    def stop(self) -> None:
        """No effect once the function has ended: the exception is raised under the lock that its end takes."""
        with self._lock:
            self._is_stopped = True
            if self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Stopped))


def _cpu_seconds(thread: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread))
