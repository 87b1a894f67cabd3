"""The state machine behind the test of supervision: requests come and go while engines die and stall in any order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from scheduler.config import EngineConfig
from scheduler.messages import Finished, FinishReason
from server.engine_client import ENGINE_DEAD, EngineState, EngineUnavailable
from server.errors import BadRequest
from server.streams import RequestStream
from server.supervisor import Supervisor
from tests.scheduler.fake_engine import COMMAND, expected_tokens
from tests.server.engine_streams import add_request

PAUSES = (0.0,) * 1000
STALL_SECONDS = 2.0
WAIT_SECONDS = 60


class SupervisionStorm(RuleBasedStateMachine):
    """Every request that `submit` took ends exactly once: with its own tokens, its own abort, or the engine's death."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.ends: dict[str, list[Finished]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.readers: list[asyncio.Task[None]] = []
        self.aborted: set[str] = set()
        self.is_stopped = False
        self.clients: list[Any] = []

    @initialize(step_seconds=st.sampled_from(["0", "0.002", "0.02"]))
    def start(self, step_seconds: str) -> None:
        async def begin() -> None:
            self.supervisor = Supervisor(
                EngineConfig(model_dir="/none", num_blocks=40),
                command=[*COMMAND, "--step-seconds", step_seconds],
                stall_seconds=STALL_SECONDS,
                pauses=PAUSES,
            )
            await self.supervisor.start()
            async with asyncio.timeout(WAIT_SECONDS):
                await self.supervisor.wait_ready()
            self.running = asyncio.create_task(self.supervisor.run())

        self.runner.run(begin())

    @rule(
        lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
        max_tokens=st.sampled_from([1, 3, 40, 100_000]),
    )
    def submit(self, lengths: list[int], max_tokens: int) -> None:
        async def send() -> None:
            for length in lengths:
                name = f"r{len(self.prompts)}"
                prompt = [1 + (len(self.prompts) * 7 + i) % 900 for i in range(length)]
                try:
                    stream = self.supervisor.submit(add_request(name, prompt, max_tokens))
                except (EngineUnavailable, BadRequest):
                    continue
                self.clients.append(self.supervisor.engine)
                self.prompts[name] = (prompt, max_tokens)
                self.ends[name], self.tokens[name] = [], []
                self.readers.append(asyncio.create_task(self.read(name, stream)))

        self.runner.run(send())

    async def read(self, name: str, stream: RequestStream) -> None:
        async for delta in stream:
            assert not self.ends[name]
            self.tokens[name] += delta.token_ids
            if delta.finished is not None:
                self.ends[name].append(delta.finished)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.prompts)))

        async def send() -> None:
            if not self.ends[name]:
                self.aborted.add(name)
            self.supervisor.engine.abort(name)
            self.supervisor.engine.abort("never there")

        self.runner.run(send())

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP]))
    def strike(self, number: signal.Signals) -> None:
        async def send() -> None:
            engine = self.supervisor.engine
            # One that is loading has no limit, so that it would stay stopped.
            states = {EngineState.READY} if number == signal.SIGSTOP else {EngineState.READY, EngineState.STARTING}
            if engine.state in states and engine.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(engine.pid, number)

        self.runner.run(send())

    @rule()
    def close_channel(self) -> None:
        async def send() -> None:
            self.supervisor.engine.kill("the test")

        self.runner.run(send())

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.02, 0.2]))
    def wait(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @rule()
    def wait_ready(self) -> None:
        async def wait() -> None:
            async with asyncio.timeout(WAIT_SECONDS):
                while not self.is_stopped and not self.supervisor.is_ready:
                    await asyncio.sleep(0.005)

        self.runner.run(wait())

    def teardown(self) -> None:
        async def finish() -> None:
            async with asyncio.timeout(WAIT_SECONDS):
                await self.supervisor.shutdown(0)
                await self.running
                await asyncio.gather(*self.readers)
            assert all(client.num_open == 0 for client in self.clients)

        try:
            if hasattr(self, "running"):
                self.runner.run(finish())
                self.check()
        finally:
            self.runner.close()

    def check(self) -> None:
        for name, (prompt, max_tokens) in self.prompts.items():
            [end] = self.ends[name]
            tokens = self.tokens[name]
            assert tokens == expected_tokens(prompt, len(tokens))
            if end.reason is FinishReason.LENGTH:
                assert len(tokens) == max_tokens
            elif end.code == "shutting_down":
                assert end.reason is FinishReason.ABORT
            else:
                assert end == ENGINE_DEAD or name in self.aborted
