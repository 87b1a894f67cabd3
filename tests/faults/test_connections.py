"""F16, F18, F26, F28 and slow heads: clients that leave, do not read, do not write, or are too many."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.daemon import Daemon
from tests.faults.conftest import Measured, StartDaemon
from tests.faults.traffic import LONG, SHORT
from tests.faults.wire import HEALTH, Pulse, address, ask, memory, post_bytes, processor_seconds, reset, wait_until


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("stream", [True, False])
def test_f16_clients_that_leave_in_every_phase(
    start: StartDaemon, measured: Measured, stream: bool, end: Callable[[socket.socket], None]
) -> None:
    """Waiting, in decode, in prefill."""
    daemon = start("--max-num-seqs", "2", "--max-num-batched-tokens", "64")
    body = {**LONG, "stream": stream}
    busy = [connect(daemon, body) for _ in range(2)]
    wait_until(lambda: daemon.gauge("vllm:num_requests_running") == 2)
    queued = connect(daemon, body)
    wait_until(lambda: daemon.gauge("vllm:num_requests_waiting") == 1)
    seconds = [seconds_until_gone(lambda: end(queued), lambda: daemon.gauge("vllm:num_requests_waiting") == 0)]

    def leave(*connections: socket.socket) -> None:
        for connection in connections:
            end(connection)

    seconds.append(seconds_until_gone(lambda: leave(*busy), lambda: open_requests(daemon) == 0))
    prefilling = connect(daemon, {**body, "prompt": "The sea and the sky. " * 300})
    wait_until(lambda: open_requests(daemon) == 1)
    seconds.append(seconds_until_gone(lambda: leave(prefilling), lambda: open_requests(daemon) == 0))
    daemon.wait_idle(5)
    assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    assert "Traceback" not in daemon.logs
    measured(
        "F16", f"{'streamed' if stream else 'whole'}: waiting, decode, prefill: {[round(s, 2) for s in seconds]} s"
    )


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("stream", [True, False])
def test_f16_clients_that_leave_while_their_text_is_tokenized(
    start: StartDaemon, measured: Measured, wide_model: list[str], stream: bool, end: Callable[[socket.socket], None]
) -> None:
    """Sixteen megabytes in 64 prompts: the tokenizer needs seconds for them."""
    daemon = start(*wide_model)
    prompts = ["The sea and the sky. " * 11_500] * 64
    leaving = connect(daemon, {**SHORT, "prompt": prompts, "stream": stream})
    wait_until(lambda: open_requests(daemon) == 64)
    used = processor_seconds(daemon.process.pid)
    seconds = seconds_until_gone(lambda: end(leaving), lambda: open_requests(daemon) == 0)
    time.sleep(1)
    used = processor_seconds(daemon.process.pid) - used
    assert daemon.gauge("vllm:request_prompt_tokens_count") == 0  # nothing of it came to the engine
    assert used < 0.5  # nor does anybody go on with it
    assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    assert "Traceback" not in daemon.logs
    measured("F16", f"{'streamed' if stream else 'whole'}: tokenizing: {seconds:.2f} s, {used:.2f} s of processor time")


def open_requests(daemon: Daemon) -> int:
    return int(httpx.get(f"{daemon.url}/load").json()["server_load"])


def connect(daemon: Daemon, body: dict[str, object]) -> socket.socket:
    connection = socket.create_connection(address(daemon.url))
    connection.sendall(post_bytes(body))
    return connection


def seconds_until_gone(leave: Callable[[], object], is_gone: Callable[[], bool]) -> float:
    started = time.monotonic()
    leave()
    wait_until(is_gone, 5)
    return time.monotonic() - started


@pytest.mark.parametrize("num_logprobs", [None, 20])
def test_f18_sixty_four_clients_that_do_not_read(
    start: StartDaemon, measured: Measured, num_logprobs: int | None
) -> None:
    daemon = start("--max-num-seqs", "80", "--max-num-batched-tokens", "512", "--num-blocks", "3200")
    body = {**LONG, "stream": True, "max_tokens": 3000, "logprobs": num_logprobs}
    before = memory(daemon.process.pid)
    stalled = []
    for _ in range(64):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address(daemon.url))
        connection.sendall(post_bytes(body))
        stalled.append(connection)
    wait_until(lambda: daemon.gauge("vllm:num_requests_running") == 64)
    started = time.monotonic()
    answer = httpx.post(f"{daemon.url}/v1/completions", json={**SHORT, "max_tokens": 50}, timeout=60)
    assert answer.status_code == 200  # nobody waits for them
    seconds = time.monotonic() - started
    time.sleep(15)
    held = (memory(daemon.process.pid) - before) / 64
    running = daemon.gauge("vllm:num_requests_running")
    assert held < 256 * 1024
    for connection in stalled:
        reset(connection)
    daemon.wait_idle(10)
    measured(
        "F18",
        f"{num_logprobs or 0} log-probabilities: {held / 1024:.0f} KiB for each after 15 s, {running:.0f} still run; "
        f"50 tokens for another client took {seconds:.1f} s",
    )


def test_f19_clients_that_vanish_without_a_word(tmp_path: Path, measured: Measured) -> None:
    """With three seconds instead of two minutes."""
    network = ["unshare", "-rn"]
    if subprocess.run([*network, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("needs a network of its own")
    command = [*network, sys.executable, "-m", "tests.faults.half_open", "inside", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stderr
    seconds = float(ended.stdout)
    assert 2 < seconds < 10
    measured("F19", f"the link cut: both clients given up after {seconds:.1f} s")


def test_f26_no_file_left_for_a_connection(start: StartDaemon, measured: Measured) -> None:
    daemon = start()
    with httpx.stream("POST", f"{daemon.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        subprocess.run(["prlimit", "--pid", str(daemon.process.pid), "--nofile=64:64"], check=True)
        crowd = [socket.create_connection(address(daemon.url)) for _ in range(200)]
        before = processor_seconds(daemon.process.pid)
        for _ in range(100):
            assert next(lines) is not None  # the stream goes on
        time.sleep(2)
        used = processor_seconds(daemon.process.pid) - before
        for connection in crowd:
            connection.close()
        started = time.monotonic()
        while True:
            try:
                assert httpx.get(f"{daemon.url}/health", timeout=5).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() - started < 5
        measured("F26", f"the stream went on, {used:.1f} s of processor time in 2 s, answers again at once")
    assert daemon.process.poll() is None
    assert "Traceback" not in daemon.logs


ACTIVE = 1000


@pytest.fixture
def many_files() -> int:
    """How many idle connections this process may have beside ACTIVE ones."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(10_000, hard - ACTIVE - 1000)


