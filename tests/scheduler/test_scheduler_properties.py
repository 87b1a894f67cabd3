"""Whatever happens, the scheduler's books balance and every request gets its own text (short storm)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.scheduler.storm import SchedulerStorm

SchedulerStorm.TestCase.settings = settings(
    max_examples=1000,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestSchedulerStorm = SchedulerStorm.TestCase
