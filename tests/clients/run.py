"""Runs a command against a daemon of its own: `python -m tests.clients.run [option of serve ...] -- command ...`.

The command finds the daemon in LATENTD_URL. The exit code is the command's, or 1 when the daemon did not end well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.e2e.daemon import Daemon


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), *arguments[:split])
        try:
            command = [argument.replace("{url}", daemon.url) for argument in arguments[split + 1 :]]
            code = subprocess.run(command, env={**os.environ, "LATENTD_URL": daemon.url}, check=False).returncode
            stays = daemon.process.poll() is None
        finally:
            ended_well = daemon.stop() == 0
        if not (stays and ended_well):
            print(daemon.logs, file=sys.stderr)
    return code or int(not (stays and ended_well))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
