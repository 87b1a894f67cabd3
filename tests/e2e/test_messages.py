"""Anthropic's SDK against the real process: whole, streamed, accumulated, tools, counts, errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.daemon import Daemon

MESSAGES: Any = [{"role": "user", "content": "Tell me of the sea."}]
GREEDY: Any = {"model": "builtin", "max_tokens": 24, "messages": MESSAGES, "extra_body": {"temperature": 0}}
TOOL: Any = {
    "name": "look_up",
    "description": "Finds a number.",
    "input_schema": {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["count"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=daemon.url, api_key="unused", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_the_answer_is_that_of_the_chat(client: anthropic.Anthropic, daemon: Daemon) -> None:
    message = client.messages.create(system="Be brief.", **GREEDY)
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused") as other:
        messages: Any = [{"role": "system", "content": "Be brief."}, *MESSAGES]
        chat = other.chat.completions.create(model="builtin", temperature=0, max_tokens=24, messages=messages)
    assert text_of(message) == chat.choices[0].message.content
    assert chat.usage is not None
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens


def test_stream(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**GREEDY)
    with client.messages.stream(**GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_stop_sequence(client: anthropic.Anthropic) -> None:
    whole = text_of(client.messages.create(**GREEDY))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    message = client.messages.create(stop_sequences=[stop], **GREEDY)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == whole[: whole.index(stop)]


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic) -> None:
    whole = text_of(client.messages.create(**GREEDY))
    begun = whole[: len(whole) // 2].rstrip()
    continued = client.messages.create(**{**GREEDY, "messages": [*MESSAGES, {"role": "assistant", "content": begun}]})
    assert not text_of(continued).startswith(begun)


def test_tool_use(client: anthropic.Anthropic) -> None:
    asked: Any = {**GREEDY, "max_tokens": 200, "tools": [{**TOOL, "strict": True}]}
    asked["tool_choice"] = {"type": "tool", "name": "look_up", "disable_parallel_tool_use": True}
    message: Any = client.messages.create(**asked)
    [use] = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, use.name) == ("tool_use", "look_up")
    assert use.input["count"] in range(1, 10)
    with client.messages.stream(**asked) as stream:
        final: Any = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [use.input]
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "7"}
    turns = [*MESSAGES, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**{**GREEDY, "messages": turns, "tools": [TOOL]}).role == "assistant"


def test_count_tokens(client: anthropic.Anthropic) -> None:
    usage = client.messages.create(**GREEDY).usage
    counted = client.messages.count_tokens(model="builtin", messages=MESSAGES).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_have_their_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**GREEDY, "model": "claude"})
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**{**GREEDY, "extra_body": {"temperature": 2}})
    image: Any = {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]"):
        client.messages.create(**{**GREEDY, "messages": [{"role": "user", "content": [image]}]})


def test_key(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--api-key", "secret", "--served-model-name", "builtin")
    try:
        with anthropic.Anthropic(base_url=daemon.url, api_key="secret", max_retries=0) as client:
            assert client.messages.create(**GREEDY).role == "assistant"
        with (
            anthropic.Anthropic(base_url=daemon.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(**GREEDY)
    finally:
        daemon.stop()
