"""A real engine process, its front-end played by a blocking stand-in."""

from __future__ import annotations

import socket
import subprocess
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.batch import SamplingParams
from scheduler.channel import FrameDecoder, encode_frame
from scheduler.config import EngineConfig
from scheduler.messages import (
    AddRequest,
    Configure,
    EngineReady,
    Finished,
    FromEngine,
    Grammar,
    StepOutput,
    ToEngine,
)
from tests.scheduler.fake_engine import COMMAND

ROOT = Path(__file__).parents[2]


class EngineProcess:
    """A running engine and the front-end's end of its channel."""

    def __init__(self, log: Path, *options: str, protocol: int = 1, **config: int | str) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        self._log = log
        with theirs, log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*COMMAND, *options, "--fd", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        self._messages = self._receive()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, Finished] = {}
        self.send(Configure(EngineConfig(model_dir="/none", **config), protocol=protocol))

    def send(self, message: ToEngine) -> None:
        self.socket.sendall(encode_frame(message))

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, *, grammar: Grammar | None = None, **params: Any
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, **params)
        prompt_bytes = array("I", prompt).tobytes()
        self.send(AddRequest(request_id=request_id, prompt=prompt_bytes, params=sampling, grammar=grammar))

    def _receive(self) -> Iterator[FromEngine]:
        decoder = FrameDecoder[FromEngine](FromEngine)
        while data := self.socket.recv(65536):
            yield from decoder.feed(data)

    def next(self) -> FromEngine:
        """The next message; keeps account of tokens and terminal events."""
        message = next(self._messages)
        if isinstance(message, StepOutput):
            for request_id, token_ids in zip(message.request_ids, message.token_ids, strict=True):
                assert request_id not in self.finished, "tokens after the terminal event"
                self.tokens[request_id] += token_ids
            assert not message.finished.keys() & self.finished.keys(), "a second terminal event"
            self.finished |= message.finished
        return message

    def until(self, condition: Callable[[FromEngine], bool]) -> FromEngine:
        while not condition(message := self.next()):
            pass
        return message

    def wait_ready(self) -> EngineReady:
        message = self.next()
        assert isinstance(message, EngineReady)
        return message

    def wait_finished(self, *request_ids: str) -> None:
        while not self.finished.keys() >= set(request_ids):
            self.next()

    def end(self) -> int:
        """Read to the end of file; the exit code."""
        for _ in iter(lambda: next(self._messages, None), None):
            pass
        return self.process.wait(10)

    @property
    def log(self) -> str:
        return self._log.read_text()
