"""Which limit of a request ends first, and what its client is told."""

from __future__ import annotations

import pytest

from server.deadlines import Clock, Deadlines
from server.errors import ApiError, DeadlineExceeded, QueueTimeout, TimeLimitExceeded


@pytest.mark.parametrize(
    ("timeout", "total", "queue", "error"),
    [
        (1.0, None, None, DeadlineExceeded),
        (None, 1.0, None, TimeLimitExceeded),
        (None, None, 1.0, QueueTimeout),
        (3.0, 2.0, 1.0, QueueTimeout),
        (3.0, 2.0, 2.5, TimeLimitExceeded),
        (1.0, 2.0, 3.0, DeadlineExceeded),
        (1.0, 1.0, 1.0, DeadlineExceeded),
    ],
)
def test_the_limit_that_ends_first_is_named_also_by_an_early_timer(
    timeout: float | None, total: float | None, queue: float | None, error: type[ApiError]
) -> None:
    clock = Clock(Deadlines(queue, total), timeout, retry_after=lambda: 7)
    left = clock.time_left
    assert left is not None
    assert 0 < left <= min(each for each in (timeout, total, queue) if each is not None)
    assert type(clock.error()) is error


def test_a_request_that_has_started_waits_no_more() -> None:
    clock = Clock(Deadlines(queue=1.0, total=5.0), None, retry_after=lambda: 7)
    clock.has_started = True
    assert isinstance(clock.error(), TimeLimitExceeded)
    clock = Clock(Deadlines(queue=1.0), None, retry_after=lambda: 7)
    clock.has_started = True
    assert clock.time_left is None
