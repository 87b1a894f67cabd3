"""Grammars that are refused: what cannot be enforced, what is too large, and what would take for ever."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scheduler.messages import Grammar
from server import grammar_check
from server.errors import ApiError, BadRequest, Overloaded
from server.grammar_check import GrammarChecker
from server.limits import (
    CHOICES,
    ENUM_VALUES,
    GRAMMAR_BYTES,
    REGEX_BYTES,
    REPEATS,
    SCHEMA_BYTES,
    SCHEMA_DEPTH,
    SCHEMA_PROPERTIES,
)
from server.regex import nested_repeats
from server.settings import BUILTIN_MODEL
from server.structured import response_grammar


def refusal(response_format: Any = None, structured_outputs: Any = None) -> BadRequest:
    with pytest.raises(BadRequest) as error:
        response_grammar(response_format, structured_outputs)
    return error.value


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "param"),
    [
        ({}, None, "response_format.type"),
        ({"type": 1}, None, "response_format.type"),
        ({"type": "xml"}, None, "response_format.type"),
        ({"type": "structural_tag"}, None, "response_format.type"),
        ({"type": "text", "schema": {}}, None, "response_format.schema"),
        ({"type": "json_schema"}, None, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, None, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}},
            None,
            "response_format.json_schema.strict",
        ),
        ({"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}, None, "response_format.json_schema.x"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, None, "response_format.json_schema.schema"),
        (None, {}, "structured_outputs"),
        (None, {"regex": "a", "json": {}}, "structured_outputs"),
        (None, {"structural_tag": {}}, "structured_outputs.structural_tag"),
        (None, {"json": "{"}, "structured_outputs.json"),
        (None, {"json": "[1]"}, "structured_outputs.json"),
        (None, {"json_object": "true"}, "structured_outputs.json_object"),
        (None, {"regex": 5}, "structured_outputs.regex"),
        (None, {"regex": "\ud800"}, "structured_outputs.regex"),
        (None, {"choice": []}, "structured_outputs.choice"),
        (None, {"choice": ["a", ""]}, "structured_outputs.choice"),
        (None, {"choice": ["\ud800"]}, "structured_outputs.choice"),
        (None, {"choice": "a"}, "structured_outputs.choice"),
        (None, {"grammar": " "}, "structured_outputs.grammar"),
        (None, {"grammar": 'start: %json {"not": {}}'}, "structured_outputs.grammar"),
        ({"type": "json_object"}, {"regex": "a"}, "structured_outputs"),
    ],
)
def test_refusals_name_the_field(response_format: Any, structured_outputs: Any, param: str) -> None:
    assert refusal(response_format, structured_outputs).param == param


UNSUPPORTED = {
    "$anchor": "a",
    "$dynamicRef": "#a",
    "$vocabulary": {},
    "additionalItems": False,
    "contains": {},
    "contentEncoding": "base64",
    "dependencies": {},
    "dependentRequired": {},
    "else": {},
    "if": {},
    "maxContains": 1,
    "minContains": 1,
    "not": {},
    "nullable": True,
    "propertyNames": {},
    "then": {},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "uniqueItems": True,
    "x-guidance": {"lenient": True},
    "misspelt": 1,
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_unsupported_keywords_are_named_wherever_they_stand(keyword: str) -> None:
    schema = {keyword: UNSUPPORTED[keyword]}
    for place in (
        schema,
        {"properties": {"a": schema}},
        {"items": schema},
        {"prefixItems": [schema]},
        {"anyOf": [{}, schema]},
        {"oneOf": [schema]},
        {"allOf": [schema]},
        {"$defs": {"a": schema}},
        {"definitions": {"a": schema}},
        {"additionalProperties": schema},
        {"patternProperties": {"a": schema}},
    ):
        assert f"'{keyword}'" in refusal(structured_outputs={"json": place}).message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strng"},
        {"type": []},
        {"type": None},
        {"format": "iri"},
        {"format": "unknown"},
        {"enum": []},
        {"enum": "a"},
        {"required": "a"},
        {"properties": []},
        {"properties": {"a": 1}},
        {"items": [{}]},
        {"anyOf": []},
        {"anyOf": {}},
        {"minLength": -1},
        {"maxItems": 1.5},
        {"minimum": "1"},
        {"exclusiveMinimum": True},
        {"multipleOf": 0},
        {"multipleOf": -1},
        {"$ref": "http://example.com/schema"},
        {"$ref": "other.json"},
        {"$ref": 1},
        {"properties": {"a": {"$id": "b"}}},
        {"pattern": 1},
        {"pattern": "[[a]]"},
        {"pattern": "[\\W--[a]]"},
        {"pattern": "\\PL"},
        {"pattern": "[\\x00-!]"},
        {"const": "\x01"},
        {"const": "\x7f"},
        {"const": "\ud800"},
        {"const": float("nan")},
        {"minProperties": 2},
        {"required": ["a"], "minProperties": 3},
        {"allOf": [{"pattern": "a"}] * 5},
    ],
    ids=str,
)
def test_malformed_schemas_are_refused(schema: Any) -> None:
    assert refusal(structured_outputs={"json": schema}).param == "structured_outputs.json"


def test_names_in_data_are_not_keywords() -> None:
    """What stands under `properties`, `const`, `enum`, `default` and `examples` is not a schema."""
    schema = {
        "properties": {"not": {"type": "null"}, "$ref": {}, "x-guidance": {}, "if": {"const": {"not": 1}}},
        "default": {"not": 1},
        "examples": [{"contains": 1}],
        "enum": [{"uniqueItems": True}],
        "x-order": 1,
    }
    assert response_grammar(None, {"json": schema}) is not None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def sized(size: int) -> dict[str, Any]:
    return {"description": "d" * (size - len('{"description":""}'))}


LIMIT_CASES: dict[str, tuple[float, Callable[[int], dict[str, Any]]]] = {
    "schema_bytes": (SCHEMA_BYTES.maximum, lambda n: {"json": sized(n)}),
    "schema_depth": (SCHEMA_DEPTH.maximum, lambda n: {"json": nested(n)}),
    "schema_properties": (
        SCHEMA_PROPERTIES.maximum,
        lambda n: {"json": {"properties": {f"p{i}": {} for i in range(n)}}},
    ),
    "enum_values": (ENUM_VALUES.maximum, lambda n: {"json": {"enum": list(range(n))}}),
    "maxLength": (REPEATS.maximum, lambda n: {"json": {"maxLength": n}}),
    "minLength": (REPEATS.maximum, lambda n: {"json": {"minLength": n}}),
    "maxItems": (REPEATS.maximum, lambda n: {"json": {"maxItems": n}}),
    "maxProperties": (REPEATS.maximum, lambda n: {"json": {"maxProperties": n}}),
    "multipleOf": (REPEATS.maximum, lambda n: {"json": {"multipleOf": n}}),
    "decimals": (REPEATS.maximum, lambda n: {"json": {"multipleOf": n / 1000 + 0.0}}),
    "regex repeats": (REPEATS.maximum, lambda n: {"regex": f"a{{{n}}}"}),
    "pattern repeats": (REPEATS.maximum, lambda n: {"json": {"pattern": f"a{{1,{n}}}"}}),
    "grammar repeats": (REPEATS.maximum, lambda n: {"grammar": f'start: "a"{{1,{n}}}'}),
    "regex_bytes": (REGEX_BYTES.maximum, lambda n: {"regex": "é" * (n // 2) + "a" * (n % 2)}),
    "pattern bytes": (REGEX_BYTES.maximum, lambda n: {"json": {"patternProperties": {"a" * n: {}}}}),
    "grammar_bytes": (GRAMMAR_BYTES.maximum, lambda n: {"grammar": 'start: "a"' + " " * (n - 10)}),
    "choices": (CHOICES.maximum, lambda n: {"choice": [str(i) for i in range(n)]}),
}


@pytest.mark.parametrize("name", LIMIT_CASES)
def test_limits(name: str) -> None:
    maximum, build = LIMIT_CASES[name]
    assert response_grammar(None, build(int(maximum))) is not None
    error = refusal(structured_outputs=build(int(maximum) + 1))
    assert error.param is not None
    assert error.param.startswith("structured_outputs.")


@pytest.mark.parametrize(
    ("regex", "product"),
    [
        ("abc", 1),
        ("(a{3}b){2}", 6),
        ("(a{1,500}){1,500}", 250_000),
        ("[{]{3}\\({4}(?:x{2,}|y{5}){2}", 10),
        ("a{5}b{7}", 7),
        ("((a{2}){3}){4}|b{9}", 24),
        ("[]{9}]{2}", 2),
        ("a{,5}", 1),
        (")a{4}", 4),
        ("((", 1),
    ],
)
def test_nested_repeats(regex: str, product: int) -> None:
    assert nested_repeats(regex) == product


BOMBS: dict[str, dict[str, Any]] = {
    "nested 200 deep": {"json": nested(200)},
    "50,000 enum values": {"json": {"enum": [f"v{i}" for i in range(50_000)]}},
    "3,000 properties": {"json": {"properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}},
    "maxLength 10^6": {"json": {"type": "string", "maxLength": 10**6}},
    "minItems 10^5": {"json": {"type": "array", "minItems": 10**5}},
    "nested repeats": {"regex": "(a{1,500}){1,500}"},
    "remainders": {"json": {"type": "integer", "multipleOf": 999_983}},
    "patterns multiplied": {
        "json": {
            "$defs": {f"p{i}": {"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(20)},
            "allOf": [{"$ref": f"#/$defs/p{i}"} for i in range(20)],
        }
    },
    "unions multiplied": {
        "json": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {"type": "integer"}}} for j in range(4)]}
                for i in range(10)
            ]
        }
    },
    "itself": {"json": {"$ref": "#"}},
    "invalid regex": {"regex": "(" * 1000},
    "complements": {"grammar": "start: T\nT: " + " & ".join(f"/.*{chr(97 + i)}.{{20}}/" for i in range(20))},
}


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(BUILTIN_MODEL / "tokenizer.json")
    yield checker
    checker.close()


async def refuse(checker: GrammarChecker, constraint: dict[str, Any]) -> tuple[int, float]:
    """Status and seconds."""
    started = time.monotonic()
    try:
        grammar = response_grammar(None, constraint)
        assert grammar is not None
        await checker.check(grammar, "structured_outputs")
    except ApiError as error:
        return error.status, time.monotonic() - started
    return 200, time.monotonic() - started


def test_ten_bombs_get_a_400_in_time_and_disturb_nobody(checker: GrammarChecker) -> None:
    """At once, while the loop keeps its pace and good grammars pass between them."""

    async def run() -> tuple[list[tuple[int, float]], float, int]:
        gaps: list[float] = []

        async def watch() -> None:
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                gaps.append(time.monotonic() - before)

        await checker.check(Grammar("regex", "warm"), "p")
        watcher = asyncio.create_task(watch())
        results = await asyncio.gather(*(refuse(checker, bomb) for bomb in BOMBS.values()))
        good, _ = await refuse(checker, {"regex": "good"})
        watcher.cancel()
        return results, max(gaps), good

    results, gap, good = asyncio.run(run())
    assert dict(zip(BOMBS, (status for status, _ in results), strict=True)) == dict.fromkeys(BOMBS, 400)
    assert max(seconds for _, seconds in results) < 2
    assert gap < 0.25
    assert good == 200


def test_ten_bombs_that_get_past_the_static_checks_get_a_400_in_time(checker: GrammarChecker) -> None:
    """Each costs the workers, which are not even running yet, all the time that one is given."""

    async def refused(number: int) -> tuple[int, float]:
        started = time.monotonic()
        schema = {"type": "integer", "multipleOf": 999_983 + number}  # 10 s and more, half a gigabyte
        try:
            await checker.check(Grammar("json_schema", json.dumps(schema)), "p")
        except ApiError as error:
            return error.status, time.monotonic() - started
        return 200, time.monotonic() - started

    async def run() -> list[tuple[int, float]]:
        return await asyncio.gather(*map(refused, range(10)))

    results = asyncio.run(run())
    assert [status for status, _ in results] == [400] * 10
    assert max(seconds for _, seconds in results) < 2


def test_verdicts_are_remembered_and_a_dead_worker_is_replaced(checker: GrammarChecker) -> None:
    async def run() -> None:
        await checker.check(Grammar("regex", "a"), "p")
        [process] = checker._processes
        process.kill()
        process.wait()
        await checker.check(Grammar("regex", "a"), "p")
        assert checker._processes == [process]
        await checker.check(Grammar("regex", "b"), "p")
        [replacement] = checker._processes
        assert replacement.pid != process.pid
        with pytest.raises(BadRequest, match="unclosed group") as error:
            await checker.check(Grammar("regex", "(a"), "p")
        assert (error.value.param, error.value.code) == ("p", "invalid_grammar")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        (Grammar("json_schema", '{"oneOf": [{"type": "string"}, {"type": "string"}]}'), "exclude one another."),
        (Grammar("json_schema", '{"$ref": "#/nope"}'), "enforced: Pointer '/nope' does not exist."),
        (Grammar("regex", "(a"), 'enforced: invalid regex "(a"'),
        (Grammar("lark", 'start: "a'), "enforced: 1(10): "),
    ],
)
def test_what_is_wrong_is_told_in_words_of_the_request(checker: GrammarChecker, grammar: Grammar, told: str) -> None:
    with pytest.raises(BadRequest) as refused:
        asyncio.run(checker.check(grammar, "p"))
    assert told in refused.value.message
    assert refused.value.message.startswith("'p' cannot be enforced: ")


def test_patience_begins_with_the_first_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes must read the tokenizer first: no overload, however long that takes."""
    monkeypatch.setattr(grammar_check, "PATIENCE_SECONDS", 0.0)

    async def ask() -> None:
        checker = GrammarChecker(BUILTIN_MODEL / "tokenizer.json")
        try:
            await checker.check(Grammar(kind="regex", text="a+"), "p")
            with pytest.raises(Overloaded):
                await checker.check(Grammar(kind="regex", text="b+"), "p")
        finally:
            checker.close()

    asyncio.run(ask())
