"""Tools through the official SDK against the real process: the model never saw these, calls are the grammar's work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.daemon import Daemon

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 7}, "maxItems": 3},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
ALARM: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "set_alarm": ALARM}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "A test.", "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
ASK: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
OPTIONS: Any = {"model": "builtin", "temperature": 1.0, "max_tokens": 400}


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_are_valid(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, **OPTIONS
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_a_named_function_streamed(client: openai.OpenAI, name: str) -> None:
    """The SDK's accumulator puts the deltas together; what it makes is the whole answer of the same seed."""
    fields: Any = {"messages": ASK, "tools": TOOLS, "tool_choice": named(name), "parallel_tool_calls": False, "seed": 7}
    whole = client.chat.completions.create(**fields, **OPTIONS).choices[0].message.tool_calls
    with client.chat.completions.stream(**fields, **OPTIONS) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert whole is not None
    [call] = final.message.tool_calls
    assert call.function.name == name
    assert call.function.parsed_arguments == json.loads(call.function.arguments)
    assert call.function.arguments == whole[0].function.arguments
    check(name, call.function.arguments)


def test_two_rounds(client: openai.OpenAI) -> None:
    messages: Any = list(ASK)
    for round_number in range(2):
        answer = client.chat.completions.create(
            messages=messages, tools=TOOLS, tool_choice=named("set_alarm"), seed=round_number, **OPTIONS
        )
        message = answer.choices[0].message
        assert message.tool_calls
        messages.append(message.model_dump(exclude_none=True))
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls]
    before = answer.usage
    last = client.chat.completions.create(messages=messages, tools=TOOLS, **OPTIONS)
    assert last.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert last.usage is not None
    assert before is not None
    assert last.usage.prompt_tokens > before.prompt_tokens


def test_strict_functions_are_free_to_be_left_alone(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=ASK, tools=TOOLS, seed=1, **OPTIONS)
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_several_choices_have_calls_of_their_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=ASK, tools=TOOLS, tool_choice=named("weather"), parallel_tool_calls=False, n=3, seed=3, **OPTIONS
    )
    calls = [choice.message.tool_calls or [] for choice in answer.choices]
    assert [len(each) for each in calls] == [1, 1, 1]
    assert len({each[0].id for each in calls}) == 3
    for [call] in calls:
        check("weather", call.function.arguments)


def test_refusals_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice=named("gone"), **OPTIONS)
    assert refused.value.param == "tool_choice"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=ASK, tools=[{**TOOLS[0], "type": "web_search"}], **OPTIONS)
    assert (refused.value.param or "").startswith("tools[0]")
