from __future__ import annotations

from array import array
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from model.batch import SamplingParams
from scheduler.request import Request
from scheduler.waiting_queue import WaitingQueue
from tests.scheduler.test_scheduler import Bench


def request(arrival: int, tenant: str = "", priority: int = 0, num_preemptions: int = 0) -> Request:
    return Request(
        request_id=f"{tenant}{arrival}",
        params=SamplingParams(max_tokens=1),
        tokens=array("I", [1]),
        num_prompt_tokens=1,
        max_num_tokens=2,
        priority=priority,
        tenant=tenant,
        stop_token_ids=frozenset(),
        root=b"",
        block_hashes=[],
        order=(priority, arrival),
        num_preemptions=num_preemptions,
    )


def served(queue: WaitingQueue) -> list[str]:
    ids = []
    while queue:
        ids.append(queue.first().request_id)
        queue.serve(queue.first())
    return ids


def filled(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue()
    for each in requests:
        queue.insert(each)
    return queue


def test_a_flood_is_served_in_turns_with_whoever_else_comes() -> None:
    queue = filled(*(request(i, "a") for i in range(4)), request(4, "b"), request(5, "c"), request(6, "b"))
    assert [each.request_id for each in queue] == served(queue) == ["a0", "b4", "c5", "a1", "b6", "a2", "a3"]


def test_priorities_come_before_turns_and_preempted_requests_before_new_ones() -> None:
    queue = filled(request(0, "a", 1), request(1, "a", 1), request(2, "b", 0), request(3, "b", 1, num_preemptions=1))
    assert served(queue) == ["b2", "b3", "a0", "a1"]


def test_who_sends_one_after_the_other_is_held_up_once_each_time() -> None:
    queue = filled(*(request(i, "a") for i in range(10)))
    order = []
    for arrival in range(10, 13):
        queue.insert(request(arrival, "b"))
        while order[-1:] != [f"b{arrival}"]:
            order.append(queue.first().request_id)
            queue.serve(queue.first())
    assert order == ["a0", "b10", "a1", "b11", "a2", "b12"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.sampled_from("abcd")),
        st.tuples(st.just("serve"), st.just("")),
        st.tuples(st.just("remove"), st.integers(0, 30)),
    ),
    max_size=60,
)


@given(STEPS)
def test_a_request_waits_for_one_of_each_other_tenant_at_most(steps: list[tuple[str, str | int]]) -> None:
    """Whatever else is sent and given up meanwhile; and a tenant's own requests keep their order."""
    queue = WaitingQueue()
    waiting: list[Request] = []
    served_since: dict[Request, Counter[str]] = {}
    for arrival, (step, what) in enumerate(steps):
        if step == "insert":
            new = request(arrival, str(what))
            queue.insert(new)
            waiting.append(new)
        elif step == "remove" and waiting:
            gone = waiting.pop(int(what) % len(waiting))
            queue.remove(gone)
        elif step == "serve" and waiting:
            expected = next(iter(queue))
            chosen = queue.first()
            assert chosen is expected
            assert chosen is next(each for each in waiting if each.tenant == chosen.tenant)
            queue.serve(chosen)
            waiting.remove(chosen)
            for counter in served_since.values():
                counter[chosen.tenant] += 1
        heads = {each.tenant: each for each in reversed(waiting)}
        served_since = {head: served_since.get(head, Counter()) for head in heads.values()}
        assert all(count <= 1 for counter in served_since.values() for count in counter.values())
        assert len(queue) == len(waiting)


def test_first_token_behind_a_flood() -> None:
    """One row, forty requests of one key: the other key's request starts when the one that runs has ended."""
    bench = Bench(max_num_seqs=1)
    for index in range(40):
        bench.add(f"flood-{index}", range(8), max_tokens=3, tenant="a")
    bench.step()
    bench.add("other", range(8), max_tokens=3, tenant="b")
    while "other" not in bench.output:
        bench.step()
    assert [request_id for request_id in bench.output if request_id != "other"] == ["flood-0"]
