"""Bare connections to a daemon: many at once, and none of them well-behaved."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def post_bytes(body: Mapping[str, Any], *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


async def ask(url: str, request: bytes) -> tuple[int, dict[str, str], float]:
    """Status and headers of one request on a connection of its own, and the seconds to its last byte."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection(*address(url))
    try:
        writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        data = await reader.read()
        while part := await reader.read():
            data += part
    finally:
        writer.transport.abort()
    head, *lines = data.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(head.split()[1]), headers, time.monotonic() - started


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Pulse:
    """`async with Pulse(url) as pulse`: a process of its own asks /health all the time; then `p99` is known."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.p99 = 0.0
        """Seconds."""

    async def __aenter__(self) -> Pulse:
        command = (sys.executable, "-m", "tests.faults.wire", self._url)
        self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"begun\n"
        return self

    async def __aexit__(self, *_: object) -> None:
        output, _ = await self._process.communicate(b"\n")
        self.p99 = float(output)


async def beat(url: str) -> None:
    """What the process does until its input ends."""
    seconds = []
    end = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    print("begun", flush=True)
    while not end.done():
        status, _, taken = await ask(url, HEALTH)
        assert status == 200
        seconds.append(taken)
        await asyncio.sleep(0.01)
    print(sorted(seconds)[int(len(seconds) * 0.99)])


def reset(connection: socket.socket) -> None:
    """Close with a RST, as a program that was killed with unread data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(beat(sys.argv[1]))
