from __future__ import annotations

import pytest

from server.api_keys import KeyLimits
from server.errors import RateLimited
from server.rate_limit import KeyUsage


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def usage(**limits: int) -> tuple[KeyUsage, Time]:
    time = Time()
    return KeyUsage(KeyLimits(**limits), time), time


def test_requests_a_minute() -> None:
    key, time = usage(requests_per_minute=3)
    for _ in range(3):
        key.begin(1, 0)
    with pytest.raises(RateLimited) as caught:
        key.begin(1, 0)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers == {"Retry-After": "20"}
    time.now += 19.9
    with pytest.raises(RateLimited):
        key.begin(1, 0)
    time.now += 0.2
    key.begin(1, 0)
    time.now += 3600  # an idle hour saves up a minute's worth
    for _ in range(3):
        key.begin(1, 0)
    with pytest.raises(RateLimited):
        key.begin(1, 0)


def test_tokens_of_prompts_and_answers() -> None:
    key, time = usage(tokens_per_minute=600)
    key.add_prompt(500)
    with pytest.raises(RateLimited) as caught:
        key.add_prompt(200)
    assert caught.value.retry_after == 10
    key.add_answer(400)  # it was let in, and got longer than what was left
    with pytest.raises(RateLimited) as caught:
        key.begin(1, 0)
    assert caught.value.retry_after == 31  # 300 tokens are owed, and one must be there
    time.now += 31
    key.begin(1, 0)


def test_a_prompt_that_can_never_fit_is_not_worth_a_retry() -> None:
    key, _ = usage(tokens_per_minute=10)
    with pytest.raises(RateLimited, match="may use 10 a minute") as caught:
        key.add_prompt(11)
    assert caught.value.headers == {"x-should-retry": "false"}


def test_headers() -> None:
    key, time = usage(requests_per_minute=60, tokens_per_minute=6000)
    key.begin(1, 0)
    key.add_prompt(500)
    time.now += 0.5
    assert key.headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "0.500s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5550",
        "x-ratelimit-reset-tokens": "4.500s",
    }
    assert usage()[0].headers == {}
    assert usage(concurrent_requests=1)[0].headers == {}
