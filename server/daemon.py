"""`latentd serve` from the bound port to the exit code: engine, HTTP server, signals."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import resource
import signal
import socket
import sys
import time

import uvicorn
import uvloop
from starlette.types import ASGIApp

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, DeepseekConfig, load_config
from server.address import BACKLOG, PortError, bind
from server.banner import ready_text
from server.chat_template import TemplateError
from server.engine_client import EngineClient, EngineStartError
from server.http_protocol import HttpProtocol
from server.settings import Settings
from server.tokenizer import TokenizerError

KEEP_ALIVE_SECONDS = 75
FLUSH_SECONDS = 2
"""How long the last bytes of finished answers may take to reach their readers when the daemon ends."""


def run(settings: Settings) -> int:
    """Serves until a signal and returns the exit code. SettingsError and CheckpointError come before anything runs."""
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
        return runner.run(_serve(settings, config, listener, started))


async def _serve(settings: Settings, config: DeepseekConfig, listener: socket.socket, started: float) -> int:
    signals: asyncio.Queue[int] = asyncio.Queue()
    _take_signals(signals)
    engine = EngineClient(settings.to_engine_config())
    try:
        await engine.start()
        server = _build_server(settings, config, engine)  # while the engine process imports torch and loads
    except EngineStartError as error:
        return _fail(error.message, error.exit_code)
    except (CheckpointError, TokenizerError, TemplateError) as error:
        await engine.shutdown(0)
        return _fail(str(error), 2)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    _take_signals(signals)  # again: uvicorn has put its own handlers in place, and they cut open streams

    stopping = asyncio.create_task(signals.get())
    loading = asyncio.create_task(engine.wait_ready())
    await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if stopping.done():
        loading.cancel()
    else:
        try:
            print(ready_text(settings, config, loading.result(), listener, time.monotonic() - started), flush=True)
            # If the engine dies from here on, requests are answered with 503 until somebody stops the daemon.
            await stopping
        except EngineStartError as error:
            code = _fail(error.message, error.exit_code)
            stopping.cancel()
    await _stop(engine, signals, settings.drain_timeout)
    server.should_exit = True
    await serving
    return code


def _build_server(settings: Settings, config: DeepseekConfig, engine: EngineClient) -> uvicorn.Server:
    from server.app import build_app  # here, so that these 0.5 s run beside the engine's start
    from server.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(settings.model, config.vocab_size)
    app = build_app(settings, engine, tokenizer)
    return uvicorn.Server(http_config(app))


def http_config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HttpProtocol,
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


async def _stop(engine: EngineClient, signals: asyncio.Queue[int], drain_timeout: float) -> None:
    """Lets open requests finish while new ones get 503; returns when the engine is gone. A second signal ends all."""
    draining = asyncio.create_task(engine.shutdown(drain_timeout))
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
