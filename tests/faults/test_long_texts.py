"""R13: the longest body there can be, against everybody else."""

from __future__ import annotations

import asyncio
import json
import time

from tests.faults.conftest import Measured, StartDaemon
from tests.faults.wire import Pulse, ask, memory

TEXT = "The quick brown fox, 12345 times: x = [1, 2]\n"


def test_sixteen_megabytes_of_text_hold_up_nobody(start: StartDaemon, measured: Measured) -> None:
    daemon = start()
    body = json.dumps({"prompt": TEXT * (16 * 2**20 // (len(TEXT) + 2))}).encode()
    head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    before = memory(daemon.process.pid)

    async def run() -> None:
        peak = before
        async with Pulse(daemon.url) as pulse:
            started = time.monotonic()
            tokenizing = asyncio.create_task(ask(daemon.url, request))
            while not tokenizing.done():
                peak = max(peak, memory(daemon.process.pid))
                await asyncio.sleep(0.02)
            seconds = time.monotonic() - started
        assert tokenizing.result()[0] == 200
        assert peak - before < 2**30
        measured(
            "R13",
            f"{len(body) / 2**20:.1f} MiB tokenized in {seconds:.0f} s, {(peak - before) / 2**20:.0f} MiB more, "
            f"p99 of /health {1000 * pulse.p99:.0f} ms",
        )
        assert pulse.p99 < 0.25

    asyncio.run(run())
