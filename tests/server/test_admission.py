from __future__ import annotations

import pytest

from scheduler.messages import EngineStats
from server.admission import MAX_RETRY_AFTER, AdmissionGate
from server.errors import Overloaded


def test_bound_and_release() -> None:
    gate = AdmissionGate(2)
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
    gate = AdmissionGate(1)
    with pytest.raises(ZeroDivisionError), gate.reserve():
        raise ZeroDivisionError
    assert gate.open_requests == 0


def test_retry_after_is_one_second_while_nothing_is_known() -> None:
    gate = AdmissionGate(1)
    with gate.reserve(), pytest.raises(Overloaded) as caught:
        gate.reserve()
    assert caught.value.retry_after == 1
    assert caught.value.code == "server_overloaded"


def test_retry_after_from_the_measured_prefill_rate() -> None:
    gate = AdmissionGate(1)
    for step in range(1, 6):  # 500 tokens in half a second: 1,000 a second
        gate.observe(EngineStats(num_steps=step, prompt_tokens=500 * step, step_seconds=0.5, waiting_tokens=12_300))
    assert gate.retry_after() == 13
    gate.observe(EngineStats(num_steps=6, prompt_tokens=2500, step_seconds=9.0, waiting_tokens=12_300))
    assert gate.retry_after() == 13  # a step that only decodes says nothing about prefill
    gate.observe(EngineStats(num_steps=7, prompt_tokens=2500, waiting_tokens=10_000_000))
    assert gate.retry_after() == MAX_RETRY_AFTER


def test_retry_after_from_how_fast_places_become_free() -> None:
    now = 0.0
    gate = AdmissionGate(1, clock=lambda: now)
    for _ in range(10):
        ticket = gate.reserve()
        now += 7.5
        ticket.release()
    assert gate.retry_after() == 8


def test_an_idle_hour_is_no_rate() -> None:
    now = 0.0
    gate = AdmissionGate(2, clock=lambda: now)
    for _ in range(3):
        with gate.reserve():
            now += 3600.0
    assert gate.retry_after() == 1
