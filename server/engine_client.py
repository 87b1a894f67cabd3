"""The front-end's view of the engine process: start it, send it requests, hand its tokens to streams, see it die."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence

from scheduler.channel import ClientChannel
from scheduler.config import EngineConfig
from scheduler.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    Configure,
    EngineFailed,
    EngineReady,
    EngineStats,
    Finished,
    FinishReason,
    FromEngine,
    Heartbeat,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
)
from server.streams import RequestStream

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-P", "-m", "scheduler.engine")
"""`-P`: a `model` folder in the working directory must not be taken for ours."""
SHUTDOWN_GRACE_SECONDS = 2.0
"""How long the engine may take beyond the drain before it is killed: its last step and its exit."""
_EXIT_GRACE_SECONDS = 1.0
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
"""What native code dies of: unlike SIGKILL, which comes from outside, it may be what a request made of it."""

ENGINE_DEAD = Finished(
    reason=FinishReason.ERROR,
    code="engine_dead",
    message="The server had an error while processing your request.",
)
"""How every open stream ends when the engine dies. The text is fixed: what happened is for the log, not for clients."""
OVERRUN = Finished(reason=FinishReason.ABORT, code="slow_reader")
"""How the stream of a reader ends who lets too many log-probabilities gather."""


class EngineState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    """The engine died or could not start; `EngineClient.failure` says why."""
    STOPPED = "stopped"
    """`shutdown` was called: open streams may still be draining, new requests are refused."""


class EngineStartError(Exception):
    """The engine ended before it was ready."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        """What the daemon should exit with: 2 when the operator must change something, else 1."""


class EngineUnavailable(Exception):  # noqa: N818
    """There is no engine that takes requests now; the text says why, for the operator."""


class EngineClient:
    """One engine process and the streams that wait for it. Everything runs in the event loop of `start`.

    `state` only moves forward (STARTING, READY, then DOWN or STOPPED): a new engine is a new client.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_stats: Callable[[EngineStats], None] | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        """`on_stats` is called with the figures of every step and heartbeat; `command` gets `--fd N` appended."""
        self.state = EngineState.STARTING
        self.failure: str | None = None
        """Why the engine is down, in one line for the operator."""
        self.ready: EngineReady | None = None
        self.fatal_prompts: list[bytes] = []
        """Prompts that were being computed when the engine failed by itself: what it named, or all that were open."""
        self.stats = EngineStats()
        self.longest_step = 0.0
        """Seconds, of all its steps so far."""
        self.unknown_ids = 0
        """Outputs for requests that are not open here: what was under way when they were aborted."""
        self.on_stats = on_stats
        self._config = config
        self._command = command
        self._streams: dict[str, RequestStream] = {}
        self._prompts: dict[str, bytes] = {}
        """Of the open streams; after a death, of those it ended."""
        self._channel: ClientChannel | None = None
        self._process: Process | None = None
        self._failed: EngineFailed | None = None
        self._closed = asyncio.Event()
        self._started = asyncio.Event()
        self._gone = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._progress_at = 0.0
        """Monotonic time at which the engine, by its own account, last ended a step or was idle."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def num_open(self) -> int:
        """Streams without their terminal event."""
        return len(self._streams)

    @property
    def step_age(self) -> float:
        """Seconds that the running step has taken, or that the engine has been silent; up to a second when idle."""
        return time.monotonic() - self._progress_at

    async def start(self) -> None:
        """Start the process and send it its configuration. `EngineStartError` when it cannot be started."""
        # The engine imports from where we do, installed or not.
        search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # In our session: Linux shares the processor among sessions first, whatever the priorities in them. Of
                # Ctrl-C, which a terminal sends to both, the engine takes no notice: we decide.
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    "--fd",
                    str(theirs.fileno()),
                    stdin=DEVNULL,
                    env=os.environ | {"PYTHONPATH": search_path},
                    pass_fds=[theirs.fileno()],
                )
        except OSError as error:
            ours.close()
            self.state = EngineState.DOWN
            self.failure = f"cannot start the engine process: {error}"
            self._started.set()
            self._gone.set()
            raise EngineStartError(self.failure, 1) from error
        self._channel = await ClientChannel.open(ours, self._on_message, self._on_closed)
        self._channel.send(Configure(self._config))
        self._watcher = asyncio.create_task(self._watch(self._process, self._channel))
        if self.state is EngineState.STOPPED:  # shutdown() was called meanwhile
            self._kill()

    async def wait_ready(self) -> EngineReady:
        """Wait until the model is loaded. `EngineStartError` when the engine ends, or is shut down, before that."""
        await self._started.wait()
        if self.ready is None:
            is_config = self._failed is not None and self._failed.kind == "config"
            raise EngineStartError(self.failure or "stopped while loading", 2 if is_config else 1)
        return self.ready

    async def wait_down(self) -> None:
        """Wait until the process is gone and reaped, whatever the reason."""
        await self._gone.wait()

    def submit(self, request: AddRequest) -> RequestStream:
        """Send a request and open its stream. Ids must never be used twice.

        `EngineUnavailable` unless READY; `ValueError` for an id that is open; `ProtocolError` for a prompt that does
        not fit into a frame.
        """
        if self.state is not EngineState.READY or self._channel is None:
            raise EngineUnavailable(self.failure or f"the engine is {self.state}")
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id} is in use")
        self._channel.send(request)
        stream = self._streams[request.request_id] = RequestStream(request.request_id)
        self._prompts[request.request_id] = request.prompt
        return stream

    def abort(self, request_id: str) -> None:
        """Forget a request at once and tell the engine to. Idempotent; never raises; a no-op after the terminal event.

        A stream that somebody still reads ends with ABORT.
        """
        stream = self._streams.pop(request_id, None)
        if stream is None or self._channel is None:
            return
        del self._prompts[request_id]
        stream.push([], finished=Finished(reason=FinishReason.ABORT))
        self._channel.send(AbortRequests([request_id]))

    def reset_prefix_cache(self) -> None:
        """Tell the engine to forget what it has cached: requests submitted from now on find nothing older.

        `EngineUnavailable` unless READY.
        """
        if self.state is not EngineState.READY or self._channel is None:
            raise EngineUnavailable(self.failure or f"the engine is {self.state}")
        self._channel.send(ResetPrefixCache())

    def kill(self, reason: str) -> None:
        """End an engine that no longer works; everything goes on as after any other death."""
        self.failure = reason
        self._kill()
        if self._channel is not None:
            self._channel.close()  # where the kernel cannot end the process, its streams need not wait for that

    def dump_stacks(self) -> None:
        """Let a ready engine write the stacks of its threads to its stderr."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)

    async def shutdown(self, drain_seconds: float) -> None:
        """Refuse new requests, let the open ones run for at most `drain_seconds`, return when the process is gone.

        May be called again with a shorter time while it waits. An engine that is still loading is killed.
        """
        was_starting = self.state is EngineState.STARTING
        if self.state is not EngineState.DOWN:
            self.state = EngineState.STOPPED
        if self._process is None or self._channel is None:
            return
        if was_starting:
            self._kill()
        else:
            self._channel.send(Shutdown(drain_seconds))
        try:
            await asyncio.wait_for(self._gone.wait(), drain_seconds + SHUTDOWN_GRACE_SECONDS)
        except TimeoutError:
            logger.warning("engine did not end within %.1f s of the drain: killed", SHUTDOWN_GRACE_SECONDS)
            self._kill()
            await self._gone.wait()

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self._progress_at = time.monotonic()
                self._dispatch(message)
                self._take_stats(message.stats)
            case Heartbeat():
                self._progress_at = time.monotonic() - message.step_age
                self._take_stats(message.stats)
            case EngineReady():
                self._on_ready(message)
            case EngineFailed():
                self._failed = message

    def _dispatch(self, output: StepOutput) -> None:
        """Hand the columns of a step to their streams. No code of a stream's reader runs in between."""
        streams = self._streams
        # What comes before a request's first token, then what comes with each token, then the end.
        for request_id, progress in output.progress.items():
            if (stream := streams.get(request_id)) is not None:
                stream.push([], progress=progress)
        for request_id, prompt_logprobs in output.prompt_logprobs.items():
            if (stream := streams.get(request_id)) is not None:
                stream.push([], prompt_logprobs=prompt_logprobs)
        for request_id, started in output.started.items():
            if (stream := streams.get(request_id)) is not None:
                stream.push([], started=started)
        for request_id, token_ids in zip(output.request_ids, output.token_ids, strict=True):
            stream = streams.get(request_id)
            if stream is None:
                self.unknown_ids += 1
            else:
                stream.push(token_ids, logprobs=output.logprobs.get(request_id))
                if stream.is_overrun and not stream.ended:
                    stream.push([], finished=OVERRUN)
                    self.abort(request_id)
        for request_id, finished in output.finished.items():
            if (stream := streams.pop(request_id, None)) is not None:
                del self._prompts[request_id]
                stream.push([], finished=finished)

    def _take_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        self.longest_step = max(self.longest_step, stats.step_seconds)
        if self.on_stats is not None:
            self.on_stats(stats)

    def _on_ready(self, ready: EngineReady) -> None:
        if ready.protocol != PROTOCOL_VERSION:
            self.failure = f"the engine speaks protocol {ready.protocol}, not {PROTOCOL_VERSION}"
            self._kill()
        elif self.state is EngineState.STARTING:
            self._progress_at = time.monotonic()
            self.ready = ready
            self.state = EngineState.READY
            self._started.set()

    def _on_closed(self, reason: str) -> None:
        """End of the channel: the engine is dead, or as good as dead because nothing can reach it any more."""
        if self.state is not EngineState.STOPPED:
            self.state = EngineState.DOWN
            if self.failure is None:
                self.failure = self._failed.message if self._failed is not None else f"engine channel closed: {reason}"
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.push([], finished=ENGINE_DEAD)
        self._closed.set()

    async def _watch(self, process: Process, channel: ClientChannel) -> None:
        """Reap the process, however it ends: by its exit, or by closing the channel."""
        exited = asyncio.create_task(process.wait())
        closed = asyncio.create_task(self._closed.wait())
        await asyncio.wait({exited, closed}, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():
            # It is either ending by itself, and then its exit code tells why, or is useless without a channel.
            await asyncio.wait({exited}, timeout=_EXIT_GRACE_SECONDS)
            self._kill()
        exit_code = await exited
        if not closed.done():
            # What it wrote before it ended is still to be read; then comes the end of file, unless a process of its
            # own has inherited the socket.
            await asyncio.wait({closed}, timeout=_EXIT_GRACE_SECONDS)
            channel.close()
        await closed
        if self._failed is not None:
            self.fatal_prompts = [self._prompts[name] for name in self._failed.request_ids if name in self._prompts]
        elif -exit_code in _CRASHES:
            self.fatal_prompts = list(self._prompts.values())
        self._prompts.clear()
        if self.state is EngineState.DOWN:
            if self._failed is None:
                self.failure = f"engine process {process.pid} {_describe_exit(exit_code)} ({self.failure})"
            if self.ready is not None:  # else `wait_ready` reports it
                logger.error("engine is down: %s", self.failure)
        self._started.set()
        self._gone.set()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"exited with code {exit_code}"
