"""Cancelling by id: both names, the same key only, nothing left behind."""

from __future__ import annotations

import pytest

from server.errors import Cancelled
from server.open_requests import OpenRequests
from server.record import RequestRecord


def record(key: bytes = b"a", request_id: str = "mine", response_id: str = "cmpl-1") -> RequestRecord:
    return RequestRecord(request_id, key_digest=key, response_id=response_id)


@pytest.mark.parametrize("name", ["mine", "cmpl-1"])
def test_either_name_ends_all_generations_of_the_request(name: str) -> None:
    requests, ours, calls = OpenRequests(), record(), []
    with requests.track(ours, lambda: calls.append(1)), requests.track(ours, lambda: calls.append(2)):
        assert requests.cancel(b"a", name)
    assert (calls, ours.cancelled) == ([1, 2], True)


def test_only_the_same_key_and_only_while_it_is_open() -> None:
    requests, ours = OpenRequests(), record()
    with requests.track(ours, lambda: pytest.fail("not ours to cancel")):
        assert not requests.cancel(b"b", "mine")
        assert not requests.cancel(b"a", "other")
        assert not requests.cancel(b"a", "")
    assert not requests.cancel(b"a", "mine")
    assert not ours.cancelled
    assert not requests._open


def test_the_same_id_twice() -> None:
    requests, first, second = OpenRequests(), record(response_id="x"), record(response_id="y")
    with requests.track(first, lambda: None):
        with requests.track(second, lambda: None):
            assert requests.cancel(b"a", "x")
            assert not second.cancelled
        assert requests.cancel(b"a", "mine")
        assert not second.cancelled


def test_nothing_starts_after_the_cancellation() -> None:
    ours = record()
    ours.cancelled = True
    with pytest.raises(Cancelled), OpenRequests().track(ours, lambda: None):
        pytest.fail("not reached")
