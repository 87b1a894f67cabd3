"""How long a request may wait and take: the operator's limits and the client's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import ApiError, DeadlineExceeded, QueueTimeout, TimeLimitExceeded


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds since a request's arrival; None: no limit."""

    queue: float | None = None
    """To its first step in the engine."""
    total: float | None = None


class Clock:
    """The time of one request, against whichever limit ends first."""

    def __init__(self, deadlines: Deadlines, timeout: float | None, retry_after: Callable[[], int]) -> None:
        """`timeout`: what the client asked for. `retry_after`: called when the wait was too long."""
        self.arrival = time.monotonic()
        self.has_started = False
        """It does not wait any more: set it at the first sign of a step."""
        self._deadlines = deadlines
        self._timeout = timeout
        self._retry_after = retry_after

    @property
    def time_left(self) -> float | None:
        """Seconds; None without a limit."""
        limits = self._limits()
        return self.arrival + _first(limits)[0] - time.monotonic() if limits else None

    def error(self) -> ApiError:
        """What a client gets when no time is left: that of the limit which ends first. Not by the time that has
        passed: a timer may be early by a millisecond."""
        return _first(self._limits())[1]()

    def _limits(self) -> list[_Limit]:
        queue = None if self.has_started else self._deadlines.queue
        limits: tuple[tuple[float | None, Callable[[], ApiError]], ...] = (
            (self._timeout, DeadlineExceeded),
            (self._deadlines.total, TimeLimitExceeded),
            (queue, self._waited_too_long),
        )
        return [(seconds, error) for seconds, error in limits if seconds is not None]

    def _waited_too_long(self) -> QueueTimeout:
        return QueueTimeout(
            f"The request did not start within {self._deadlines.queue} seconds. Please retry later.",
            retry_after=self._retry_after(),
        )


_Limit = tuple[float, Callable[[], ApiError]]
"""Seconds since the arrival, and the error of whoever takes longer."""


def _first(limits: list[_Limit]) -> _Limit:
    return min(limits, key=lambda limit: limit[0])
