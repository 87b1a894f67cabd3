from __future__ import annotations

import threading
import time

import pytest

from model.batch import Logprobs
from scheduler import outbox as outbox_module
from scheduler.messages import EngineStats, Finished, FinishReason, Started, StepOutput
from scheduler.outbox import Outbox

STOP = Finished(reason=FinishReason.STOP)
HIT, MISS = Started(64, 0.5, 0.25), Started(0, 0.5, 1.5)


def output(step: int, tokens: dict[str, list[int]], **rare: dict[str, object]) -> StepOutput:
    columns: dict[str, dict[str, object]] = {"finished": {}, "started": {}, **rare}
    return StepOutput(
        step=step,
        request_ids=list(tokens),
        token_ids=list(tokens.values()),
        stats=EngineStats(num_steps=step),
        **columns,
    )


def test_what_is_taken_in_time_comes_out_as_it_went_in() -> None:
    outbox = Outbox()
    first, second = output(1, {"a": [1]}), output(2, {"a": [2]})
    outbox.put(first)
    assert outbox.take(0) is first
    outbox.put(second)
    assert outbox.take(0) is second
    assert outbox.take(0) is None


def test_what_is_not_taken_merges_in_order_and_loses_nothing() -> None:
    outbox = Outbox()
    outbox.put(output(1, {"a": [1], "b": [10]}, started={"a": HIT}))
    outbox.put(output(2, {"b": [11], "c": [20]}, started={"c": MISS}, finished={"a": STOP}))
    outbox.put(output(3, {"c": [21, 22], "b": [12]}, finished={"b": STOP}))
    assert outbox.take(0) == output(
        3,
        {"a": [1], "b": [10, 11, 12], "c": [20, 21, 22]},
        started={"a": HIT, "c": MISS},
        finished={"a": STOP, "b": STOP},
    )
    assert outbox.take(0) is None


def test_log_probabilities_merge_in_order_and_progress_keeps_the_latest() -> None:
    outbox = Outbox()
    outbox.put(output(1, {}, prompt_logprobs={"a": Logprobs([[5]], [[-1.0]])}, progress={"a": 64, "b": 64}))
    outbox.put(
        output(
            2,
            {"a": [7]},
            prompt_logprobs={"a": Logprobs([[6]], [[-2.0]]), "b": Logprobs([[9]], [[-9.0]])},
            logprobs={"a": Logprobs([[7, 8]], [[-3.0, -1.0]])},
            progress={"b": 128},
        )
    )
    outbox.put(output(3, {"a": [8]}, logprobs={"a": Logprobs([[8, 8]], [[-0.5, -0.5]])}))
    assert outbox.take(0) == output(
        3,
        {"a": [7, 8]},
        prompt_logprobs={"a": Logprobs([[5], [6]], [[-1.0], [-2.0]]), "b": Logprobs([[9]], [[-9.0]])},
        logprobs={"a": Logprobs([[7, 8], [8, 8]], [[-3.0, -1.0], [-0.5, -0.5]])},
        progress={"a": 64, "b": 128},
    )


def test_log_probabilities_count_towards_a_full_outbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_PENDING_TOKENS", 4)
    outbox = Outbox()
    outbox.put(output(1, {}, prompt_logprobs={"a": Logprobs([[1, 2], [3, 4]], [[0.0, 0.0], [0.0, 0.0]])}))
    engine = threading.Thread(target=outbox.put, args=(output(2, {"a": [5]}),))
    engine.start()
    engine.join(0.1)
    assert engine.is_alive()
    assert outbox.take(0) is not None
    engine.join(1)
    assert not engine.is_alive()


def test_a_full_outbox_holds_the_engine_until_the_writer_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_PENDING_TOKENS", 4)
    outbox = Outbox()
    outbox.put(output(1, {"a": [1, 2, 3, 4]}))
    engine = threading.Thread(target=outbox.put, args=(output(2, {"a": [5]}),))
    engine.start()
    engine.join(0.1)
    assert engine.is_alive()
    assert outbox.take(0) == output(1, {"a": [1, 2, 3, 4]})
    engine.join(1)
    assert not engine.is_alive()
    assert outbox.take(0) == output(2, {"a": [5]})


def test_take_waits_for_an_output_or_the_close() -> None:
    outbox = Outbox()
    threading.Timer(0.05, outbox.put, [output(1, {"a": [1]})]).start()
    assert outbox.take(5) == output(1, {"a": [1]})
    threading.Timer(0.05, outbox.close).start()
    started = time.monotonic()
    assert not outbox.drained
    assert outbox.take(5) is None
    assert time.monotonic() - started < 2
    assert outbox.drained


def test_what_was_put_before_the_close_can_still_be_taken() -> None:
    outbox = Outbox()
    outbox.put(output(1, {"a": [1]}))
    outbox.close()
    assert not outbox.drained
    assert outbox.take(0) is not None
    assert outbox.drained
