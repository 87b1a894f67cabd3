"""Every row of the table: the bound passes, the bound plus one is refused with the field's name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from server import limits
from server.limits import LIMITS, Limit
from tests.server.harness import JSON, Answer, answers, call, chat, make_app, tokenizer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def request_for(limit: Limit, value: int | float) -> tuple[str, bytes, list[tuple[bytes, bytes]]]:
    """A request that has exactly `value` of what the row bounds."""
    integer = int(value)
    message = {"role": "user", "content": "x"}
    body: dict[str, Any] = {"prompt": "x"}
    path = COMPLETIONS
    headers = [JSON]
    match limit.name:
        case "body":
            text = json.dumps(body).encode()
            return path, text + b" " * (integer - len(text)), headers
        case "json_depth":
            return path, b'{"prompt": "x", "unknown": ' + b"[" * integer + b"]" * integer + b"}", headers
        case "json_objects":
            # Each with a text that looks like one more.
            return (
                path,
                b'{"prompt": "x", "user": "[", "unknown": [%b]}' % b",".join([b'["{"]'] * (integer - 2)),
                headers,
            )
        case "free_form":
            function = {"name": "f", "description": ""}
            tools = [{"type": "function", "function": function}]
            function["description"] = "d" * (integer - len(json.dumps(tools)))
            path, body = CHAT, chat(tools=tools)
        case "messages":
            path, body = CHAT, {"messages": [message] * integer}
        case "content_parts":
            path, body = CHAT, {"messages": [{**message, "content": [{"type": "text", "text": "x"}] * integer}]}
        case "name":
            path, body = CHAT, chat()
            body["messages"][0]["name"] = "n" * integer
        case "model":
            body["model"] = "m" * integer
        case "prompt_ids":
            body["prompt"] = [5] * integer
        case "stop":
            body["stop"] = ["zq"] * integer
        case "stop_length":
            body["stop"] = "é" * (integer // 2) + "e" * (integer % 2)
        case "stop_token_ids":
            body["stop_token_ids"] = [2] * integer
        case "token_id":
            body["stop_token_ids"] = [integer]
        case "cache_salt":
            body["cache_salt"] = "s" * integer
        case "max_tokens" | "min_tokens" | "request_id":
            body[limit.name] = integer
            if limit.name == "min_tokens":
                body["max_tokens"] = min(max(integer, 1), int(limits.MAX_TOKENS.maximum))
        case "max_completion_tokens":
            path, body = CHAT, chat(max_tokens=integer)
        case "prompts":
            body["prompt"] = ["x"] * integer
        case "sequences":
            body |= {"prompt": ["x"] * (integer // 2 + integer % 2), "n": 2} if integer > 1 else {"n": integer}
        case "top_logprobs":
            path, body = CHAT, chat(logprobs=True, top_logprobs=integer)
        case "logit_bias":
            body["logit_bias"] = {str(index): 1 for index in range(integer)}
        case "logit_bias_value":
            body["logit_bias"] = {"5": value}
        case "allowed_token_ids" | "stop_token_ids":
            body[limit.name] = [2] * integer
        case "bad_words":
            body["bad_words"] = ["zq"] * integer
        case "bad_word_length":
            body["bad_words"] = ["z" * integer]
        case "tools":
            path, body = CHAT, chat(tools=[tool(f"f{index}") for index in range(integer)], tool_choice="none")
        case "function_name":
            path, body = CHAT, chat(tools=[tool("f" * integer)], tool_choice="none")
        case "tool_calls":
            call_of_f = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            path, body = CHAT, chat()
            body["messages"].append({"role": "assistant", "content": None, "tool_calls": [call_of_f] * integer})
        case "chat_template_kwargs":
            path, body = CHAT, chat(chat_template_kwargs={f"x{index}": 1 for index in range(integer)})
        case name:
            is_integer = isinstance(limit.maximum, int)
            body[name] = integer if is_integer else value
    return path, json.dumps(body).encode(), headers


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def send(limit: Limit, value: int | float) -> Answer:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"), served_model_name=("m" * 256, "x"))
        path, body, headers = request_for(limit, value)
        return await call(app, "POST", path, body, headers)

    return asyncio.run(run())


def above(limit: Limit) -> float:
    return limit.maximum + (1 if isinstance(limit.maximum, int) else 0.01)


def below(limit: Limit) -> float:
    assert limit.minimum is not None
    return limit.minimum - (1 if isinstance(limit.minimum, int) else 0.01)


ELSEWHERE = {
    *("request_id", "headers", "header_count", "unbroken_text", "queued_bodies"),
    *("schema_bytes", "schema_depth", "schema_properties", "enum_values", "repeats", "regex_bytes"),
    *("grammar_bytes", "choices"),
}
"""A longer request id is replaced, not refused: test_middleware. Headers: test_http_protocol. Unbroken text:
test_text_slices. Bodies together: test_overload. Schemas and grammars: test_grammar_refusals."""
ROWS = [limit for limit in LIMITS if limit.name not in ELSEWHERE]
STATUS = {"body": 413}
PARAM: dict[str, Callable[[str], bool]] = {
    "free_form": lambda param: param == "tools",
    "content_parts": lambda param: param == "messages[0].content",
    "name": lambda param: param == "messages[0].name",
    "prompt_ids": lambda param: param == "prompt",
    "stop_length": lambda param: param == "stop",
    "token_id": lambda param: param == "stop_token_ids[0]",
    "max_completion_tokens": lambda param: param == "max_tokens",
    "prompts": lambda param: param == "prompt",
    "sequences": lambda param: param == "n",
    "logit_bias_value": lambda param: param == "logit_bias.5",
    "bad_word_length": lambda param: param == "bad_words[0]",
    "function_name": lambda param: param == "tools[0].function.name",
    "tool_calls": lambda param: param == "messages[1].tool_calls",
}


def by_name(limit: Limit) -> str:
    return limit.name


@pytest.mark.parametrize("limit", ROWS, ids=by_name)
def test_maximum(limit: Limit) -> None:
    refused = send(limit, above(limit))
    assert refused.status == STATUS.get(limit.name, 400)
    if refused.status == 400 and limit.name not in ("json_depth", "json_objects"):
        assert PARAM.get(limit.name, lambda param: param == limit.name)(refused.error["param"])
    passed = send(limit, limit.maximum)
    if limit.name in ("token_id", "prompt_ids", "messages", "content_parts", "tool_calls", "free_form"):
        # In the table's range, and then too much for this model.
        error = passed.error
        assert error["code"] == "context_length_exceeded" or "vocabulary" in error["message"]
    else:
        assert passed.status == 200, passed.body


@pytest.mark.parametrize("limit", [limit for limit in ROWS if limit.minimum is not None], ids=by_name)
def test_minimum(limit: Limit) -> None:
    assert send(limit, below(limit)).status == 400
    assert limit.minimum is not None
    # A deadline of a millisecond is in the range, and then perhaps too short.
    assert send(limit, limit.minimum).status in ((200, 408) if limit.name == "timeout" else (200,))


def test_chunked_body_is_bounded_without_a_length() -> None:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"))
        part = b" " * (limits.MAX_BODY_BYTES.maximum // 4)
        return await call(app, "POST", COMPLETIONS, [part] * 4 + [b" "], [JSON])

    answer = asyncio.run(run())
    assert (answer.status, answer.headers["connection"]) == (413, "close")


def test_token_ids_are_below_the_vocabulary() -> None:
    async def run(path: str, body: dict[str, Any]) -> Answer:
        app, _ = make_app(answers("ok"))
        return await call(app, "POST", path, json.dumps(body).encode(), [JSON])

    size = tokenizer().vocab_size
    assert asyncio.run(run(COMPLETIONS, {"prompt": [size - 1]})).status == 200
    for path, body, param in (
        (COMPLETIONS, {"prompt": [5, size]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[5], [5, size]]}, "prompt[1][1]"),
        (COMPLETIONS, {"prompt": [[size]]}, "prompt[0][0]"),
        ("/detokenize", {"tokens": [5, size]}, "tokens[1]"),
    ):
        refused = asyncio.run(run(path, body))
        assert (refused.status, refused.error["param"]) == (400, param)
