"""Bytes that are no request, or too many, or too slow: an answer, an end, and never a 500 or a wait without end."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import uvloop

from server import http_protocol, limits, middleware
from server.http_protocol import HttpProtocol
from tests.server.raw_http import HOST, Reply, exchange, serving

T = TypeVar("T")
JSON = b"Content-Type: application/json\r\n"
BODY = b'{"prompt": "x", "max_tokens": 1}'
GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n\r\n"
WHOLE = POST + LENGTH + b"\r\n" + BODY
MAX_HEADERS = int(limits.MAX_HEADERS.maximum)
MAX_BYTES = int(limits.MAX_HEADER_BYTES.maximum)


def with_server(client: Callable[[int], Awaitable[T]]) -> T:
    async def run() -> T:
        async with serving() as port:
            result = await client(port)
            assert (await exchange(port, GET + b"\r\n", until_closed=False)).status == 200  # it still lives
            return result

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the daemon's
        return runner.run(run())


def send(*pieces: bytes, pause: float = 0.0, until_closed: bool = True) -> Reply:
    return with_server(lambda port: exchange(port, *pieces, pause=pause, until_closed=until_closed))


MALFORMED = {
    "length and chunks": POST + LENGTH + CHUNKED + b"\r\n" + BODY,
    "two lengths": POST + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "length with a sign": POST + b"Content-Length: +5\r\n\r\n" + BODY,
    "length that is no number": POST + b"Content-Length: x\r\n\r\n",
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + BODY,
    "bad end of a chunk": POST + CHUNKED + b"\r\n5\r\nabcdeXX\r\n0\r\n\r\n",
    "size that is no number": POST + CHUNKED + b"\r\nzz\r\nabc\r\n0\r\n\r\n",
    "folded header": GET + b"X-A: b\r\n c\r\n\r\n",
    "space before the colon": GET + b"X-A : b\r\n\r\n",
    "bare line feeds": GET.replace(b"\r\n", b"\n") + b"\n",
    "null in a header": GET + b"X-A: \0\r\n\r\n",
    "no header name": GET + b": b\r\n\r\n",
    "version 3.7": GET.replace(b"1.1", b"3.7") + b"\r\n",
    "unknown method": GET.replace(b"GET", b"GETT") + b"\r\n",
    "no path": b"GET  HTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS": bytes.fromhex("16030100f8010000f40303") + bytes(range(240)),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_request(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        reply = send(data)
    assert (reply.status, reply.closed) == (400, True)
    assert reply.message == "This is not a valid HTTP/1.1 request."
    assert b"close" in reply.data
    assert "connection closed" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("hosts", [b"", HOST + HOST, HOST + b"Host: evil.example\r\n"])
def test_a_request_has_one_host(hosts: bytes) -> None:
    reply = send(b"GET /health HTTP/1.1\r\n" + hosts + b"\r\n", until_closed=False)
    assert (reply.status, reply.message) == (400, "A request has one Host header.")


def test_http_1_0_knows_no_host() -> None:
    """As HAProxy's health checks ask; no browser does."""
    assert send(b"GET /health HTTP/1.0\r\n\r\n").status == 200
    assert send(b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n").status == 403
    assert send(b"GET /health HTTP/1.0\r\n" + HOST * 2 + b"\r\n").status == 400


UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    "lower case": b"upgrade:websocket\r\nconnection: upgrade\r\n",
}


@pytest.mark.parametrize("offer", UPGRADES.values(), ids=UPGRADES.keys())
def test_offers_of_another_protocol_are_passed_over(offer: bytes) -> None:
    """Java's client makes one with the first request of each connection."""
    reply = send((POST + offer + LENGTH + b"\r\n" + BODY) * 2 + GET + offer + b"\r\n" + GET + CLOSE)
    assert reply.data.count(b"HTTP/1.1 200 OK") == 4


