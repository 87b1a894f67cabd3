"""F15, F27, F35: a full disk under the log, a port in use, and a system that offers next to nothing."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx

from tests.e2e.daemon import READY_LINE
from tests.faults.conftest import Measured
from tests.faults.traffic import SHORT

SERVE = [sys.executable, "-m", "server", "serve", "--port", "0", "--num-threads", "1", "--kv-cache-memory", "64MiB"]


@contextmanager
def running(command: list[str], log: Path, stderr: IO[bytes] | int, environment: dict[str, str]) -> Iterator[str]:
    """A daemon and its URL; afterwards it must end as it should."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=stderr, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (match := READY_LINE.search(log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield match[1]
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> None:
    for _ in range(3):
        assert httpx.post(f"{url}/v1/completions", json=SHORT, timeout=30).status_code == 200
    assert httpx.post(f"{url}/v1/completions", json={"prompt": 1}, timeout=30).status_code == 400


def test_f15_a_log_that_cannot_be_written(tmp_path: Path, measured: Measured) -> None:
    with (
        open("/dev/full", "wb") as full,
        running(SERVE, tmp_path / "out", full, {**os.environ, "LATENTD_LOG_LEVEL": "debug"}) as url,
    ):
        answers(url)
    measured("F15", "every write to the log failed, every request was answered, exit code 0")


def test_f27_a_port_in_use(measured: Measured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*SERVE, "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert ended.returncode == 1
    assert ended.stderr.endswith("Address already in use\n")
    assert ended.stderr.count("\n") == 1
    measured("F27", f"exit code 1 after {seconds:.2f} s, {computed:.2f} s of processor time")
    assert computed < 1  # an engine's imports alone take longer


def test_f35_no_home_no_locale_nothing_writable(tmp_path: Path, measured: Measured) -> None:
    root = Path(__file__).parents[2]
    search_path = os.pathsep.join([str(root), *(entry for entry in sys.path if entry)])
    environment = {"PYTHONPATH": search_path, "LANG": "C"}
    read_only = ["unshare", "-rm", "sh", "-c", 'mount -o remount,bind,ro / && cd / && exec "$@"', "sh"]
    if subprocess.run([*read_only, "true"], capture_output=True).returncode:
        read_only = []  # no such rights here: the rest of it at least
    command = [*read_only, *SERVE]
    with running(command, tmp_path / "out", subprocess.DEVNULL, environment) as url:
        answers(url)
    measured("F35", "starts and answers" + (" on a read-only root" if read_only else ""))
