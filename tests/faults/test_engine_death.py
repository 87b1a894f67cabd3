"""F1 to F4 and F23: the engine is killed, stopped, or fails, in every phase."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import httpx
import pytest

from tests.e2e.daemon import Daemon
from tests.faults.conftest import Measured, StartDaemon
from tests.faults.traffic import LONG, SHORT, Stream, client_of, read_stream, until


def ready(daemon: Daemon) -> bool:
    return httpx.get(f"{daemon.url}/ready").status_code == 200


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until `condition()` holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.005)
    return time.monotonic() - started


def wait_for_engine(daemon: Daemon) -> None:
    """Until there is a process, loading or not."""

    def is_there() -> bool:
        try:
            return daemon.engine_pid > 0
        except (ValueError, FileNotFoundError):
            return False

    wait_for(is_there, 30)


def test_f1_an_idle_engine_is_killed_three_times(start: StartDaemon, measured: Measured) -> None:
    daemon = start()
    gone, back = [], []
    for _ in range(3):
        killed = daemon.engine_pid
        os.kill(killed, signal.SIGKILL)
        gone.append(wait_for(lambda: not ready(daemon), 1))
        refused = httpx.post(f"{daemon.url}/v1/completions", json=SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        back.append(wait_for(lambda: ready(daemon), 60))
        assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    assert daemon.gauge("latentd_engine_restarts_total") == 3
    assert daemon.stop() == 0
    measured("F1", f"not ready after {max(gone) * 1e3:.0f} ms, ready after {', '.join(f'{s:.1f}' for s in back)} s")


@pytest.mark.parametrize("phase", ["queue and prefill", "decode"])
def test_f2_an_engine_is_killed_under_load(start: StartDaemon, measured: Measured, phase: str) -> None:
    daemon = start("--max-num-seqs", "64")

    async def run() -> None:
        async with client_of(daemon.url) as client:
            prompt = "A long story. " * 100 if phase != "decode" else "The sea"
            streams = [Stream() for _ in range(80)]
            bodies = [{**LONG, "max_tokens": 1000, "prompt": f"{index} {prompt}"} for index in range(80)]
            tasks = [
                asyncio.create_task(read_stream(client, body, seen)) for body, seen in zip(bodies, streams, strict=True)
            ]
            whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
            if phase == "decode":
                await until(lambda: sum(bool(seen.text) for seen in streams) >= 64)
                assert daemon.gauge("vllm:num_requests_waiting") >= 16
            else:
                await until(lambda: any(seen.text for seen in streams))
            killed = time.monotonic()
            os.kill(daemon.engine_pid, signal.SIGKILL)
            await asyncio.gather(*tasks)
            last = max(seen.ended_at for seen in streams) - killed
            assert (await whole).status_code == 500
            for seen in streams:
                # One that had begun ends with an event; one that had not is a plain error.
                assert len(seen.errors) == 1
                assert seen.done == (seen.status == 200)
                assert seen.status in (200, 500)
                assert seen.errors[0]["type"] == "server_error"
            assert last < 2
            measured("F2", f"{phase}: 80 of 80 ended with one error, the last after {last * 1e3:.0f} ms")

    asyncio.run(run())
    daemon.wait_ready_again(60)
    daemon.wait_idle(2)
    assert daemon.stop() == 0


def test_f3_the_fourth_death_is_the_daemons_end(start: StartDaemon, measured: Measured) -> None:
    daemon = start()
    for _ in range(3):
        os.kill(daemon.engine_pid, signal.SIGKILL)
        wait_for(lambda: not ready(daemon), 1)
        daemon.wait_ready_again(60)
    os.kill(daemon.engine_pid, signal.SIGKILL)
    killed = time.monotonic()
    assert daemon.process.wait(10) == 1
    last = daemon.stderr.read_text().splitlines()[-1]
    assert last.startswith("latentd: the engine died 4 times within 10 minutes, at last: engine process ")
    assert "SIGKILL" in last
    measured("F3", f"exit code 1 {time.monotonic() - killed:.1f} s after the fourth death")


def test_f4_a_stopped_engine_is_dead_after_the_limit(start: StartDaemon, measured: Measured) -> None:
    daemon = start("--stall-timeout", "3")

    async def run() -> None:
        async with client_of(daemon.url) as client:
            streams = [Stream() for _ in range(8)]
            tasks = [asyncio.create_task(read_stream(client, LONG, seen)) for seen in streams]
            await until(lambda: all(seen.text for seen in streams))
            os.kill(daemon.engine_pid, signal.SIGSTOP)
            stopped = time.monotonic()
            await asyncio.gather(*tasks)
            seconds = time.monotonic() - stopped
            assert 2 < seconds < 30  # a busy machine has long steps, and with them a later limit
            assert all(len(seen.errors) == seen.done == 1 for seen in streams)
            assert (await client.get("/ready")).status_code == 503
            measured("F4", f"limit 3 s: streams ended {seconds:.1f} s after SIGSTOP")

    asyncio.run(run())
    daemon.wait_ready_again(60)
    assert "no step of the engine has ended for" in daemon.logs
    assert "was killed by SIGKILL (no step ended for" in daemon.logs
    daemon.wait_idle(2)
    assert daemon.stop() == 0


def test_f4_a_second_of_sleep_is_forgiven(start: StartDaemon) -> None:
    daemon = start("--stall-timeout", "3")

    async def run() -> None:
        async with client_of(daemon.url) as client:
            body = {**LONG, "max_tokens": 600, "temperature": 0}
            undisturbed = await read_stream(client, body)
            seen = Stream()
            task = asyncio.create_task(read_stream(client, body, seen))
            await until(lambda: bool(seen.text))
            os.kill(daemon.engine_pid, signal.SIGSTOP)
            await asyncio.sleep(1)
            os.kill(daemon.engine_pid, signal.SIGCONT)
            await task
            assert (seen.text, seen.errors, seen.done) == (undisturbed.text, [], 1)

    asyncio.run(run())
    assert daemon.gauge("latentd_engine_restarts_total") == 0


def test_f8_an_exception_in_a_step(start: StartDaemon, measured: Measured) -> None:
    daemon = start(faults="--raise-at-step 10")

    async def run() -> None:
        async with client_of(daemon.url) as client:
            streams = await asyncio.gather(*(read_stream(client, {**LONG, "prompt": f"{i}"}) for i in range(8)))
            assert all(len(seen.errors) == 1 for seen in streams)
            assert all("fault of the test" not in str(seen.errors) for seen in streams)

    asyncio.run(run())
    failed = time.monotonic()
    daemon.wait_ready_again(60)
    measured("F8", f"8 of 8 ended with one error, ready after {time.monotonic() - failed:.1f} s")
    [line] = [line for line in daemon.logs.splitlines() if "step 10 failed with" in line]
    assert "cmpl-" in line
    assert "RuntimeError: a fault of the test" in daemon.logs


def test_f23_an_engine_that_is_killed_while_it_loads_is_not_restarted(start: StartDaemon) -> None:
    daemon = start(faults="--load-seconds 30", wait=False)
    wait_for_engine(daemon)
    time.sleep(0.3)
    os.kill(daemon.engine_pid, signal.SIGKILL)
    assert daemon.process.wait(5) == 1
    assert "was killed by SIGKILL" in daemon.stderr.read_text().splitlines()[-1]