@pytest.mark.parametrize(
    "pieces",
    [
        (POST + b"Connection: Upgrade\r\nUpg", b"rade: h2c\r\n" + LENGTH + b"\r\n" + BODY),
        (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",),
    ],
)
def test_what_cannot_be_passed_over_ends_the_connection(pieces: tuple[bytes, ...]) -> None:
    reply = send(*pieces, pause=0.1)
    assert (reply.status, reply.closed) == (400, True)
    assert "protocol" in reply.message


def test_number_of_headers() -> None:
    def head(count: int) -> bytes:
        return GET + b"".join(b"X-%d: y\r\n" % index for index in range(count - 1)) + b"\r\n"

    assert send(head(MAX_HEADERS), until_closed=False).status == 200
    for count in (MAX_HEADERS + 1, 1000):
        reply = send(head(count))
        assert (reply.status, reply.closed, reply.message) == (431, True, "The request has too many headers.")


def test_size_of_the_headers() -> None:
    used = len(b"/healthHostlocalhostX")
    assert send(GET + b"X: " + b"y" * (MAX_BYTES - used) + b"\r\n\r\n", until_closed=False).status == 200
    for data in (
        GET + b"X: " + b"y" * (MAX_BYTES - used + 1) + b"\r\n\r\n",
        GET + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
        GET + b"".join(b"X-%d: %b\r\n" % (index, b"y" * 1000) for index in range(40)) + b"\r\n",
        GET.replace(b"/health", b"/" + b"h" * MAX_BYTES) + b"\r\n",
    ):
        reply = send(data)
        assert (reply.status, reply.closed, reply.message) == (431, True, "The headers of the request are too large.")


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(GET + b"X: ", id="value"),
        pytest.param(GET + b"X", id="name"),
        pytest.param(b"GET /", id="path"),
        pytest.param(POST + CHUNKED + b"\r\n1\r\n \r\n0\r\nX: ", id="trailer"),
        pytest.param(POST + CHUNKED + b"\r\n1;", id="chunk extension"),
    ],
)
def test_twenty_megabytes_without_an_end(start: bytes) -> None:
    """Refused after the first few of them: nothing collects what never ends."""
    reply = send(start, *[b"y" * 65_536] * (20 * 2**20 // 65_536))
    assert (reply.status, reply.closed) == (431, True)


def test_an_answer_before_the_body_reaches_a_client_that_goes_on_sending() -> None:
    megabytes = 20 * 2**20
    reply = send(POST + b"Content-Length: %d\r\n\r\n" % megabytes, *[b" " * 65_536] * (megabytes // 65_536))
    assert (reply.status, reply.closed) == (413, True)


def test_empty_lines_without_an_end() -> None:
    assert send(b"\r\n" * (MAX_BYTES + 1)).status == 431


def test_trailers_are_not_headers() -> None:
    """Else what a proxy has checked would not be what is read here."""
    data = POST.replace(JSON, b"") + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    assert send(data + JSON + b"\r\n", until_closed=False).status == 415


@pytest.mark.parametrize("start", [b"G", b"GET /hea", GET, GET + b"X: y", b"\r\n", POST + LENGTH])
def test_headers_that_never_end(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.1)
    reply = send(start)
    assert (reply.status, reply.closed) == (408, True)
    assert reply.message == "The headers of the request came too slowly."


def test_a_byte_now_and_then_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    assert send(*[bytes([byte]) for byte in GET] * 10, pause=0.01).status == 408


def test_a_body_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)
    for start in (POST + LENGTH + b"\r\n" + BODY[:-1], POST + CHUNKED + b"\r\n5\r\nabc"):
        reply = send(start)
        assert (reply.status, reply.closed, reply.message) == (408, True, "The body of the request came too slowly.")


def test_a_connection_on_which_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed without a word, before its first request as after each."""
    monkeypatch.setattr("server.daemon.KEEP_ALIVE_SECONDS", 0.1)
    assert send() == Reply(b"", True)
    reply = send(GET + b"\r\n")
    assert (reply.status, reply.closed) == (200, True)


def test_slow_answers_do_not_count_as_slow_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of the next request waits for this one's answer."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    slow = b'{"prompt": "x", "stream": true}'
    head = POST + b"Content-Length: %d\r\n\r\n" % len(slow)
    first = send(head + slow[:-1], b"", slow[-1:] + GET[:9], pause=0.2)
    assert first.status == 200
    assert b"[DONE]" in first.data
    assert first.data.count(b"HTTP/1.1 ") == 2  # and then the 408 of the second


def test_requests_sent_ahead_are_answered_in_order() -> None:
    reply = send(WHOLE * 3 + GET + CLOSE)
    assert reply.data.count(b"HTTP/1.1 200 OK") == 4
    assert reply.data.endswith(b'{"status":"ready"}')


def test_nothing_is_written_into_another_answer() -> None:
    """Rubbish behind a request that is being answered ends the connection, and is not taken for its answer."""
    reply = send(WHOLE + b"\0\0\0\0")
    assert (reply.status, reply.closed) == (0, True)


@pytest.mark.parametrize("data", [WHOLE, GET + b"\r\n", POST + LENGTH + b"\r\n", GET, b"GETT"])
def test_connections_leave_nothing_to_the_garbage_collector(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[HttpProtocol]] = []
    connection_made = HttpProtocol.connection_made

    def connection_noted(self: HttpProtocol, transport: asyncio.Transport) -> None:
        made.append(weakref.ref(self))
        connection_made(self, transport)

    async def leave(port: int) -> None:
        reading = asyncio.create_task(exchange(port, data))
        await asyncio.sleep(0.1)
        reading.cancel()
        async with asyncio.timeout(5):
            while made[0]() is not None:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(HttpProtocol, "connection_made", connection_noted)
    gc.disable()
    try:
        with_server(leave)
    finally:
        gc.enable()


@pytest.mark.parametrize("path", [b"/health", b"/ready", b"/version", b"/v1/models", b"/metrics"])
def test_head(path: bytes) -> None:
    reply = send(b"HEAD %b HTTP/1.1\r\n" % path + HOST + b"Connection: close\r\n\r\n")
    assert (reply.status, reply.body) == (200, b"")
    assert b"content-length" in reply.data.lower()
    assert send(b"HEAD /v1/completions HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n").status == 405


def test_a_client_that_asks_before_it_sends() -> None:
    reply = send(POST + LENGTH + b"Expect: 100-continue\r\nConnection: close\r\n\r\n", BODY, pause=0.05)
    assert reply.data.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_client_that_leaves_during_the_upload(caplog: pytest.LogCaptureFixture) -> None:
    async def leave(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + LENGTH + b"\r\n" + BODY[:5])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()
        async with asyncio.timeout(5):
            while " 499 " not in caplog.text:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.INFO):
        with_server(leave)
    assert caplog.text.count("POST /v1/completions 499 ") == 1
    assert "Traceback" not in caplog.text
