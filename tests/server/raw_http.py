"""The application behind the real HTTP server on a real socket, and a client that sends whatever bytes it likes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache

from fastapi import FastAPI
from uvicorn.server import ServerState

from server.address import bind
from server.daemon import http_config
from tests.server.harness import answers, make_app

HOST = b"Host: localhost\r\n"
SECONDS = 20.0


@dataclass
class Reply:
    """All that came until the server closed the connection, or until a whole answer was there."""

    data: bytes
    closed: bool

    @property
    def status(self) -> int:
        """Of the first answer; 0 without one."""
        match = re.match(rb"HTTP/1\.1 (\d+) ", self.data)
        return int(match[1]) if match else 0

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["error"]["message"])


@cache
def default_app() -> FastAPI:
    """Answers "ok" to everything."""
    return make_app(answers("ok"))[0]


@asynccontextmanager
async def serving(app: FastAPI | None = None) -> AsyncIterator[int]:
    """A server in this event loop; the port."""
    app = app or default_app()
    config, state, loop = http_config(app), ServerState(), asyncio.get_running_loop()
    config.load()
    with bind("127.0.0.1", 0) as listener:
        # As uvicorn.Server does it, which takes a tenth of a second for each start and end.
        server = await loop.create_server(lambda: config.http_protocol_class(config, state, {}, loop), sock=listener)
        try:
            yield listener.getsockname()[1]
        finally:
            server.close()
            for connection in list(state.connections):
                connection.transport.abort()
            if state.tasks:
                await asyncio.wait(state.tasks)


async def exchange(port: int, *pieces: bytes, pause: float = 0.0, until_closed: bool = True) -> Reply:
    """Sends the pieces and reads the answer. Raises TimeoutError for a server that neither answers nor closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def read() -> Reply:
        data = b""
        while until_closed or not _is_whole(data):
            part = await reader.read(1 << 16)
            if not part:
                return Reply(data, True)
            data += part
        return Reply(data, False)

    reading = asyncio.create_task(read())
    try:
        async with asyncio.timeout(SECONDS):
            for piece in pieces:
                if reading.done():
                    break
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
            return await reading
    finally:
        reading.cancel()
        writer.transport.abort()


def _is_whole(data: bytes) -> bool:
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(end) and (len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n"))
