"""The supervisor over real engine processes: what dies or stalls is replaced, and every request ends once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from scheduler.config import EngineConfig
from scheduler.messages import EngineStats, Finished, FinishReason
from server.engine_client import ENGINE_DEAD, EngineStartError, EngineState
from server.errors import BadRequest, Unavailable
from server.supervisor import Supervisor
from tests.scheduler.fake_engine import COMMAND, expected_tokens
from tests.server.engine_streams import add_request, read, until
from tests.server.supervision_storm import SupervisionStorm

Scenario = Callable[[Supervisor, "asyncio.Task[None]"], Coroutine[Any, Any, None]]


def supervise(scenario: Scenario, *options: str, command: tuple[str, ...] = COMMAND, **more: Any) -> Supervisor:
    """Run `scenario` with a ready supervised engine and the task of `Supervisor.run`; no process is left."""

    async def run() -> Supervisor:
        supervisor = Supervisor(EngineConfig(model_dir="/none"), command=[*command, *options], **more)
        await supervisor.start()
        running = None
        try:
            async with asyncio.timeout(120):
                await supervisor.wait_ready()
                running = asyncio.create_task(supervisor.run())
                await scenario(supervisor, running)
        finally:
            await supervisor.shutdown(0)
            if running is not None:
                await asyncio.wait({running}, timeout=10)
                assert running.done()
        return supervisor

    return asyncio.run(run())


def kill(supervisor: Supervisor, number: int = signal.SIGKILL) -> None:
    assert supervisor.engine.pid is not None
    os.kill(supervisor.engine.pid, number)


async def until_restarted(supervisor: Supervisor, restarts: int) -> None:
    await until(lambda: supervisor.restarts == restarts and supervisor.is_ready, 60)


def test_an_engine_that_dies_is_replaced_and_answers() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        figures: list[EngineStats] = []
        supervisor.on_stats = figures.append
        first = supervisor.engine
        streams = [supervisor.submit(add_request(f"r{i}", [i], 1_000_000)) for i in range(8)]
        await until(lambda: first.stats.generation_tokens > 100)
        kill(supervisor)
        assert {end for _, end in await asyncio.gather(*map(read, streams))} == {ENGINE_DEAD}
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                supervisor.require_ready()
            assert (caught.value.code, caught.value.status) == ("engine_down", 503)
            assert caught.value.message == "The engine died and is being restarted."
            assert caught.value.retry_after is not None
            assert 1 <= caught.value.retry_after <= 10
            await asyncio.sleep(0.02)
        await until_restarted(supervisor, 1)
        assert EngineStats() in figures
        assert supervisor.engine is not first
        assert first.num_open == 0
        assert await read(supervisor.submit(add_request("new", [5], 10))) == (
            expected_tokens([5], 10),
            Finished(reason=FinishReason.LENGTH),
        )
        assert supervisor.require_ready().vocab_size == 1000

    supervise(scenario, "--step-seconds", "0.002")


def test_one_death_too_many_is_the_end_with_code_1_and_the_reason() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        for death in range(3):
            await until_restarted(supervisor, death)
            kill(supervisor)
        with pytest.raises(EngineStartError) as caught:
            await running
        assert caught.value.exit_code == 1
        assert caught.value.message.startswith("the engine died 3 times within 10 minutes, at last: engine process ")
        assert "was killed by SIGKILL" in caught.value.message
        assert not supervisor.is_ready

    supervise(scenario, pauses=(0.0, 0.1))


def test_a_second_death_is_followed_by_a_pause() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        kill(supervisor)
        await until_restarted(supervisor, 1)
        died = time.monotonic()
        kill(supervisor)
        await until(lambda: supervisor.restarts == 2, 60)
        assert time.monotonic() - died >= 1.0

    supervise(scenario, pauses=(0.0, 1.0))


def test_deaths_of_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.DEATH_WINDOW_SECONDS", 0.01)

    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        for death in range(3):
            await until_restarted(supervisor, death)
            kill(supervisor)
        await until_restarted(supervisor, 3)

    supervise(scenario, pauses=(0.0,))


ONCE = """
import sys
from pathlib import Path
mark = Path(sys.argv[1])
options = sys.argv[2].split() if mark.exists() else []
mark.touch()
sys.argv[1:] = options + sys.argv[3:]
import runpy
runpy.run_module("tests.scheduler.fake_engine", run_name="__main__")
"""
"""An engine whose second and later lives have options."""


def only_once(folder: Path, later: str) -> tuple[str, ...]:
    return (sys.executable, "-c", ONCE, str(folder / "mark"), later)


def test_a_configuration_that_no_longer_loads_is_the_end_with_code_2(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        kill(supervisor)
        with pytest.raises(EngineStartError, match=r"^gone$") as caught:
            await running
        assert caught.value.exit_code == 2
        assert supervisor.restarts == 1

    supervise(scenario, command=only_once(tmp_path, "--load-error gone"))


def test_an_engine_that_fails_while_it_is_restarted_has_died_again(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        kill(supervisor)
        with pytest.raises(EngineStartError, match=r"died 3 times .*at last: KeyError") as caught:
            await running
        assert caught.value.exit_code == 1
        assert supervisor.restarts == 2

    supervise(scenario, command=only_once(tmp_path, "--load-bug"), pauses=(0.0, 0.0))


def test_a_program_that_is_gone_is_no_reason_to_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        supervisor._command = ["/no/such/program"]
        kill(supervisor)
        with pytest.raises(EngineStartError, match=r"died 2 times .*cannot start the engine process"):
            await running

    supervise(scenario, pauses=(0.0,))


@pytest.mark.parametrize("when", ["in a step", "idle"])
def test_a_stopped_engine_is_killed_when_the_limit_has_passed(when: str) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        stream = supervisor.submit(add_request("a", [1], 1_000_000 if when == "in a step" else 1))
        await anext(stream)
        kill(supervisor, signal.SIGSTOP)
        stopped = time.monotonic()
        first = supervisor.engine
        if when == "in a step":
            assert (await read(stream))[1] == ENGINE_DEAD
        await first.wait_down()
        assert 1 < time.monotonic() - stopped < 10
        assert first.failure is not None
        assert "no step ended for" in first.failure
        await until_restarted(supervisor, 1)

    supervise(scenario, "--step-seconds", "0.002", stall_seconds=2.0)


def test_a_step_that_hangs_shows_its_stacks_and_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        stream = supervisor.submit(add_request("a", [1], 100))
        started = time.monotonic()
        assert (await read(stream))[1] == ENGINE_DEAD
        assert 1.4 < time.monotonic() - started < 10
        with pytest.raises(Unavailable, match=r"The engine stalled and is being restarted"):
            supervisor.require_ready()
        await until_restarted(supervisor, 1)

    supervise(scenario, "--stall-at-step", "3", stall_seconds=1.5)
    assert "fake_engine.py" in capfd.readouterr().err  # the line that sleeps


def test_a_short_stop_is_forgiven() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        stream = supervisor.submit(add_request("a", [1], 500))
        await anext(stream)
        kill(supervisor, signal.SIGSTOP)
        await asyncio.sleep(0.7)
        kill(supervisor, signal.SIGCONT)
        assert (await read(stream))[1].reason is FinishReason.LENGTH
        assert supervisor.restarts == 0

    supervise(scenario, "--step-seconds", "0.002", stall_seconds=3.0)


class WatchedEngine:
    """What the watchdog sees of an engine."""

    state = EngineState.READY
    step_age = 100.0
    longest_step = 0.0
    killed = False

    async def wait_down(self) -> None:
        await asyncio.Event().wait()

    def kill(self, reason: str) -> None:
        self.killed = True

    def dump_stacks(self) -> None:
        pass

    def watch(self) -> asyncio.Task[None]:
        """With a limit of one second."""
        supervisor = Supervisor(EngineConfig(model_dir="/none"), stall_seconds=1.0)
        supervisor.engine = self  # type: ignore[assignment]
        return asyncio.create_task(supervisor._until_down(supervisor.engine))


def test_a_front_end_that_was_held_up_reads_before_it_judges() -> None:
    """Which it may have no chance to between being held up and the watchdog's turn."""

    async def run() -> None:
        engine = WatchedEngine()
        loop = asyncio.get_running_loop()
        watching = engine.watch()
        loop.call_later(0.05, time.sleep, 0.5)
        loop.call_later(0.6, setattr, engine, "step_age", 0.0)  # what has come meanwhile is read
        await asyncio.sleep(0.8)
        assert not engine.killed
        engine.step_age = 100.0
        await asyncio.sleep(0.3)
        assert engine.killed
        watching.cancel()

    asyncio.run(run())


