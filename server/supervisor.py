"""The engine over the life of the daemon: one process after the other, each with its own `EngineClient`.

An engine that dies, or whose step takes longer than the stall limit, is replaced by a new one. What must not happen is
a daemon that looks alive and answers nothing: one death too many, or a configuration that no longer loads, ends it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from scheduler.config import EngineConfig
from scheduler.messages import AddRequest, EngineReady, EngineStats
from server.admission import MAX_RETRY_AFTER
from server.engine_client import ENGINE_COMMAND, EngineClient, EngineStartError, EngineState
from server.errors import BadRequest, Unavailable
from server.streams import RequestStream
from server.suspects import Suspects

logger = logging.getLogger(__name__)

RESTART_PAUSES = (0.0, 1.0, 2.0)
"""Seconds before the restart after the first, second and third death within `DEATH_WINDOW_SECONDS`; a fourth one ends
the daemon."""
DEATH_WINDOW_SECONDS = 600.0
STALL_SECONDS = 30.0
_FIRST_START_SECONDS = 2.0
"""Told to clients that come before it is known how long a start takes."""
_DRAIN_SECONDS = 5
"""After which another replica, or the next daemon at this address, may answer."""
_TICK_SECONDS = 1.0
_PATIENCE = 4
"""How much longer than the longest step so far one may take: on a slow machine steps with a long context take more than
any fixed limit, but they grow by less from one to the next."""


class Supervisor:
    """Keeps an engine running. Everything runs in the event loop of `start`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        stall_seconds: float = STALL_SECONDS,
        command: Sequence[str] = ENGINE_COMMAND,
        pauses: Sequence[float] = RESTART_PAUSES,
    ) -> None:
        """`stall_seconds`: how long one step may take, or the engine be silent, unless steps have become that long by
        and by; loading and warming up have no limit. `pauses` is for tests, as `command` is.
        """
        self.on_stats: Callable[[EngineStats], None] | None = None
        """Called with the figures of every step and heartbeat; with empty ones when an engine has died."""
        self.restarts = 0
        self._config = config
        self._stall_seconds = stall_seconds
        self._command = command
        self._pauses = pauses
        self._suspects = Suspects()
        self._deaths: deque[float] = deque()
        self._what_happened = "died"
        """To the newest engine, or will have: all that clients are told of it."""
        self._is_stopping = False
        self._started_at = 0.0
        self._start_seconds = _FIRST_START_SECONDS
        self._ready_at = 0.0
        """Monotonic time at which the engine that is missing is expected."""
        self.engine = self._new_engine()
        """The newest one, whatever its state; another object after each restart."""

    @property
    def is_ready(self) -> bool:
        return self.engine.state is EngineState.READY

    @property
    def step_age(self) -> float:
        """Seconds since the ready engine last ended a step or was idle; 0 while there is none."""
        return self.engine.step_age if self.is_ready else 0.0

    def require_ready(self) -> EngineReady:
        """What the engine is. Raises Unavailable, with an honest time to come back, when it takes no requests."""
        engine = self.engine
        if engine.state is EngineState.READY and engine.ready is not None:
            return engine.ready
        if self._is_stopping or engine.state is EngineState.STOPPED:
            raise Unavailable("The server is shutting down.", code="shutting_down", retry_after=_DRAIN_SECONDS)
        wait = self._ready_at - time.monotonic()
        if engine.state is EngineState.DOWN and wait < 0:  # it has only just died
            wait = self._start_seconds
        seconds = min(max(math.ceil(wait), 1), MAX_RETRY_AFTER)
        if engine.state is EngineState.STARTING and not self._deaths:
            raise Unavailable("Loading model", code="model_loading", retry_after=seconds)
        message = f"The engine {self._what_happened} and is being restarted."
        raise Unavailable(message, code="engine_down", retry_after=seconds)

    def submit(self, request: AddRequest) -> RequestStream:
        """`EngineClient.submit`, but for prompts that engines have died of: BadRequest."""
        if self._suspects.convict(request.prompt, time.monotonic()):
            raise BadRequest(
                "The engine has failed twice while it computed this prompt, which is refused for ten minutes.",
                code="prompt_refused",
            )
        return self.engine.submit(request)

    async def start(self) -> None:
        """Start the first engine. `EngineStartError` when its process cannot be started."""
        self._started_at = time.monotonic()
        self._ready_at = self._started_at + self._start_seconds
        await self.engine.start()

    async def wait_ready(self) -> EngineReady:
        """Wait until the newest engine has loaded the model and answered. `EngineStartError` when it ends before."""
        ready = await self.engine.wait_ready()
        self._start_seconds = time.monotonic() - self._started_at
        return ready

    async def run(self) -> None:
        """Once the first engine is ready: replace engines that die or stall, until `shutdown`.

        `EngineStartError`, with the daemon's exit code, when there is no use in another start.
        """
        while True:
            await self._until_down(self.engine)
            if self._is_stopping:
                return
            now = time.monotonic()
            self._suspects.accuse(self.engine.fatal_prompts, now)
            if self.on_stats is not None:
                self.on_stats(EngineStats())
            pause = self._count_death(now)
            self._ready_at = now + pause + self._start_seconds
            logger.warning("the engine is restarted in %.0f s", pause)
            await asyncio.sleep(pause)
            if self._is_stopping:
                return
            self.restarts += 1
            self.engine = self._new_engine()
            try:
                await self.start()
                await self.wait_ready()
            except EngineStartError as error:
                if error.exit_code == 2 and not self._is_stopping:
                    raise
                logger.error("the engine did not start: %s", error.message)
            else:
                logger.warning("the engine is ready again after %.1f s", time.monotonic() - now)

    async def shutdown(self, drain_seconds: float) -> None:
        """No more restarts; the rest as `EngineClient.shutdown`."""
        self._is_stopping = True
        await self.engine.shutdown(drain_seconds)

    def _new_engine(self) -> EngineClient:
        return EngineClient(self._config, on_stats=self._take_stats, command=self._command)

    def _take_stats(self, stats: EngineStats) -> None:
        if self.on_stats is not None:
            self.on_stats(stats)

    def _count_death(self, now: float) -> float:
        """Seconds to wait before the restart. `EngineStartError` for one death too many."""
        deaths = self._deaths
        deaths.append(now)
        while deaths[0] <= now - DEATH_WINDOW_SECONDS:
            deaths.popleft()
        if len(deaths) > len(self._pauses):
            minutes = DEATH_WINDOW_SECONDS / 60
            raise EngineStartError(
                f"the engine died {len(deaths)} times within {minutes:.0f} minutes, at last: {self.engine.failure}", 1
            )
        return self._pauses[len(deaths) - 1]

    async def _until_down(self, engine: EngineClient) -> None:
        """Wait for the end of an engine's process, and bring it about where it stalls."""
        tick = min(_TICK_SECONDS, self._stall_seconds / 10)
        down = asyncio.create_task(engine.wait_down())
        is_suspect = False
        self._what_happened = "died"
        try:
            while not down.done():
                slept = time.monotonic()
                await asyncio.wait({down}, timeout=tick)
                if time.monotonic() - slept > 2 * tick:
                    continue  # it was we who were held up: what the engine has sent meanwhile may still be unread
                age = self.step_age
                limit = max(self._stall_seconds, _PATIENCE * engine.longest_step)
                if age >= limit:
                    self._what_happened = "stalled"
                    engine.kill(f"no step ended for {age:.1f} s")
                elif age < limit / 2:
                    is_suspect = False
                elif not is_suspect:
                    is_suspect = True
                    logger.warning("no step of the engine has ended for %.1f s; its stacks:", age)
                    engine.dump_stacks()
        finally:
            down.cancel()
