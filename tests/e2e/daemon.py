"""A real daemon on the built-in model: started as a user would, watched through its pipes and /proc."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_SECONDS = 120.0
READY_LINE = re.compile(r"at (http://[^/]+)/v1")


class Daemon:
    """`latentd serve --port 0 ...`; float32 and one thread, so that greedy text is a fixed function of the prompt."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        module: Sequence[str] = ("server",),
        wait: bool = True,
    ) -> None:
        """`module`: what `python -m` runs, with what comes before `serve`. Without `wait` there is no `url` yet."""
        self.stdout, self.stderr = folder / "stdout.log", folder / "stderr.log"
        command = [sys.executable, "-m", *module, "serve", "--port", "0", "--dtype", "float32", "--num-threads", "1"]
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, "--kv-cache-memory", "64MiB", *options],
                stdout=out,
                stderr=err,
                env={**os.environ, **(environment or {})},
            )
        self.url = self.wait_ready() if wait else ""

    def wait_ready(self) -> str:
        """Until the daemon says its address."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if match := READY_LINE.search(self.stdout.read_text()):
                return match[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"the daemon did not start: {self.logs}")

    @property
    def logs(self) -> str:
        return self.stdout.read_text() + self.stderr.read_text()

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        [pid] = [pid for pid in children if b"--fd" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(pid)

    def gauge(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    def wait_idle(self, seconds: float) -> None:
        """Until nothing runs, waits, or holds a block."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + seconds
        while any(left := {name: self.gauge(name) for name in names}.values()):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def wait_ready_again(self, seconds: float) -> None:
        """Until requests are taken, after an engine was lost."""
        deadline = time.monotonic() + seconds
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < deadline, self.logs
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Signals the daemon and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
