"""Every grammar of a request is compiled once in a process of its own before anything else is spent on it.

That gives the 400 with what is wrong, and a grammar that would take too long never meets the engine. The processes
(`scheduler/grammar_worker.py`) start with the first grammar and are waited for in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import struct
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from scheduler.messages import Grammar
from server.errors import BadRequest, Overloaded

WORKERS = 2
PATIENCE_SECONDS = 1.8
"""A request whose turn has not come by then is refused as overload."""
START_SECONDS = 15.0
"""The same, until there is a first verdict: the processes have to read a tokenizer of perhaps 130,000 tokens before."""
MAX_VERDICTS = 4096
"""Remembered, good and bad, by the hash of the grammar."""


_OWN_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


class GrammarChecker:
    def __init__(self, tokenizer_path: Path) -> None:
        self._tokenizer_path = tokenizer_path
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar")
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        """Of the two lists."""
        self._closed = threading.Event()
        self.close = weakref.finalize(self, _end, self._executor, self._processes, self._lock, self._closed)
        """End the processes; happens by itself when nobody refers to the checker."""

    async def check(self, grammar: Grammar, param: str) -> None:
        """Returns if the engine can enforce the grammar. Raises BadRequest that names `param`, or Overloaded."""
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            frame = msgspec.msgpack.encode(grammar)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS if self._verdicts else START_SECONDS):
                    verdict = await asyncio.get_running_loop().run_in_executor(self._executor, self._ask, frame)
            except TimeoutError:
                raise Overloaded(
                    "Grammars take too long to compile at the moment.", param=param, retry_after=1
                ) from None
            self._verdicts[key] = verdict
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        if verdict:
            raise BadRequest(
                f"'{param}' cannot be enforced: {_told(verdict, grammar)[:400]}.", param=param, code="invalid_grammar"
            )

    def _ask(self, frame: bytes) -> str:
        """One grammar's verdict, in a thread. A process that has died is replaced, once."""
        for _ in range(2):
            process = self._take()
            try:
                stdin, stdout = _pipes(process)
                stdin.write(struct.pack("<I", len(frame)) + frame)
                stdin.flush()
                [size] = struct.unpack("<I", stdout.read(4))
                verdict = msgspec.msgpack.decode(stdout.read(size), type=str)
            except (OSError, ValueError, struct.error, msgspec.DecodeError):
                self._discard(process)
                continue
            with self._lock:
                self._idle.append(process)
            return verdict
        raise RuntimeError("the grammar worker does not answer")

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the grammar checker is closed")
            if self._idle:
                return self._idle.pop()
            command = [sys.executable, "-m", "scheduler.grammar_worker", str(self._tokenizer_path)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
            return process

    def _discard(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        with self._lock:
            if process in self._processes:
                self._processes.remove(process)
                _close_pipes(process)


def _told(verdict: str, grammar: Grammar) -> str:
    """llguidance's words, without its places in a grammar that it made itself and the options that nobody here has."""
    if grammar.kind == "lark":
        return verdict
    if "oneOf constraints are not supported" in verdict:
        return "the branches of a 'oneOf' do not exclude one another"
    return _OWN_PLACE.sub("", verdict)


def _end(
    executor: ThreadPoolExecutor,
    processes: list[subprocess.Popen[bytes]],
    lock: threading.Lock,
    closed: threading.Event,
) -> None:
    executor.shutdown(wait=False, cancel_futures=True)
    with lock:
        closed.set()  # else a thread that waits for one of them would replace it
        for process in processes:
            process.kill()
            process.wait()
            _close_pipes(process)
        processes.clear()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in _pipes(process):
        with suppress(OSError):  # what was left to write has no reader
            pipe.close()
