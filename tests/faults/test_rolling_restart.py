"""Two daemons behind a plain balancer are restarted one after the other, and no client notices."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tests.e2e.daemon import Daemon
from tests.faults.conftest import Measured, StartDaemon
from tests.faults.traffic import client_of, read_stream


class Balancer:
    """Asks backends for /ready ten times a second; a request goes to the first ready one that does not refuse it."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._ready: set[int] = set()
        self.retries = 0

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[str]:
        watcher = asyncio.create_task(self._watch())
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        watcher.cancel()

    async def _watch(self) -> None:
        async with httpx.AsyncClient(timeout=1, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while True:
                for port in self._ports:
                    try:
                        is_ready = (await client.get(f"http://127.0.0.1:{port}/ready")).status_code == 200
                    except httpx.HTTPError:
                        is_ready = False
                    (self._ready.add if is_ready else self._ready.discard)(port)
                await asyncio.sleep(0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        request = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + await reader.readexactly(length)
        with contextlib.closing(writer):
            while not any([await self._pass_on(port, request, writer) for port in self._choose()]):
                self.retries += 1
                await asyncio.sleep(0.05)

    def _choose(self) -> list[int]:
        self._ports.append(self._ports.pop(0))
        return [port for port in self._ports if port in self._ready][:1]

    async def _pass_on(self, port: int, request: bytes, client: asyncio.StreamWriter) -> bool:
        """False where nothing has answered yet and another may be asked."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(request)
                data = await reader.read(65536)
                if not data or data.startswith(b"HTTP/1.1 503"):
                    return False
                while data:
                    client.write(data)
                    await client.drain()
                    data = await reader.read(65536)
        except ConnectionError:
            return False
        return True


def test_no_request_fails_while_both_are_restarted(start: StartDaemon, measured: Measured) -> None:
    daemons = [start(), start()]
    ports = [int(daemon.url.rpartition(":")[2]) for daemon in daemons]
    texts: dict[int, set[str]] = {}
    failures: list[object] = []
    count = 0

    async def restart(daemon: Daemon, port: int) -> None:
        daemon.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.process.wait, 60) == 0
        await asyncio.to_thread(start, "--port", str(port))

    async def run() -> int:
        is_over = asyncio.Event()

        async def talk(client: httpx.AsyncClient, index: int) -> None:
            nonlocal count
            body = {"prompt": f"{index} and", "max_tokens": 40 + 20 * index, "ignore_eos": True, "temperature": 0}
            while not is_over.is_set():
                seen = await read_stream(client, body)
                count += 1
                if seen.errors or seen.done != 1:
                    failures.append(seen)
                texts.setdefault(index, set()).add(seen.text)

        balancer = Balancer(list(ports))
        async with balancer.listen() as url, client_of(url) as client:
            clients = [asyncio.create_task(talk(client, index)) for index in range(6)]
            for daemon, port in zip(daemons, ports, strict=True):
                await asyncio.sleep(2)
                await restart(daemon, port)
            await asyncio.sleep(2)
            is_over.set()
            await asyncio.gather(*clients)
        return balancer.retries

    retries = asyncio.run(run())
    assert not failures
    assert all(len(each) == 1 for each in texts.values())
    assert count > 20
    measured("F20", f"rolling restart of two daemons: {count} requests, 0 failed, {retries} asked again")
