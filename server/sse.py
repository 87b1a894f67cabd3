"""Server-sent events: the framing clients rely on, and a response that cannot leak what it streams from.

An event is `data: {json}` and an empty line, with LF: clients that split on "\\n\\n" find nothing when the separator is
CRLF. Keep-alive is a comment. Everything that is ready together is written together. An error before the first event is
a real HTTP status; after it, an event with the error object. The end is `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, ClientDisconnected, as_api_error

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n").encode()
KEEP_ALIVE_SECONDS = 15
SEND_TIMEOUT_SECONDS = 60
"""A client that takes nothing for so long is given up; the request is aborted."""

T = TypeVar("T")
_encoder = msgspec.json.Encoder()


def event(data: msgspec.Struct) -> bytes:
    return b"data: " + _encoder.encode(data) + b"\n\n"


def typed_event(data: msgspec.Struct) -> bytes:
    """An event whose name is the tag of its struct."""
    return f"event: {data.__struct_config__.tag}\n".encode() + event(data)


def error_end(error: ApiError) -> bytes:
    """The end of a stream that failed, for OpenAI's clients."""
    return b"data: " + error.body() + b"\n\n" + DONE


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; when the client leaves first, cancel it, wait for its end, and raise ClientDisconnected.

    The body of the request must have been read: the next thing to receive is the disconnect.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def start_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    headers: dict[str, str],
    request_id: str,
    on_error: Callable[[ApiError], bytes] = error_end,
) -> EventStream:
    """The response that streams `events`. Raises what comes instead of the first of them; `on_error` gives the events
    for what comes later.
    """
    first = await until_disconnect(request, anext(events))
    return EventStream(_with_errors(first, events, request_id, on_error), headers)


class EventStream(EventSourceResponse):
    """sse-starlette's response with a loop of its own: a timer and a cancel scope for every chunk took a third of the
    front-end's time, and SIGTERM is none of its business, since the daemon drains and running answers are finished.

    Sends events until they end or the client leaves, and a comment in silences. However it ends, what it streams from
    is closed.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events = events
        self._since = time.monotonic()
        """When the last write began."""
        self._is_writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientDisconnected when the client takes nothing for SEND_TIMEOUT_SECONDS."""
        work = asyncio.create_task(self._send_all(send)), asyncio.create_task(_disconnect(receive))
        try:
            while not (await asyncio.wait(work, timeout=self._time_left, return_when=asyncio.FIRST_COMPLETED))[0]:
                if self._time_left > 0:
                    continue
                if self._is_writing:
                    raise ClientDisconnected
                await self._write(send, KEEP_ALIVE)
            if work[0].done():
                work[0].result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    @property
    def _time_left(self) -> float:
        """Seconds until the client is given up, or until it gets a comment. Looked at now and then, so that what is
        sent needs no timer of its own."""
        limit = SEND_TIMEOUT_SECONDS if self._is_writing else min(KEEP_ALIVE_SECONDS, SEND_TIMEOUT_SECONDS)
        return self._since + limit - time.monotonic()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                await self._write(send, data)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        self._since, self._is_writing = time.monotonic(), True
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._is_writing = False


async def _with_errors(
    first: bytes, events: AsyncGenerator[bytes, None], request_id: str, on_error: Callable[[ApiError], bytes]
) -> AsyncGenerator[bytes, None]:
    """All events; an error on the way becomes the end."""
    async with aclosing(events):
        try:
            yield first
            async for each in events:
                yield each
        except Exception as exc:
            if not isinstance(exc, ApiError):
                logger.exception("request %s failed while streaming", request_id)
            yield on_error(as_api_error(exc, request_id))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
