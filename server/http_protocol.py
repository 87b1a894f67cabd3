"""HTTP/1.1 on one connection: uvicorn's, with the bounds that it lacks on heads, trailers and waiting.

A head (request line and headers) may take HEAD_SECONDS from its first byte and has bounded bytes and fields; a
connection on which nothing comes at all is closed like one that is idle between two requests. The pace of a body is
the middleware's business (`server/middleware.py`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server import limits
from server.errors import ApiError, BadRequest, HeadersTooLarge, RequestTimeout
from server.middleware import POLLED_PATHS

access_logger = logging.getLogger("server.access")

HEAD_SECONDS = 10.0
"""From the first byte of a request to the end of its headers."""
WRITE_BUFFER_BYTES = 16 * 1024
"""What waits here for a client that does not read, before the answer does; the kernel keeps eight times as much."""
LINGER_SECONDS = 2.0
"""How long what a client still sends is read and dropped after a refusal. Closing at once resets the connection, and
the client may never see why."""
_UPGRADE = re.compile(rb"\r\n[Uu][Pp][Gg][Rr][Aa][Dd][Ee]:")
"""An offer of another protocol, h2c from Java's client, may be passed over, but the parser takes what follows the head
for that protocol. So it never sees the offer. No JSON has this in it."""


class Turnstile:
    """Starts one request in each turn of the event loop: a burst does not hold up whoever only asks how we are. The
    loop accepts no more than one connection in a turn, so turns must be short."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def enter(self, loop: asyncio.AbstractEventLoop, start: Callable[[], None]) -> None:
        if not self._waiting:
            loop.call_soon(self._turn, loop)
        self._waiting.append(start)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting.popleft()()
        if self._waiting:
            loop.call_soon(self._turn, loop)


class HttpProtocol(HttpToolsProtocol):
    """What cannot be a request is answered once, with our error object, and the connection is closed."""

    def __init__(self, turnstile: Turnstile, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turnstile = turnstile
        self._in_head = True
        self._is_ending = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._silent_bytes = 0
        """Received since the parser last gave anything: a field, or part of a URL or of a body."""
        self._refusal: ApiError | None = None
        """Set by a callback, which then raises to stop the parser."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        # Else they refer to each other, and taking a thousand apart stops everything for the garbage collector's 50 ms.
        self.cycle = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._is_ending or self.transport.is_closing():
            return
        if self._in_head:
            self._begin_head_timer()
            data = _UPGRADE.sub(b"\r\nIgnored:", data)
        self._silent_bytes += len(data)
        super().data_received(data)
        # The parser keeps an unfinished field to itself, however long it gets.
        if self._silent_bytes > limits.MAX_HEADER_BYTES.maximum and not self._is_ending:
            self._refuse(_too_large())

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser, or one of the callbacks below, has raised."""
        self._refuse(self._refusal or BadRequest("This is not a valid HTTP/1.1 request."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._silent_bytes = 0
        self._begin_head_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
            if len(self.headers) > limits.MAX_HEADERS.maximum:
                self._stop(HeadersTooLarge("The request has too many headers."))
            self._count(len(name) + len(value))
        # else a trailer: nothing here reads them, and their sum is bounded as what gives nothing is.

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._stop(BadRequest("This server speaks HTTP/1.1 and changes to no other protocol."))
        self._in_head = False
        self._head_bytes = self._silent_bytes = 0
        self._end_head_timer()
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["path"] in POLLED_PATHS:
            super()._start_asgi_task(cycle, app)
        else:
            self._turnstile.enter(self.loop, partial(super()._start_asgi_task, cycle, app))

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._silent_bytes = 0

    def _count(self, size: int) -> None:
        self._silent_bytes = 0
        self._head_bytes += size
        if self._head_bytes > limits.MAX_HEADER_BYTES.maximum:
            self._stop(_too_large())

    def _stop(self, error: ApiError) -> None:
        self._refusal = error
        raise error

    def _begin_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_answering:
            self._begin_head_timer()  # the client has sent ahead: nobody has waited for the rest yet
        elif not self._is_ending:
            self._refuse(RequestTimeout("The headers of the request came too slowly."))

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    @property
    def expects_body(self) -> bool:
        """Of the request that is answered."""
        return self.cycle is not None and self.cycle.more_body

    @property
    def _is_answering(self) -> bool:
        """An earlier request, or the body's own, waits for its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        """Answer, where that cannot be taken for the answer to another request, and close."""
        self._end_head_timer()
        access_logger.info("- other %d connection closed: %s", error.status, error.message)
        if self._is_answering and (self._in_head or self.cycle.response_started or self.pipeline):
            self._is_ending = True
            self.transport.close()
            return
        body = error.body()
        self.transport.write(
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        self.close_with_answer()

    def close_with_answer(self) -> None:
        """Nothing more is sent; the connection ends when the client has seen that, or soon."""
        self._is_ending = True
        if self.transport.is_closing():
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class _AnswerTransport:
    """What one answer needs of the connection; `close` lets a client that is still sending read the answer first."""

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol = protocol
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        if self._protocol.expects_body:
            self._protocol.close_with_answer()
        else:
            self._protocol.transport.close()


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge("The headers of the request are too large.")
