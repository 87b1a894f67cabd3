"""/v1/messages over a scripted engine: what it asks of a chat, Anthropic's envelope for every error, its streams."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic.types as sdk
import pytest

from scheduler.messages import AddRequest, FinishReason
from server import limits
from server.engine_client import EngineState
from server.routes.messages import NAMES, chat_fields
from server.routes.translated import chat_request
from server.schemas.chat import ChatCompletionRequest
from server.schemas.messages import UNSUPPORTED, MessagesRequest
from server.streams import RequestStream
from tests.server.harness import JSON, Answer, ScriptedEngine, answers, call, finish, ids_of, make_app, post
from tests.server.typed_events import typed_events

PATH = "/v1/messages"
BODY: dict[str, Any] = {"max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
VERSION = (b"anthropic-version", b"2023-06-01")


def send(data: dict[str, Any], script: Any = None, path: str = PATH, **options: Any) -> Answer:
    async def run() -> Answer:
        app, _ = make_app(script or answers("one two"), **options)
        return await post(app, path, {**BODY, **data}, [VERSION])

    return asyncio.run(run())


def chat_of(**data: Any) -> tuple[Any, ChatCompletionRequest]:
    fields = chat_fields(MessagesRequest.model_validate({**BODY, **data}))
    return fields["messages"], chat_request(fields, NAMES)


def error_of(answer: Answer) -> str:
    """The type word; asserts the envelope."""
    body = answer.json
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"].keys()) == ("error", {"type", "message"})
    assert body["request_id"] == answer.headers["x-request-id"] == answer.headers["request-id"]
    word: str = body["error"]["type"]
    return word


def test_whole_answer() -> None:
    answer = send({"metadata": {"user_id": "me"}})
    message = sdk.Message.model_validate(answer.json, strict=True)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.stop_reason, message.stop_sequence) == (
        "message",
        "assistant",
        "max_tokens",  # the scripted engine ends by length
        None,
    )
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "one two"}]
    assert message.usage.input_tokens > 0
    assert (message.usage.cache_read_input_tokens, message.usage.cache_creation_input_tokens) == (0, 0)


def test_stream_is_the_same_answer() -> None:
    events = typed_events(send({"stream": True}))
    names = [event["type"] for event in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event["delta"]["text"] for event in events if "text" in event.get("delta", {})) == "one two"
    assert events[-2]["usage"] == send({}).json["usage"]


def test_stop_sequence() -> None:
    answer = send({"stop_sequences": ["tw"]}).json
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "tw")
    assert answer["content"] == [{"type": "text", "text": "one "}]


def test_failure_on_the_way_is_an_event() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        async def tokens() -> None:
            for token_id in ids_of("one two"):
                stream.push([token_id])
                await asyncio.sleep(0)
            stream.push([], finished=finish(FinishReason.ERROR))

        engine.tasks.append(asyncio.ensure_future(tokens()))

    answer = send({"stream": True}, script)
    last = typed_events(answer)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert last["request_id"] == answer.headers["x-request-id"]


def test_count_tokens_is_what_an_answer_is_charged_for() -> None:
    data = {"system": "Be brief."}
    counted = send(data, path=f"{PATH}/count_tokens")
    assert counted.json == {"input_tokens": send(data).json["usage"]["input_tokens"]}
    assert counted.json["input_tokens"] > send({}, path=f"{PATH}/count_tokens").json["input_tokens"]
    assert error_of(send({"messages": []}, path=f"{PATH}/count_tokens")) == "invalid_request_error"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "user cannot"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": "not a name"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "tool"}}, "'name'"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"messages": [{"role": "user", "content": "word " * 1000}]}, "context length"),
        *(({name: "x"}, name) for name in UNSUPPORTED),
    ],
    ids=str,
)
def test_refusals_name_the_field(data: dict[str, Any], field: str) -> None:
    refused = send(data)
    assert (refused.status, error_of(refused)) == (400, "invalid_request_error")
    assert field in refused.json["error"]["message"]


def test_every_error_has_the_envelope() -> None:
    async def run() -> dict[int, str]:
        app, _ = make_app(answers("ok"))
        locked, _ = make_app(answers("ok"), api_key=("secret",))
        starting, _ = make_app(answers("ok"), EngineState.STARTING)
        large = b" " * int(limits.MAX_BODY_BYTES.maximum + 1)
        refused = [
            await post(app, PATH, b"{"),
            await post(locked, PATH, BODY),
            await post(app, PATH, {**BODY, "model": "claude"}),
            await call(app, "POST", f"{PATH}/other", b"{}", [JSON]),
            await call(app, "GET", PATH),
            await call(app, "POST", PATH, large, [JSON]),
            await call(app, "POST", PATH, b"{}"),
            await post(starting, PATH, BODY),
        ]
        assert (await post(locked, PATH, BODY, [(b"x-api-key", b"secret"), VERSION])).status == 200
        return {answer.status: error_of(answer) for answer in refused}

    assert asyncio.run(run()) == {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        405: "invalid_request_error",
        413: "request_too_large",
        415: "invalid_request_error",
        503: "overloaded_error",
    }


def test_blocks_become_messages() -> None:
    messages, _ = chat_of(
        system=[{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "look"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": "é"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "1"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                    {"type": "text", "text": "go on"},
                ],
            },
        ],
    )
    function = {"name": "f", "arguments": '{"x": "é"}'}
    assert messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": "look",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "go on"},
    ]


def test_a_last_message_of_the_assistant_is_continued() -> None:
    turns = [*BODY["messages"], {"role": "assistant", "content": "Well,"}]
    _, chat = chat_of(messages=turns)
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    assert chat_of()[1].continue_final_message is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tool_choices(choice: dict[str, Any], expected: Any) -> None:
    _, chat = chat_of(tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    assert chat.model_dump()["tool_choice"] == expected
    assert chat.parallel_tool_calls is False


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    _, chat = chat_of(
        top_k=5,
        temperature=0.5,
        stop_sequences=["END"],
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "max", "format": {"type": "json_schema", "schema": schema}},
    )
    assert (chat.max_completion_tokens, chat.top_k, chat.temperature, chat.stops) == (16, 5, 0.5, ["END"])
    assert chat.thinking is not None
    assert (chat.thinking.type, chat.reasoning_effort) == ("enabled", "max")
    assert chat.response_format is not None
    assert chat.response_format["json_schema"]["schema"] == schema
