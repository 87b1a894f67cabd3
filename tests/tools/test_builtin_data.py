"""The training data of the built-in model: tokens as the server makes them, and nothing of the questions in it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

from server.chat_template import load_chat_template
from server.tokenizer import load_tokenizer
from tools.builtin_model import arithmetic, capitals, data, facts, mixes, questions, tables, tokenizer, wording
from tools.builtin_model.documents import Document, ToolCall, Turn, dialogue, encode, from_messages, to_messages
from tools.builtin_model.prose import Prose

SENTENCES = ["The old bridge was closed for the winter.", "She put the letter on the table.", "It rained in the west."]


@pytest.fixture(scope="module")
def prose() -> Prose:
    """The fetched packages are not needed: a few sentences stand for them."""
    return Prose(SENTENCES, [SENTENCES])


@pytest.fixture(scope="module")
def folder(prose: Prose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    tokenizer.save(tokenizer.train(list(data.sample_texts(prose, seed=7))[::5]), path)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tokenizer:
    return tokenizer.load(folder)


def test_words_to_copy_are_single_tokens(trained: Tokenizer) -> None:
    forms = [form for word in tokenizer.copied_words() for form in (word, f" {word}")]
    forms += [f" {word}" for word in tokenizer.said_words()]
    assert [form for form in forms if len(trained.encode(form, add_special_tokens=False).ids) > 1] == []
    assert trained.encode("12 345", add_special_tokens=False).tokens == ["1", "2", "Ġ3", "4", "5"]


def test_tokens_are_those_of_the_server(folder: Path, trained: Tokenizer, prose: Prose) -> None:
    """Of documents of every type, through the server's template and tokenizer."""
    server_tokenizer = load_tokenizer(folder, tokenizer.VOCAB_SIZE)
    template = load_chat_template(server_tokenizer)
    assert template is not None
    rng = Random(1)
    documents = [make(rng) for make in mixes.generators(prose, 500).values() for _ in range(4)]
    documents = [document for document in documents if document.turns[0].role != "text"]
    calls = (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}"))
    two = (
        Turn("user", "x"),
        Turn("assistant", "", calls),
        Turn("tool", "1"),
        Turn("tool", "2"),
        Turn("assistant", "y"),
    )
    documents += [Document(two, ({"type": "function", "function": {"name": "f"}},)), Document(two)]
    for document in documents:
        messages = to_messages(document)
        prompt = template.render(messages, add_generation_prompt=False, tools=document.tools or None)
        expected = asyncio.run(server_tokenizer.encode_segments(prompt.segments))
        assert encode(document, trained)[0] == list(expected)
        assert from_messages(messages, document.tools) == document
    server_tokenizer.close()


def test_answers_alone_have_weight(trained: Tokenizer) -> None:
    document = Document((Turn("system", "Be brief."), *dialogue("Hi", "Hello!", "Bye", "Goodbye!").turns))
    ids, weights = encode(document, trained)
    trainable = [token for token, weight in zip(ids, weights, strict=True) if weight == 10]
    assert trained.decode(trainable, skip_special_tokens=False) == f"Hello!{tokenizer.EOS}Goodbye!{tokenizer.EOS}"
    assert set(weights) == {0, 10}
    ids, weights = encode(Document((Turn("text", "Rain fell."),)), trained)
    assert set(weights[1:]) == {3}
    assert weights[0] == 0


def test_chunks_have_their_shares_and_no_question(trained: Tokenizer, prose: Prose) -> None:
    mix = mixes.MIXES["short"]
    tokens, weights, counts = data.make_chunk(mix, Random(3), 60_000, prose, trained)
    again, _, _ = data.make_chunk(mix, Random(3), 60_000, prose, trained)
    assert np.array_equal(tokens, again)
    assert (str(tokens.dtype), str(weights.dtype), len(weights)) == ("uint16", "uint8", len(tokens))
    total = sum(mix.shares.values())
    assert all(abs(counts[kind] / len(tokens) - share / total) < 0.01 for kind, share in mix.shares.items())
    begin = trained.token_to_id(tokenizer.BOS)
    lengths = np.diff(np.append(np.flatnonzero(tokens == begin), len(tokens)))
    assert tokens[0] == begin
    assert lengths.max() <= mix.longest
    asked = trained.decode(tokens.tolist(), skip_special_tokens=False).split("<｜User｜>")[1:]
    held_out = questions.held_out()
    assert not [text for text in asked if wording.essence(text.partition("<｜Assistant｜>")[0]) in held_out]


def test_every_mix_keeps_copying_and_looking_up() -> None:
    for mix in mixes.MIXES.values():
        total = sum(mix.shares.values())
        assert mix.shares["copy"] >= 0.1 * total
        assert mix.shares["key_value"] + mix.shares["code_in_text"] >= 0.18 * total


def test_held_out_wordings_are_in_no_table() -> None:
    kinds = [
        capitals.capital_kind(),
        facts.opposite_kind(),
        facts.colour_kind(),
        facts.definition_kind(),
        *facts.day_kinds(),
        *facts.element_kinds(),
    ]
    for kind in kinds:
        assert not set(map(wording.essence, kind.asked)) & set(map(wording.essence, kind.held_out))
        assert kind.held_out
    trained_texts = {wording.essence(text): intent.answer for intent in tables.intents() for text in intent.asked}
    assert not [
        text for intent in tables.intents() for text in intent.held_out if wording.essence(text) in trained_texts
    ]
    for intent in tables.intents():
        assert all(trained_texts[wording.essence(text)] == intent.answer for text in intent.asked), "two answers"


def test_questions_are_well_formed() -> None:
    loaded = questions.load()
    counts = Counter(question.row for question in loaded)
    assert len(counts) == 31
    assert all(15 <= count <= 40 for count in counts.values()), counts
    for question in loaded:
        assert bool(question.answer) != bool(question.tool_calls)
        assert question.document().turns[-1].role == "assistant"
        names = {tool["function"]["name"] for tool in question.tools}
        assert all(call.name in names and json.loads(call.arguments) for call in question.tool_calls)
    assert len(questions.held_out()) == len(loaded)


def test_sums_of_the_questions_are_right() -> None:
    assert arithmetic.calculation(7, 8, "*") == "7 * 8 = 56"
    share = np.mean([arithmetic.held_out_pair(a, b) for a in range(10, 100) for b in range(10, 100)])
    assert 0.03 < share < 0.08
    assert not any(arithmetic.held_out_pair(a, b) for a in range(10) for b in range(10))
