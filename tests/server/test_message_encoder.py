"""The blocks and events of /v1/messages from hand-made pieces, checked with the official SDK's own types."""

from __future__ import annotations

from typing import Any

import anthropic.types as sdk
import msgspec
import pytest
from pydantic import TypeAdapter

from server.errors import InternalError
from server.events import ChoiceEvent, Counts, ToolCallDelta
from server.message_encoder import MessageEncoder

COUNTS = Counts(prompt_tokens=7, cached_tokens=3, completion_tokens=5)
EVENT: TypeAdapter[Any] = TypeAdapter(sdk.RawMessageStreamEvent)


def piece(**fields: Any) -> ChoiceEvent:
    return ChoiceEvent(index=0, counts=COUNTS, **fields)


def encode(*pieces: ChoiceEvent) -> tuple[list[Any], dict[str, Any]]:
    """All events but pings, and the answer, as JSON; asserts what is true of every stream."""
    encoding = MessageEncoder("msg_1", "m", "id")
    events = [msgspec.to_builtins(event) for each in pieces for event in encoding.push(each)]
    answer = msgspec.to_builtins(encoding.result)
    events = [event for event in events if event["type"] != "ping"]
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]
    sdk.Message.model_validate(answer, strict=True)
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[0]["message"] | {"content": answer["content"], "stop_reason": answer["stop_reason"]} == answer | {
        "stop_sequence": None
    }
    for index in range(len(answer["content"])):
        own = [event["type"] for event in events if event.get("index") == index]
        assert (own[0], own[-1]) == ("content_block_start", "content_block_stop")
        assert set(own[1:-1]) <= {"content_block_delta"}
    assert events[-2]["delta"] == {name: answer[name] for name in ("stop_reason", "stop_sequence")}
    assert events[-2]["usage"] == answer["usage"]
    return events, answer


def deltas(events: list[Any], kind: str) -> list[str]:
    return [event["delta"][kind] for event in events if kind in event.get("delta", {})]


def test_text() -> None:
    events, answer = encode(piece(content="Hel"), piece(content="lo"), piece(finish_reason="stop"))
    assert answer["content"] == [{"type": "text", "text": "Hello"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 5,
    }
    assert deltas(events, "text") == ["Hel", "lo"]


def test_thinking_text_and_tools() -> None:
    events, answer = encode(
        piece(reasoning="thi"),
        piece(reasoning="nk", content="I'll look."),
        piece(tool_calls=(ToolCallDelta(0, "call_a", "f"), ToolCallDelta(0, arguments='{"x"'))),
        piece(tool_calls=(ToolCallDelta(0, arguments=":1}"), ToolCallDelta(1, "call_b", "g"))),
        piece(finish_reason="tool_calls"),
    )
    assert answer["content"] == [
        {"type": "thinking", "thinking": "think", "signature": ""},
        {"type": "text", "text": "I'll look."},
        {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "call_b", "name": "g", "input": {}},
    ]
    assert answer["stop_reason"] == "tool_use"
    assert deltas(events, "thinking") == ["thi", "nk"]
    assert deltas(events, "partial_json") == ['{"x"', ":1}"]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block.get("input", {}) for block in starts] == [{}] * 4


@pytest.mark.parametrize(
    ("ending", "reason", "sequence"),
    [
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"finish_reason": "stop", "stop_reason": "END"}, "stop_sequence", "END"),
        ({"finish_reason": "stop", "stop_reason": 17}, "end_turn", None),
    ],
)
def test_reasons(ending: dict[str, Any], reason: str, sequence: str | None) -> None:
    _, answer = encode(piece(content="x"), piece(**ending))
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_a_forced_call_is_a_tool_use() -> None:
    _, answer = encode(piece(tool_calls=(ToolCallDelta(0, "call_a", "f", "{}"),)), piece(finish_reason="stop"))
    assert answer["stop_reason"] == "tool_use"


def test_arguments_that_were_cut_are_not_lost() -> None:
    _, answer = encode(piece(tool_calls=(ToolCallDelta(0, "call_a", "f", '{"x": "ab'),)), piece(finish_reason="length"))
    assert answer["content"][0]["input"] == {"INVALID_JSON": '{"x": "ab'}


def test_silence_pings() -> None:
    encoding = MessageEncoder("msg_1", "m", "id")
    silent = ChoiceEvent(index=0, counts=Counts(prompt_tokens=9))
    names = [[event.__struct_config__.tag for event in encoding.push(silent)] for _ in range(3)]
    assert names == [["message_start", "ping"], ["ping"], ["ping"]]


def test_failure() -> None:
    encoding = MessageEncoder("msg_1", "m", "id-1")
    encoding.push(piece(content="Hel"))
    [event] = encoding.fail(InternalError("It broke."))
    assert msgspec.to_builtins(event) == {
        "type": "error",
        "error": {"type": "api_error", "message": "It broke."},
        "request_id": "id-1",
    }
