"""The events of an answer with tools and thoughts, and the same over HTTP as clients expect it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from scheduler.messages import AddRequest, FinishReason, Started
from server.events import ChoiceEvent, Counts
from server.message_parser import MessageParser
from server.message_split import MessageSplitter
from server.streams import RequestStream
from server.tool_syntax import DEEPSEEK_V3
from tests.server.harness import (
    Answer,
    Script,
    ScriptedEngine,
    answers,
    chat,
    finish,
    ids_of,
    make_app,
    post,
    tokenizer,
)

PATH = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>'
NOW = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
CALLS = f"<｜tool▁calls▁begin｜>{CALL}\n{NOW}<｜tool▁calls▁end｜>"


def ends(text: str) -> Script:
    """As `answers`, but the model itself ends the answer."""

    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        for index, token_id in enumerate(ids_of(text)):
            stream.push([token_id], started=Started(0, 0.0, 0.0) if index == 0 else None)
        stream.push([1], finished=finish(FinishReason.STOP, stop_token_id=1))

    return script


def ask(script: Script, **fields: Any) -> tuple[Answer, ScriptedEngine]:
    app, engine = make_app(script)
    return asyncio.run(post(app, PATH, chat(**fields))), engine


def test_a_whole_answer_with_calls_only() -> None:
    answer, _ = ask(ends(CALLS), tools=TOOLS)
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    assert "reasoning_content" not in message
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Rome"}'},
        {"name": "now", "arguments": "{}"},
    ]
    ids = {call["id"] for call in message["tool_calls"]}
    assert len(ids) == 2
    assert all(each.startswith("call_") for each in ids)


def test_streamed_deltas() -> None:
    answer, _ = ask(answers("Well: " + CALLS), tools=TOOLS, stream=True)
    deltas = [event["choices"][0]["delta"] for event in answer.events]
    assert "".join(delta.get("content", "") for delta in deltas) == "Well: "
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    for index, name, arguments in ((0, "weather", '{"city": "Rome"}'), (1, "now", "{}")):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert (first["type"], first["id"][:5]) == ("function", "call_")
        assert first["function"] == {"name": name, "arguments": ""}
        assert all(set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"} for piece in rest)
        assert "".join(piece["function"]["arguments"] for piece in (first, *rest)) == arguments
    assert len([piece for piece in pieces if "id" in piece]) == 2


def test_a_call_that_comes_at_once_is_still_opened_by_a_delta_of_its_own() -> None:
    def at_once(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        stream.push([*ids_of(CALLS)], started=Started(0, 0.0, 0.0))
        stream.push([1], finished=finish(FinishReason.STOP, stop_token_id=1))

    answer, _ = ask(at_once, tools=TOOLS, stream=True)
    deltas = [event["choices"][0]["delta"] for event in answer.events]
    opened, filled = (delta["tool_calls"] for delta in deltas if "tool_calls" in delta)
    assert [call["function"] for call in opened] == [{"name": name, "arguments": ""} for name in ("weather", "now")]
    assert filled == [
        {"index": 0, "function": {"arguments": '{"city": "Rome"}'}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]


def test_the_calls_and_results_of_openai_s_first_spelling() -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    asked = {"role": "user", "content": "?"}
    old = [
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    new = [
        {"role": "assistant", "tool_calls": [{"id": "weather", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "weather", "content": "sunny"},
    ]
    for tools in ([], TOOLS):
        prompts = []
        for messages in (old, new):
            answer, engine = ask(answers("ok"), messages=[asked, *messages], tools=tools)
            assert answer.status == 200
            prompts.append(engine.requests[0].prompt)
        assert prompts[0] == prompts[1]
    answer, _ = ask(answers("ok"), messages=[asked, old[0]], continue_final_message=True)
    assert (answer.status, answer.json["error"]["param"]) == (400, "messages[1].function_call")


def test_an_answer_without_calls_has_none() -> None:
    answer, engine = ask(ends("Hello."), tools=TOOLS, tool_choice="auto")
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "Hello."
    assert "tool_calls" not in choice["message"]
    assert engine.requests[0].grammar is None


def test_tools_that_are_not_to_be_used_are_not_offered() -> None:
    plain, engine = ask(ends(CALLS))
    unused, other = ask(ends(CALLS), tools=TOOLS, tool_choice="none")
    assert engine.prompt() == other.prompt()
    for answer in (plain, unused):
        assert answer.json["choices"][0]["message"]["content"] == CALLS
        assert answer.json["choices"][0]["finish_reason"] == "stop"
    _, offered = ask(ends(""), tools=TOOLS)
    assert tokenizer().token_id("<｜User｜>") in offered.prompt()
    assert len(offered.prompt()) > len(other.prompt())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_are_forced_have_a_grammar(choice: Any) -> None:
    _, engine = ask(ends(CALLS), tools=TOOLS, tool_choice=choice)
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert ("now" in grammar.text) == (choice == "required")


def test_a_call_that_is_cut_is_a_cut() -> None:
    """By its length or by a stop text: what there was of it is sent, and no client takes it for whole."""
    answer, _ = ask(answers(CALLS[:-60]), tools=TOOLS)
    assert answer.json["choices"][0]["finish_reason"] == "length"
    answer, _ = ask(answers(CALLS), tools=TOOLS, stop=["Ro"])
    [choice] = answer.json["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "Ro")
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_rounds_go_into_the_prompt() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    _, engine = ask(ends("Fine."), messages=history)
    text = b"".join(map(tokenizer().token_bytes, engine.prompt())).decode()
    assert text.endswith(
        f"<｜User｜>Hello<｜Assistant｜><｜tool▁calls▁begin｜>{CALL}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS * 2}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "tools[0].function.name"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": {}}}, "chat_template_kwargs.x"),
    ],
)
def test_refused(fields: dict[str, Any], param: str) -> None:
    answer, engine = ask(ends(""), **fields)
    assert answer.status == 400
    assert answer.error["param"].startswith(param)
    assert not engine.requests


def test_thoughts_and_their_tokens() -> None:
    syntax = replace(DEEPSEEK_V3, marks={"<think>": 7, "</think>": 8})
    splitter = MessageSplitter(lambda: MessageParser(syntax, reasoning=True, tools=["now"]), 8)

    def event(text: str, *ids: int, index: int = 0, **more: Any) -> ChoiceEvent:
        return splitter.split(ChoiceEvent(index, Counts(completion_tokens=9), content=text, token_ids=ids, **more))

    first = event("Hm.", 20, 21)
    assert (first.content, first.reasoning, first.counts.reasoning_tokens) == ("", "Hm.", 2)
    second = event(" So</think>\n\nYes", 22, 8, 23, 24)
    assert (second.content, second.reasoning, second.counts.reasoning_tokens) == ("Yes", " So", 4)
    # Another choice is another message.
    assert event("Oh", 30, index=1).reasoning == "Oh"
    last = event(" sir", 25, finish_reason="stop")
    assert (last.content, last.counts, last.finish_reason) == (" sir", Counts(0, 0, 9, 4), "stop")
    assert json.dumps(last.token_ids) == "[25]"
