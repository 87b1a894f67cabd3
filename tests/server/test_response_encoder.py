"""The items and events of /v1/responses from hand-made pieces, checked with the official SDK's own types."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from openai.types import responses as sdk
from pydantic import TypeAdapter

from server.errors import InternalError
from server.events import ChoiceEvent, Counts, TokenLogprob, ToolCallDelta
from server.logprobs import chat_logprobs
from server.response_encoder import ResponseEncoder
from server.schemas.response_events import ReasoningConfig, ResponseObject, TextConfig

COUNTS = Counts(prompt_tokens=7, cached_tokens=3, completion_tokens=5, reasoning_tokens=2)
EVENT: TypeAdapter[Any] = TypeAdapter(sdk.ResponseStreamEvent)
EURO = "€".encode()


def piece(**fields: Any) -> ChoiceEvent:
    return ChoiceEvent(index=0, counts=COUNTS, **fields)


def encoder() -> ResponseEncoder:
    shell = ResponseObject(
        id="resp_1",
        created_at=1,
        instructions=None,
        max_output_tokens=None,
        max_tool_calls=None,
        metadata={"a": "b"},
        model="m",
        parallel_tool_calls=True,
        reasoning=ReasoningConfig(effort=None),
        temperature=None,
        text=TextConfig(format={"type": "text"}),
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=None,
    )
    # Token n is byte n of the euro sign.
    tokenizer: Any = SimpleNamespace(token_bytes=lambda token_id: EURO[token_id : token_id + 1])
    return ResponseEncoder(shell, lambda entries: chat_logprobs(tokenizer, entries).content)


def encode(*pieces: ChoiceEvent) -> tuple[list[Any], dict[str, Any]]:
    """All events and the answer, as JSON; asserts what is true of every stream."""
    encoding = encoder()
    events = [msgspec.to_builtins(event) for each in pieces for event in encoding.push(each)]
    answer = msgspec.to_builtins(encoding.result)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]
    sdk.Response.model_validate(answer, strict=True)
    assert events[-1]["response"] == answer
    assert events[0]["response"]["output"] == []
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == answer["output"]
    assert len({item["id"] for item in done}) == len(done)
    return events, answer


def types(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_text() -> None:
    events, answer = encode(piece(content="Hel"), piece(content="lo"), piece(finish_reason="stop"))
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo"]
    assert all(event["logprobs"] == [] for event in events if "delta" in event)
    assert (answer["status"], answer["incomplete_details"], answer["error"]) == ("completed", None, None)
    assert answer["output"][0]["content"] == [
        {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    ]
    assert answer["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }
    assert answer["metadata"] == {"a": "b"}
    assert answer["store"] is False


def test_reasoning_then_text_then_two_calls() -> None:
    events, answer = encode(
        piece(reasoning="thi"),
        piece(reasoning="nk", content="I'll look."),
        piece(tool_calls=(ToolCallDelta(0, "call_a", "f"), ToolCallDelta(0, arguments='{"x"'))),
        piece(tool_calls=(ToolCallDelta(0, arguments=":1}"), ToolCallDelta(1, "call_b", "g", "{}"))),
        piece(finish_reason="tool_calls"),
    )
    thoughts, message, first, second = answer["output"]
    assert (thoughts["type"], thoughts["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "think"}])
    assert (message["type"], message["content"][0]["text"]) == ("message", "I'll look.")
    assert [(call["call_id"], call["name"], call["arguments"]) for call in (first, second)] == [
        ("call_a", "f", '{"x":1}'),
        ("call_b", "g", "{}"),
    ]
    assert {item["status"] for item in answer["output"]} == {"completed"}
    for item, name in zip(answer["output"], ("reasoning_text", "output_text", "arguments", "arguments"), strict=True):
        own = [event for event in events if event.get("item_id") == item["id"]]
        assert {event["output_index"] for event in own} == {answer["output"].index(item)}
        deltas = "".join(event["delta"] for event in own if event["type"].endswith("delta"))
        [done] = [event for event in own if event["type"].endswith(f"{name}.done")]
        assert deltas == done.get("text", done.get("arguments"))
    assert answer["status"] == "completed"


def test_length_leaves_the_last_item_incomplete() -> None:
    events, answer = encode(piece(reasoning="hm", content="and so"), piece(finish_reason="length"))
    assert (events[-1]["type"], answer["status"]) == ("response.incomplete", "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]


def test_an_empty_answer_is_an_empty_text() -> None:
    _, answer = encode(piece(finish_reason="stop"))
    assert sdk.Response.model_validate(answer).output_text == ""
    assert len(answer["output"]) == 1


def test_logprobs_have_true_bytes_and_stay_with_the_text() -> None:
    def token(index: int) -> TokenLogprob:
        return TokenLogprob(index, -0.5, ((index, -0.5), (0, float("-inf"))))

    events, answer = encode(
        piece(reasoning="r", logprobs=(token(0),)),
        piece(logprobs=(token(0),)),
        piece(logprobs=(token(1),)),
        piece(content="€", logprobs=(token(2),)),
        piece(finish_reason="stop", logprobs=(token(0),)),
    )
    text = answer["output"][1]["content"][0]
    assert [entry["bytes"] for entry in text["logprobs"]] == [[EURO[0]], [EURO[1]], [EURO[2]], [EURO[0]]]
    assert text["logprobs"][0]["top_logprobs"][1]["logprob"] == -9999.0
    assert text["logprobs"][0]["token"] == "\N{REPLACEMENT CHARACTER}"
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in deltas] == [3, 1]
    assert [entry for event in deltas for entry in event["logprobs"]] == text["logprobs"]


@pytest.mark.parametrize("begun", [False, True])
def test_failure_ends_the_stream(begun: bool) -> None:
    encoding = encoder()
    if begun:
        encoding.push(piece(content="Hel"))
    *_, last = [msgspec.to_builtins(event) for event in encoding.fail(InternalError("It broke."))]
    EVENT.validate_python(last)
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "It broke."}
    assert [item["status"] for item in last["response"]["output"]] == ["incomplete"] * begun


def test_silence_starts_the_stream_and_sends_no_more() -> None:
    encoding = encoder()
    assert types([msgspec.to_builtins(event) for event in encoding.push(piece())]) == ["created", "in_progress"]
    assert encoding.push(piece()) == []
