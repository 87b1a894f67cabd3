from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from model.batch import Logprobs
from scheduler import outbox as outbox_module
from scheduler.channel import EngineChannel, FrameDecoder
from scheduler.messages import EngineStats, Finished, FinishReason, FromEngine, Started, StepOutput
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


@pytest.fixture
def ends() -> Iterator[tuple[EngineChannel, socket.socket]]:
    """The engine's end, and the front-end's as it is."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        yield EngineChannel(ours), theirs


@pytest.fixture
def channel(ends: tuple[EngineChannel, socket.socket]) -> EngineChannel:
    return ends[0]


def received(theirs: socket.socket, number: int) -> list[StepOutput]:
    decoder = FrameDecoder[StepOutput](FromEngine)
    messages: list[StepOutput] = []
    while len(messages) < number:
        messages += decoder.feed(theirs.recv(65536))
    return messages


def start_writer(outbox: Outbox, channel: EngineChannel, taken: list[StepOutput | None]) -> threading.Thread:
    """Does as the engine's writer does, and keeps what it took."""

    def write() -> None:
        while not outbox.drained:
            taken.append(outbox.take(5))
            channel.flush()
            if taken[-1] is not None:
                channel.send(taken[-1])

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    while not outbox._writer_waits:
        time.sleep(0.001)
    return thread


def test_while_the_writer_waits_outputs_go_straight_into_the_socket(
    ends: tuple[EngineChannel, socket.socket],
) -> None:
    channel, theirs = ends
    outbox = Outbox(channel)
    taken: list[StepOutput | None] = []
    writer = start_writer(outbox, channel, taken)
    outputs = [output(step, {"a": [step]}) for step in range(3)]
    for each in outputs:
        outbox.put(each)
    assert received(theirs, 3) == outputs
    outbox.close()
    writer.join(5)
    assert taken == [None]


def test_what_the_socket_has_no_room_for_is_left_to_the_writer(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, theirs = ends
    outbox = Outbox(channel)
    taken: list[StepOutput | None] = []
    writer = start_writer(outbox, channel, taken)
    size = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    outbox.put(output(0, {"a": [70_000] * size}))  # several times what fits: goes in part
    assert channel.unsent or not outbox._writer_waits
    for step in range(1, 4):
        outbox.put(output(step, {"a": [step]}))
    assert [token_id for message in received(theirs, 2) for token_id in message.token_ids[0][-3:]] == (
        [70_000] * 3 + [1, 2, 3]
    )
    outbox.close()
    writer.join(5)
    assert not writer.is_alive()


def test_a_front_end_that_is_gone_is_for_the_reader_to_notice(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, theirs = ends
    outbox = Outbox(channel)
    start_writer(outbox, channel, [])
    theirs.close()
    outbox.put(output(0, {"a": [1]}))
    outbox.close()


def test_what_is_taken_in_time_comes_out_as_it_went_in(channel: EngineChannel) -> None:
    outbox = Outbox(channel)
    first, second = output(1, {"a": [1]}), output(2, {"a": [2]})
    outbox.put(first)
    assert outbox.take(0) is first
    outbox.put(second)
    assert outbox.take(0) is second
    assert outbox.take(0) is None


def test_what_is_not_taken_merges_in_order_and_loses_nothing(channel: EngineChannel) -> None:
    outbox = Outbox(channel)
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


def test_log_probabilities_merge_in_order_and_progress_keeps_the_latest(channel: EngineChannel) -> None:
    outbox = Outbox(channel)
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


def test_log_probabilities_count_towards_a_full_outbox(channel: EngineChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_PENDING_TOKENS", 4)
    outbox = Outbox(channel)
    outbox.put(output(1, {}, prompt_logprobs={"a": Logprobs([[1, 2], [3, 4]], [[0.0, 0.0], [0.0, 0.0]])}))
    engine = threading.Thread(target=outbox.put, args=(output(2, {"a": [5]}),))
    engine.start()
    engine.join(0.1)
    assert engine.is_alive()
    assert outbox.take(0) is not None
    engine.join(1)
    assert not engine.is_alive()


def test_a_full_outbox_holds_the_engine_until_the_writer_has_taken(
    channel: EngineChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_PENDING_TOKENS", 4)
    outbox = Outbox(channel)
    outbox.put(output(1, {"a": [1, 2, 3, 4]}))
    engine = threading.Thread(target=outbox.put, args=(output(2, {"a": [5]}),))
    engine.start()
    engine.join(0.1)
    assert engine.is_alive()
    assert outbox.take(0) == output(1, {"a": [1, 2, 3, 4]})
    engine.join(1)
    assert not engine.is_alive()
    assert outbox.take(0) == output(2, {"a": [5]})


def test_take_waits_for_an_output_or_the_close(channel: EngineChannel) -> None:
    outbox = Outbox(channel)
    with contextlib.suppress(BlockingIOError):
        while True:
            channel._sock.send(b"x" * 4096, socket.MSG_DONTWAIT)
    threading.Timer(0.05, outbox.put, [output(1, {"a": [1]})]).start()
    assert outbox.take(5) == output(1, {"a": [1]})
    threading.Timer(0.05, outbox.close).start()
    started = time.monotonic()
    assert not outbox.drained
    assert outbox.take(5) is None
    assert time.monotonic() - started < 2
    assert outbox.drained


def test_what_was_put_before_the_close_can_still_be_taken(channel: EngineChannel) -> None:
    outbox = Outbox(channel)
    outbox.put(output(1, {"a": [1]}))
    outbox.close()
    assert not outbox.drained
    assert outbox.take(0) is not None
    assert outbox.drained
