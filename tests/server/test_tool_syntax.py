"""Which syntax a checkpoint has, and that what its grammar allows is what the parser reads, with valid arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from scheduler.messages import Grammar
from server.errors import BadRequest
from server.message_parser import MessageParser
from server.tokenizer import load_tokenizer
from server.tool_syntax import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    JSON_CALLS,
    KIMI_K2,
    ToolChoice,
    ToolSyntax,
    check_tools,
    detect_syntax,
    tool_grammar,
)
from tests.server.test_message_parser import join
from tests.server.tokenizer_folders import BUILTIN, BUILTIN_VOCAB_SIZE, V3_TOKENIZER, V3_VOCAB_SIZE

TOKENIZER = load_tokenizer(BUILTIN, BUILTIN_VOCAB_SIZE)
[EOS] = TOKENIZER.eos_token_ids
LIBRARY = LLTokenizer((BUILTIN / "tokenizer.json").read_text(), n_vocab=BUILTIN_VOCAB_SIZE, eos_token=EOS)
SYNTAX = detect_syntax(TOKENIZER, TOKENIZER.chat_template)
# The built-in tokenizer has none of Kimi's marks: there they are written as text.
SYNTAXES = [SYNTAX, replace(DEEPSEEK_V31, marks=SYNTAX.marks), KIMI_K2, JSON_CALLS]


def function(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
}
TOOLS = [
    function("weather", WEATHER),
    function("now"),
    function("set-alarm_2", {"properties": {"on": {"type": "boolean"}}, "required": ["on"]}, strict=False),
]
SCHEMAS = {"weather": WEATHER, "now": {"maxProperties": 0}, "set-alarm_2": TOOLS[2]["function"]["parameters"]}


def sample(grammar: Grammar, seed: int, max_tokens: int = 400, prefix: tuple[int, ...] = ()) -> str | None:
    """A text drawn evenly over the allowed tokens; None when it does not end in time."""
    assert grammar.kind == "lark"
    random, lark = Random(seed), LLMatcher.grammar_from_lark(grammar.text)
    assert LLMatcher.validate_grammar(lark, LIBRARY) == ""
    matcher = LLMatcher(LIBRARY, lark)
    ids = list(prefix)
    assert matcher.consume_tokens(ids)
    while len(ids) < max_tokens:
        mask = matcher.compute_bitmask()
        allowed = [index for index in range(BUILTIN_VOCAB_SIZE) if mask[index // 8] >> index % 8 & 1]
        token = random.choice(allowed)
        if token == EOS:
            return b"".join(map(TOKENIZER.token_bytes, ids)).decode(errors="replace")
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    return None


def calls_of(syntax: ToolSyntax, text: str, **options: Any) -> list[tuple[str, str]]:
    parser = MessageParser(syntax, tools=list(SCHEMAS), **options)
    content, _, calls = join(parser.push(text) + parser.finish())
    assert content == ""
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return calls


def test_syntax_by_tokens_and_template() -> None:
    v3 = load_tokenizer(V3_TOKENIZER, V3_VOCAB_SIZE)
    source = v3.chat_template
    assert source is not None
    syntax = detect_syntax(v3, source)
    assert syntax.name == "deepseek-v3"
    assert syntax.thinks
    assert syntax.marks["<｜tool▁calls▁begin｜>"] == 128806
    assert len(syntax.marks) == 7
    v31 = "<｜User｜>{{'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments}}"
    assert detect_syntax(v3, v31).name == "deepseek-v3.1"
    assert detect_syntax(v3, "<｜User｜>").name == "deepseek-v3"  # V2.5
    assert detect_syntax(v3, "User: ").name == "json"  # V2-Chat
    assert detect_syntax(v3, None).name == "json"
    assert (SYNTAX.name, SYNTAX.thinks) == ("deepseek-v3", False)

    class Kimi:
        added_tokens = (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|im_end|>",
        )

        def token_id(self, text: str) -> int:
            return self.added_tokens.index(text)

    kimi = detect_syntax(Kimi(), None)
    assert kimi.name == "kimi-k2"
    assert set(kimi.marks) == set(Kimi.added_tokens[:3])


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_required_calls_are_valid(syntax: ToolSyntax) -> None:
    grammar = tool_grammar(syntax, TOOLS, "required")
    assert grammar is not None
    names: list[str] = []
    for seed in range(12):
        if (text := sample(grammar, seed)) is not None:
            calls = calls_of(syntax, text)
            assert calls
            names += [name for name, _ in calls]
    assert set(names) == set(SCHEMAS)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_a_named_function_and_one_call_only(syntax: ToolSyntax) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    grammar = tool_grammar(syntax, TOOLS, named, parallel_tool_calls=False)
    assert grammar is not None
    for seed in range(4):
        text = sample(grammar, seed)
        assert text is not None
        assert [name for name, _ in calls_of(syntax, text)] == ["weather"]


def test_auto_is_free_until_a_call_begins() -> None:
    strict = [function("weather", WEATHER, strict=True)]
    grammar = tool_grammar(SYNTAX, strict, "auto")
    assert grammar is not None
    begin = SYNTAX.marks[SYNTAX.begin]
    for seed in range(4):
        text = sample(grammar, seed, prefix=(*LIBRARY.tokenize_str("Let me see. "), begin))
        if text is not None:
            parser = MessageParser(SYNTAX, tools=["weather"])
            content, _, calls = join(parser.push(text) + parser.finish())
            assert content
            assert calls
            jsonschema.validate(json.loads(calls[0][1]), WEATHER)
    assert tool_grammar(SYNTAX, TOOLS, "auto") is None
    assert tool_grammar(SYNTAX, TOOLS, None) is None
    assert tool_grammar(SYNTAX, TOOLS, "none", answer=Grammar("regex", "a")) == Grammar("regex", "a")
    unmarked = tool_grammar(JSON_CALLS, strict, "auto")
    assert unmarked is not None
    assert sample(unmarked, 0, prefix=tuple(LIBRARY.tokenize_str("Well, {")), max_tokens=4) is None
    text = sample(unmarked, 1, prefix=tuple(LIBRARY.tokenize_str('{"name": "weather')))
    assert text is None or calls_of(JSON_CALLS, text)
    assert not LLMatcher(LIBRARY, LLMatcher.grammar_from_lark(unmarked.text)).consume_tokens(
        LIBRARY.tokenize_str('{"nome')
    )
    assert tool_grammar(SYNTAX, [], None) is None
    one = tool_grammar(SYNTAX, TOOLS, "auto", parallel_tool_calls=False)
    assert one is not None
    assert "call)*" not in one.text


@pytest.mark.parametrize(
    ("answer", "matches"),
    [(Grammar("regex", "[ab]/c\\/"), ("a/c/", "b/c/")), (Grammar("json_schema", '{"const": "x"}'), ('"x"',))],
)
def test_auto_with_a_constrained_answer(answer: Grammar, matches: tuple[str, ...]) -> None:
    grammar = tool_grammar(SYNTAX, TOOLS, "auto", answer=answer)
    assert grammar is not None
    texts = [text for seed in range(12) if (text := sample(grammar, seed)) is not None]
    assert all(text in matches or calls_of(SYNTAX, text) for text in texts)
    assert any(text in matches for text in texts)
    assert any(text not in matches for text in texts)
    with pytest.raises(BadRequest):
        tool_grammar(SYNTAX, TOOLS, "auto", answer=Grammar("lark", "start: /x/"))


def test_thoughts_are_free_before_forced_calls() -> None:
    # No mark for thoughts in the built-in tokenizer: some other control token stands for it.
    [stand_in] = LIBRARY.tokenize_str("<|EOT|>", parse_special=True)
    syntax = replace(SYNTAX, marks={**SYNTAX.marks, "</think>": stand_in})
    grammar = tool_grammar(syntax, TOOLS, "required", thinking=True)
    answer = tool_grammar(syntax, [], None, answer=Grammar("json_schema", '{"const": 7}'), thinking=True)
    assert grammar is not None
    assert answer is not None
    for seed in range(4):
        text = sample(grammar, seed, prefix=(*LIBRARY.tokenize_str("Hm. "), stand_in))
        if text is not None:
            assert calls_of(syntax, text.replace("<|EOT|>", "</think>"), reasoning=True)
        text = sample(answer, seed, prefix=(*LIBRARY.tokenize_str("Hm."), stand_in))
        assert text is not None
        assert text.endswith("7")
    assert tool_grammar(syntax, TOOLS, "auto", thinking=True) is None


def test_schemas_that_cannot_be_enforced() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "noSuchKeyword": 1}}}
    with pytest.raises(BadRequest) as refused:
        tool_grammar(SYNTAX, [function("f", odd, strict=True)], "required")
    assert refused.value.param is not None
    assert refused.value.param.startswith("tools[0].function.parameters")
    assert tool_grammar(SYNTAX, [function("f", odd)], "required") is not None
    with pytest.raises(BadRequest) as refused:
        tool_grammar(SYNTAX, [function("f", {"type": "string"})], "required")
    assert refused.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("tools", "tool_choice", "param"),
    [
        ([function("f"), function("f")], None, "tools"),
        ([], "required", "tool_choice"),
        ([function("f")], {"type": "function", "function": {"name": "g"}}, "tool_choice"),
    ],
)
def test_refused(tools: list[dict[str, Any]], tool_choice: ToolChoice | None, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_tools(tools, tool_choice)
    assert refused.value.param == param
    check_tools([function("f"), function("g")], "required")


def test_v3_is_what_its_model_card_says() -> None:
    assert DEEPSEEK_V3.begin + DEEPSEEK_V3.before_name + "f" + DEEPSEEK_V3.after_name == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    )
