"""Grammars of requests: what becomes one, what is refused and how, and that what passes is enforced."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from model.config import load_config
from scheduler.grammar import CheckpointGrammars, GrammarError
from scheduler.grammar_worker import byte_tokenizer, verdict
from scheduler.messages import Grammar
from server.errors import ApiError, BadRequest
from server.grammar_check import GrammarChecker
from server.json_schema import schema_text
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
from server.regex import inside_json, nested_repeats
from server.settings import BUILTIN_MODEL
from server.structured import json_grammar, response_grammar
from server.tokenizer import load_tokenizer
from tests.schema_suite import suite, validate

CONFIG = load_config(BUILTIN_MODEL)
PATH = BUILTIN_MODEL / "tokenizer.json"
MAX_TOKENS = 2000


@pytest.fixture(scope="module")
def grammars() -> CheckpointGrammars:
    return CheckpointGrammars(PATH, CONFIG.vocab_size, CONFIG.eos_token_ids)


@pytest.fixture(scope="module")
def token_bytes() -> Callable[[int], bytes]:
    return load_tokenizer(BUILTIN_MODEL, CONFIG.vocab_size).token_bytes


def draw(grammars: CheckpointGrammars, grammar: Grammar, token_bytes: Callable[[int], bytes], seed: int) -> str | None:
    """Text of uniformly drawn tokens, as of a model that knows nothing; None if it does not end."""
    rng = np.random.default_rng(seed)
    grammars.add("drawn", grammar)
    text = b""
    try:
        for _ in range(MAX_TOKENS):
            mask = np.frombuffer(grammars.bitmask("drawn"), np.uint8)
            token_id = int(rng.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little"))))
            ended = grammars.accept("drawn", token_id)
            if token_id not in CONFIG.eos_token_ids:
                text += token_bytes(token_id)
            if ended or token_id in CONFIG.eos_token_ids:
                return text.decode()
        return None
    finally:
        grammars.drop("drawn")


def accepts(grammars: CheckpointGrammars, grammar: Grammar, text: str) -> bool:
    """Whether the text, byte by byte, is a whole sentence of the grammar."""
    grammars.add("asked", grammar)
    try:
        ended = False
        for byte in text.encode():
            ended = grammars.accept("asked", BYTE_IDS[byte])
        if ended:
            return True
        return bool(grammars.bitmask("asked")[CONFIG.eos_token_ids[0] // 8] >> CONFIG.eos_token_ids[0] % 8 & 1)
    except GrammarError:
        return False
    finally:
        grammars.drop("asked")


@pytest.fixture(scope="module", autouse=True)
def _byte_ids(token_bytes: Callable[[int], bytes]) -> None:
    BYTE_IDS.update({token_bytes(i)[0]: i for i in range(CONFIG.vocab_size - 1, -1, -1) if len(token_bytes(i)) == 1})


BYTE_IDS: dict[int, int] = {}


def refusal(response_format: Any = None, structured_outputs: Any = None) -> BadRequest:
    with pytest.raises(BadRequest) as error:
        response_grammar(response_format, structured_outputs)
    return error.value


def test_the_suite_has_150_schemas() -> None:
    assert len(suite()) >= 150


@pytest.mark.parametrize("name", suite())
def test_whatever_is_drawn_is_valid(
    name: str, grammars: CheckpointGrammars, token_bytes: Callable[[int], bytes]
) -> None:
    schema = suite()[name]
    grammar = json_grammar(schema, "schema")
    drawn = [draw(grammars, grammar, token_bytes, seed) for seed in range(4)]
    ended = [text for text in drawn if text is not None]
    assert len(ended) >= 3
    for text in ended:
        validate(schema, text)


def test_the_worker_takes_the_whole_suite() -> None:
    tokenizer = byte_tokenizer(PATH)
    verdicts = {name: verdict(tokenizer, json_grammar(schema, "s")) for name, schema in suite().items()}
    assert not {name: text for name, text in verdicts.items() if text}


def test_free_answers() -> None:
    assert response_grammar(None, None) is None
    assert response_grammar({"type": "text"}, None) is None


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "good", "bad"),
    [
        ({"type": "json_object"}, None, '{"a": [1, "b", null]}', "[1]"),
        ({"type": "json_object", "schema": {"type": "integer"}}, None, "12", "1.5"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 1}}}, None, "1", "2"),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": False, "schema": {"const": 1}}}, None, "1", ""),
        ({"type": "json_schema", "json_schema": {"schema": {"const": 1}, "strict": None}}, None, "1", "11"),
        (None, {"json": {"type": "boolean"}}, "true", "yes"),
        (None, {"json": '{"type": "boolean"}'}, "false", "0"),
        (None, {"json_object": True}, "{}", "null"),
        (None, {"regex": "[a-c]{2}-?"}, "ab-", "ad"),
        (None, {"choice": ["yes", "no\n", '"né" \\ 😀']}, '"né" \\ 😀', "yesno"),
        (None, {"grammar": 'start: "a" b+\nb: "b" | "c"'}, "abcb", "a"),
        ({"type": "text"}, {"regex": "a", "json": None, "choice": None}, "a", "b"),
    ],
)
def test_what_becomes_a_grammar(
    response_format: Any, structured_outputs: Any, good: str, bad: str, grammars: CheckpointGrammars
) -> None:
    grammar = response_grammar(response_format, structured_outputs)
    assert grammar is not None
    assert accepts(grammars, grammar, good)
    assert not accepts(grammars, grammar, bad)


def test_white_space_is_bounded_and_the_end_is_the_end(grammars: CheckpointGrammars) -> None:
    grammar = json_grammar({"type": "object", "additionalProperties": {"type": "integer"}}, "s")
    for text in ('{"a":1,"b":2}', '{"a": 1, "b": 2}', '{\n  "a": 1,\n  "b": 2\n}', "{ }"):
        assert accepts(grammars, grammar, text), text
    for text in ('{"a":  1}', '{\n\n"a": 1}', "{\n" + " " * 21 + "}", ' {"a":1}', '{"a":1} ', '{"a":1}\n', '{"a":\t1}'):
        assert not accepts(grammars, grammar, text), text


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


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ('^[^"]$', ["a", "\\", "é"], ['"']),
        ("^[^\\\\]$", ["a", '"'], ["\\"]),
        ("^[^ -~]$", ["é"], ['"', "\\", "a"]),
        ("^[^a-]$", ["b", '"'], ["a", "-"]),
        ("^[^]a]$", ["b"], ["]", "a"]),
        ("^[^\\w]$", ['"', "-"], ["a"]),
        ("^\\[b\\]$", ["[b]"], ["b"]),
        ("^[\\t\\f]$", ["\t", "\f"], ['"', "\\"]),
        ('^["\\\\]$', ['"', "\\"], ["a"]),
        ("^\\S$", ["a", '"', "\\"], [" ", "\n"]),
        ("^.$", ["a", '"', "\\"], ["\n"]),
    ],
)
def test_patterns_hold_for_escaped_characters(
    pattern: str, good: list[str], bad: list[str], grammars: CheckpointGrammars
) -> None:
    grammar = json_grammar({"type": "string", "pattern": pattern}, "s")
    assert [text for text in good if not accepts(grammars, grammar, json.dumps(text, ensure_ascii=False))] == []
    assert [text for text in bad if accepts(grammars, grammar, json.dumps(text, ensure_ascii=False))] == []


def test_patterns_without_negated_classes_stay_as_they_are() -> None:
    for pattern in ("^a[b-d]+\\[^$", "\\\\[a]", "[]a]", "a{2}(b|c)?"):
        assert inside_json(pattern) == pattern


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01"]),
        ("time", ["23:59:59Z", "00:00:00.5+01:30"], ["12:00:60Z", "24:00:00Z"]),
        ("date-time", ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-01-01T12:00:60Z"]),
        ("hostname", ["a.example"], [".".join(["a" * 60] * 5)]),
    ],
)
def test_formats_are_what_readers_accept(
    format: str, good: list[str], bad: list[str], grammars: CheckpointGrammars
) -> None:
    schema = {"type": "string", "format": format}
    grammar = json_grammar(schema, "s")
    for text in good:
        validate(schema, json.dumps(text))
        assert accepts(grammars, grammar, json.dumps(text)), text
    for text in bad:
        assert not accepts(grammars, grammar, json.dumps(text)), text


def test_a_key_has_one_spelling(grammars: CheckpointGrammars) -> None:
    """Else a typed property could be smuggled in as an additional one."""
    grammar = json_grammar({"type": "object", "properties": {"a/": {"type": "integer"}}}, "s")
    assert accepts(grammars, grammar, '{"a/":1}')
    for key in ("\\u0061/", "a\\/", "a/"):
        assert not accepts(grammars, grammar, f'{{"{key}":"x"}}')


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
    checker = GrammarChecker(PATH)
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


def test_a_random_schema_is_enforced_or_refused(
    grammars: CheckpointGrammars, token_bytes: Callable[[int], bytes]
) -> None:
    """Keywords of any kind thrown together: no draw that ends may break the schema."""
    rng = Random(7)
    tokenizer = byte_tokenizer(PATH)
    enforced = 0
    for seed in range(120):
        schema = random_schema(rng, 2)
        try:
            grammar = json_grammar(schema, "s")
        except BadRequest:
            continue
        if verdict(tokenizer, grammar):
            continue
        enforced += 1
        text = draw(grammars, grammar, token_bytes, seed)
        if text is not None:
            validate(schema, text)
    assert enforced > 60


def random_schema(rng: Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(
        ["string", "integer", "number", "boolean", "null", "enum"] + ["array", "object", "anyOf"] * (depth > 0)
    )
    match kind:
        case "string":
            schema: dict[str, Any] = {"type": "string", "maxLength": rng.randint(1, 8)}
            if rng.random() < 0.4:
                schema["pattern"] = rng.choice(['^[^"a]{1,3}$', "^[a-c]+$", "x", "^\\d{2}", "[é-ü]", "^(ab|cd)*$"])
            return schema
        case "integer" | "number":
            low = rng.randint(-20, 20)
            return {"type": kind, "minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(1, 50)}
        case "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
        case "object":
            names = rng.sample(["a", "b", 'c"', "d\\", "é", "", "f/g"], rng.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.6],
                "additionalProperties": False,
            }
        case "anyOf":
            return {rng.choice(["anyOf", "oneOf"]): [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "enum":
            return {"enum": rng.sample([1, "a", None, [1], {"b": 2}, 'q"\\', "é\n", 2.5, True], rng.randint(1, 4))}
    return {"type": kind}


def test_schema_text_leaves_the_request_alone() -> None:
    schema = {"type": "object", "properties": {"t": {"format": "time"}, "p": {"pattern": "[^a]"}}}
    before = json.dumps(schema)
    schema_text(schema, "s")
    assert json.dumps(schema) == before
