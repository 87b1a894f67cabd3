"""The bounds at the door: a request reserves its place, and room for its prompt in the queue, before work is spent."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from scheduler.messages import EngineStats
from server.api_keys import ApiKey
from server.errors import Overloaded, RateLimited
from server.rate_limit import KeyUsage

MAX_RETRY_AFTER = 60
"""Seconds; the OpenAI SDK does not retry at all when it is told to wait for more than two minutes."""
_DECAY = 0.95
"""Weight of the past at each new observation of a rate: about the last twenty count."""


class Ticket:
    """What one request has reserved: a context manager that gives it back once, whatever happened."""

    def __init__(self, gate: AdmissionGate, count: int, key: bytes) -> None:
        self._gate = gate
        self._count = count
        self._key = key
        self._queued = 0

    def enqueue(self, tokens: int) -> None:
        """Reserve room for prompts of so many tokens. Raises Overloaded or RateLimited."""
        self._gate._enqueue(tokens, self._key)
        self._queued += tokens

    def dequeue(self, tokens: int) -> None:
        """A prompt of so many tokens has been computed."""
        tokens = min(tokens, self._queued)
        self._queued -= tokens
        self._gate._dequeue(tokens, self._key)

    def count_answer(self, tokens: int) -> None:
        """So many tokens were generated: they count against the key's limit."""
        if (usage := self._gate._usage.get(self._key)) is not None:
            usage.add_answer(tokens)

    def release(self) -> None:
        self.dequeue(self._queued)
        count, self._count = self._count, 0
        if count:
            self._gate._release(count, self._key)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class AdmissionGate:
    """Counts open requests and queued prompt tokens and refuses above the bounds, with an honest Retry-After.

    Where there are several keys, none gets more than what it leaves free: one alone has half of everything, so that
    whoever comes next finds the door open. Everything is synchronous and runs in the event loop, so a burst cannot
    slip through between check and count.
    """

    def __init__(
        self,
        max_open_requests: int,
        max_queued_tokens: int,
        keys: Iterable[ApiKey] = (),
        *,
        on_refusal: Callable[[str], None] = lambda bound: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_refusal` hears which bound was reached: `open_requests`, `queued_tokens` or `rate_limit`."""
        self.max_open_requests = max_open_requests
        self.max_queued_tokens = max_queued_tokens
        self.open_requests = 0
        self.queued_tokens = 0
        """Prompt tokens of requests that have no first token yet."""
        self._usage = {key.digest: KeyUsage(key.limits, clock) for key in keys}
        self._is_shared = len(self._usage) > 1
        self._open_of: Counter[bytes] = Counter()
        self._queued_of: Counter[bytes] = Counter()
        self._on_refusal = on_refusal
        self._clock = clock
        self._stats = EngineStats()
        self._prefill_tokens = 0.0
        self._prefill_seconds = 0.0
        self._releases = 0.0
        self._release_seconds = 0.0
        self._last_release: float | None = None

    def reserve(self, count: int = 1, key: bytes = b"") -> Ticket:
        """Take places for the request of a key's digest, one for each choice of its answer.

        Raises Overloaded or RateLimited, both with Retry-After.
        """
        free = self.max_open_requests - self.open_requests
        if count > free or (self._is_shared and self._open_of[key] + count > free and self._open_of[key]):
            raise self._no_place()
        with self._counting_rate_limits():
            if (usage := self._usage.get(key)) is not None:
                usage.begin(count, self._open_of[key])
        self.open_requests += count
        self._open_of[key] += count
        return Ticket(self, count, key)

    @property
    def is_full(self) -> bool:
        return self.open_requests >= self.max_open_requests

    def require_place(self) -> None:
        """Raises Overloaded when all places are taken."""
        if self.is_full:
            raise self._no_place()

    def _no_place(self) -> Overloaded:
        self._on_refusal("open_requests")
        return Overloaded(
            f"The server has {self.open_requests} open requests; {self.max_open_requests} is its limit"
            f"{', and keys share it' if self._is_shared else ''}. Please retry later.",
            retry_after=self.retry_after(),
        )

    @contextmanager
    def _counting_rate_limits(self) -> Iterator[None]:
        try:
            yield
        except RateLimited:
            self._on_refusal("rate_limit")
            raise

    def rate_limit_headers(self, key: bytes) -> Mapping[str, str]:
        """`x-ratelimit-*` for the answers to this key."""
        usage = self._usage.get(key)
        return {} if usage is None else usage.headers

    def observe(self, stats: EngineStats) -> None:
        """Learn the prefill rate from the figures of each step."""
        computed = stats.prompt_tokens - self._stats.prompt_tokens
        if computed > 0 and stats.num_steps == self._stats.num_steps + 1:
            self._prefill_tokens = _DECAY * self._prefill_tokens + computed
            self._prefill_seconds = _DECAY * self._prefill_seconds + stats.step_seconds
        self._stats = stats

    def retry_after(self) -> int:
        """Whole seconds, 1 to 60: until a place is free and what is queued is prefilled, as measured."""
        seconds = self._release_seconds / self._releases if self._releases else 0.0
        if self._prefill_seconds > 0:
            seconds += self.queued_tokens * self._prefill_seconds / self._prefill_tokens
        return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER)

    def _enqueue(self, tokens: int, key: bytes) -> None:
        free = self.max_queued_tokens - self.queued_tokens
        # A prompt that is longer than the bound is let in when it is the only one.
        if (tokens > free and self.queued_tokens) or (
            self._is_shared and self._queued_of[key] + tokens > free and self._queued_of[key]
        ):
            self._on_refusal("queued_tokens")
            raise Overloaded(
                f"The server has {self.queued_tokens} prompt tokens to compute; {self.max_queued_tokens} is its limit"
                f"{', and keys share it' if self._is_shared else ''}. Please retry later.",
                retry_after=self.retry_after(),
            )
        with self._counting_rate_limits():
            if (usage := self._usage.get(key)) is not None:
                usage.add_prompt(tokens)
        self.queued_tokens += tokens
        self._queued_of[key] += tokens

    def _dequeue(self, tokens: int, key: bytes) -> None:
        self.queued_tokens -= tokens
        self._queued_of[key] -= tokens

    def _release(self, count: int, key: bytes) -> None:
        was_full = self.is_full
        self.open_requests -= count
        self._open_of[key] -= count
        now = self._clock()
        # A pause in which the server was not full says nothing about how fast places become free.
        if self._last_release is not None and was_full:
            self._releases = _DECAY * self._releases + count
            self._release_seconds = _DECAY * self._release_seconds + (now - self._last_release)
        self._last_release = now
