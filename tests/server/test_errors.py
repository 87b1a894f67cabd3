"""One envelope for every failure, whatever layer it comes from; nothing of the request in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from scheduler.messages import Finished, FinishReason
from server.engine_client import EngineState
from server.errors import (
    MAX_MESSAGE,
    BadRequest,
    ContextLengthExceeded,
    InternalError,
    Overloaded,
    Unavailable,
    field_path,
    finished_error,
)
from tests.server.harness import Answer, ScriptedEngine, answers, call, chat, make_app, post

CANARY = "canary-7f3a"


def ask(method: str, path: str, body: bytes = b"", headers: Any = (), **more: Any) -> Answer:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"), **more)
        return await call(app, method, path, body, headers)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "unknown": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e400}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x",}',
        b'{"prompt": "x"} {}',
        b'{"a":' * 50_000,
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_body_that_is_not_the_json_it_should_be(body: bytes) -> None:
    answer = ask("POST", "/v1/completions", body, [(b"content-type", b"application/json")])
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 500


@pytest.mark.parametrize(
    "media_type", [b"application/x-www-form-urlencoded", b"text/plain", b"", b"multipart/form-data"]
)
def test_other_content_types_are_refused(media_type: bytes) -> None:
    assert ask("POST", "/v1/completions", b'{"prompt": "x"}', [(b"content-type", media_type)]).status == 415


@pytest.mark.parametrize("coding", [b"gzip", b"br", b"Deflate, gzip"])
def test_compressed_bodies_are_refused_as_such(coding: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-encoding", coding)]
    refused = ask("POST", "/v1/completions", b"\x1f\x8b", headers)
    assert refused.status == 415
    assert "compressed" in refused.error["message"]
    headers[1] = (b"content-encoding", b"identity")
    assert ask("POST", "/v1/completions", b'{"prompt": "x"}', headers).status == 200


@pytest.mark.parametrize("media_type", [b"application/json; charset=utf-8", b"Application/JSON", b"application/x+json"])
def test_json_content_types(media_type: bytes) -> None:
    assert ask("POST", "/v1/completions", b'{"prompt": "x"}', [(b"content-type", media_type)]).status == 200


def test_unknown_path_and_method() -> None:
    assert ask("GET", "/v2/models").error["message"] == "This path does not exist here."
    assert ask("POST", "/v1/completions/").status == 404
    refused = ask("GET", "/v1/completions")
    assert (refused.status, refused.headers["allow"]) == (405, "POST")
    assert refused.error["type"] == "invalid_request_error"
    assert ask("DELETE", "/v1/models").headers["allow"] == "GET, HEAD"
    assert ask("HEAD", "/v1/models").status == 200


def test_unknown_model() -> None:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"))
        return await post(app, "/v1/chat/completions", chat(model="gpt-x"))

    answer = asyncio.run(run())
    assert answer.status == 404
    assert answer.error == {
        "message": "The model `gpt-x` does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (EngineState.STARTING, "model_loading"),
        (EngineState.DOWN, "engine_down"),
        (EngineState.STOPPED, "shutting_down"),
    ],
)
def test_without_an_engine(state: EngineState, code: str) -> None:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"), state)
        return await post(app, "/v1/chat/completions", chat(stream=True))

    answer = asyncio.run(run())
    assert (answer.status, answer.error["code"]) == (503, code)
    assert int(answer.headers["retry-after"]) >= 1


def test_unforeseen_failure_is_a_fixed_text_with_the_id(caplog: pytest.LogCaptureFixture) -> None:
    def explode(engine: ScriptedEngine, *_: object) -> None:
        raise ZeroDivisionError("/secret/path")

    async def run() -> Answer:
        app, _ = make_app(explode)
        return await post(app, "/v1/completions", {"prompt": CANARY}, [(b"x-request-id", b"abc.1")])

    answer = asyncio.run(run())
    assert answer.status == 500
    assert answer.error["message"] == "The server failed on this request. Its id is abc.1."
    assert "request abc.1 failed" in caplog.text
    assert CANARY not in caplog.text


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": CANARY, "temperature": CANARY},
        {"prompt": [CANARY, 1]},
        {"prompt": {CANARY: CANARY}},
        {"prompt": "x", "stop": [CANARY * 50]},
        {"prompt": "x", "stream_options": CANARY},
        {"prompt": "x", "suffix": [CANARY]},
        {"prompt": "x", "logit_bias": {"1": CANARY}},
        {"prompt": "x", "n": CANARY},
        {"prompt": "x" * 20_000 + CANARY},
    ],
)
def test_errors_never_repeat_the_input(data: dict[str, Any]) -> None:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"))
        return await post(app, "/v1/completions", data)

    answer = asyncio.run(run())
    assert answer.status == 400
    assert CANARY.encode() not in answer.body
    assert len(answer.body) < 1000


def test_many_errors_make_one_short_answer() -> None:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"))
        return await post(app, "/v1/chat/completions", {"messages": [{"role": 1, "content": 1}] * 4096})

    answer = asyncio.run(run())
    assert (answer.status, answer.error["param"]) == (400, "messages[0].role")
    assert len(answer.body) < 500


def test_field_path() -> None:
    assert field_path(("messages", 0, "content", "<list>", 12, "<text>", "text")) == "messages[0].content[12].text"
    assert field_path(()) == ""


def test_messages_are_bounded() -> None:
    assert len(BadRequest("x" * 5000).message) == MAX_MESSAGE


def test_terminal_events() -> None:
    def error(reason: FinishReason, **more: Any) -> Any:
        return finished_error(Finished(reason=reason, **more), "id-1")

    assert error(FinishReason.STOP) is None
    assert error(FinishReason.LENGTH) is None
    assert isinstance(error(FinishReason.REJECTED, code="context_length_exceeded"), ContextLengthExceeded)
    assert isinstance(error(FinishReason.REJECTED, code="other"), BadRequest)
    assert isinstance(error(FinishReason.ABORT), Unavailable)
    failed = error(FinishReason.ERROR, message="/opt/engine.py exploded", code="nan_logits")
    assert isinstance(failed, InternalError)
    assert (failed.code, "/opt" in failed.message, "id-1" in failed.message) == ("nan_logits", False, True)


def test_retry_after_is_a_header() -> None:
    assert Overloaded("full", retry_after=3).headers == {"Retry-After": "3"}
