"""Grammars of requests: what becomes one, and that it is enforced."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

from model.config import load_config
from scheduler.grammar import CheckpointGrammars, GrammarError
from scheduler.grammar_worker import byte_tokenizer, verdict
from scheduler.messages import Grammar
from server.errors import BadRequest
from server.json_schema import schema_text
from server.regex import inside_json
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
