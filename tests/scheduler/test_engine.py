"""The engine process, driven over its socket by a blocking stand-in for the front-end."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.batch import SamplingParams
from scheduler.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    FinishReason,
    Grammar,
    Heartbeat,
    ResetPrefixCache,
    Shutdown,
    Started,
    StepOutput,
)
from tests.scheduler.engine_process import EngineProcess
from tests.scheduler.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE, expected_tokens

OVERLAP = ([], ["--overlap"])
"""One step at a time, and each launched before the one before it is collected."""


StartEngine = Callable[..., EngineProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartEngine]:
    engines: list[EngineProcess] = []

    def start_engine(*options: str, **config: int | str) -> EngineProcess:
        engines.append(EngineProcess(tmp_path / f"{len(engines)}.log", *options, **config))  # type: ignore[arg-type]
        return engines[-1]

    yield start_engine
    for engine in engines:
        engine.socket.close()
        engine.process.kill()
        engine.process.wait()


@pytest.mark.parametrize("options", OVERLAP)
def test_it_says_what_it_is_and_answers(start: StartEngine, options: list[str]) -> None:
    engine = start(*options, num_blocks=100, max_num_seqs=8)
    ready = engine.wait_ready()
    assert (ready.num_blocks, ready.block_size, ready.max_num_seqs) == (100, 64, 8)
    assert (ready.max_model_len, ready.vocab_size) == (MAX_MODEL_LEN, VOCAB_SIZE)
    prompts = {f"r{i}": list(range(1 + 40 * i)) for i in range(8)}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, max_tokens=20)
    engine.wait_finished(*prompts)
    assert engine.tokens == {request_id: expected_tokens(prompt, 20) for request_id, prompt in prompts.items()}
    assert {finished.reason for finished in engine.finished.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize("when", ["loading", "idle", "in a step"])
def test_the_front_ends_end_of_file_ends_it_at_once(start: StartEngine, when: str) -> None:
    engine = start("--load-seconds", "60") if when == "loading" else start("--step-seconds", "60")
    if when == "loading":
        time.sleep(1)  # past its imports
    else:
        engine.wait_ready()
    if when == "in a step":
        engine.add("a", [1], max_tokens=1)
        engine.until(lambda message: isinstance(message, Heartbeat) and message.step_age > 0)
    engine.socket.close()
    started = time.monotonic()
    assert engine.process.wait(10) == 0
    assert time.monotonic() - started < 1


def test_signals_do_not_end_it(start: StartEngine) -> None:
    engine = start()
    engine.wait_ready()
    engine.process.send_signal(signal.SIGINT)
    engine.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    engine.add("a", [1], max_tokens=3)
    engine.wait_finished("a")
    engine.send(Shutdown(0))
    assert engine.end() == 0


def test_heartbeats_come_during_a_step_and_tell_its_age(start: StartEngine) -> None:
    engine = start("--step-seconds", "2.5")
    engine.wait_ready()
    engine.add("a", [1], max_tokens=1)
    ages = []
    while "a" not in engine.finished:
        message = engine.next()
        if isinstance(message, Heartbeat):
            ages.append(message.step_age)
    assert ages == sorted(ages)
    assert ages[-1] > 1.5
    idle = engine.until(lambda message: isinstance(message, Heartbeat))
    assert isinstance(idle, Heartbeat)
    assert idle.step_age == 0
    assert idle.stats.step_seconds == pytest.approx(2.5, abs=0.3)


def test_a_step_is_launched_while_the_one_before_it_runs(start: StartEngine) -> None:
    """What arrives in a step is not in the next one, which is under way, but in the one after it."""
    started_at = {}
    for options in OVERLAP:
        engine = start(*options, "--step-seconds", "0.2")
        engine.wait_ready()
        engine.add("first", [1], max_tokens=6)
        engine.until(lambda message: isinstance(message, StepOutput))
        time.sleep(0.05)  # an output may be here before the next step is launched
        engine.add("second", [2], max_tokens=1)
        message = engine.until(lambda message: isinstance(message, StepOutput) and "second" in message.started)
        assert isinstance(message, StepOutput)
        started_at[len(options)] = message.step
        engine.wait_finished("first", "second")
        assert engine.tokens == {"first": expected_tokens([1], 6), "second": expected_tokens([2], 1)}
    assert started_at == {0: 2, 1: 3}


def test_it_sleeps_when_idle(start: StartEngine) -> None:
    engine = start()
    engine.wait_ready()
    engine.add("a", [1], max_tokens=3)
    engine.wait_finished("a")

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{engine.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = cpu_ticks()
    time.sleep(1.2)
    assert cpu_ticks() - before <= 0.05 * os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("options", OVERLAP)
def test_shutdown_lets_open_requests_finish_and_refuses_new_ones(start: StartEngine, options: list[str]) -> None:
    engine = start(*options, "--step-seconds", "0.01")
    engine.wait_ready()
    engine.add("a", [1, 2], max_tokens=30)
    engine.until(lambda _: len(engine.tokens["a"]) > 2)
    engine.send(Shutdown(30))
    engine.add("late", [1], max_tokens=1)
    engine.wait_finished("a", "late")
    assert engine.tokens == {"a": expected_tokens([1, 2], 30)}
    assert (engine.finished["late"].reason, engine.finished["late"].code) == (FinishReason.REJECTED, "shutting_down")
    assert engine.end() == 0


@pytest.mark.parametrize("options", OVERLAP)
def test_a_drain_that_is_too_short_aborts_the_rest(start: StartEngine, options: list[str]) -> None:
    engine = start(*options, "--step-seconds", "0.01", max_num_seqs=2)
    engine.wait_ready()
    for i in range(4):
        engine.add(f"r{i}", [1, 2], max_tokens=100_000)
    engine.until(lambda _: len(engine.tokens["r1"]) > 2)
    engine.send(Shutdown(0.2))
    engine.wait_finished("r0", "r1", "r2", "r3")
    assert {(f.reason, f.code) for f in engine.finished.values()} == {(FinishReason.ABORT, "shutting_down")}
    assert engine.end() == 0


def test_an_exception_in_a_step_ends_it_and_is_logged_with_the_requests(start: StartEngine) -> None:
    engine = start("--raise-at-step", "10", max_num_seqs=3)
    engine.wait_ready()
    for i in range(5):
        engine.add(f"r{i}", [777, 778], max_tokens=100)
    failed = engine.until(lambda message: isinstance(message, EngineFailed))
    assert failed == EngineFailed(
        kind="step",
        message="step 10 failed: RuntimeError: the model broke in two lines",
        request_ids=["r0", "r1", "r2"],
    )
    assert not engine.finished
    assert engine.end() == 70
    assert "step 10 failed with r0 r1 r2\n" in engine.log
    assert "Traceback" in engine.log


@pytest.mark.parametrize("options", OVERLAP)
def test_the_newest_prompt_is_given_up_when_memory_runs_out_and_the_others_lose_nothing(
    start: StartEngine, options: list[str]
) -> None:
    engine = start(*options, "--out-of-memory-at-steps", "6", "--step-seconds", "0.1", max_num_batched_tokens=64)
    engine.wait_ready()
    prompts = {"a": [1] * 100, "b": [2] * 10, "greedy": [3] * 500}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, max_tokens=30)
    engine.wait_finished(*prompts)
    assert (engine.finished["greedy"].reason, engine.finished["greedy"].code) == (FinishReason.ERROR, "out_of_memory")
    assert not engine.tokens["greedy"]
    for request_id in ("a", "b"):
        assert engine.tokens[request_id] == expected_tokens(prompts[request_id], 30)
        assert engine.finished[request_id].reason is FinishReason.LENGTH
    assert "step 6 ran out of memory, greedy is given up: out of memory in two lines" in engine.log
    beat = engine.until(lambda message: isinstance(message, Heartbeat) and message.stats.num_running == 0)
    assert isinstance(beat, Heartbeat)
    assert beat.stats.free_blocks == beat.stats.num_blocks


def test_running_out_of_memory_twice_in_a_minute_is_the_end(start: StartEngine) -> None:
    engine = start("--out-of-memory-at-steps", "5", "9")
    engine.wait_ready()
    for request_id in "ab":
        engine.add(request_id, [1, 2], max_tokens=100)
    failed = engine.until(lambda message: isinstance(message, EngineFailed))
    assert isinstance(failed, EngineFailed)
    assert (failed.kind, failed.request_ids) == ("step", ["a"])
    assert engine.finished["b"].code == "out_of_memory"
    assert engine.end() == 70


def test_a_config_error_while_loading_is_one_line_and_exit_code_2(start: StartEngine) -> None:
    engine = start("--load-error", "model.safetensors: tensor x is\ntruncated")
    assert engine.next() == EngineFailed(kind="config", message="model.safetensors: tensor x is truncated")
    assert engine.end() == 2
    assert engine.log == ""


def test_a_bug_while_loading_is_logged_in_full_and_exit_code_70(start: StartEngine) -> None:
    engine = start("--load-bug")
    failed = engine.next()
    assert isinstance(failed, EngineFailed)
    assert failed.kind == "load"
    assert engine.end() == 70
    assert "Traceback" in engine.log


def test_another_protocol_version_is_refused(start: StartEngine) -> None:
    engine = start(protocol=99)
    failed = engine.next()
    assert isinstance(failed, EngineFailed)
    assert "protocol 99" in failed.message
    assert engine.end() == 2


def test_junk_on_the_channel_ends_it(start: StartEngine) -> None:
    engine = start()
    engine.wait_ready()
    engine.socket.sendall(struct.pack("<I", 3) + b"abc")
    assert engine.end() == 70
    assert "ProtocolError" in engine.log


def test_an_impossible_request_is_rejected_alone(start: StartEngine) -> None:
    engine = start("--step-seconds", "0.005", num_blocks=10)
    engine.wait_ready()
    engine.add("good", [5, 6], max_tokens=50)
    params = SamplingParams(max_tokens=5)
    engine.send(AddRequest(request_id="odd", prompt=b"1234567", params=params))
    engine.add("vocabulary", [1, VOCAB_SIZE, 2], max_tokens=5)
    engine.add("empty", [], max_tokens=5)
    engine.add("long", [1] * 641, max_tokens=5)
    engine.wait_finished("good", "odd", "vocabulary", "empty", "long")
    codes = {request_id: (finished.reason, finished.code) for request_id, finished in engine.finished.items()}
    assert codes == {
        "good": (FinishReason.LENGTH, None),
        "odd": (FinishReason.REJECTED, "invalid_prompt"),
        "vocabulary": (FinishReason.REJECTED, "invalid_prompt"),
        "empty": (FinishReason.REJECTED, "invalid_request"),
        "long": (FinishReason.REJECTED, "context_length_exceeded"),
    }
    assert engine.tokens == {"good": expected_tokens([5, 6], 50)}


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": (VOCAB_SIZE,)},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
        {"allowed_token_ids": (3, VOCAB_SIZE)},
        {"bad_words": ((VOCAB_SIZE, 1),)},
    ],
)
def test_ids_outside_the_vocabulary_reach_no_tensor(start: StartEngine, params: dict[str, Any]) -> None:
    engine = start()
    engine.wait_ready()
    engine.add("a", [1], max_tokens=1, **params)
    engine.wait_finished("a")
    assert (engine.finished["a"].reason, engine.finished["a"].code) == (FinishReason.REJECTED, "invalid_request")


@pytest.mark.parametrize("options", OVERLAP)
def test_requests_under_a_grammar_follow_it_beside_free_ones_and_end_with_it(
    start: StartEngine, options: list[str]
) -> None:
    engine = start(*options, "--step-seconds", "0.002", max_num_seqs=8)
    engine.wait_ready()
    engine.add("free", [5], max_tokens=30)
    engine.add("ends", [5], max_tokens=30, grammar=Grammar("regex", "7 8 9"))
    engine.add("cut", [5], max_tokens=2, grammar=Grammar("regex", "3 2 1"))
    engine.add("exact", [5], max_tokens=2, grammar=Grammar("regex", "3 2"))
    engine.add("breaks", [5], max_tokens=9, grammar=Grammar("regex", "4 5 ? 6"))
    engine.add("bad", [5], max_tokens=9, grammar=Grammar("lark", "7"))
    engine.wait_finished("free", "ends", "cut", "exact", "breaks", "bad")
    assert engine.tokens == {
        "free": expected_tokens([5], 30),
        "ends": [7, 8, 9],
        "cut": [3, 2],
        "exact": [3, 2],
        "breaks": [4, 5],
    }
    assert {request_id: (finished.reason, finished.code) for request_id, finished in engine.finished.items()} == {
        "free": (FinishReason.LENGTH, None),
        "ends": (FinishReason.STOP, None),
        "cut": (FinishReason.LENGTH, None),
        "exact": (FinishReason.STOP, None),
        "breaks": (FinishReason.ERROR, "grammar_failed"),
        "bad": (FinishReason.REJECTED, "invalid_grammar"),
    }


def test_the_first_token_tells_cache_queue_and_prefill(start: StartEngine) -> None:
    engine = start("--step-seconds", "0.05", max_num_seqs=1, max_num_batched_tokens=64)
    engine.wait_ready()
    started: dict[str, Started] = {}
    for request_id in "ab":
        engine.add(request_id, [1] * 130, max_tokens=2)
    while engine.finished.keys() != {"a", "b"}:
        message = engine.next()
        if isinstance(message, StepOutput):
            started |= message.started
    assert [started[request_id].cached_tokens for request_id in "ab"] == [0, 128]
    # Steps of 50 ms: three for the prompt of `a` and one more, one for what the cache leaves of `b`.
    assert 0 <= started["a"].queue_seconds < started["a"].prefill_seconds
    assert 0.15 <= started["a"].prefill_seconds < 5
    assert 0.15 <= started["b"].queue_seconds < 5
    assert 0.05 <= started["b"].prefill_seconds < started["b"].queue_seconds


def test_after_a_reset_of_the_prefix_cache_nothing_is_found(start: StartEngine) -> None:
    engine = start()
    engine.wait_ready()
    found = []
    for request_id in "abc":
        engine.add(request_id, [1] * 130, max_tokens=1)
        message = engine.until(lambda message: isinstance(message, StepOutput) and bool(message.started))
        assert isinstance(message, StepOutput)
        found.append(message.started[request_id].cached_tokens)
        if request_id == "b":
            engine.send(ResetPrefixCache())
    assert found == [0, 128, 0]


@pytest.mark.parametrize("options", OVERLAP)
def test_an_abort_works_in_the_queue_in_prefill_and_in_decode(start: StartEngine, options: list[str]) -> None:
    engine = start(*options, "--step-seconds", "0.02", num_blocks=1000, max_num_seqs=2, max_num_batched_tokens=64)
    engine.wait_ready()
    engine.add("decode", [1], max_tokens=1000)
    engine.until(lambda _: len(engine.tokens["decode"]) > 2)
    engine.add("prefill", [2] * 20_000, max_tokens=10)  # 300 steps
    engine.add("queued", [3], max_tokens=10)
    engine.until(lambda message: isinstance(message, StepOutput) and message.stats.free_blocks < 995)
    assert not engine.tokens.keys() & {"prefill", "queued"}
    engine.send(AbortRequests(["queued", "prefill", "decode", "never there"]))
    engine.wait_finished("queued", "prefill", "decode")
    assert {finished.reason for finished in engine.finished.values()} == {FinishReason.ABORT}
    engine.send(AbortRequests(["queued", "decode"]))
    beat = engine.until(lambda message: isinstance(message, Heartbeat) and message.stats.unknown_ids == 3)
    assert isinstance(beat, Heartbeat)
    assert (beat.stats.free_blocks, beat.stats.num_running, beat.stats.num_waiting) == (1000, 0, 0)


def test_a_thousand_aborts_of_nothing_are_counted_and_nothing_else(start: StartEngine) -> None:
    engine = start()
    engine.wait_ready()
    engine.add("done", [1], max_tokens=2)
    engine.wait_finished("done")
    engine.add("open", [2], max_tokens=50)
    for i in range(500):
        engine.send(AbortRequests([f"never{i}", "done"]))
    engine.wait_finished("open")
    assert engine.finished["open"].reason is FinishReason.LENGTH
    assert engine.tokens["open"] == expected_tokens([2], 50)
    beat = engine.until(lambda message: isinstance(message, Heartbeat) and message.stats.unknown_ids >= 1000)
    assert isinstance(beat, Heartbeat)
    assert beat.stats.unknown_ids == 1000


def test_at_level_info_the_log_has_no_prompt_and_no_tokens(start: StartEngine) -> None:
    engine = start(num_blocks=10)
    engine.wait_ready()
    engine.add("a", [777] * 3, max_tokens=3)
    engine.add("b", [777] * 3000, max_tokens=3)
    engine.wait_finished("a", "b")
    engine.send(Shutdown(0))
    assert engine.end() == 0
    assert "777" not in engine.log
    assert "draining" in engine.log
