"""How engine processes start and end, as the engine client sees it: real processes, fake model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from scheduler.config import EngineConfig
from scheduler.messages import FinishReason
from server.engine_client import (
    ENGINE_DEAD,
    EngineClient,
    EngineStartError,
    EngineState,
    EngineUnavailable,
)
from tests.scheduler.fake_engine import COMMAND, expected_tokens
from tests.server.engine_streams import add_request, is_alive, read, until, with_engine

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_kill_9_ends_every_stream_with_one_error_at_once(loop: str) -> None:
    async def scenario(engine: EngineClient) -> None:
        streams = [engine.submit(add_request(f"r{i}", [i], 1_000_000)) for i in range(8)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await until(lambda: engine.stats.generation_tokens > 100)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        killed = time.monotonic()
        answers = await asyncio.gather(*readers)
        assert time.monotonic() - killed < 1
        assert {end for _, end in answers} == {ENGINE_DEAD}
        assert all(tokens == expected_tokens([i], len(tokens)) for i, (tokens, _) in enumerate(answers))
        assert engine.state is EngineState.DOWN
        with pytest.raises(EngineUnavailable):
            engine.submit(add_request("late", [1], 1))
        engine.abort("r0")
        await engine.wait_down()
        assert not Path(f"/proc/{engine.pid}").exists()  # reaped

    engine = with_engine(scenario, "--step-seconds", "0.002", loop=loop)
    assert engine.state is EngineState.DOWN
    assert engine.failure is not None
    assert "was killed by SIGKILL" in engine.failure


def test_an_exception_in_a_step_ends_every_stream_with_the_fixed_text() -> None:
    async def scenario(engine: EngineClient) -> None:
        answers = await asyncio.gather(*(read(engine.submit(add_request(f"r{i}", [i], 100))) for i in range(8)))
        assert {end for _, end in answers} == {ENGINE_DEAD}
        assert "broke" not in str(ENGINE_DEAD.message)
        assert engine.state is EngineState.DOWN
        await engine.wait_down()

    engine = with_engine(scenario, "--raise-at-step", "10")
    assert engine.failure == "step 10 failed: RuntimeError: the model broke in two lines"


def test_an_engine_that_dies_within_a_step_is_noticed() -> None:
    async def scenario(engine: EngineClient) -> None:
        assert (await read(engine.submit(add_request("a", [1], 100))))[1] == ENGINE_DEAD
        await engine.wait_down()

    assert with_engine(scenario, "--kill-at-step", "5").state is EngineState.DOWN


def start_error(command: Sequence[str], then: Callable[[EngineClient], None] | None = None) -> EngineStartError:
    async def run() -> EngineStartError:
        engine = EngineClient(EngineConfig(model_dir="/none"), command=command)
        with pytest.raises(EngineStartError) as caught:  # noqa: PT012
            await engine.start()
            assert engine.state is EngineState.STARTING
            if then is not None:
                then(engine)
            async with asyncio.timeout(20):
                await engine.wait_ready()
        assert (engine.state, engine.failure) == (EngineState.DOWN, caught.value.message)
        with pytest.raises(EngineUnavailable):
            engine.submit(add_request("a", [1], 1))
        return caught.value

    return asyncio.run(run())


def test_a_config_error_while_loading_is_exit_code_2_with_its_line() -> None:
    error = start_error([*COMMAND, "--load-error", "config.json: no kv_lora_rank"])
    assert (error.exit_code, error.message) == (2, "config.json: no kv_lora_rank")


def test_a_bug_while_loading_is_exit_code_1() -> None:
    error = start_error([*COMMAND, "--load-bug"])
    assert error.exit_code == 1
    assert "KeyError" in error.message


def test_an_engine_killed_while_loading_is_exit_code_1() -> None:
    def kill(engine: EngineClient) -> None:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)

    error = start_error([*COMMAND, "--load-seconds", "60"], kill)
    assert error.exit_code == 1
    assert "SIGKILL" in error.message


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["/no/such/python"], "cannot start the engine process"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "exited with code 3"),
        ([sys.executable, "-c", "import os, sys; os.write(int(sys.argv[2]), b'x' * 99)"], "a frame announces"),
    ],
    ids=["missing", "exits", "garbage"],
)
def test_something_else_in_place_of_the_engine(command: Sequence[str], text: str) -> None:
    error = start_error(command)
    assert error.exit_code == 1
    assert text in error.message


def test_a_process_that_closes_the_channel_but_lives_is_killed() -> None:
    program = "import os, sys, time; os.close(int(sys.argv[2])); time.sleep(600)"
    assert "SIGKILL" in start_error([sys.executable, "-c", program]).message


def test_shutdown_drains() -> None:
    async def scenario(engine: EngineClient) -> None:
        streams = [engine.submit(add_request(f"r{i}", [i], 100)) for i in range(8)]
        readers = asyncio.gather(*map(read, streams))
        await until(lambda: engine.stats.generation_tokens > 8)
        shutdown = asyncio.create_task(engine.shutdown(30))
        await asyncio.sleep(0)
        assert engine.state is EngineState.STOPPED
        with pytest.raises(EngineUnavailable, match="stopped"):
            engine.submit(add_request("late", [1], 1))
        answers = await readers
        assert [tokens for tokens, _ in answers] == [expected_tokens([i], 100) for i in range(8)]
        assert {end.reason for _, end in answers} == {FinishReason.LENGTH}
        await shutdown

    engine = with_engine(scenario, "--step-seconds", "0.002")
    assert (engine.state, engine.failure) == (EngineState.STOPPED, None)


def test_a_second_shutdown_cuts_the_drain_short() -> None:
    async def scenario(engine: EngineClient) -> None:
        stream = engine.submit(add_request("a", [1], 100_000))
        await anext(stream)
        first = asyncio.create_task(engine.shutdown(60))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await engine.shutdown(0)
        await first
        assert time.monotonic() - started < 1
        assert (await read(stream))[1].code == "shutting_down"

    with_engine(scenario, "--step-seconds", "0.002")


def test_an_engine_that_is_still_loading_is_stopped_at_once() -> None:
    async def scenario() -> None:
        engine = EngineClient(EngineConfig(model_dir="/none"), command=[*COMMAND, "--load-seconds", "60"])
        await engine.start()
        waiting = asyncio.create_task(engine.wait_ready())
        await asyncio.sleep(0.5)
        started = time.monotonic()
        await engine.shutdown(30)
        assert time.monotonic() - started < 1
        with pytest.raises(EngineStartError):
            await waiting
        assert engine.state is EngineState.STOPPED

    asyncio.run(scenario())


def test_a_module_in_the_working_directory_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of checkpoints often hold a `model` package or a `model.py`."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)

    async def scenario() -> str:
        engine = EngineClient(EngineConfig(model_dir=str(tmp_path), device="none"))
        await engine.start()
        with pytest.raises(EngineStartError) as caught:
            await engine.wait_ready()
        await engine.wait_down()
        return caught.value.message

    assert "config.json" in asyncio.run(scenario())


FRONT_END = """
import asyncio, sys
from scheduler.config import EngineConfig
from server.engine_client import EngineClient
from tests.scheduler.fake_engine import COMMAND, expected_tokens
from tests.server.engine_streams import add_request, read

