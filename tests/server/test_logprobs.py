"""Log-probabilities of both completion endpoints, and echo."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from model.batch import Logprobs
from scheduler.messages import AddRequest, Started
from server.streams import RequestStream
from tests.server.harness import (
    CHAT,
    TEXT,
    ScriptedEngine,
    answers,
    finish,
    ids_of,
    run,
    scores,
    silent,
    tokenizer,
)


def test_chat_logprobs() -> None:
    whole = run(scores(), CHAT, logprobs=True, top_logprobs=2)[0].json["choices"][0]["logprobs"]
    ids = ids_of(TEXT)
    assert [entry["logprob"] for entry in whole["content"]] == [-token_id / 8 for token_id in ids]
    assert b"".join(bytes(entry["bytes"]) for entry in whole["content"]).decode() == TEXT
    assert all(len(entry["top_logprobs"]) == 2 for entry in whole["content"])
    events = run(scores(), CHAT, logprobs=True, top_logprobs=2, stream=True)[0].events
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert list(itertools.chain.from_iterable(each["content"] for each in streamed if each)) == whole["content"]
    none = run(scores(), CHAT, logprobs=True)[0].json["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in none)
    assert run(scores(), CHAT)[0].json["choices"][0]["logprobs"] is None
    refused = run(silent, CHAT, top_logprobs=1)[0]
    assert (refused.status, refused.error["param"]) == (400, "top_logprobs")


def test_bytes_are_those_of_the_token() -> None:
    """A token may be half a character; its text is then lossy, its bytes are not."""
    text = "漢字🙂"
    content = run(scores(text), CHAT, logprobs=True)[0].json["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == [tokenizer().token_bytes(each) for each in ids_of(text)]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text


def test_minus_infinity_is_clamped() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        logprobs = Logprobs([[5, 6]], [[float("-inf"), float("-inf")]])
        out.push([5], started=Started(0, 0.0, 0.0), logprobs=logprobs, finished=finish())

    [entry] = run(script, CHAT, logprobs=True, top_logprobs=1)[0].json["choices"][0]["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
    assert run(script, logprobs=1)[0].json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_completion_logprobs() -> None:
    logprobs = run(scores(), logprobs=2)[0].json["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    assert logprobs["text_offset"] == list(itertools.accumulate(map(len, logprobs["tokens"][:-1]), initial=0))
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    only = run(scores(), logprobs=0)[0].json["choices"][0]["logprobs"]
    assert [list(top) for top in only["top_logprobs"]] == [[token] for token in only["tokens"]]
    assert run(scores())[0].json["choices"][0]["logprobs"] is None


def joined(events: list[Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for event in events:
        for name, column in columns.items():
            column += event["choices"][0]["logprobs"][name]
    return columns


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_go_on_over_the_chunks_of_a_stream(echo: bool) -> None:
    data = {"logprobs": 1, "echo": echo, "prompt": "naïve 漢字"}
    whole = run(scores(), **data)[0].json["choices"][0]
    events = run(scores(), **data, stream=True)[0].events
    assert joined(events) == whole["logprobs"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]


def test_echo_has_an_entry_for_every_token() -> None:
    answer, engine = run(scores(), prompt=[5, 6, 7, 8], echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.json["choices"][0]["logprobs"]
    assert engine.requests[0].params.prompt_logprobs == 1
    assert {len(column) for column in logprobs.values()} == {5}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:4] == [-0.75, -0.875, -1.0]
    assert all(logprobs["top_logprobs"][1:])


def test_echo() -> None:
    assert run(answers(" there"), echo=True)[0].json["choices"][0]["text"] == "Hello there"
    events = run(answers(" there"), echo=True, stream=True, n=2)[0].events
    for index in range(2):
        texts = [e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == index]
        assert "".join(texts) == "Hello there"
    assert not any(request.params.prompt_logprobs for request in run(answers("ok"), echo=True)[1].requests)


def test_max_tokens_zero_scores_the_prompt_only() -> None:
    answer, engine = run(scores(), echo=True, logprobs=1, max_tokens=0)
    [choice] = answer.json["choices"]
    assert engine.requests[0].params.max_tokens == 1
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
    assert len(choice["logprobs"]["tokens"]) == answer.json["usage"]["prompt_tokens"]
    assert answer.json["usage"]["completion_tokens"] == 0
    assert run(answers("ok"), max_tokens=0)[0].json["choices"][0]["text"] == ""
    refused = run(silent, CHAT, max_tokens=0)[0]
    assert (refused.status, refused.error["param"]) == (400, "max_tokens")


def test_only_the_first_choice_scores_the_prompt() -> None:
    answer, engine = run(scores(), echo=True, logprobs=1, n=2)
    assert [request.params.prompt_logprobs for request in engine.requests] == [1, None]
    first, second = answer.json["choices"]
    assert first["logprobs"] == second["logprobs"]
