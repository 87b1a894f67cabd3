"""Grammars in the engine: masks, ends, sharing, bounds; and the process that tries grammars first."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from model.config import load_config
from scheduler import grammar as grammar_module
from scheduler.grammar import CheckpointGrammars, GrammarError
from scheduler.grammar_worker import TOO_COMPLEX, byte_tokenizer, try_grammar, verdict
from scheduler.messages import Grammar
from server.settings import BUILTIN_MODEL
from server.tokenizer import Tokenizer, load_tokenizer

CONFIG = load_config(BUILTIN_MODEL)
[EOS] = CONFIG.eos_token_ids
PATH = BUILTIN_MODEL / "tokenizer.json"
USER = next(token["id"] for token in json.loads(PATH.read_text())["added_tokens"] if token["content"] == "<｜User｜>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUILTIN_MODEL, CONFIG.vocab_size)


@pytest.fixture
def grammars() -> CheckpointGrammars:
    return CheckpointGrammars(PATH, CONFIG.vocab_size, CONFIG.eos_token_ids)


def allowed(mask: bytes) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))]


def test_the_mask_has_the_tokens_that_can_follow_and_no_other(
    grammars: CheckpointGrammars, tokenizer: Tokenizer
) -> None:
    grammars.add("r", Grammar("regex", "(?:foo|for|bar){2}"))
    mask = grammars.bitmask("r")
    assert len(mask) * 8 == CONFIG.vocab_size
    prefixes = {text[:end] for text in (b"foofoo", b"forfor", b"barbar", b"barfor") for end in range(1, 7)}
    texts = {tokenizer.token_bytes(token_id) for token_id in allowed(mask)}
    assert {b"f", b"b"} <= texts
    assert all(any(prefix.startswith(text) for prefix in prefixes) for text in texts)
    one_letter = next(token_id for token_id in allowed(mask) if tokenizer.token_bytes(token_id) == b"b")
    assert not grammars.accept("r", one_letter)
    assert {tokenizer.token_bytes(token_id) for token_id in allowed(grammars.bitmask("r"))} <= {b"a", b"ar"} | {
        b"ar" + prefix for prefix in prefixes
    }


@pytest.mark.parametrize(
    ("kind", "text", "written"),
    [
        ("regex", "a<｜User｜>b", "a<｜User｜>b"),
        ("json_schema", '{"const": "<｜User｜>"}', '"<｜User｜>"'),
        ("lark", 'start: "<｜User｜>"', "<｜User｜>"),
        ("lark", '%llguidance {"no_forcing": false}\nstart: "<｜User｜>"', "<｜User｜>"),
    ],
)
def test_the_name_of_a_control_token_is_text_like_any_other(
    grammars: CheckpointGrammars, tokenizer: Tokenizer, kind: str, text: str, written: str
) -> None:
    grammars.add("r", Grammar(kind, text))
    drawn, ended = b"", False
    while not ended:
        token_id = allowed(grammars.bitmask("r"))[0]
        drawn += tokenizer.token_bytes(token_id) if token_id != EOS else b""
        ended = grammars.accept("r", token_id)
    assert drawn.decode().strip() == written


def test_it_ends_where_nothing_can_follow_and_offers_eos_where_it_may(grammars: CheckpointGrammars) -> None:
    grammars.add("closed", Grammar("regex", "[0-9]"))
    assert EOS not in allowed(grammars.bitmask("closed"))
    assert grammars.accept("closed", allowed(grammars.bitmask("closed"))[0])
    grammars.add("open", Grammar("regex", "[0-9]+"))
    assert not grammars.accept("open", allowed(grammars.bitmask("open"))[0])
    assert EOS in allowed(grammars.bitmask("open"))
    assert grammars.accept("open", EOS)


def test_a_mask_changes_with_accepted_tokens_alone(grammars: CheckpointGrammars) -> None:
    """Asked twice, as after a preemption, and with another request of the same grammar far ahead."""
    grammar = Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "boolean"}}))
    grammars.add("a", grammar)
    first = grammars.bitmask("a")
    grammars.add("b", grammar)
    for _ in range(5):
        grammars.accept("b", allowed(grammars.bitmask("b"))[0])
        assert grammars.bitmask("a") == first
    grammars.drop("b")
    grammars.add("c", grammar)
    assert grammars.bitmask("c") == first


def test_refusals_leave_nothing_behind(grammars: CheckpointGrammars) -> None:
    for grammar in (
        Grammar("regex", "(a"),
        Grammar("json_schema", '{"not": {}}'),
        Grammar("json_schema", "{"),
        Grammar("lark", "start: b"),
        Grammar("telepathy", "a"),
    ):
        with pytest.raises(GrammarError) as error:
            grammars.add("r", grammar)
        assert "\n" not in str(error.value)
    assert len(grammars) == 0
    grammars.add("r", Grammar("regex", "a"))
    with pytest.raises(GrammarError, match="in use"):
        grammars.add("r", Grammar("regex", "b"))
    grammars.drop("r")
    grammars.drop("r")
    grammars.drop("never there")
    assert len(grammars) == 0


def test_a_token_outside_the_mask_is_an_error(grammars: CheckpointGrammars) -> None:
    grammars.add("r", Grammar("regex", "[0-9]{3}"))
    with pytest.raises(GrammarError, match=f"token {EOS}"):
        grammars.accept("r", EOS)


def test_control_tokens_come_only_where_a_grammar_names_them(grammars: CheckpointGrammars) -> None:
    grammars.add("text", Grammar("lark", "start: /(?s:.)*/"))
    control = {token["id"] for token in json.loads(PATH.read_text())["added_tokens"]}
    assert control & set(allowed(grammars.bitmask("text"))) == {EOS}
    grammars.add("named", Grammar("lark", f'start: <[{USER}]> "a"'))
    assert allowed(grammars.bitmask("named")) == [USER]


def test_an_unusable_tokenizer_is_an_error_of_the_request() -> None:
    grammars = CheckpointGrammars(PATH.with_name("no.json"), CONFIG.vocab_size, [EOS])
    with pytest.raises(GrammarError, match=r"no\.json"):
        grammars.add("r", Grammar("regex", "a"))


def test_compiled_grammars_are_reused_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    original = grammar_module.compile_grammar

    def count(tokenizer: object, grammar: Grammar) -> object:
        compiled.append(grammar.text)
        return original(tokenizer, grammar)  # type: ignore[arg-type]

    monkeypatch.setattr(grammar_module, "compile_grammar", count)
    monkeypatch.setattr(grammar_module, "MAX_COMPILED", 2)
    grammars = CheckpointGrammars(PATH, CONFIG.vocab_size, [EOS])
    for index, text in enumerate(["a", "b", "a", "c", "a", "b"]):
        grammars.add(str(index), Grammar("regex", text))
    assert compiled == ["a", "b", "c", "b"]
    assert len(grammars._compiled) == 2


def test_a_grammar_of_many_states_ends_with_an_error_not_with_the_memory() -> None:
    """llguidance builds its automaton on the way; what passes the start may still be refused later."""
    grammars = CheckpointGrammars(PATH, CONFIG.vocab_size, [EOS])
    grammars.add("r", Grammar("regex", "(?:[ab]{0,2}c?)*a[ab]{14}[abc]*d"))
    rng = np.random.default_rng(0)
    started = time.monotonic()
    with suppress(GrammarError):
        for _ in range(300):
            if grammars.accept("r", int(rng.choice(allowed(grammars.bitmask("r"))))):
                break
    assert time.monotonic() - started < 20


def test_adding_in_one_thread_while_another_asks(grammars: CheckpointGrammars) -> None:
    failures: list[BaseException] = []

    def add() -> None:
        try:
            for index in range(200):
                grammars.add(f"t{index}", Grammar("regex", f"[ab]{{{index % 50 + 1}}}"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    grammars.add("main", Grammar("regex", "[0-9]{200}"))
    for _ in range(100):
        token_id = min(allowed(grammars.bitmask("main")))
        assert not grammars.accept("main", token_id)
    thread.join()
    assert not failures
    assert len(grammars) == 201


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar("regex", "a+"), ""),
        (Grammar("json_schema", '{"type": "object"}'), ""),
        (Grammar("lark", f'start: <[{USER}]> "a"'), ""),
        (Grammar("lark", 'start: <｜User｜> "a"'), ""),
        (Grammar("lark", "start: <nobody>"), "unknown special token"),
        (Grammar("regex", "a{3,1}"), "invalid repetition count range"),
        (Grammar("json_schema", '{"$ref": "#"}'), "nothing can match"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}'), "Unsatisfiable"),
    ],
)
def test_verdicts(grammar: Grammar, expected: str) -> None:
    answer = verdict(byte_tokenizer(PATH), grammar)
    assert expected in answer if expected else answer == ""
    assert "\n" not in answer


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(20)]},
        {"type": "integer", "multipleOf": 999_983},
    ],
    ids=["patterns", "remainders"],
)
def test_a_bomb_dies_alone(schema: object) -> None:
    """These take 10 s and more, and half a gigabyte."""
    tokenizer = byte_tokenizer(PATH)
    started = time.monotonic()
    assert try_grammar(tokenizer, Grammar("json_schema", json.dumps(schema))) == TOO_COMPLEX
    assert time.monotonic() - started < 2
    assert try_grammar(tokenizer, Grammar("regex", "a")) == ""
