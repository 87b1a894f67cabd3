"""F5, F6, F20 to F22, F24, F25: the front-end is stopped, killed, told to end, and its clock jumps."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon
from tests.faults.conftest import Measured, StartDaemon
from tests.faults.test_engine_death import wait_for, wait_for_engine
from tests.faults.traffic import LONG, SHORT, Stream, client_of, read_stream, until

GREEDY: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def begin(client: httpx.AsyncClient, count: int, **more: Any) -> tuple[list[Stream], list[asyncio.Task[Stream]]]:
    """Streams of which each has shown something."""
    streams = [Stream() for _ in range(count)]
    tasks = [
        asyncio.create_task(read_stream(client, {**GREEDY, "prompt": f"{index} and", **more}, seen))
        for index, seen in enumerate(streams)
    ]
    await until(lambda: all(seen.text or seen.errors for seen in streams))
    return streams, tasks


@contextlib.asynccontextmanager
async def unchanged(client: httpx.AsyncClient, count: int, **more: Any) -> AsyncIterator[None]:
    """Streams that have begun; whatever is done inside, they must end as they do when nothing is done."""
    undisturbed, tasks = await begin(client, count, **more)
    await asyncio.gather(*tasks)
    streams, tasks = await begin(client, count, **more)
    yield
    await asyncio.gather(*tasks)
    assert [seen.text for seen in streams] == [seen.text for seen in undisturbed]
    assert all(seen.done == 1 and not seen.errors for seen in streams)


def test_f5_a_front_end_that_is_stopped_for_ten_seconds(start: StartDaemon, measured: Measured) -> None:
    daemon = start("--stall-timeout", "5")

    async def run() -> None:
        async with client_of(daemon.url) as client, unchanged(client, 8):
            daemon.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(10)
            daemon.process.send_signal(signal.SIGCONT)

    asyncio.run(run())
    assert daemon.gauge("latentd_engine_restarts_total") == 0
    measured("F5", "8 of 8 answers unchanged, no restart")


@pytest.mark.parametrize("phase", ["loading", "idle", "prefill", "decode"])
def test_f6_a_front_end_that_is_killed(start: StartDaemon, measured: Measured, phase: str) -> None:
    daemon = start(faults="--load-seconds 60", wait=False) if phase == "loading" else start()
    if phase == "loading":
        wait_for_engine(daemon)
        time.sleep(1)
    pid = daemon.engine_pid

    async def run() -> None:
        async with client_of(daemon.url or "http://none") as client:
            tasks: list[asyncio.Task[Stream]] = []
            if phase == "prefill":
                bodies = [{**LONG, "max_tokens": 100, "prompt": f"{i} long stories. " * 400} for i in range(8)]
                tasks = [asyncio.create_task(read_stream(client, body)) for body in bodies]
                await asyncio.sleep(0.2)
            elif phase == "decode":
                _, tasks = await begin(client, 8)
            assert is_alive(pid)
            daemon.process.kill()
            seconds = await asyncio.to_thread(wait_for, lambda: not is_alive(pid), 2)
            measured("F6", f"{phase}: the engine is gone after {seconds * 1e3:.0f} ms")
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    if phase == "decode":
        again = start("--port", daemon.url.rpartition(":")[2])
        assert again.url == daemon.url
        assert httpx.post(f"{again.url}/v1/completions", json=SHORT, timeout=30).status_code == 200


def test_f20_a_drain_that_is_long_enough(start: StartDaemon, measured: Measured) -> None:
    daemon = start("--drain-timeout", "60")

    async def run() -> None:
        async with client_of(daemon.url) as client, unchanged(client, 8):
            daemon.process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            while (await client.get("/ready")).status_code != 503:
                assert time.monotonic() - told < 1
            measured("F20", f"not ready {(time.monotonic() - told) * 1e3:.0f} ms after SIGTERM")
            assert (await client.get("/health")).status_code == 200
            late = await client.post("/v1/completions", json=SHORT)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            assert int(late.headers["retry-after"]) >= 1

    asyncio.run(run())
    assert daemon.process.wait(10) == 0


def test_f21_a_drain_that_is_too_short(start: StartDaemon, measured: Measured) -> None:
    daemon = start("--drain-timeout", "1")

    async def run() -> None:
        async with client_of(daemon.url) as client:
            streams, tasks = await begin(client, 8, max_tokens=7000)
            daemon.process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            await asyncio.gather(*tasks)
            assert all(len(seen.errors) == seen.done == 1 for seen in streams)
            assert await asyncio.to_thread(daemon.process.wait, 10) == 0
            seconds = time.monotonic() - told
            assert 1 <= seconds < 1 + 2
            measured("F21", f"drain of 1 s: 8 of 8 ended with one error, exit code 0 after {seconds:.1f} s")

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f22_a_second_signal(start: StartDaemon, measured: Measured, number: signal.Signals) -> None:
    daemon = start()
    pid = daemon.engine_pid

    async def run() -> None:
        async with client_of(daemon.url) as client:
            _, tasks = await begin(client, 4, max_tokens=7000)
            daemon.process.send_signal(number)
            await asyncio.sleep(0.5)
            assert daemon.process.poll() is None
            daemon.process.send_signal(number)
            told = time.monotonic()
            assert await asyncio.to_thread(daemon.process.wait, 5) == 128 + number
            assert time.monotonic() - told < 1
            measured("F22", f"{number.name}: gone {(time.monotonic() - told) * 1e3:.0f} ms after the second")
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    wait_for(lambda: not is_alive(pid), 2)


@pytest.mark.parametrize("after", [0.5, 3.0])
def test_f24_sigterm_while_loading(start: StartDaemon, measured: Measured, after: float) -> None:
    daemon = start(faults="--load-seconds 60", wait=False)
    wait_for_engine(daemon)
    pid = daemon.engine_pid
    time.sleep(after)
    daemon.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    assert daemon.process.wait(5) == 0
    seconds = time.monotonic() - told
    assert seconds < 2
    assert not is_alive(pid)
    measured("F24", f"{after} s after the engine's start: exit code 0 after {seconds:.2f} s")


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) { return access(getenv("CLOCK_FILE"), F_OK) ? 0 : 7200; }
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return where ? (*where = now.tv_sec) : now.tv_sec;
}
"""
"""The wall clock of a process is two hours ahead while a file exists."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_f25_the_clock_jumps(tmp_path: Path, measured: Measured) -> None:
    (tmp_path / "clock.c").write_text(CLOCK)
    library, file = tmp_path / "clock.so", tmp_path / "ahead"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(file)}
    daemon = Daemon(tmp_path, "--stall-timeout", "5", environment=environment)

    async def run() -> None:
        async with client_of(daemon.url) as client, unchanged(client, 4, timeout=120):
            before = (await client.post("/v1/completions", json=SHORT)).json()["created"]
            file.touch()
            after = (await client.post("/v1/completions", json=SHORT)).json()["created"]
            assert 7000 < after - before < 8000
            file.unlink()
            await asyncio.sleep(2)

    try:
        asyncio.run(run())
        assert daemon.gauge("latentd_engine_restarts_total") == 0
        measured("F25", "two hours ahead and back: 4 of 4 answers unchanged, no time-out, no restart")
        assert daemon.stop() == 0
    finally:
        daemon.process.kill()
