"""`python -m tests.faults.daemon FAULTS serve ...`: the daemon as it is, over an engine with the faults of
`tests.faults.engine`."""

from __future__ import annotations

import shlex
import sys
from functools import partial

import server.daemon
from server.cli import main

if __name__ == "__main__":
    faults, *arguments = sys.argv[1:]
    command = (sys.executable, "-m", "tests.faults.engine", *shlex.split(faults))
    server.daemon.run = partial(server.daemon.run, engine_command=command)  # what the command imports when it serves
    sys.exit(main(arguments))
