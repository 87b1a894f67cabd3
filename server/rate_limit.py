"""What one API key has used of its limits: requests and tokens a minute, as buckets that fill up steadily."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from server.api_keys import KeyLimits
from server.errors import RateLimited


class Bucket:
    """Holds what may be used at once, a minute's worth; it is full at first and fills up within a minute.

    It can be overdrawn: how long an answer gets is known when it has been given.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._time = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self._level + (now - self._time) * self.per_minute / 60, self.per_minute)
        self._time = now
        return self._level

    def take(self, amount: int) -> None:
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """How long it takes to fill up to `amount`."""
        return max(amount - self.level, 0.0) * 60 / self.per_minute


class KeyUsage:
    """One key's use of its limits. Every method runs in the event loop, and returns or raises without waiting."""

    def __init__(self, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._requests = _bucket(limits.requests_per_minute, clock)
        self._tokens = _bucket(limits.tokens_per_minute, clock)

    def begin(self, count: int, num_open: int) -> None:
        """A request for `count` answers of a key that has `num_open` already. Raises RateLimited."""
        most = self._limits.concurrent_requests
        if most is not None and num_open + count > most:
            raise RateLimited(f"This API key may have {most} open requests at once.", retry_after=1)
        if self._tokens is not None and self._tokens.level < 1:
            raise self._refusal("tokens", self._tokens, 1)
        if self._requests is not None:
            if self._requests.level < 1:
                raise self._refusal("requests", self._requests, 1)
            self._requests.take(1)

    def add_prompt(self, tokens: int) -> None:
        """Raises RateLimited."""
        if self._tokens is None:
            return
        if tokens > self._tokens.per_minute:
            raise RateLimited(f"The prompt has {tokens} tokens; this key may use {self._tokens.per_minute} a minute.")
        if tokens > self._tokens.level:
            raise self._refusal("tokens", self._tokens, tokens)
        self._tokens.take(tokens)

    def add_answer(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)

    @property
    def headers(self) -> Mapping[str, str]:
        """`x-ratelimit-*`, as OpenAI spells them: what there is, what is left, and when all of it is there again."""
        headers = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(math.floor(bucket.level), 0))
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.per_minute):.3f}s"
        return headers

    @staticmethod
    def _refusal(name: str, bucket: Bucket, amount: int) -> RateLimited:
        return RateLimited(
            f"This API key may use {bucket.per_minute} {name} a minute, and has used them.",
            retry_after=max(math.ceil(bucket.seconds_until(amount)), 1),
        )


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, clock)
