"""Server-sent events: the framing clients rely on, and a response that cannot leak what it streams from.

An event is `data: {json}` and an empty line, with LF: clients that split on "\\n\\n" find nothing when the separator is
CRLF. Keep-alive is a comment. Everything that is ready together is written together. An error before the first event is
a real HTTP status; after it, an event with the error object. The end is `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, ClientDisconnected, as_api_error

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
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
    watcher = asyncio.create_task(_disconnect(request))
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
    """sse-starlette's response, except that it always closes its iterator and never ends streams on SIGTERM.

    The daemon drains by itself: running answers are finished, not cut.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        AppStatus.enable_automatic_graceful_drain = False
        super().__init__(
            events,
            headers=headers,
            ping=KEEP_ALIVE_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=SEND_TIMEOUT_SECONDS,
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


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


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
