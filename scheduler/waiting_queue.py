"""Requests that wait, by priority; within a priority tenants take turns.

Next is, of the highest priority, a preempted request, else the first of the tenant that was served longest ago. So
however many requests a tenant has, they hold up another's by one at most; and the requests of one tenant keep their
order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from scheduler.request import Request
from scheduler.request_queue import RequestQueue


class WaitingQueue:
    """A `RequestQueue` for each tenant that has any: what comes next costs a comparison for each of them."""

    def __init__(self) -> None:
        self._queues: dict[str, RequestQueue] = {}
        self._turns: dict[str, int] = {}
        """Tenant -> the number of its latest turn; as many as there ever were, and they are API keys."""
        self._num_turns = 0
        self.num_tokens = 0
        """Of their prompts."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they would be served if nothing else came."""
        turns, num_turns = dict(self._turns), self._num_turns
        at = dict.fromkeys(self._queues, 0)
        while at:
            request = self._first(at, turns)
            yield request
            tenant = request.tenant
            num_turns += 1
            turns[tenant] = num_turns
            at[tenant] += 1
            if at[tenant] == len(self._queues[tenant]):
                del at[tenant]

    def first(self) -> Request:
        """The next one. There must be one."""
        return self._first(dict.fromkeys(self._queues, 0), self._turns)

    def insert(self, request: Request) -> None:
        self._queues.setdefault(request.tenant, RequestQueue()).insert(request)
        self.num_tokens += request.num_prompt_tokens

    def remove(self, request: Request) -> None:
        queue = self._queues[request.tenant]
        queue.remove(request)
        self.num_tokens -= request.num_prompt_tokens
        if not queue:
            del self._queues[request.tenant]

    def serve(self, request: Request) -> None:
        """Remove it because it is its tenant's turn."""
        self.remove(request)
        self._num_turns += 1
        self._turns[request.tenant] = self._num_turns

    def _first(self, at: Mapping[str, int], turns: Mapping[str, int]) -> Request:
        def rank(request: Request) -> tuple[int, bool, int, int]:
            priority, arrival = request.order
            return priority, not request.num_preemptions, turns.get(request.tenant, 0), arrival

        return min((self._queues[tenant][index] for tenant, index in at.items()), key=rank)
