"""`latentd serve` from the bound port to the exit code: engine, HTTP server, signals."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, DeepseekConfig, load_config
from model.memory import trim
from server.address import BACKLOG, PortError, bind
from server.banner import ready_text
from server.chat_template import TemplateError
from server.engine_client import ENGINE_COMMAND, EngineStartError
from server.http_protocol import HttpProtocol, Turnstile
from server.settings import Settings
from server.supervisor import Supervisor
from server.tokenizer import TokenizerError

T = TypeVar("T")

KEEP_ALIVE_SECONDS = 75
FLUSH_SECONDS = 2
"""How long the last bytes of finished answers may take to reach their readers when the daemon ends."""


def run(settings: Settings, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serves until a signal, or until there is no engine any more, and returns the exit code.

    SettingsError and CheckpointError come before anything runs. `engine_command`: as `EngineClient` has it.
    """
    started = time.monotonic()
    config = load_config(settings.model)
    open_checkpoint(settings.model, config)
    try:
        listener = bind(settings.host, settings.port)
    except PortError as error:
        return _fail(str(error), 1)
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what it warns of has a line of ours
    _raise_file_limit()
    faulthandler.enable()
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, config, listener, started, engine_command))


async def _serve(
    settings: Settings,
    config: DeepseekConfig,
    listener: socket.socket,
    started: float,
    engine_command: Sequence[str],
) -> int:
    signals: asyncio.Queue[int] = asyncio.Queue()
    _take_signals(signals)
    supervisor = Supervisor(settings.to_engine_config(), stall_seconds=settings.stall_timeout, command=engine_command)
    try:
        await supervisor.start()
        server = _build_server(settings, config, supervisor)  # while the engine process imports torch and loads
    except EngineStartError as error:
        return _fail(error.message, error.exit_code)
    except (CheckpointError, TokenizerError, TemplateError) as error:
        await supervisor.shutdown(0)
        return _fail(str(error), 2)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    gc.collect()
    gc.freeze()  # what was imported stays: no collection between chunks need look at it
    trim()
    _take_signals(signals)  # again: uvicorn has put its own handlers in place, and they cut open streams

    stopping = asyncio.create_task(signals.get())
    lost: EngineStartError | None = None
    try:
        if (ready := await _unless(stopping, supervisor.wait_ready())) is not None:
            print(ready_text(settings, config, ready, listener, time.monotonic() - started), flush=True)
            await _unless(stopping, supervisor.run())
    except EngineStartError as error:
        lost = error
        stopping.cancel()
    await _stop(supervisor, signals, settings.drain_timeout)
    server.should_exit = True
    await serving
    return 0 if lost is None else _fail(lost.message, lost.exit_code)


async def _unless(stopping: asyncio.Task[int], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, and `work` is given up, when a signal comes first."""
    task = asyncio.create_task(work)
    await asyncio.wait({stopping, task}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        return None
    return task.result()


def _build_server(settings: Settings, config: DeepseekConfig, supervisor: Supervisor) -> uvicorn.Server:
    from server.app import build_app  # here, so that these 0.5 s run beside the engine's start
    from server.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(settings.model, config.vocab_size)
    app = build_app(settings, supervisor, tokenizer)
    return uvicorn.Server(http_config(app))


def http_config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=cast(type[HttpProtocol], partial(HttpProtocol, Turnstile())),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


def _raise_file_limit() -> None:
    """Every connection is an open file; the usual soft limit, 1,024, is meant for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _take_signals(signals: asyncio.Queue[int]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)


async def _stop(supervisor: Supervisor, signals: asyncio.Queue[int], drain_timeout: float) -> None:
    """Lets open requests finish while new ones get 503; returns when the engine is gone. A second signal ends all."""
    draining = asyncio.create_task(supervisor.shutdown(drain_timeout))
    again = asyncio.create_task(signals.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        print("latentd: stopped at once, open requests are cut off", file=sys.stderr, flush=True)
        os._exit(128 + again.result())  # no waiting for threads; the engine ends when its channel closes
    again.cancel()
    await draining


def _fail(message: str, code: int) -> int:
    print(f"latentd: {message}", file=sys.stderr, flush=True)
    return code
