from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from array import array
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from model.batch import SamplingParams
from scheduler.channel import (
    MAX_FRAME_BYTES,
    ChannelClosed,
    ClientChannel,
    EngineChannel,
    FrameDecoder,
    ProtocolError,
    encode_frame,
)
from scheduler.config import EngineConfig
from scheduler.messages import (
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
    Shutdown,
    Started,
    StepOutput,
    ToEngine,
)

PARAMS = SamplingParams(max_tokens=5, temperature=0.5, stop_token_ids=(3, 4))
TO_ENGINE: list[ToEngine] = [
    Configure(EngineConfig(model_dir="/models/v2", num_blocks=7)),
    AddRequest(request_id="é", prompt=array("I", range(131_072)).tobytes(), params=PARAMS, priority=-1),
    AbortRequests(["a", "b"]),
    Shutdown(1.5),
]
STATS = EngineStats(num_running=2, step_seconds=0.25)
FROM_ENGINE: list[FromEngine] = [
    EngineReady(
        model_type="deepseek_v2",
        fingerprint="f",
        max_model_len=1,
        vocab_size=2,
        eos_token_ids=[1],
        num_blocks=3,
        block_size=64,
        cache_bytes_per_token=4,
        weight_bytes=2**40,
        device="cpu",
        dtype="float32",
        quantization="none",
        ops="eager",
        instruction_set=None,
        prefill_attention="cudnn",
        max_num_seqs=1,
        max_num_batched_tokens=1,
        load_seconds=0.5,
    ),
    StepOutput(
        step=3,
        request_ids=["a", "b"],
        token_ids=[[1], [2, 3]],
        finished={"b": Finished(reason=FinishReason.STOP, stop_token_id=3)},
        started={"a": Started(64, 0.5, 0.25)},
        stats=STATS,
    ),
    EngineFailed(kind="step", message="m", request_ids=["a"]),
    Heartbeat(step=3, step_age=0.5, stats=STATS),
]


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def packed(value: object) -> bytes:
    return framed(msgspec.msgpack.encode(value))


CRAFTED: dict[str, bytes] = {
    "empty frame": framed(b""),
    "longer than the limit": struct.pack("<I", MAX_FRAME_BYTES + 1),
    "longest possible length": b"\xff\xff\xff\xff",
    "never used byte": framed(b"\xc1"),
    "not an object": packed([1, 2]),
    "no tag": packed({"request_ids": ["a"]}),
    "unknown tag": packed({"type": "exec", "code": "1"}),
    "tag of the other direction": packed({"type": "heartbeat", "step": 1, "step_age": 0.0, "stats": {}}),
    "tag of another type": packed({"type": 1}),
    "missing field": packed({"type": "abort"}),
    "wrong type of field": packed({"type": "abort", "request_ids": "a"}),
    "wrong type inside a list": packed({"type": "abort", "request_ids": ["a", 1]}),
    "null for a number": packed({"type": "shutdown", "drain_seconds": None}),
    "integer out of range": framed(msgspec.msgpack.encode({"type": "shutdown"})[:-8] + b"\xcf" + b"\xff" * 8),
    "trailing byte": framed(msgspec.msgpack.encode({"type": "abort", "request_ids": []}) + b"\x00"),
    "truncated object": framed(msgspec.msgpack.encode({"type": "abort", "request_ids": ["abc"]})[:-1]),
    "array of 4 thousand million": framed(b"\x82\xa4type\xa5abort\xabrequest_ids\xdd\xff\xff\xff\xff"),
    "object of 4 thousand million": framed(b"\xdf\xff\xff\xff\xff"),
    "nested 200,000 deep": framed(b"\x82\xa4type\xa5abort\xa1x" + b"\x91" * 200_000),
    "invalid UTF-8": framed(b"\x82\xa4type\xa5abort\xabrequest_ids\x91\xa2\xff\xfe"),
    "surrogate in UTF-8": framed(b"\x82\xa4type\xa5abort\xabrequest_ids\x91\xa3\xed\xa0\x80"),
    "timestamp extension": framed(b"\xd6\xff\x00\x00\x00\x00"),
    "unknown extension": framed(b"\xd4\x2a\x00"),
    "a pickle": framed(b"\x80\x05\x8c\x02os\x8c\x06system\x93."),
    "a line of HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("data", CRAFTED.values(), ids=CRAFTED.keys())
def test_a_crafted_frame_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameDecoder[ToEngine](ToEngine).feed(data))


def test_random_frames_are_protocol_errors() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        with pytest.raises(ProtocolError):
            list(FrameDecoder[ToEngine](ToEngine).feed(framed(rng.randbytes(rng.randrange(200)))))