def test_a_machine_whose_steps_take_long_gets_more_time() -> None:
    async def run() -> None:
        engine = WatchedEngine()
        engine.longest_step, engine.step_age = 0.5, 1.9
        watching = engine.watch()
        await asyncio.sleep(0.5)
        assert not engine.killed
        engine.step_age = 2.1
        await asyncio.sleep(0.5)
        assert engine.killed
        watching.cancel()

    asyncio.run(run())


def test_loading_has_no_limit() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        kill(supervisor)
        await until_restarted(supervisor, 1)

    supervise(scenario, "--load-seconds", "1.5", stall_seconds=0.5)


@pytest.mark.parametrize("options", [["--raise-at-step", "3"], ["--kill-at-step", "3", "--kill-with", "11"]])
def test_a_prompt_that_two_engines_died_of_is_refused(options: list[str]) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        for death in range(2):
            await until_restarted(supervisor, death)
            poison = supervisor.submit(add_request(f"poison{death}", [6, 6, 6], 10))
            bystander = supervisor.submit(add_request(f"other{death}", [7, death], 10))
            assert {(await read(stream))[1] for stream in (poison, bystander)} == {ENGINE_DEAD}
        await until_restarted(supervisor, 2)
        with pytest.raises(BadRequest) as caught:
            supervisor.submit(add_request("again", [6, 6, 6], 10))
        assert caught.value.code == "prompt_refused"
        for death in range(2):
            assert (await read(supervisor.submit(add_request(f"new{death}", [7, death], 1))))[0]

    supervise(scenario, *options)


