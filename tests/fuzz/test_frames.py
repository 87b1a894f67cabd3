"""A glimpse of `tests.fuzz.frames`, whose own command does the million."""

from __future__ import annotations

from tests.fuzz.frames import fuzz


def test_some_frames() -> None:
    counts = fuzz(4000, seed=7)
    assert counts["messages to the engine"] > 500
    assert counts["closed by the engine"] > 500
    assert counts["closed by the front-end"] > 500
