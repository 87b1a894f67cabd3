"""Thoughts, content and calls come out the same however the text is cut, and no character is lost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.message_parser import MessageParser, Piece
from server.tool_syntax import DEEPSEEK_V3, DEEPSEEK_V31, JSON_CALLS, KIMI_K2, THINK_BEGIN, THINK_END, ToolSyntax

SYNTAXES = [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, JSON_CALLS]
Parts = tuple[str, str, list[tuple[str, str]]]
"""Content, reasoning, and name and arguments of each call."""


def thinking(syntax: ToolSyntax) -> ToolSyntax:
    return replace(syntax, marks={THINK_BEGIN: 1, THINK_END: 2})


def join(pieces: list[Piece]) -> Parts:
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        assert bool(piece.content) + bool(piece.reasoning) + (piece.tool_call is not None) == 1
        if (delta := piece.tool_call) is None:
            continue
        if delta.name is not None:
            assert delta.call_id
            assert delta.index == len(calls)
            assert not delta.arguments
            calls.append((delta.name, ""))
        else:
            assert delta.call_id is None
            assert delta.index == len(calls) - 1
            assert delta.arguments
            calls[-1] = calls[-1][0], calls[-1][1] + delta.arguments
    return "".join(p.content for p in pieces), "".join(p.reasoning for p in pieces), calls


def parse(
    syntax: ToolSyntax | None, chunks: list[str], *, reasoning: bool = False, tools: tuple[str, ...] = ("f", "g")
) -> Parts:
    parser = MessageParser(syntax, reasoning=reasoning, tools=tools)
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)]
    return join(pieces + parser.finish())


def write(syntax: ToolSyntax, *calls: tuple[str, str]) -> str:
    texts = [
        f"{syntax.before_name}{name}{f':{index}' if syntax.numbered else ''}{syntax.after_name}{arguments}"
        f"{syntax.after_arguments}"
        for index, (name, arguments) in enumerate(calls)
    ]
    return syntax.begin + syntax.separator.join(texts) + syntax.end


CALLS = [("f", '{"a": "}<｜tool▁call▁end｜>\\"{", "b": [1, {"c": null}]}'), ("g", "{}"), ("f", '{"é🙂": -1.5e3}')]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_calls_in_pieces_of_any_size(syntax: ToolSyntax, size: int) -> None:
    text = write(syntax, *CALLS)
    assert parse(syntax, [text[at : at + size] for at in range(0, len(text), size)]) == ("", "", CALLS)


@pytest.mark.parametrize("syntax", [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2], ids=lambda syntax: syntax.name)
def test_text_around_calls_is_content(syntax: ToolSyntax) -> None:
    text = "Let me see.\n" + write(syntax, *CALLS[:2]) + " Done."
    assert parse(syntax, list(text)) == ("Let me see.\n Done.", "", CALLS[:2])


def test_the_form_models_write_by_hand() -> None:
    first = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\n  "a": 1\n}\n```<｜tool▁call▁end｜>'
    second = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>"
    text = f"<｜tool▁calls▁begin｜>{first}\n{second}<｜tool▁calls▁end｜>"
    assert parse(DEEPSEEK_V3, [text]) == ("", "", [("f", '{\n  "a": 1\n}'), ("g", "{}")])
    text = '\n{ "name" : "f",\n"arguments":{"a": 1} }\n\n{"name": "g", "arguments": {}}\n'
    assert parse(JSON_CALLS, list(text)) == ("", "", [("f", '{"a": 1}'), ("g", "{}")])


def test_kimis_calls_keep_the_models_ids() -> None:
    parser = MessageParser(KIMI_K2, tools=["f"])
    [first, _] = parser.push(write(KIMI_K2, ("f", "{}")))
    assert first.tool_call is not None
    assert first.tool_call.call_id == "functions.f:0"
    parser = MessageParser(DEEPSEEK_V3, tools=["f"], new_id=iter(["call_7"]).__next__)
    assert parser.push(write(DEEPSEEK_V3, ("f", "{}")))[0].tool_call is not None
    assert (
        MessageParser(DEEPSEEK_V3, tools=["f"])
        .push(write(DEEPSEEK_V3, ("f", "{}")))[0]
        .tool_call.call_id.startswith("call_")
    )


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (DEEPSEEK_V3, "<｜tool▁calls▁begin｜>nonsense"),
        (DEEPSEEK_V3, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\nnot JSON"),
        (DEEPSEEK_V3, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"),
        (DEEPSEEK_V3, "a <｜tool▁cal"),
        (DEEPSEEK_V31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>bad name<｜tool▁sep｜>{}"),
        (KIMI_K2, "<|tool_calls_section_begin|><|tool_call_begin|>functions.f<|tool_call_argument_begin|>{}"),
        (JSON_CALLS, '{"name": "unknown", "arguments": {}}'),
        (JSON_CALLS, '{"name": "f", "arguments": 3}'),
        (JSON_CALLS, '{"answer": 42}'),
        (JSON_CALLS, 'Sure: {"name": "f", "arguments": {}}'),
        (JSON_CALLS, '{"name": "f'),
        (JSON_CALLS, '{"name"' + " " * 2000 + ': "f", "arguments": {}}'),
    ],
)
def test_what_is_no_call_is_content(syntax: ToolSyntax, text: str) -> None:
    assert parse(syntax, list(text)) == (text, "", [])
    assert parse(syntax, [text]) == (text, "", [])


def test_an_answer_cut_inside_a_call_keeps_what_there_is() -> None:
    whole = write(DEEPSEEK_V3, ("f", '{"a": "x"}'))
    begin = whole.index('{"a"')
    for end in range(begin + 1, len(whole)):
        content, _, calls = parse(DEEPSEEK_V3, [whole[:end]])
        assert (content, calls) == ("", [("f", whole[begin : min(end, begin + 10)])])


def test_broken_arguments_do_not_swallow_the_marks() -> None:
    text = write(DEEPSEEK_V3, ("f", '{"a": "never closed'), ("g", "{}"))
    assert parse(DEEPSEEK_V3, list(text)) == ("", "", [("f", '{"a": "never closed\n'), ("g", "{}")])
    text = write(DEEPSEEK_V31, ("f", '{"a": [1'), ("g", "{}"))
    assert parse(DEEPSEEK_V31, list(text)) == ("", "", [("f", '{"a": [1'), ("g", "{}")])


def test_calls_are_text_where_no_tools_are_offered() -> None:
    text = write(DEEPSEEK_V3, ("f", "{}"))
    assert parse(DEEPSEEK_V3, list(text), tools=()) == (text, "", [])
    assert parse(None, ["<think>", text]) == ("<think>" + text, "", [])


def test_arguments_arrive_as_they_are_written() -> None:
    parser = MessageParser(DEEPSEEK_V31, tools=["f"])
    parser.push("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>")
    assert [piece.tool_call.name for piece in parser.push("{") if piece.tool_call][:1] == ["f"]
    assert [piece.tool_call.arguments for piece in parser.push('"a": "b') if piece.tool_call] == ['"a": "b']


def test_only_the_beginning_of_a_mark_is_held_back() -> None:
    parser = MessageParser(DEEPSEEK_V3, tools=["f"])
    assert parser.push("a < b") == [Piece(content="a < b")]
    assert parser.push(" <｜tool") == [Piece(content=" ")]
    assert parser.push("box｜>") == [Piece(content="<｜toolbox｜>")]


def test_thoughts() -> None:
    syntax = thinking(DEEPSEEK_V3)
    call = write(syntax, ("f", "{}"))
    for text in ("<think>\nWhy? <b\n</think>\n\nBecause.", "\n<think>Why? <b\n</think>Because."):
        assert parse(syntax, list(text)) == ("Because.", "Why? <b\n", [])
    assert parse(syntax, list(f"\nWhy?</think>{call}"), reasoning=True) == ("", "Why?", [("f", "{}")])
    # In thoughts a call is a thought; an end that never comes leaves nothing behind.
    assert parse(syntax, list(f"{call} hm</thi"), reasoning=True) == ("", f"{call} hm</thi", [])
    # Only an answer that begins so is thought.
    assert parse(syntax, list("I <think>so</think>")) == ("I <think>so</think>", "", [])
    assert parse(syntax, ["  "]) == ("  ", "", [])
    assert parse(DEEPSEEK_V3, ["<think>a</think>"]) == ("<think>a</think>", "", [])


def test_whether_it_is_thinking_is_known_after_each_push() -> None:
    parser = MessageParser(thinking(DEEPSEEK_V3), reasoning=True)
    assert parser.reasoning
    parser.push("hm")
    assert parser.reasoning
    parser.push("</think>")
    assert not parser.reasoning


MARKS = [
    *("<think>", "</think>", "\n", " ", "{", "}", '"', "\\", "f", ":0", "x<", "｜>"),
    *itertools.chain.from_iterable(
        (s.begin, s.end, s.before_name, s.after_name, s.after_arguments, write(s, ("f", '{"a": "b"}')))
        for s in SYNTAXES
    ),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SYNTAXES),
    st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=12),
    st.booleans(),
    st.data(),
)
def test_chunking_does_not_matter(syntax: ToolSyntax, texts: list[str], reasoning: bool, data: st.DataObject) -> None:
    text = "".join(texts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    chunks = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    syntax = thinking(syntax)
    assert parse(syntax, chunks, reasoning=reasoning) == parse(syntax, [text], reasoning=reasoning)