def test_kills_from_outside_accuse_nobody() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        for death in range(2):
            await until_restarted(supervisor, death)
            stream = supervisor.submit(add_request(f"r{death}", [1], 1_000_000))
            await anext(stream)
            kill(supervisor)
            await read(stream)
        await until_restarted(supervisor, 2)
        assert (await read(supervisor.submit(add_request("again", [1], 5))))[0] == expected_tokens([1], 5)

    supervise(scenario)


GARBAGE = """
import os, runpy, signal, sys
signal.signal(signal.SIGUSR2, lambda *_: os.write(int(sys.argv[-1]), b"\\x05\\x00\\x00\\x00hello"))
runpy.run_module("tests.scheduler.fake_engine", run_name="__main__")
"""


def test_an_engine_that_talks_garbage_is_as_good_as_dead() -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        first = supervisor.engine
        stream = supervisor.submit(add_request("a", [1], 1_000_000))
        await anext(stream)
        kill(supervisor, signal.SIGUSR2)
        assert (await read(stream))[1] == ENGINE_DEAD
        await first.wait_down()
        assert first.failure is not None
        assert "is not a message" in first.failure
        await until_restarted(supervisor, 1)

    supervise(scenario, "--step-seconds", "0.01", command=(sys.executable, "-c", GARBAGE))


@pytest.mark.parametrize("when", ["pausing", "loading"])
def test_shutdown_in_the_middle_of_a_restart(when: str) -> None:
    async def scenario(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
        kill(supervisor)
        await until(
            lambda: supervisor.engine.state is (EngineState.DOWN if when == "pausing" else EngineState.STARTING)
        )
        started = time.monotonic()
        await supervisor.shutdown(30)
        assert time.monotonic() - started < 1
        with pytest.raises(Unavailable, match="shutting down"):
            supervisor.require_ready()
        await running
        assert supervisor.restarts == (when == "loading")

    supervise(scenario, pauses=(0.5 if when == "pausing" else 0.0,))


def test_whatever_happens_in_whatever_order_every_request_ends_once() -> None:
    """A few examples; `tests/fuzz` has the long storm."""
    run_state_machine_as_test(
        SupervisionStorm,
        settings=settings(
            max_examples=3,
            stateful_step_count=15,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
