"""What a start costs: `python -m benchmarks.startup [MODEL] [--runs 5] [--check]`.

Starts the real daemon, waits for `/ready`, asks for one short completion and reads the resident memory of both
processes. With `--check` the exit code is 1 if the median start or the front-end's memory misses its target.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

READY_TARGET_SECONDS = 5.0
"""For the built-in model."""
FRONT_END_TARGET_MB = 150.0
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Start:
    ready_seconds: float
    front_end_mb: float
    engine_mb: float
    weights_mb: float


def measure(model: str | None) -> Start:
    port = _free_port()
    command = [sys.executable, "-m", "server", "serve", *([model] if model else []), "--port", str(port)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() - started > TIMEOUT_SECONDS:
                    raise SystemExit(f"the daemon did not become ready: {' '.join(command)}")
                time.sleep(0.01)
            ready_seconds = time.monotonic() - started
            body = json.dumps({"prompt": "Hello", "max_tokens": 4}).encode()
            url = f"http://127.0.0.1:{port}/v1/completions"
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                answer.read()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5) as answer:
                weights_mb = json.load(answer)["engine"]["weight_bytes"] / 1e6
            [engine] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return Start(ready_seconds, _resident_mb(process.pid), _resident_mb(int(engine)), weights_mb)
        finally:
            process.terminate()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return True
    except (OSError, urllib.error.HTTPError):
        return False


def _resident_mb(pid: int) -> float:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024 / 1e6


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="folder of a checkpoint; default: the built-in model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    starts = [measure(arguments.model) for _ in range(arguments.runs)]
    ready = statistics.median(start.ready_seconds for start in starts)
    front_end = max(start.front_end_mb for start in starts)
    engine = max(start.engine_mb for start in starts)
    slowest = max(start.ready_seconds for start in starts)
    print(f"start to /ready, median of {len(starts)}   {ready:6.2f} s    (slowest {slowest:.2f} s; target 5 s)")
    print(f"front-end, resident              {front_end:6.1f} MB   (target 150 MB)")
    beyond = engine - starts[0].weights_mb
    print(f"engine, resident                 {engine:6.1f} MB   ({beyond:.0f} MB beyond the weights)")
    return int(arguments.check and (ready > READY_TARGET_SECONDS or front_end > FRONT_END_TARGET_MB))


if __name__ == "__main__":
    sys.exit(main())