@asynccontextmanager
async def idle_connections(daemon: Daemon, count: int) -> AsyncIterator[None]:
    """All of them accepted."""
    idle = []
    for index in range(count):
        connection = socket.socket()
        connection.bind((f"127.0.0.{2 + index // 5000}", 0))
        connection.connect(address(daemon.url))
        idle.append(connection)
    await ask(daemon.url, HEALTH)
    yield
    for connection in idle:
        connection.close()


def test_f28_ten_thousand_idle_connections(start: StartDaemon, measured: Measured, many_files: int) -> None:
    daemon = start()
    before = memory(daemon.process.pid)

    async def run() -> None:
        async with idle_connections(daemon, many_files):
            grown = memory(daemon.process.pid) - before
            async with Pulse(daemon.url) as pulse:
                await asyncio.sleep(4)
        assert grown < 300 * 2**20
        assert pulse.p99 < 0.25
        measured("F28", f"{many_files}: {grown / 2**20:.0f} MiB more, p99 of /health {1000 * pulse.p99:.0f} ms")

    asyncio.run(run())


def test_f28_a_thousand_streams_beside_ten_thousand_idle(
    start: StartDaemon, measured: Measured, many_files: int
) -> None:
    rooms = ("--max-num-batched-tokens", "1024", "--num-blocks", "1100")
    daemon = start("--max-open-requests", str(ACTIVE), "--max-num-seqs", str(ACTIVE), *rooms)
    body = {**SHORT, "max_tokens": 50, "stream": True}
    before = memory(daemon.process.pid)
    begun = ended = 0

    async def read() -> bytes:
        nonlocal begun, ended
        reader, writer = await asyncio.open_connection(*address(daemon.url))
        writer.write(post_bytes(body, "Connection: close"))
        first = await reader.readuntil(b"\n\n")
        begun += 1
        assert ended == 0  # while all others are open
        rest = await reader.read(-1)
        ended += 1
        writer.close()
        return first + rest

    async def run() -> None:
        async with idle_connections(daemon, many_files):
            started = time.monotonic()
            async with Pulse(daemon.url) as pulse:
                answers = await asyncio.gather(*(read() for _ in range(ACTIVE)))
            seconds = time.monotonic() - started
            grown = memory(daemon.process.pid) - before
        assert all(data.startswith(b"HTTP/1.1 200 ") and b"data: [DONE]" in data for data in answers)
        assert len({text_of(data) for data in answers}) == 1  # greedy, of one prompt
        measured(
            "F28",
            f"{ACTIVE} streams of 50 tokens open at once beside {many_files} idle: all complete after {seconds:.0f} s, "
            f"{grown / 2**20:.0f} MiB more, p99 of /health {1000 * pulse.p99:.0f} ms",
        )
        assert grown < 300 * 2**20
        assert pulse.p99 < 0.25

    asyncio.run(run())
    daemon.wait_idle(5)


def text_of(data: bytes) -> str:
    """Of an answer as its events came over the wire."""
    events = (json.loads(event) for event in re.findall(rb"^data: (\{.*\})$", data, re.MULTILINE))
    return "".join(event["choices"][0]["text"] for event in events)


def test_slow_heads_hold_up_nobody_and_end(start: StartDaemon, measured: Measured) -> None:
    daemon = start()

    async def run() -> None:
        async with Pulse(daemon.url) as alone:
            await asyncio.sleep(3)
        slow = [socket.create_connection(address(daemon.url)) for _ in range(1000)]
        for connection in slow:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        started = time.monotonic()
        async with Pulse(daemon.url) as beside:
            await asyncio.sleep(5)
        for connection in slow:
            connection.settimeout(10)
            assert (await asyncio.to_thread(connection.recv, 100)).startswith(b"HTTP/1.1 408 ")
        ended = time.monotonic() - started
        assert ended < 15
        assert beside.p99 < max(1.2 * alone.p99, alone.p99 + 0.02)
        measured(
            "F30",
            f"1,000 unfinished heads: 408 after {ended:.1f} s; p99 of /health {1000 * alone.p99:.0f} ms without and "
            f"{1000 * beside.p99:.0f} ms with them",
        )
        for connection in slow:
            connection.close()

    asyncio.run(run())


def test_one_listening_socket_and_no_other_connection(start: StartDaemon) -> None:
    daemon = start()
    assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    lines = subprocess.run(["ss", "-Htanup"], capture_output=True, text=True, check=True).stdout.splitlines()
    pids = (daemon.process.pid, daemon.engine_pid)
    ours = [line.split() for line in lines if any(f"pid={pid}," in line for pid in pids)]
    port = address(daemon.url)[1]
    listening = [fields for fields in ours if fields[1] == "LISTEN"]
    assert [fields[4] for fields in listening] == [f"127.0.0.1:{port}"]
    assert all(fields[4].endswith(f":{port}") for fields in ours)
