"""Clients that leave, too many of them, an engine that dies, and a signal to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.daemon import Daemon

LONG: dict[str, Any] = {"prompt": "The sea", "max_tokens": 4000, "ignore_eos": True, "temperature": 1.0}
SHORT: dict[str, Any] = {"prompt": "The sea", "max_tokens": 4, "temperature": 0}


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_storm_of_two_hundred_clients_that_leave(daemon: Daemon) -> None:
    """Half of them in the middle of their stream, half before they saw anything, some not streaming at all."""

    async def run() -> int:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=daemon.url, timeout=60, limits=limits) as client:

            async def leave(index: int) -> int:
                body = {**LONG, "prompt": f"Storm {index} " * (index % 7 * 20 + 1), "stream": index % 5 != 0}
                try:
                    async with asyncio.timeout(0.05 + index % 10 * 0.05 if index % 2 else 30):
                        async with client.stream("POST", "/v1/completions", json=body) as response:
                            async for _ in response.aiter_bytes():
                                return response.status_code
                except TimeoutError:
                    pass
                return 0

            seen: list[int] = []
            for start in range(0, 200, 40):
                tasks = [leave(index) for index in range(start, start + 40) if index % 2 or index % 5]
                tasks += [leave(index + 1) for index in range(start, start + 40) if not index % 2 and not index % 5]
                seen += await asyncio.gather(*tasks)
            assert len(seen) == 200
            return seen.count(200)

    assert asyncio.run(run()) >= 50
    daemon.wait_idle(20)
    started = time.monotonic()
    assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    assert time.monotonic() - started < 5
    assert "Traceback" not in daemon.logs


def test_overload_then_a_drain_that_finishes_what_runs(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--max-open-requests", "1", "--drain-timeout", "60")
    got: list[Any] = []
    first = threading.Event()

    def read() -> None:
        body = {**LONG, "max_tokens": 400, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{daemon.url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    got.append(line)
                    first.set()

    reader = threading.Thread(target=read)
    try:
        reader.start()
        assert first.wait(30)
        with (
            openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.completions.create(model="latentd-builtin", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "server_overloaded")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert daemon.gauge("vllm:admission_rejections_total") == 1

        daemon.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{daemon.url}/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert httpx.get(f"{daemon.url}/health").status_code == 200
        late = httpx.post(f"{daemon.url}/v1/completions", json=SHORT)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert daemon.process.wait(60) == 0
    finally:
        daemon.stop(signal.SIGKILL)
        reader.join(30)
    assert got[-1] == "data: [DONE]"
    assert json.loads(got[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 400


def test_an_engine_that_is_killed_is_replaced(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, environment={"LATENTD_API_KEY": "key-1,key-2"})
    try:
        assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT).status_code == 401
        with (
            openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="Incorrect API key"),
        ):
            client.models.list()
        headers = {"Authorization": "Bearer key-2"}
        with httpx.Client(base_url=daemon.url, headers=headers, timeout=60) as client:
            whole: dict[str, Any] = {}
            waiting = threading.Thread(
                target=lambda: whole.update(
                    answer=httpx.post(f"{daemon.url}/v1/completions", json=LONG, headers=headers, timeout=60)
                )
            )
            waiting.start()
            text = client.post("/v1/completions", json=SHORT).json()["choices"][0]["text"]
            tokens = daemon.gauge("vllm:generation_tokens_total")
            with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                assert response.status_code == 200
                while daemon.gauge("vllm:num_requests_running") < 2:
                    time.sleep(0.02)
                killed = daemon.engine_pid
                os.kill(killed, signal.SIGKILL)
                *_, error, done = events_of(response)
            assert done == "[DONE]"
            assert error["error"]["type"] == "server_error"
            waiting.join(30)
            assert whole["answer"].status_code == 500
            assert whole["answer"].json()["error"]["type"] == "server_error"
            ready = client.get("/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "The engine died and is being restarted.")
            refused = client.post("/v1/completions", json=SHORT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert client.get("/livez").status_code == 200
            assert daemon.gauge("vllm:num_requests_running") == daemon.gauge("latentd_ready") == 0
            daemon.wait_ready_again(60)
            assert daemon.engine_pid != killed
            again = client.post("/v1/completions", json=SHORT)
            assert again.json()["choices"][0]["text"] == text
            assert daemon.gauge("latentd_engine_restarts_total") == daemon.gauge("latentd_ready") == 1
            assert daemon.gauge("vllm:generation_tokens_total") > tokens
            daemon.wait_idle(2)
    finally:
        assert daemon.stop() == 0
