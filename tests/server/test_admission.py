from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler.messages import EngineStats
from server.admission import MAX_RETRY_AFTER, AdmissionGate, Ticket
from server.api_keys import ApiKey, KeyLimits
from server.errors import Overloaded, RateLimited


def test_bound_and_release() -> None:
    gate = AdmissionGate(2, 100_000)
    first, second = gate.reserve(), gate.reserve()
    with pytest.raises(Overloaded):
        gate.reserve()
    first.release()
    first.release()
    assert gate.open_requests == 1
    third = gate.reserve()
    second.release()
    third.release()
    assert gate.open_requests == 0


def test_ticket_is_a_context_manager() -> None:
    gate = AdmissionGate(1, 100_000)
    with pytest.raises(ZeroDivisionError), gate.reserve():
        raise ZeroDivisionError
    assert gate.open_requests == 0


def test_retry_after_is_one_second_while_nothing_is_known() -> None:
    gate = AdmissionGate(1, 100_000)
    with gate.reserve(), pytest.raises(Overloaded) as caught:
        gate.reserve()
    assert caught.value.retry_after == 1
    assert caught.value.code == "server_overloaded"


def test_retry_after_from_the_measured_prefill_rate() -> None:
    gate = AdmissionGate(2, 100_000)
    ticket = gate.reserve()
    ticket.enqueue(12_300)
    for step in range(1, 6):  # 500 tokens in half a second: 1,000 a second
        gate.observe(EngineStats(num_steps=step, prompt_tokens=500 * step, step_seconds=0.5))
    assert gate.retry_after() == 13
    gate.observe(EngineStats(num_steps=6, prompt_tokens=2500, step_seconds=9.0))
    assert gate.retry_after() == 13  # a step that only decodes says nothing about prefill
    ticket.enqueue(80_000)
    with pytest.raises(Overloaded) as caught:
        ticket.enqueue(80_000)
    assert caught.value.retry_after == MAX_RETRY_AFTER


def test_retry_after_from_how_fast_places_become_free() -> None:
    now = 0.0
    gate = AdmissionGate(1, 100_000, clock=lambda: now)
    for _ in range(10):
        ticket = gate.reserve()
        now += 7.5
        ticket.release()
    assert gate.retry_after() == 8


def test_an_idle_hour_is_no_rate() -> None:
    now = 0.0
    gate = AdmissionGate(2, 100_000, clock=lambda: now)
    for _ in range(3):
        with gate.reserve():
            now += 3600.0
    assert gate.retry_after() == 1


def test_bound_on_queued_tokens() -> None:
    gate = AdmissionGate(10, 100)
    first, second = gate.reserve(), gate.reserve()
    first.enqueue(60)
    with pytest.raises(Overloaded, match="60 prompt tokens to compute; 100 is its limit"):
        second.enqueue(41)
    second.enqueue(40)
    first.dequeue(60)
    first.dequeue(60)
    assert gate.queued_tokens == 40
    second.release()
    second.release()
    assert (gate.queued_tokens, gate.open_requests) == (0, 1)


def test_a_prompt_longer_than_the_bound_is_computed_alone() -> None:
    gate = AdmissionGate(10, 100)
    first, second = gate.reserve(), gate.reserve()
    first.enqueue(500)
    with pytest.raises(Overloaded):
        second.enqueue(1)
    first.release()
    second.enqueue(1)


def keys(*names: str, **limits: int) -> list[ApiKey]:
    return [ApiKey(name, KeyLimits(**limits)) for name in names]


def test_several_keys_leave_room_for_each_other() -> None:
    a, b, c = keys("a", "b", "c")
    gate = AdmissionGate(12, 120, [a, b, c])

    def taken(key: ApiKey) -> int:
        tickets = []
        while True:
            try:
                tickets.append(gate.reserve(1, key.digest))
                tickets[-1].enqueue(10)
            except Overloaded:
                return len(tickets)

    assert [taken(a), taken(b), taken(c)] == [6, 3, 2]


def test_a_single_key_has_everything() -> None:
    [only] = keys("a")
    gate = AdmissionGate(3, 30, [only])
    for _ in range(3):
        gate.reserve(1, only.digest).enqueue(10)
    assert (gate.open_requests, gate.queued_tokens) == (3, 30)


def test_a_key_has_so_many_open_requests_at_once() -> None:
    [key] = keys("a", concurrent_requests=2)
    gate = AdmissionGate(10, 100, [key])
    first, _ = gate.reserve(1, key.digest), gate.reserve(1, key.digest)
    with pytest.raises(RateLimited, match="2 open requests"):
        gate.reserve(1, key.digest)
    first.release()
    gate.reserve(1, key.digest)


class GateStorm(RuleBasedStateMachine):
    """Whatever is reserved, refused, computed and given up in whatever order: the gate counts what is out."""

    @initialize(most=st.integers(1, 6), tokens=st.integers(1, 50), shared=st.booleans())
    def build(self, most: int, tokens: int, shared: bool) -> None:
        self.keys = keys("a", "b") if shared else keys("a")
        self.gate = AdmissionGate(most, tokens, self.keys)
        self.open: list[tuple[Ticket, int, list[int]]] = []

    @rule(count=st.integers(1, 3), which=st.integers(0, 1))
    def reserve(self, count: int, which: int) -> None:
        try:
            ticket = self.gate.reserve(count, self.keys[which % len(self.keys)].digest)
        except Overloaded:
            assert self.gate.open_requests or count > self.gate.max_open_requests
        else:
            self.open.append((ticket, count, []))

    @rule(which=st.integers(0, 9), tokens=st.integers(1, 30))
    def enqueue(self, which: int, tokens: int) -> None:
        if self.open:
            ticket, _, queued = self.open[which % len(self.open)]
            try:
                ticket.enqueue(tokens)
            except Overloaded:
                assert self.gate.queued_tokens
            else:
                queued.append(tokens)

    @rule(which=st.integers(0, 9))
    def dequeue(self, which: int) -> None:
        if self.open:
            ticket, _, queued = self.open[which % len(self.open)]
            if queued:
                ticket.dequeue(queued.pop())

    @rule(which=st.integers(0, 9), twice=st.booleans())
    def release(self, which: int, twice: bool) -> None:
        if self.open:
            ticket, _, _ = self.open.pop(which % len(self.open))
            ticket.release()
            if twice:
                ticket.release()
                ticket.dequeue(5)

    @invariant()
    def counts_what_is_out(self) -> None:
        if hasattr(self, "gate"):
            assert self.gate.open_requests == sum(count for _, count, _ in self.open) <= self.gate.max_open_requests
            assert self.gate.queued_tokens == sum(sum(queued) for _, _, queued in self.open)


TestGateStorm = GateStorm.TestCase
