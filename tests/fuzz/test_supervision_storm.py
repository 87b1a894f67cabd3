"""The long storm over supervision: engines die, stall and are aborted at in any order. Minutes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.server.supervision_storm import SupervisionStorm


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_storm() -> None:
    run_state_machine_as_test(
        SupervisionStorm,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
