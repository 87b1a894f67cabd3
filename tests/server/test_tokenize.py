"""/tokenize, /detokenize, /tokenizer_info and the rendering of prompts: vLLM's shapes, and the truth."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.engine_client import EngineState
from tests.server.harness import WINDOW, Answer, answers, call, chat, ids_of, make_app, post, silent, tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]


def ask(path: str, body: Any, state: EngineState = EngineState.READY, **options: Any) -> Answer:
    async def run() -> Answer:
        app, engine = make_app(silent, state, **options)
        answer = await post(app, path, body)
        assert not engine.requests
        return answer

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_text(path: str) -> None:
    text = "The sea: Zürich 你好"
    answer = ask(path, {"prompt": text, "model": None}).json
    bos = [tokenizer().bos_token_id] if tokenizer().add_bos_token else []
    assert answer["tokens"] == bos + ids_of(text)
    assert (answer["count"], answer["max_model_len"], answer["token_strs"]) == (len(answer["tokens"]), WINDOW, None)
    bare = ask(path, {"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json
    assert bare["tokens"] == ids_of(text)
    assert len(bare["token_strs"]) == bare["count"]
    assert all(bare["token_strs"])


def test_empty_text() -> None:
    assert ask("/tokenize", {"prompt": "", "add_special_tokens": False}).json["tokens"] == []


def test_messages_are_what_a_chat_request_is_sent_as() -> None:
    async def run() -> None:
        app, engine = make_app(answers("ok"))
        body = chat(messages=[{"role": "system", "content": "S"}, *MESSAGES])
        await post(app, "/v1/chat/completions", body)
        sent = engine.prompt()
        assert (await post(app, "/tokenize", body)).json["tokens"] == sent
        rendered = (await post(app, "/v1/chat/completions/render", body)).json
        assert rendered["tokens"] == sent
        assert (rendered["count"], rendered["max_model_len"]) == (len(sent), WINDOW)
        assert rendered["model"] == "latentd-builtin"
        assert b"".join(map(tokenizer().token_bytes, sent)).decode() == rendered["prompt"]
        assert len(engine.requests) == 1

    asyncio.run(run())


def test_messages_without_the_generation_prompt() -> None:
    whole = ask("/tokenize", {"messages": MESSAGES}).json["tokens"]
    bare = ask("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json["tokens"]
    assert bare == whole[: len(bare)]
    assert len(bare) < len(whole)
    again = ask("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}).json["tokens"]
    assert again.count(tokenizer().bos_token_id) == 1  # the template has written it


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": "x", "messages": MESSAGES}, None),
        ({"prompt": ["x"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
    ],
)
def test_what_tokenize_refuses(body: Any, param: str | None) -> None:
    answer = ask("/tokenize", body)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_unknown_model_and_lone_surrogates() -> None:
    assert ask("/tokenize", {"prompt": "x", "model": "other"}).error["code"] == "model_not_found"
    assert ask("/detokenize", {"tokens": [5], "model": "other"}).error["code"] == "model_not_found"
    assert ask("/tokenize", b'{"prompt": "\\ud800"}').status == 400
    assert ask("/tokenize", b'{"messages": [{"role": "user", "content": "\\ud800"}]}').status == 400


def test_unknown_fields_are_named() -> None:
    headers = ask("/tokenize", {"prompt": "x", "colour": 1}).headers
    assert "colour" in headers["x-ignored-fields"]


def test_not_while_the_model_loads() -> None:
    answer = ask("/tokenize", {"prompt": "x"}, EngineState.STARTING)
    assert (answer.status, answer.error["code"]) == (503, "model_loading")


def test_a_full_server_refuses() -> None:
    async def run() -> Answer:
        app, engine = make_app(silent, max_open_requests=1)
        gone = asyncio.Event()
        open_one = asyncio.create_task(post(app, "/v1/completions", {"prompt": "x"}, disconnect=gone))
        await engine.submitted.wait()
        assert (await call(app, "GET", "/load")).json == {"server_load": 1}
        refused = await post(app, "/tokenize", {"prompt": "x"})
        gone.set()
        await open_one
        assert (await call(app, "GET", "/load")).json == {"server_load": 0}
        assert (await post(app, "/tokenize", {"prompt": "x"})).status == 200
        return refused

    assert asyncio.run(run()).error["code"] == "server_overloaded"


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_there_and_back(path: str) -> None:
    text = "Zürich 你好 🙂 \n\t end"
    assert ask(path, {"tokens": ids_of(text)}).json == {"prompt": text, "text": text}
    assert ask(path, {"tokens": []}).json["text"] == ""


def test_special_tokens_and_broken_characters() -> None:
    bos = tokenizer().bos_token_id
    assert ask("/detokenize", {"tokens": [bos, *ids_of("x")]}).json["text"] == f"{tokenizer().bos_token}x"
    assert ask("/detokenize", {"tokens": [bos, *ids_of("x")], "skip_special_tokens": True}).json["text"] == "x"
    half = next(i for i in range(tokenizer().vocab_size) if tokenizer().token_bytes(i)[:1] == b"\xf0")
    assert "\ufffd" in ask("/detokenize", {"tokens": [half]}).json["text"]


@pytest.mark.parametrize("token", [-1, 10**6, 2**31, True, 1.5, "x"])
def test_ids_that_are_none(token: Any) -> None:
    answer = ask("/detokenize", {"tokens": [5, token]})
    assert (answer.status, answer.error["param"]) == (400, "tokens[1]")


def test_tokenizer_info() -> None:
    async def run() -> Any:
        app, _ = make_app(silent)
        return (await call(app, "GET", "/tokenizer_info")).json

    info = asyncio.run(run())
    assert (info["bos_token"], info["eos_token"]) == (tokenizer().bos_token, tokenizer().eos_token)
    assert info["chat_template"] == tokenizer().chat_template
    assert (info["vocab_size"], info["model_max_length"]) == (tokenizer().vocab_size, WINDOW)


def test_render_refuses_what_chat_refuses() -> None:
    assert ask("/v1/chat/completions/render", {}).error["param"] == "messages"
    assert ask("/v1/chat/completions/render", chat(audio={})).error["param"] == "audio"
