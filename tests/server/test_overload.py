"""Too much at once, too long, or too much for a key: what clients get, and that everything is given back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from scheduler.messages import AddRequest, Started
from server import limits
from server.chat_template import ChatTemplate
from server.streams import RequestStream
from server.tool_syntax import detect_syntax
from tests.server.harness import (
    JSON,
    Answer,
    ScriptedEngine,
    answers,
    call,
    chat,
    finish,
    make_app,
    post,
    silent,
    tokenizer,
)

PATH = "/v1/completions"
KEY = "k requests_per_minute=2 tokens_per_minute=1000"
BEARER = [(b"authorization", b"Bearer k")]


def load(app: Any) -> Any:
    """The gate, as the tests of this file look into it."""
    return next(each.kwargs["gate"] for each in app.user_middleware if "gate" in each.kwargs)


def test_rate_limits_and_their_headers() -> None:
    async def run() -> list[Answer]:
        app, _ = make_app(answers("one two three"), api_key=(KEY, "other"))
        return [await post(app, PATH, {"prompt": "Hello"}, BEARER) for _ in range(3)] + [
            await post(app, PATH, {"prompt": "Hello"}, [(b"authorization", b"Bearer other")])
        ]

    first, second, refused, other = asyncio.run(run())
    assert (first.status, second.status, refused.status, other.status) == (200, 200, 429, 200)
    used = first.json["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - used)
    assert refused.error["code"] == "rate_limit_exceeded"
    assert 25 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]


def test_every_endpoint_that_works_for_a_key_counts() -> None:
    async def run() -> list[int]:
        app, _ = make_app(answers("ok"), api_key=(KEY,))
        message = [{"role": "user", "content": "x"}]
        return [
            (await post(app, "/tokenize", {"prompt": "x"}, BEARER)).status,
            (
                await post(
                    app, "/v1/messages", {"model": "latentd-builtin", "max_tokens": 1, "messages": message}, BEARER
                )
            ).status,
            (
                await post(app, "/v1/messages/count_tokens", {"model": "latentd-builtin", "messages": message}, BEARER)
            ).status,
            (await post(app, "/v1/responses", {"input": "x"}, BEARER)).status,
            (await post(app, "/v1/chat/completions", {"messages": message}, BEARER)).status,
        ]

    assert asyncio.run(run()) == [200, 200, 429, 429, 429]


def test_queued_tokens_are_counted_from_the_door_to_the_first_token() -> None:
    waiting: list[RequestStream] = []

    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        waiting.append(stream)

    async def run() -> None:
        app, engine = make_app(script, max_queued_tokens=10)
        gate = load(app)
        first = asyncio.create_task(post(app, PATH, {"prompt": [5] * 8}))
        await engine.submitted.wait()
        assert gate.queued_tokens == 8
        refused = await post(app, PATH, {"prompt": [5] * 3})
        assert (refused.status, refused.error["code"]) == (503, "server_overloaded")
        assert "10 is its limit" in refused.error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert len(engine.requests) == 1
        waiting[0].push([5], started=Started(0, 0.0, 0.0))
        while gate.queued_tokens:
            await asyncio.sleep(0)
        assert gate.open_requests == 1
        engine.submitted.clear()
        second = asyncio.create_task(post(app, PATH, {"prompt": [5] * 3}))
        await engine.submitted.wait()
        assert gate.queued_tokens == 3
        for stream in waiting:
            stream.push([], finished=finish())
        assert [(await task).status for task in (first, second)] == [200, 200]
        assert (gate.queued_tokens, gate.open_requests) == (0, 0)
        metrics = (await post(app, "/metrics", {}, [])).status
        assert metrics == 405

    asyncio.run(run())


def test_a_request_that_does_not_start_in_time() -> None:
    async def run() -> tuple[Answer, ScriptedEngine, Any]:
        app, engine = make_app(silent, queue_timeout=0.05)
        return await post(app, PATH, {"prompt": "x"}), engine, load(app)

    answer, engine, gate = asyncio.run(run())
    assert (answer.status, answer.error["code"], answer.error["type"]) == (503, "queue_timeout", "server_error")
    assert int(answer.headers["retry-after"]) >= 1
    assert engine.aborted == [engine.requests[0].request_id]
    assert (gate.queued_tokens, gate.open_requests) == (0, 0)


@pytest.mark.parametrize("sign", ["progress", "token"])
def test_a_request_that_has_started_may_take_its_time(sign: str) -> None:
    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        async def push() -> None:
            assert request.progress
            if sign == "progress":
                stream.push([], progress=1)
            else:
                stream.push([5], started=Started(0, 0.0, 0.0))
            await asyncio.sleep(0.2)
            stream.push([5], finished=finish())

        engine.tasks.append(asyncio.ensure_future(push()))

    async def run() -> Answer:
        app, _ = make_app(script, queue_timeout=0.1)
        return await post(app, PATH, {"prompt": "x"})

    assert asyncio.run(run()).status == 200


def test_a_request_that_takes_too_long() -> None:
    async def run(**options: Any) -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(silent, request_timeout=0.05)
        return await post(app, PATH, {"prompt": "x", **options}), engine

    answer, engine = asyncio.run(run())
    assert (answer.status, answer.error["code"]) == (504, "request_timeout")
    assert answer.headers["x-should-retry"] == "false"
    assert engine.aborted == [engine.requests[0].request_id]
    assert asyncio.run(run(timeout=0.01))[0].status == 408  # the client's own limit came first
    assert asyncio.run(run(timeout=5))[0].status == 504


def test_an_answer_that_has_begun_ends_with_the_error() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        stream.push([5], started=Started(0, 0.0, 0.0))

    async def run() -> Answer:
        app, _ = make_app(script, request_timeout=0.1)
        return await post(app, PATH, {"prompt": "x", "stream": True})

    *_, error = asyncio.run(run()).events
    assert error["error"]["code"] == "request_timeout"


def test_the_engine_hears_whose_a_request_is() -> None:
    async def run() -> set[str]:
        app, engine = make_app(answers("ok"), api_key=("a", "b"))
        for key in (b"a", b"b", b"a"):
            await post(app, PATH, {"prompt": "x"}, [(b"authorization", b"Bearer " + key)])
        assert engine.requests[0].tenant == engine.requests[2].tenant
        return {request.tenant for request in engine.requests}

    tenants = asyncio.run(run())
    assert len(tenants) == 2
    assert "a" not in tenants


BOMB = """{% if messages[0].content == 'bomb' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}
{% endfor %}{% endif %}{{ messages[0].content }}"""


def test_a_template_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, nothing else waits for it, and the place at the door is free again."""
    syntax = detect_syntax(tokenizer(), tokenizer().chat_template or "")
    template = ChatTemplate(BOMB, bos_token="", eos_token="", control_tokens=(), syntax=syntax)
    monkeypatch.setattr("server.app.load_chat_template", lambda _: template)
    monkeypatch.setattr("server.chat.RENDER_SECONDS", 0.5)

    async def run() -> None:
        app, _ = make_app(answers("ok"))
        bomb = {"messages": [{"role": "user", "content": "bomb"}]}
        bombs = [asyncio.create_task(post(app, "/v1/chat/completions", bomb)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert (await post(app, PATH, {"prompt": "x"})).status == 200
        for answer in await asyncio.gather(*bombs):
            assert (answer.status, answer.error["param"]) == (400, "messages")
            assert "chat template takes more than" in answer.error["message"]
        assert load(app).open_requests == 0
        assert (await post(app, "/v1/chat/completions", chat())).status == 200

    asyncio.run(run())


def test_bodies_that_are_not_tokens_yet_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUEUED_BODY_BYTES", replace(limits.QUEUED_BODY_BYTES, maximum=300_000))
    monkeypatch.setattr("server.middleware.SMALL_BODY_BYTES", 1000)
    long = json.dumps({"prompt": [5] * 3, "user": "u" * 200_000}).encode()

    async def run() -> None:
        app, engine = make_app(silent)
        gone = asyncio.Event()
        streaming = asyncio.create_task(post(app, PATH, long, disconnect=gone))
        await engine.submitted.wait()
        streaming_too = asyncio.create_task(post(app, PATH, long, disconnect=gone))
        await asyncio.sleep(0.05)
        assert len(engine.requests) == 2  # the first is tokens by now
        gone.set()
        await asyncio.gather(streaming, streaming_too)

    asyncio.run(run())


def test_a_body_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUEUED_BODY_BYTES", replace(limits.QUEUED_BODY_BYTES, maximum=300_000))
    monkeypatch.setattr("server.middleware.SMALL_BODY_BYTES", 1000)
    part = b" " * 200_000

    async def upload(app: Any, *parts: bytes) -> Answer:
        return await call(app, "POST", PATH, parts, [JSON])

    async def run() -> None:
        app, _ = make_app(answers("ok"))
        more = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await more.wait()
            return {"type": "http.disconnect"}

        held = asyncio.create_task(slow_upload(app, part, receive))
        await asyncio.sleep(0.02)
        refused = await upload(app, part)
        assert (refused.status, refused.error["code"]) == (503, "server_overloaded")
        assert (await post(app, PATH, {"prompt": "x"})).status == 200  # small ones pass
        more.set()
        await held
        assert (await upload(app, part)).status == 400  # only spaces, but read

    asyncio.run(run())


async def slow_upload(app: Any, part: bytes, then: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """A body that stops in the middle."""
    parts = [part]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(), "more_body": True} if parts else await then()

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [JSON, (b"host", b"localhost")]}
    await app({**scope, "query_string": b"", "root_path": "", "raw_path": PATH.encode()}, receive, send)
