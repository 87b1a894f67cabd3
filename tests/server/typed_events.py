"""Streams of typed events, as /v1/responses and /v1/messages send them."""

from __future__ import annotations

import json
from typing import Any

from tests.server.harness import Answer


def typed_events(answer: Answer) -> list[Any]:
    """The JSON of each event but comments; asserts the framing, and that the name is the type."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in answer.body
    assert b"[DONE]" not in answer.body
    assert answer.body.endswith(b"\n\n")
    events = []
    for block in answer.body.decode().split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
