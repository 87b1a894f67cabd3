"""/v1/responses over a scripted engine: what it asks of a chat, what it refuses, how it streams and fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types import responses as sdk

from scheduler.messages import AddRequest, FinishReason
from server.errors import BadRequest
from server.routes.responses import NAMES, chat_fields
from server.routes.translated import chat_request
from server.schemas.responses import UNSUPPORTED, ResponsesRequest
from server.streams import RequestStream
from tests.server.harness import Answer, ScriptedEngine, answers, finish, ids_of, make_app, post
from tests.server.typed_events import typed_events

PATH = "/v1/responses"
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def send(data: dict[str, Any], script: Any = None, **options: Any) -> Answer:
    async def run() -> Answer:
        app, _ = make_app(script or answers("one two"), **options)
        return await post(app, PATH, {"input": "Hello", **data})

    return asyncio.run(run())


def messages_of(items: list[dict[str, Any]], **more: Any) -> Any:
    fields = chat_fields(ResponsesRequest.model_validate({"input": items, **more}))
    chat_request(fields, NAMES)
    return fields["messages"]


def test_whole_answer() -> None:
    answer = send(
        {"metadata": {"k": "v"}, "store": True, "instructions": "Be brief.", "temperature": 0.5, "user": "me"}
    )
    assert answer.status == 200
    response = sdk.Response.model_validate(answer.json)
    assert response.id.startswith("resp_")
    assert response.output_text == "one two"
    assert (response.object, response.metadata, response.instructions) == ("response", {"k": "v"}, "Be brief.")
    assert (answer.json["store"], response.temperature, response.truncation) == (False, 0.5, "disabled")
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    # The scripted engine ends by length.
    assert (response.status, answer.json["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    required = {name for name, field in sdk.Response.model_fields.items() if field.is_required()}
    assert required | {"error", "incomplete_details", "instructions", "metadata", "usage"} <= answer.json.keys()


def test_stream_is_the_same_answer() -> None:
    events = typed_events(send({"stream": True}))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == "one two"
    assert events[-1]["type"] == "response.incomplete"
    assert sdk.Response.model_validate(events[-1]["response"]).output_text == "one two"


def test_failure_on_the_way_is_an_event() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        async def tokens() -> None:
            for token_id in ids_of("one two"):
                stream.push([token_id])
                await asyncio.sleep(0)
            stream.push([], finished=finish(FinishReason.ERROR))

        engine.tasks.append(asyncio.ensure_future(tokens()))

    last = typed_events(send({"stream": True}, script))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_remembered_elsewhere_is_refused(name: str) -> None:
    refused = send({name: {"background": True, "truncation": "auto"}.get(name, "x")})
    assert (refused.status, refused.error["param"], refused.error["code"]) == (400, name, "unsupported_parameter")
    assert send({name: None}).status == 200


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["message.everything"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**FUNCTION, "name": "not a name"}]}, "tools[0].name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"input": "word " * 1000}, "input"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"model": "other"}, "model"),
    ],
    ids=str,
)
def test_errors_name_the_field(data: dict[str, Any], param: str) -> None:
    refused = send(data)
    assert refused.status == (404 if "model" in data else 400)
    assert refused.error["param"] == param
    assert "messages" not in refused.error["message"] or "context length" in refused.error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
def test_a_client_that_leaves_ends_its_request(path: str, stream: bool) -> None:
    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        stream.push(ids_of("one"))

    async def run() -> None:
        app, engine = make_app(script)
        gone = asyncio.Event()
        body = {"input": "Hello"} if path == PATH else {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
        task = asyncio.ensure_future(post(app, path, {**body, "stream": stream}, disconnect=gone))
        await engine.submitted.wait()
        assert engine.requests[0].request_id.startswith(("resp_", "msg_"))
        gone.set()
        await asyncio.wait_for(task, 5)
        assert engine.aborted == [engine.requests[0].request_id]

    asyncio.run(run())


def test_items_become_messages() -> None:
    call = {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "c1",
        "name": "f",
        "arguments": "{}",
        "status": "completed",
    }
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "look", "annotations": []}],
        },
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "message", "role": "developer", "content": "now"},
    ]
    calls = [{"id": id_, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id_ in ("c1", "c2")]
    assert messages_of(items, instructions="I") == [
        {"role": "system", "content": "I"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "look", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "developer", "content": "now"},
    ]


def test_thoughts_without_an_answer_belong_to_no_later_one() -> None:
    thoughts = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert messages_of([thoughts, *turns]) == turns


def test_two_answers_in_a_row_stay_two_messages() -> None:
    items = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert messages_of(items) == items


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    body = ResponsesRequest.model_validate(
        {
            "input": "x",
            "max_output_tokens": 5,
            "top_logprobs": 2,
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
            "tools": [FUNCTION],
            "tool_choice": {"type": "function", "name": "f"},
            "parallel_tool_calls": False,
            "reasoning": {"effort": "low", "summary": "auto"},
        }
    )
    chat = chat_request(chat_fields(body), NAMES)
    assert (chat.max_completion_tokens, chat.logprobs, chat.top_logprobs) == (5, True, 2)
    assert chat.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert chat.tools is not None
    assert (chat.tools[0].function.name, chat.parallel_tool_calls) == ("f", False)
    assert chat.model_dump()["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert chat.reasoning_effort == "low"


def test_a_message_keeps_no_name_of_the_chat() -> None:
    with pytest.raises(BadRequest) as caught:
        chat_request({"messages": "x"}, NAMES)
    assert (caught.value.param, "'input'" in caught.value.message) == ("input", True)
