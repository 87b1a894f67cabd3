"""What tests do with an engine client: send, read, wait."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from model.batch import SamplingParams
from scheduler.config import EngineConfig
from scheduler.messages import AddRequest, Finished
from server.engine_client import (
    EngineClient,
    EngineState,
)
from server.streams import RequestStream
from tests.scheduler.fake_engine import COMMAND


def add_request(request_id: str, prompt: Sequence[int], max_tokens: int) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return AddRequest(request_id=request_id, prompt=array("I", prompt).tobytes(), params=params)


async def read(stream: RequestStream) -> tuple[list[int], Finished]:
    """All tokens of a stream and its terminal event; checks that there is exactly one, at the end."""
    tokens: list[int] = []
    ends: list[Finished] = []
    async for delta in stream:
        assert not ends
        tokens += delta.token_ids
        if delta.finished is not None:
            ends.append(delta.finished)
    (end,) = ends
    return tokens, end


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def with_engine(
    scenario: Callable[[EngineClient], Coroutine[Any, Any, None]], *options: str, loop: str = "asyncio", **config: int
) -> EngineClient:
    """Run `scenario` with a ready engine; whatever happens, no process is left."""

    async def run() -> EngineClient:
        engine = EngineClient(EngineConfig(model_dir="/none", **config), command=[*COMMAND, *options])
        await engine.start()
        try:
            async with asyncio.timeout(60):
                await engine.wait_ready()
                assert engine.state is EngineState.READY
                await scenario(engine)
        finally:
            await engine.shutdown(0)
        return engine

    if loop == "uvloop":
        return uvloop.run(run())
    return asyncio.run(run())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
