"""F19. `python -m tests.faults.half_open inside FOLDER` runs in a network of its own and cuts its only link;
`python -m tests.faults.half_open serve ...` is the daemon, which waits three seconds for clients and not two minutes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

import server.address
from server.cli import main
from tests.e2e.daemon import Daemon
from tests.faults.traffic import SHORT
from tests.faults.wire import address, post_bytes, wait_until

SHORTENED = {
    socket.TCP_KEEPIDLE: 1,
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: 2,
    socket.TCP_USER_TIMEOUT: 3000,
}


def lose_two_clients(folder: Path) -> float:
    """One in the middle of its stream, one that waits in silence. Seconds until the daemon has given up both."""
    set_link("up")
    daemon = Daemon(folder, "--max-num-seqs", "1", module=("tests.faults.half_open",))
    try:
        body: dict[str, Any] = {**SHORT, "max_tokens": 8000}
        reading, waiting = (socket.create_connection(address(daemon.url)) for _ in range(2))
        reading.sendall(post_bytes({**body, "stream": True}))
        assert reading.recv(1000).startswith(b"HTTP/1.1 200 ")
        waiting.sendall(post_bytes(body))
        wait_until(lambda: daemon.gauge("vllm:num_requests_waiting") == 1)
        set_link("down")
        cut = time.monotonic()
        wait_until(lambda: daemon.logs.count(" finish=abort ") == 2, 20)
        seconds = time.monotonic() - cut
        set_link("up")
        daemon.wait_idle(2)
        assert httpx.post(f"{daemon.url}/v1/completions", json=SHORT, timeout=30).status_code == 200
        assert "Traceback" not in daemon.logs
        assert daemon.stop() == 0
        return seconds
    finally:
        daemon.process.kill()


def set_link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "inside":
        print(lose_two_clients(Path(sys.argv[2])))
    else:
        shortened = [(level, name, SHORTENED.get(name, value)) for level, name, value in server.address.OPTIONS]
        server.address.OPTIONS = shortened
        sys.exit(main(sys.argv[1:]))
