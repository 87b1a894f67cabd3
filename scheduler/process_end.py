"""How the engine process ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

EXIT_CONFIG = 2
EXIT_FAILURE = 70


def end_process(exit_code: int) -> NoReturn:
    """Now, from any thread, without closing the channel first: its end of file means death."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def one_line(error: Exception) -> str:
    """What an error says, for a log line or a client."""
    return " ".join(str(error).split()) or type(error).__name__
