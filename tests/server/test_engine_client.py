"""The engine client against real engine processes: in `tests.scheduler.fake_engine` only the model is not real."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop
from msgspec import structs

from model.batch import Logprobs, SamplingParams
from scheduler.config import EngineConfig
from scheduler.messages import AddRequest, EngineStats, Finished, FinishReason
from server import streams
from server.engine_client import (
    ENGINE_DEAD,
    OVERRUN,
    EngineClient,
    EngineStartError,
    EngineState,
    EngineUnavailable,
)
from server.errors import finished_error
from server.streams import RequestStream
from tests.scheduler.fake_engine import COMMAND, expected_tokens

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_streams_get_their_own_tokens_then_one_end(loop: str) -> None:
    async def scenario(engine: EngineClient) -> None:
        prompts = {f"r{i}": list(range(1 + 40 * i)) for i in range(20)}
        streams = [engine.submit(add_request(request_id, prompt, 30)) for request_id, prompt in prompts.items()]
        assert engine.num_open == 20
        answers = await asyncio.gather(*map(read, streams))
        for prompt, (tokens, end) in zip(prompts.values(), answers, strict=True):
            assert tokens == expected_tokens(prompt, 30)
            assert end.reason is FinishReason.LENGTH
        assert engine.num_open == 0

    engine = with_engine(scenario, loop=loop)
    assert (engine.state, engine.failure) == (EngineState.STOPPED, None)


def test_log_probabilities_and_progress_reach_their_stream() -> None:
    async def scenario(engine: EngineClient) -> None:
        prompt = [1 + i % 900 for i in range(1200)]
        request = add_request("a", prompt, 3)
        params = structs.replace(request.params, logprobs=0, prompt_logprobs=0)
        token_ids: list[int] = []
        logprobs, prompt_logprobs, progress = Logprobs([], []), Logprobs([], []), []
        async for delta in engine.submit(structs.replace(request, params=params, progress=True)):
            token_ids += delta.token_ids
            logprobs.extend(delta.logprobs or Logprobs([], []))
            prompt_logprobs.extend(delta.prompt_logprobs or Logprobs([], []))
            progress += [delta.progress] * (delta.progress is not None)
        assert prompt_logprobs.token_ids == [[token] for token in prompt[1:]]
        assert prompt_logprobs.logprobs == [[-float(position)] for position in range(1, 1200)]
        assert logprobs == Logprobs([[token] for token in token_ids], [[-1200.0], [-1201.0], [-1202.0]])
        assert progress == sorted(progress)
        assert set(progress) <= {512, 1024}

    with_engine(scenario, max_num_batched_tokens=512)


def test_a_reset_of_the_prefix_cache_reaches_the_engine() -> None:
    async def scenario(engine: EngineClient) -> None:
        for request_id in "ab":
            deltas = [delta async for delta in engine.submit(add_request(request_id, [7] * 200, 2))]
            assert deltas[0].started is not None
            assert deltas[0].started.cached_tokens == 0
            engine.reset_prefix_cache()
        await engine.shutdown(0)
        with pytest.raises(EngineUnavailable):
            engine.reset_prefix_cache()

    with_engine(scenario)


def test_a_second_time_the_prompt_comes_from_the_cache() -> None:
    async def scenario(engine: EngineClient) -> None:
        first = [
            delta.started and delta.started.cached_tokens
            async for delta in engine.submit(add_request("a", [7] * 200, 2))
        ]
        second = [
            delta.started and delta.started.cached_tokens
            async for delta in engine.submit(add_request("b", [7] * 200, 2))
        ]
        assert (first[0], second[0]) == (0, 192)
        assert set(first[1:] + second[1:]) <= {None}

    with_engine(scenario)


def test_a_prompt_of_131072_tokens_crosses_the_channel() -> None:
    async def scenario(engine: EngineClient) -> None:
        prompt = [token % 1000 for token in range(131_072)]
        assert await read(engine.submit(add_request("a", prompt, 3))) == (
            expected_tokens(prompt, 3),
            Finished(reason=FinishReason.LENGTH),
        )

    with_engine(scenario, max_num_batched_tokens=8192)


def test_a_reader_who_lets_log_probabilities_gather_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_BEHIND", 1000)
    monkeypatch.setattr(streams, "PATIENCE", 0.0)

    async def scenario(engine: EngineClient) -> None:
        request = add_request("a", [1], 1_000_000)
        slow = engine.submit(structs.replace(request, params=SamplingParams(max_tokens=1_000_000, logprobs=0)))
        await until(lambda: engine.num_open == 0)
        await until(lambda: engine.stats.num_running == 0)
        tokens, end = await read(slow)
        assert end == OVERRUN
        assert 100 < len(tokens) < 200
        assert tokens == expected_tokens([1], len(tokens))
        error = finished_error(end, "id")
        assert error is not None
        assert (error.status, error.code) == (503, "slow_reader")

    with_engine(scenario)


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


def test_an_aborted_request_is_forgotten_at_once() -> None:
    async def scenario(engine: EngineClient) -> None:
        aborted = engine.submit(add_request("a", [1], 1_000_000))
        other = engine.submit(add_request("b", [2], 300))
        await anext(aborted)
        engine.abort("a")
        engine.abort("a")
        engine.abort("never there")
        assert engine.num_open == 1
        assert (await read(aborted))[1].reason is FinishReason.ABORT
        assert (await read(other))[0] == expected_tokens([2], 300)
        engine.abort("b")
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.unknown_ids == 0

    with_engine(scenario, "--step-seconds", "0.001")


def test_the_same_id_cannot_be_open_twice() -> None:
    async def scenario(engine: EngineClient) -> None:
        stream = engine.submit(add_request("a", [1], 50))
        with pytest.raises(ValueError, match="a is in use"):
            engine.submit(add_request("a", [2], 50))
        assert (await read(stream))[0] == expected_tokens([1], 50)

    with_engine(scenario)


def test_after_200_aborted_streams_the_pool_is_free_and_a_new_request_answers() -> None:
    """Aborted in every phase: most wait in the queue, some are in prefill, some in decode."""

    async def scenario(engine: EngineClient) -> None:
        async def start_and_leave(i: int) -> None:
            request_id = f"r{i}"
            stream = engine.submit(add_request(request_id, [i] * (1 + 97 * i % 3000), 10_000))
            try:
                async with asyncio.timeout(0.05 + 0.005 * i):
                    await read(stream)
            except TimeoutError:
                engine.abort(request_id)

        await asyncio.gather(*map(start_and_leave, range(200)))
        assert engine.num_open == 0
        await until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0, 2)
        assert engine.stats.free_blocks == engine.stats.num_blocks == 300
        assert engine.stats.generation_tokens > 0
        assert await read(engine.submit(add_request("new", [5, 6], 10))) == (
            expected_tokens([5, 6], 10),
            Finished(reason=FinishReason.LENGTH),
        )

    with_engine(scenario, "--step-seconds", "0.001", num_blocks=300, max_num_seqs=16)


def test_a_pool_that_is_far_too_small_costs_time_and_no_tokens() -> None:
    async def scenario(engine: EngineClient) -> None:
        prompts = [[i] * (20 + i) for i in range(32)]
        requests = [add_request(f"r{i}", prompt, 400) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(read(engine.submit(request)) for request in requests))
        assert [tokens for tokens, _ in answers] == [expected_tokens(prompt, 400) for prompt in prompts]
        assert engine.stats.num_preemptions >= 10
        assert engine.stats.free_blocks == 40

    with_engine(scenario, num_blocks=40)


def test_figures_of_steps_and_heartbeats_are_reported() -> None:
    async def scenario(engine: EngineClient) -> None:
        figures: list[EngineStats] = []
        engine.on_stats = figures.append
        await read(engine.submit(add_request("a", [1] * 10, 5)))
        assert figures[-1].generation_tokens == 5
        reported = len(figures)
        await until(lambda: len(figures) > reported, 2)
        assert engine.stats == figures[-1]
        assert (figures[-1].num_running, figures[-1].prompt_tokens) == (0, 10)
        assert engine.longest_step == max(figure.step_seconds for figure in figures) > 0

    with_engine(scenario)


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
from tests.server.test_engine_client import add_request, read

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
