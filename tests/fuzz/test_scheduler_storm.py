"""The long storm over the scheduler: other examples every time, longer histories. Minutes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.scheduler.storm import SchedulerStorm


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_storm() -> None:
    run_state_machine_as_test(
        SchedulerStorm,
        settings=settings(
            max_examples=10_000,
            stateful_step_count=80,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
