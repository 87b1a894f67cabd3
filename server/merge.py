"""Several engine streams read as one, without a queue: what nobody reads stays merged in its own stream."""

from __future__ import annotations

import asyncio

from server.streams import Delta, RequestStream


class MergedStreams:
    """Streams by number; may be added and removed between two reads."""

    def __init__(self) -> None:
        self._streams: dict[int, RequestStream] = {}
        self._reads: dict[int, asyncio.Future[Delta]] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, number: int, stream: RequestStream) -> None:
        self._streams[number] = stream

    def remove(self, number: int) -> None:
        """Its end was read, or nobody wants it any more."""
        del self._streams[number]
        if (read := self._reads.pop(number, None)) is not None:
            read.cancel()

    async def next(self, timeout: float | None) -> list[tuple[int, Delta]]:
        """What has arrived, in the order of the numbers; waits until there is something.

        TimeoutError after `timeout` seconds without anything. Nothing is lost then.
        """
        if len(self._streams) == 1 and not self._reads:
            # The common case needs no task, and no timer once tokens flow.
            [(number, stream)] = self._streams.items()
            if timeout is None:
                return [(number, await anext(stream))]
            async with asyncio.timeout(timeout):
                return [(number, await anext(stream))]
        for number, stream in self._streams.items():
            if number not in self._reads:
                self._reads[number] = asyncio.ensure_future(anext(stream))
        done, _ = await asyncio.wait(self._reads.values(), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        ready = sorted(number for number, read in self._reads.items() if read in done)
        return [(number, self._reads.pop(number).result()) for number in ready]

    async def close(self) -> None:
        """Gives up all reads under way."""
        reads = list(self._reads.values())
        self._streams.clear()
        self._reads.clear()
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
