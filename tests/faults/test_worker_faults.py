"""F7, F9, F10, F17, F33: what goes wrong inside a step, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from tests.faults.conftest import Measured, StartDaemon
from tests.faults.traffic import LONG, SHORT, Stream, client_of, read_stream

GREEDY: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
POISON = 777


async def texts_of(client: httpx.AsyncClient, prompts: list[str], **more: Any) -> list[Stream]:
    return await asyncio.gather(*(read_stream(client, {**GREEDY, "prompt": p, **more}) for p in prompts))


def test_f7_memory_runs_out_in_a_step(start: StartDaemon, measured: Measured) -> None:
    prompts = [f"{index} apples and {index} pears, " * 20 for index in range(8)]

    async def run() -> None:
        async with client_of(start().url) as client:
            undisturbed = await texts_of(client, prompts)
        daemon = start(faults="--out-of-memory-at 10")
        async with client_of(daemon.url) as client:
            streams = await texts_of(client, prompts)
        failed = [seen for seen in streams if seen.errors]
        assert [seen.errors[0]["code"] for seen in failed] == ["out_of_memory"]
        assert failed[0].errors[0]["type"] == "server_error"
        for seen, expected in zip(streams, undisturbed, strict=True):
            assert seen.errors or (seen.text, seen.done) == (expected.text, 1)
        assert daemon.gauge("latentd_engine_restarts_total") == 0
        assert "step 9 ran out of memory" in daemon.logs
        daemon.wait_idle(2)
        measured("F7", "1 of 8 ended with an error, the other 7 answers unchanged, no restart")

    asyncio.run(run())


def test_f7_a_second_time_costs_the_engine(start: StartDaemon) -> None:
    daemon = start(faults="--out-of-memory-at 5 12")

    async def run() -> None:
        async with client_of(daemon.url) as client:
            streams = await texts_of(client, ["One", "Two", "Three"])
            assert {len(seen.errors) for seen in streams} == {1}

    asyncio.run(run())
    daemon.wait_ready_again(60)
    assert daemon.gauge("latentd_engine_restarts_total") == 1


def test_f9_a_poisonous_prompt_is_refused_the_third_time(start: StartDaemon, measured: Measured) -> None:
    daemon = start(faults=f"--raise-on-tokens {POISON}")
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        for _ in range(2):
            failed = client.post("/v1/completions", json={**SHORT, "prompt": [5, POISON, 6]})
            assert failed.status_code == 500
            assert "poisonous" not in failed.text
            daemon.wait_ready_again(60)
        refused = client.post("/v1/completions", json={**SHORT, "prompt": [5, POISON, 6]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompt_refused")
        assert client.post("/v1/completions", json={**SHORT, "prompt": [5, 6]}).status_code == 200
    assert daemon.gauge("latentd_engine_restarts_total") == 2
    daemon.wait_idle(2)
    measured("F9", "2 restarts, then 400 for this prompt alone")


def test_f10_logits_that_are_not_finite(start: StartDaemon, measured: Measured) -> None:
    prompts = [f"Story {index}: " for index in range(6)]

    async def run() -> None:
        async with client_of(start().url) as client:
            undisturbed = await texts_of(client, prompts)
        daemon = start(faults="--nan-at 20")
        async with client_of(daemon.url) as client:
            streams = await texts_of(client, prompts)
        assert [seen.errors[0]["code"] for seen in streams if seen.errors] == ["nan_logits"]
        for seen, expected in zip(streams, undisturbed, strict=True):
            assert expected.text.startswith(seen.text) if seen.errors else seen.text == expected.text
        assert daemon.gauge("latentd_nan_logits_total") == 1
        assert daemon.gauge("latentd_engine_restarts_total") == 0
        daemon.wait_idle(2)
        measured("F10", "1 of 6 ended with an error, the other 5 answers unchanged, counted")

    asyncio.run(run())


def test_f17_two_hundred_clients_leave_after_half_a_second(
    start: StartDaemon, measured: Measured, wide_model: list[str]
) -> None:
    daemon = start(*wide_model, "--max-num-seqs", "200")

    async def run() -> None:
        begun: list[int] = []

        async def leave(client: httpx.AsyncClient, index: int) -> None:
            body = {**LONG, "prompt": f"{index} The sea", "max_tokens": 10_000, "stream": True}
            try:
                async with asyncio.timeout(0.5), client.stream("POST", "/v1/completions", json=body) as response:
                    begun.append(response.status_code)
                    async for _ in response.aiter_bytes():
                        pass
            except TimeoutError:
                pass

        async with client_of(daemon.url) as client:
            await asyncio.gather(*(leave(client, index) for index in range(200)))
            left = time.monotonic()
            answer = await client.post("/v1/completions", json=SHORT)
            answered = time.monotonic() - left
            assert answer.status_code == 200
            daemon.wait_idle(max(0.0, 2 - (time.monotonic() - left)))
            idle = time.monotonic() - left
            assert set(begun) == {200}
            measured("F17", f"{len(begun)} had begun; next answer after {answered:.2f} s, all idle after {idle:.2f} s")
            assert answered < 2

    asyncio.run(run())
    assert daemon.gauge("vllm:num_requests_running") == 0


def test_f33_thirty_two_requests_in_a_pool_of_forty_blocks(start: StartDaemon, measured: Measured) -> None:
    prompts = [f"{index}. Once upon a time " * 4 for index in range(32)]

    async def run() -> None:
        async with client_of(start("--kv-cache-memory", "64MiB").url) as client:
            undisturbed = await texts_of(client, prompts, max_tokens=200)
        daemon = start("--num-blocks", "40")
        async with client_of(daemon.url) as client:
            streams = await texts_of(client, prompts, max_tokens=200)
        preemptions = daemon.gauge("vllm:num_preemptions_total")
        assert preemptions > 0
        assert [seen.text for seen in streams] == [seen.text for seen in undisturbed]
        assert all(seen.done == 1 and not seen.errors for seen in streams)
        daemon.wait_idle(2)
        measured("F33", f"{preemptions:.0f} preemptions, 32 of 32 answers unchanged")

    asyncio.run(run())
