"""F29, fairness and the limits of keys: more requests than there is room for."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.faults.conftest import Measured, StartDaemon
from tests.faults.traffic import LONG, SHORT
from tests.faults.wire import Pulse, ask, post_bytes


def test_f29_a_thousand_requests_for_a_hundred_places(start: StartDaemon, measured: Measured) -> None:
    daemon = start("--max-open-requests", "100", "--max-num-seqs", "100")

    async def run() -> None:
        body = {**SHORT, "max_tokens": 30}
        usual = (await ask(daemon.url, post_bytes(body)))[2]
        async with Pulse(daemon.url) as pulse:
            started = time.monotonic()
            answers = await asyncio.gather(*(ask(daemon.url, post_bytes(body)) for _ in range(1000)))
            whole = time.monotonic() - started
        counts = Counter(status for status, _, _ in answers)
        assert set(counts) == {200, 503}
        assert counts[200] >= 100
        refused = [(headers, seconds) for status, headers, seconds in answers if status == 503]
        assert all(1 <= int(headers["retry-after"]) <= 60 for headers, _ in refused)
        after = (await ask(daemon.url, post_bytes(body)))[2]
        slowest = max(seconds for _, seconds in refused)
        measured(
            "F29",
            f"{counts[200]} answers, {counts[503]} refusals (the last after {slowest:.2f} s) in {whole:.1f} s, "
            f"p99 of /health {1000 * pulse.p99:.0f} ms; one alone {usual:.2f} s before and {after:.2f} s after",
        )
        assert pulse.p99 < 0.1

    asyncio.run(run())
    daemon.wait_idle(5)
    assert httpx.get(f"{daemon.url}/load").json()["server_load"] == 0


def test_a_flood_of_one_key_delays_another_by_one_request(
    start: StartDaemon, measured: Measured, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("flood\nother\n")
    daemon = start("--api-key-file", str(keys), "--max-num-seqs", "1")
    body = {**LONG, "max_tokens": 300}

    async def run() -> None:
        flood = [
            asyncio.create_task(ask(daemon.url, post_bytes(body, "Authorization: Bearer flood"))) for _ in range(30)
        ]
        done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        one = min(task.result()[2] for task in done)
        finished = sum(task.done() for task in flood)
        status, _, waited = await ask(daemon.url, post_bytes({**SHORT, "max_tokens": 1}, "Authorization: Bearer other"))
        assert status == 200
        assert sum(task.done() for task in flood) - finished <= 1
        measured("F29", f"first token of another key behind 29 waiting requests of {one:.2f} s each: {waited:.2f} s")
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)

    asyncio.run(run())
    daemon.wait_idle(10)


def test_cached_prompts_are_a_keys_own(start: StartDaemon, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    daemon = start("--api-key-file", str(keys))
    body: dict[str, Any] = {**SHORT, "prompt": "The sea was calm. " * 20, "cache_salt": "the same"}

    def cached(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{daemon.url}/v1/completions", json=body, headers=headers, timeout=30).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached("one") > 0, cached("one") > 0, cached("two") > 0, cached("two") > 0] == [False, True, False, True]
