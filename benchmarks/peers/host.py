"""A server as a process: started, waited for, its processor time and memory read, stopped."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.load import HOST
from benchmarks.peers.servers import Server

START_SECONDS = 300.0
STOP_SECONDS = 20.0
TICKS = os.sysconf("SC_CLK_TCK")
SESSION = Path("/proc/self/autogroup")


@dataclass(frozen=True)
class Running:
    pid: int
    port: int
    startup_s: float

    def memory_mib(self, line: str) -> float:
        """VmRSS (now) or VmHWM (the most so far) of all its processes together."""
        return sum(_status_kib(pid, line) for pid in _tree(self.pid)) / 1024

    def cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in _tree(self.pid))


@contextlib.contextmanager
def started(server: Server, home: Path, log: Path) -> Iterator[Running]:
    """Raises RuntimeError, which names the log, where the server does not get ready."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    command = shlex.split(server.command.format(home=home.absolute(), port=port))
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | server.environment,
            process_group=0,  # to end it with all its children
        )
    try:
        while not _is_ready(f"http://{HOST}:{port}{server.ready}"):
            if process.poll() is not None or time.monotonic() - begin > START_SECONDS:
                raise RuntimeError(f"{command[0]} did not get ready: see {log}")
            time.sleep(0.05)
        _share_priority(process.pid)
        yield Running(process.pid, port, time.monotonic() - begin)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def raised_priority() -> Iterator[None]:
    """Before all others for this process and the servers it starts, where the system lets it.

    Linux shares the processor among sessions before it shares it within one, so nice alone does nothing between them.
    """
    with contextlib.suppress(OSError):
        SESSION.write_text("-20")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            SESSION.write_text("0")


def _share_priority(root: int) -> None:
    """For sessions that a server starts, such as our engine's, which would count as others."""
    with contextlib.suppress(OSError):
        if session := SESSION.read_text().split():  # empty where the system does not share among sessions
            for pid in _tree(root):
                Path(f"/proc/{pid}/autogroup").write_text(session[-1])


def machine_cpu_s() -> float:
    """Processor time that everything on the machine has taken since it started."""
    user, nice, system, _idle, _wait, interrupts, soft, stolen = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, interrupts, soft, stolen))) / TICKS


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0


def _status_kib(pid: int, line: str) -> int:
    with contextlib.suppress(OSError):
        for each in Path(f"/proc/{pid}/status").read_text().splitlines():
            if each.startswith(f"{line}:"):
                return int(each.split()[1])
    return 0
