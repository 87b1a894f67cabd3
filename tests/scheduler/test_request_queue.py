from __future__ import annotations

import random
import time
from array import array

import pytest

from model.batch import SamplingParams
from scheduler.request import Request
from scheduler.request_queue import RequestQueue


def request(priority: int, arrival: int) -> Request:
    return Request(
        request_id=f"{priority}/{arrival}",
        params=SamplingParams(max_tokens=1),
        tokens=array("I", [1]),
        num_prompt_tokens=1,
        max_num_tokens=2,
        priority=priority,
        stop_token_ids=frozenset(),
        root=b"",
        block_hashes=[],
        order=(priority, arrival),
    )


def test_orders_by_priority_then_arrival() -> None:
    queue = RequestQueue()
    requests = [request(1, 0), request(0, 1), request(1, 2), request(0, 3), request(-1, 4)]
    random.Random(0).shuffle(requests)
    for item in requests:
        queue.insert(item)
    assert [item.request_id for item in queue] == ["-1/4", "0/1", "0/3", "1/0", "1/2"]
    assert queue[0].request_id == "-1/4"
    assert queue[-1].request_id == "1/2"
    queue.remove(queue[2])
    assert [item.request_id for item in queue] == ["-1/4", "0/1", "1/0", "1/2"]


def test_removing_a_request_that_is_not_there_is_an_error() -> None:
    queue = RequestQueue()
    queue.insert(request(0, 0))
    with pytest.raises(KeyError):
        queue.remove(request(0, 0))
    with pytest.raises(KeyError):
        queue.remove(request(0, 1))


def test_twenty_thousand_waiting_requests_are_ordinary() -> None:
    queue = RequestQueue()
    requests = [request(arrival % 3, arrival) for arrival in range(20_000)]
    start = time.perf_counter()
    for item in requests:
        queue.insert(item)
    for item in random.Random(0).sample(requests, len(requests)):
        queue.remove(item)
    assert time.perf_counter() - start < 1.0, "about 5 us an operation on an idle core"
    assert not len(queue)
