"""The stream as bytes: framing, order, errors on the way, keep-alive, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
import uvicorn

from scheduler.messages import AddRequest, FinishReason, Started
from server import generation, sequence, sse
from server.engine_client import EngineState
from server.streams import RequestStream
from tests.server.harness import Answer, ScriptedEngine, answers, chat, finish, ids_of, make_app, post, silent
from tests.server.raw_http import serving

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TEXT = "one two three"


def stream(path: str, data: dict[str, Any], text: str = TEXT) -> Answer:
    async def run() -> Answer:
        app, _ = make_app(answers(text))
        return await post(app, path, {**data, "stream": True})

    return asyncio.run(run())


def test_chat_chunks_in_order() -> None:
    answer = stream(CHAT, chat())
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    chunks = answer.events
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(choice["delta"]) == ["content"] and choice["delta"]["content"] for choice in choices[1:-1])
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT


def test_completion_chunks() -> None:
    chunks = stream(COMPLETIONS, {"prompt": "x"}).events
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_last_and_only_when_asked_for(path: str) -> None:
    data = chat() if path == CHAT else {"prompt": "x"}
    chunks = stream(path, {**data, "stream_options": {"include_usage": True}}).events
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == len(ids_of(TEXT))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for options in ({}, None, {"include_usage": False}, {"include_usage": None}):
        assert all("usage" not in chunk for chunk in stream(path, {**data, "stream_options": options}).events)


def test_continuous_usage() -> None:
    chunks = stream(COMPLETIONS, {"prompt": "x", "stream_options": {"continuous_usage_stats": True}}).events
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == len(ids_of(TEXT))


def test_stream_options_without_stream() -> None:
    async def run(options: object) -> Answer:
        app, _ = make_app(answers(TEXT))
        return await post(app, CHAT, chat(stream_options=options))

    assert asyncio.run(run({"include_usage": True})).error["param"] == "stream_options"
    assert asyncio.run(run(None)).status == 200


def test_what_is_ready_together_is_written_together() -> None:
    def at_once(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        out.push(ids_of(TEXT), started=Started(0, 0.0, 0.0), finished=finish())

    async def run() -> Answer:
        app, _ = make_app(at_once)
        return await post(app, CHAT, chat(stream=True, stream_options={"include_usage": True}))

    answer = asyncio.run(run())
    assert len(answer.writes) == 1
    assert len(answer.events) == 4  # role, text, finish, usage


def test_error_before_the_first_token_is_a_status() -> None:
    def reject(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        out.push([], finished=finish(FinishReason.REJECTED, code="context_length_exceeded", message="too long"))

    async def run() -> Answer:
        app, _ = make_app(reject)
        return await post(app, CHAT, chat(stream=True))

    answer = asyncio.run(run())
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_error_after_the_first_token_is_an_event(reason: FinishReason) -> None:
    def fail(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def tokens() -> None:
            out.push(ids_of("one"), started=Started(0, 0.0, 0.0))
            await asyncio.sleep(0.01)
            out.push([], finished=finish(reason, message="/root secret"))

        engine.tasks.append(asyncio.ensure_future(tokens()))

    async def run() -> Answer:
        app, _ = make_app(fail)
        return await post(app, CHAT, chat(stream=True))

    answer = asyncio.run(run())
    assert answer.status == 200
    *chunks, error = answer.events
    assert chunks
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert b"secret" not in answer.body


def test_unforeseen_error_after_the_first_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0
    push = sequence.Sequence.push

    def failing(self: Any, delta: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError
        return push(self, delta)

    monkeypatch.setattr(sequence.Sequence, "push", failing)
    answer = stream(CHAT, chat())
    assert answer.events[-1]["error"]["type"] == "server_error"
    assert "failed while streaming" in caplog.text


def test_silence_starts_the_response_with_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SILENCE_SECONDS", 0.02)

    def late(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def tokens() -> None:
            await asyncio.sleep(0.15)
            out.push(ids_of(TEXT), started=Started(0, 0.0, 0.0), finished=finish())

        engine.tasks.append(asyncio.ensure_future(tokens()))

    async def run(is_stream: bool) -> Answer:
        app, _ = make_app(late)
        return await post(app, CHAT, chat(stream=is_stream))

    answer = asyncio.run(run(True))
    assert answer.writes[0] == b": keep-alive\n\n"
    assert len(answer.events) == 3
    assert asyncio.run(run(False)).json["choices"][0]["message"]["content"] == TEXT


def test_keep_alive_between_tokens_is_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)

    def slow(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def tokens() -> None:
            out.push(ids_of(TEXT), started=Started(0, 0.0, 0.0))
            await asyncio.sleep(0.15)
            out.push([], finished=finish())

        engine.tasks.append(asyncio.ensure_future(tokens()))

    async def run() -> Answer:
        app, _ = make_app(slow)
        return await post(app, CHAT, chat(stream=True))

    answer = asyncio.run(run())
    assert b": keep-alive\n\n" in answer.writes
    assert len(answer.events) == 3


@pytest.mark.parametrize("is_stream", [True, False])
def test_client_that_leaves_before_the_first_token(is_stream: bool) -> None:
    async def run() -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(silent, max_open_requests=1)
        gone = asyncio.Event()
        request = asyncio.create_task(post(app, CHAT, chat(stream=is_stream), disconnect=gone))
        await engine.submitted.wait()
        gone.set()
        answer = await request
        assert len(engine.aborted) == 1
        assert not engine.streams
        # The place at the door is free again.
        engine._script = answers("ok")
        assert (await post(app, CHAT, chat())).status == 200
        return answer, engine

    answer, _ = asyncio.run(run())
    assert answer.status == 499  # for the log; nobody reads it


def test_client_that_leaves_in_the_middle() -> None:
    def first_only(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        out.push(ids_of("one"), started=Started(0, 0.0, 0.0))

    async def run() -> ScriptedEngine:
        app, engine = make_app(first_only)
        gone = asyncio.Event()
        answer = await post(app, CHAT, chat(stream=True), disconnect=gone, on_write=lambda _: gone.set())
        assert answer.status == 200
        return engine

    engine = asyncio.run(run())
    assert len(engine.aborted) == 1
    assert not engine.streams


def test_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_TIMEOUT_SECONDS", 0.05)

    async def run() -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(answers(TEXT * 20))
        return await post(app, COMPLETIONS, {"prompt": "x", "stream": True}, takes_nothing=True), engine

    answer, engine = asyncio.run(run())
    assert answer.writes == []
    assert not engine.streams


def test_streams_survive_the_shutdown_signal() -> None:
    """The daemon drains."""
    server = uvicorn.Server(uvicorn.Config("unused"))

    def slow(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def tokens() -> None:
            out.push(ids_of("one"), started=Started(0, 0.0, 0.0))
            await asyncio.sleep(0.05)
            server.handle_exit(signal.SIGTERM, None)
            engine.state = EngineState.STOPPED
            await asyncio.sleep(0.05)
            out.push(ids_of(" two"), finished=finish())

        engine.tasks.append(asyncio.ensure_future(tokens()))

    async def run() -> Answer:
        app, _ = make_app(slow)
        return await post(app, COMPLETIONS, {"prompt": "x", "stream": True})

    assert "".join(chunk["choices"][0]["text"] for chunk in asyncio.run(run()).events) == "one two"
    assert server.should_exit


def test_f18b_clients_that_leave_while_there_is_always_more() -> None:
    """Nothing spins for them, and the others are answered."""

    def endless(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def push() -> None:
            out.push([5], started=Started(0, 0.0, 0.0))
            while not out.ended:
                out.push([5])
                await asyncio.sleep(0.001)

        engine.tasks.append(asyncio.ensure_future(push()))

    async def run() -> None:
        app, engine = make_app(endless)
        async with serving(app) as port:
            body = b'{"prompt": "x", "stream": true}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            clients = []
            for _ in range(8):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                assert await reader.read(1000)
                clients.append(writer)
            for writer in clients:
                writer.transport.abort()
            async with asyncio.timeout(5):
                while len(engine.aborted) < 8:
                    await asyncio.sleep(0.001)

    asyncio.run(run())