async def main():
    engine = EngineClient(EngineConfig(model_dir="/none"), command=[*COMMAND, "--step-seconds", sys.argv[1]])
    await engine.start()
    await engine.wait_ready()
    streams = [engine.submit(add_request(f"r{i}", [i], int(sys.argv[2]))) for i in range(8)]
    print(engine.pid, flush=True)
    for i, (tokens, end) in enumerate(await asyncio.gather(*map(read, streams))):
        assert tokens == expected_tokens([i], int(sys.argv[2])), i
        print(end.reason, flush=True)
    await engine.shutdown(0)

asyncio.run(main())
"""


def start_front_end(step_seconds: float, max_tokens: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", FRONT_END, str(step_seconds), str(max_tokens)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_kill_9_of_the_front_end_ends_the_engine() -> None:
    with start_front_end(0.001, 1_000_000) as front_end:
        assert front_end.stdout is not None
        pid = int(front_end.stdout.readline())
        time.sleep(0.2)
        assert is_alive(pid)
        front_end.kill()
        killed = time.monotonic()
        while is_alive(pid):
            assert time.monotonic() - killed < 2
            time.sleep(0.005)


def test_a_stopped_front_end_loses_nothing() -> None:
    """Stopped while 8 streams run to their ends: far more than the socket holds. Only end of file is death."""
    with start_front_end(0.0, 3000) as front_end:
        assert front_end.stdout is not None
        pid = int(front_end.stdout.readline())
        front_end.send_signal(signal.SIGSTOP)
        time.sleep(3)
        assert is_alive(pid)
        front_end.send_signal(signal.SIGCONT)
        assert front_end.stdout.read().split() == ["length"] * 8
        assert front_end.wait(10) == 0