def test_mutated_frames_are_messages_or_protocol_errors() -> None:
    """Damage within a string or number may leave a valid message; anything else must be refused the one way."""
    rng = random.Random(1)
    valid = [msgspec.msgpack.encode(message) for message in TO_ENGINE if not isinstance(message, AddRequest)]
    refused = 0
    for _ in range(1000):
        payload = bytearray(rng.choice(valid))
        for _ in range(rng.randrange(1, 4)):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        try:
            list(FrameDecoder[ToEngine](ToEngine).feed(framed(bytes(payload))))
        except ProtocolError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("piece", [1, 3, 1000, 1 << 20])
def test_messages_come_out_whole_and_in_order_however_the_bytes_are_cut(piece: int) -> None:
    messages = [message for message in TO_ENGINE if not isinstance(message, AddRequest) or piece > 3]
    stream = b"".join(map(encode_frame, messages))
    decoder = FrameDecoder[ToEngine](ToEngine)
    decoded = [
        message for start in range(0, len(stream), piece) for message in decoder.feed(stream[start : start + piece])
    ]
    assert decoded == messages


def test_messages_before_the_junk_come_out() -> None:
    stream = FrameDecoder[ToEngine](ToEngine).feed(encode_frame(Shutdown(1.0)) + CRAFTED["empty frame"])
    assert next(stream) == Shutdown(1.0)
    with pytest.raises(ProtocolError):
        next(stream)


def test_a_frame_over_the_limit_is_not_sent() -> None:
    too_long = AddRequest(request_id="a", prompt=bytes(MAX_FRAME_BYTES), params=PARAMS)
    with pytest.raises(ProtocolError, match=r"AddRequest of .* bytes is over the limit"):
        encode_frame(too_long)


def test_both_ends_carry_every_message_both_ways() -> None:
    """The echo engine answers with all its messages once it has received all of ours."""
    received: list[ToEngine] = []

    def engine(sock: socket.socket) -> None:
        channel = EngineChannel(sock)
        received.extend(channel.receive() for _ in TO_ENGINE)
        for message in FROM_ENGINE:
            channel.send(message)
        channel.close()

    async def front_end(sock: socket.socket) -> list[FromEngine]:
        answers: list[FromEngine] = []
        closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        channel = await ClientChannel.open(sock, answers.append, closed.set_result)
        for message in TO_ENGINE:
            channel.send(message)
        assert await closed == "end of file"
        channel.send(Shutdown(0.0))  # a no-op by now
        channel.close()
        return answers

    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=engine, args=(theirs,))
    thread.start()
    assert asyncio.run(front_end(ours)) == FROM_ENGINE
    thread.join()
    assert received == TO_ENGINE


def test_the_engine_sees_the_end_of_the_front_end() -> None:
    ours, theirs = socket.socketpair()
    channel = EngineChannel(theirs)
    ours.sendall(encode_frame(Shutdown(2.0)) + b"\x10\x00\x00\x00cut")
    ours.close()
    assert channel.receive() == Shutdown(2.0)
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(Heartbeat(step=0, step_age=0.0, stats=STATS))
    channel.close()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda sock: sock.sendall(CRAFTED["not an object"]), "not a message"),
        (lambda sock: sock.sendall(CRAFTED["longest possible length"]), "announces 4294967295 bytes"),
        (lambda sock: sock.shutdown(socket.SHUT_WR), "end of file"),
    ],
    ids=["junk", "endless frame", "half close"],
)
def test_the_front_end_closes_once_and_says_why(write: Callable[[socket.socket], Any], reason: str) -> None:
    async def scenario() -> tuple[list[FromEngine], list[str]]:
        ours, theirs = socket.socketpair()
        messages: list[FromEngine] = []
        reasons: list[str] = []
        channel = await ClientChannel.open(ours, messages.append, reasons.append)
        with theirs:
            theirs.sendall(encode_frame(FROM_ENGINE[3]))
            write(theirs)
            for _ in range(100):
                await asyncio.sleep(0.001)
            channel.close()
            await asyncio.sleep(0.001)
            theirs.settimeout(1)
            assert theirs.recv(1) == b""
        return messages, reasons

    messages, reasons = asyncio.run(scenario())
    assert messages == [FROM_ENGINE[3]]
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_a_message_that_cannot_be_filed_closes_the_channel() -> None:
    async def scenario() -> list[str]:
        ours, theirs = socket.socketpair()
        reasons: list[str] = []

        def refuse(message: FromEngine) -> None:
            raise ValueError("columns of unequal length")

        await ClientChannel.open(ours, refuse, reasons.append)
        with theirs:
            theirs.sendall(encode_frame(FROM_ENGINE[3]) * 2)
            await asyncio.sleep(0.05)
            theirs.settimeout(1)
            assert theirs.recv(1) == b""
        return reasons

    assert asyncio.run(scenario()) == ["ValueError: columns of unequal length"]
