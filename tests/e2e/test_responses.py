"""The official SDK's Responses API against the real process: whole, streamed, accumulated, parsed, refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.daemon import Daemon

QUESTION = "Tell me of the sea."
GREEDY: Any = {"model": "builtin", "temperature": 0, "max_output_tokens": 24}
FUNCTION: Any = {
    "type": "function",
    "name": "look_up",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["count"],
        "additionalProperties": False,
    },
}


class Wave(BaseModel):
    high: bool
    metres: int = Field(ge=0, le=99)
    """Bounded: a model that has begun with digits may go on with them."""


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_the_answer_is_that_of_the_chat(client: openai.OpenAI) -> None:
    response = client.responses.create(input=QUESTION, instructions="Be brief.", metadata={"k": "v"}, **GREEDY)
    chat = client.chat.completions.create(
        model="builtin",
        temperature=0,
        max_tokens=24,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.metadata == {"k": "v"}
    assert response.usage is not None
    assert chat.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )


def test_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **GREEDY)
    with client.responses.create(input=QUESTION, stream=True, **GREEDY) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text


def test_accumulating_helper(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **GREEDY)
    with client.responses.stream(input=QUESTION, **GREEDY) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


def test_the_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, **GREEDY)
    again: Any = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in first.output)]
    second = client.responses.create(input=[*again, {"role": "user", "content": "And then?"}], **GREEDY)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_logprobs(client: openai.OpenAI) -> None:
    response: Any = client.responses.create(
        input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2, **GREEDY
    )
    [part] = response.output[0].content
    data = b"".join(bytes(entry.bytes) for entry in part.logprobs)
    assert part.text.strip() in data.decode(errors="replace")
    for entry in part.logprobs:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs), abs=1e-4)


def test_parse(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        input="How high is the wave?", text_format=Wave, model="builtin", temperature=1, max_output_tokens=200
    )
    assert isinstance(response.output_parsed, Wave)


def test_required_function(client: openai.OpenAI) -> None:
    asked: Any = {"input": "Look it up.", "tools": [FUNCTION], "tool_choice": "required", "model": "builtin"}
    asked |= {"max_output_tokens": 200, "temperature": 0}
    response: Any = client.responses.create(parallel_tool_calls=False, **asked)
    [call] = [item for item in response.output if item.type == "function_call"]
    assert call.name == "look_up"
    with client.responses.create(parallel_tool_calls=False, stream=True, **asked) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert deltas == call.arguments
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    conversation: Any = [{"role": "user", "content": "Look it up."}, call.to_dict(), output]
    assert client.responses.create(input=conversation, tools=[FUNCTION], **GREEDY).status in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
)
def test_refusals(client: openai.OpenAI, data: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input=QUESTION, **GREEDY, **data)
    assert caught.value.param == param
