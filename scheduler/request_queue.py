"""Requests in the order of (priority, arrival)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from scheduler.request import Request

_order = attrgetter("order")


class RequestQueue:
    """A sorted list: O(log n) comparisons an operation, and a memmove of 8 bytes a request.

    With 10,000 requests an insertion or removal anywhere costs a few microseconds, and unlike a heap
    it needs no lazy deletion, so that an aborted request is gone at once.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In order. Removing requests from the end during the iteration is allowed."""
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def insert(self, request: Request) -> None:
        insort(self._requests, request, key=_order)

    def remove(self, request: Request) -> None:
        index = bisect_left(self._requests, request.order, key=_order)
        if index == len(self._requests) or self._requests[index] is not request:
            raise KeyError(request.request_id)
        del self._requests[index]
