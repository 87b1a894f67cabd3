"""Random and mutated frames at both ends of the channel: `python -m tests.fuzz.frames [--frames 1000000] [--seed N]`.

At the engine's end everything is real but the model: what decodes is built, scheduled and computed. At the front-end's
end it is the engine client. Whatever comes, either it is a message or the channel is closed; nothing else is raised,
nothing hangs, and every request ends exactly once.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import random
import struct
import time
from collections import Counter
from typing import cast

import msgspec

from model.batch import Logprobs, SamplingParams
from scheduler.block_pool import BlockPool
from scheduler.channel import ClientChannel, EngineChannel, FrameDecoder, ProtocolError, encode_frame
from scheduler.config import EngineConfig
from scheduler.main_loop import Engine
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
    Grammar,
    Heartbeat,
    ResetPrefixCache,
    Shutdown,
    Started,
    StepOutput,
    ToEngine,
)
from scheduler.outbox import Outbox
from scheduler.reader import Reader
from scheduler.scheduler import Scheduler
from scheduler.step_result import StepResult
from server.engine_client import EngineClient, EngineState
from server.streams import Delta, RequestStream
from tests.scheduler.fake_engine import EOS_TOKEN_ID, VOCAB_SIZE, FakeGrammars, FakeRunner
from tests.scheduler.invariants import check

HANG_SECONDS = 60
STEPS_EVERY = 40
"""Messages that gather at the engine's end before it computes them."""

_encode = msgspec.msgpack.Encoder().encode
_INTS = [0, 1, -1, 2, 63, 64, 65, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1]
_READY = EngineReady(
    model_type="fake",
    fingerprint="fake",
    max_model_len=4096,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=[EOS_TOKEN_ID],
    num_blocks=64,
    block_size=64,
    cache_bytes_per_token=1,
    weight_bytes=0,
    device="cpu",
    dtype="none",
    quantization="none",
    ops="fake",
    instruction_set=None,
    prefill_attention=None,
    max_num_seqs=8,
    max_num_batched_tokens=256,
    load_seconds=0.0,
)


class Frames:
    """Makes frames, good and bad."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0

    def to_engine(self) -> bytes:
        return self._bend(self._to_engine())

    def to_front_end(self, request_ids: list[str]) -> bytes:
        return self._bend(self._to_front_end(request_ids))

    def _number(self) -> int:
        draw = self._random
        return draw.choice(_INTS) if draw.random() < 0.3 else draw.randrange(300)

    def _name(self) -> str:
        return f"r{self._random.randrange(200)}"

    def _to_engine(self) -> ToEngine:
        draw = self._random
        match draw.randrange(12):
            case 0:
                return AbortRequests([self._name() for _ in range(draw.randrange(4))])
            case 1:
                return ResetPrefixCache()
            case 2:
                return Configure(EngineConfig(model_dir="/none"))
        self._count += 1
        params = SamplingParams(
            max_tokens=self._number(),
            seed=self._number(),
            temperature=draw.choice([0.0, 1.0, float("nan"), float("inf"), -1.0]),
            stop_token_ids=tuple(self._number() for _ in range(draw.randrange(3))),
            ignore_eos=draw.random() < 0.5,
            min_tokens=self._number(),
            logit_bias={self._number(): draw.choice([-100.0, 0.5, float("nan")]) for _ in range(draw.randrange(3))},
            bad_words=tuple(tuple(self._number() for _ in range(draw.randrange(3))) for _ in range(draw.randrange(2))),
            logprobs=draw.choice([None, 0, self._number()]),
            prompt_logprobs=draw.choice([None, None, 0, self._number()]),
        )
        prompt = b"".join(struct.pack("<I", draw.randrange(VOCAB_SIZE + 1)) for _ in range(draw.randrange(150)))
        return AddRequest(
            request_id=draw.choice([f"r{self._count}", self._name()]),
            prompt=prompt + draw.choice([b"", b"", b"\0"]),
            params=params,
            priority=self._number(),
            cache_salt=draw.choice(["", "a", "\0"]),
            grammar=Grammar(draw.choice(["regex", "x"]), draw.choice(["1 2 3", "5", "?"]))
            if draw.random() < 0.2
            else None,
            progress=draw.random() < 0.3,
        )

    def _to_front_end(self, request_ids: list[str]) -> FromEngine:
        draw = self._random
        known = [*draw.sample(request_ids, min(len(request_ids), draw.randrange(4))), self._name()]
        logprobs = Logprobs([[self._number()]], [[draw.choice([-0.5, float("nan")])]])
        stats = EngineStats(num_running=self._number(), num_steps=self._number())
        match draw.randrange(8):
            case 0:
                return Heartbeat(step=self._number(), step_age=draw.choice([0.0, -1.0, 1e9, float("nan")]), stats=stats)
            case 1:
                return _READY
            case 2 if draw.random() < 0.05:
                return EngineFailed(kind="step", message="x", request_ids=known)
        ends = {name: Finished(reason=draw.choice(list(FinishReason))) for name in known if draw.random() < 0.2}
        columns = len(known) + (draw.random() < 0.02)
        return StepOutput(
            step=self._number(),
            request_ids=known,
            token_ids=[[self._number() for _ in range(draw.randrange(3))] for _ in range(columns)],
            finished=ends,
            started={name: Started(self._number(), 0.0, 0.0) for name in known if draw.random() < 0.2},
            stats=stats,
            logprobs={name: logprobs for name in known if draw.random() < 0.2},
            prompt_logprobs={name: logprobs for name in known if draw.random() < 0.1},
            progress={name: self._number() for name in known if draw.random() < 0.1},
        )

    def _bend(self, message: ToEngine | FromEngine) -> bytes:
        draw = self._random
        kind = draw.random()
        if kind < 0.4:
            return encode_frame(message)
        if kind < 0.5:
            payload = bytearray(draw.randbytes(draw.randrange(64)))
        else:
            payload = bytearray(_encode(message))
            for _ in range(draw.choice([1, 1, 2, 8])):
                self._mutate(payload)
        length = len(payload) if draw.random() < 0.95 else draw.choice([0, 1, len(payload) + 1, 2**26 + 1, 2**32 - 1])
        return struct.pack("<I", length) + payload

    def _mutate(self, payload: bytearray) -> None:
        draw = self._random
        place = draw.randrange(len(payload) + 1)
        match draw.randrange(5):
            case 0 if payload:
                payload[place % len(payload)] ^= 1 << draw.randrange(8)
            case 1 if payload:
                payload[place % len(payload)] = draw.choice([0x00, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xCF, 0xDF, 0xFF])
            case 2:
                del payload[place : place + draw.choice([1, 1, 4, 100])]
            case 3:
                payload[place:place] = draw.randbytes(draw.choice([1, 1, 4]))
            case _:
                payload[place:place] = payload[place : place + draw.randrange(32)]


class Outputs:
    """In the place of the engine's outbox: whatever it says can be said."""

    def put(self, output: StepOutput) -> None:
        encode_frame(output)


class EngineEnd:
    """The engine's end: the real reader and main loop over a model of arithmetic, without threads."""

    def __init__(self) -> None:
        options = argparse.Namespace(load_error=None, load_bug=False, load_seconds=0, step_seconds=0, overlap=False)
        options.raise_at_step = options.kill_at_step = options.stall_at_step = None
        options.out_of_memory_at_steps = []
        runner = FakeRunner(EngineConfig(model_dir="/none", num_blocks=64), options)
        grammars = FakeGrammars()
        self.scheduler = Scheduler(
            pool=BlockPool(64),
            block_size=64,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            max_model_len=4096,
            eos_token_ids=[EOS_TOKEN_ID],
            prefix_cache=True,
            fingerprint="fake",
        )
        self.reader = Reader(cast(EngineChannel, None))
        self.reader.accept_requests(self.scheduler, grammars, VOCAB_SIZE)
        self.engine = Engine(self.scheduler, runner, grammars, self.reader.inbox, cast(Outbox, Outputs()))
        self.decoder = FrameDecoder[ToEngine](ToEngine)
        self.ended: set[str] = set()
        self._gathered = 0

    def feed(self, frame: bytes, counts: Counter[str]) -> None:
        try:
            for message in self.decoder.feed(frame):
                counts["messages to the engine"] += 1
                self._take(message)
        except ProtocolError:
            counts["closed by the engine"] += 1
            self.decoder = FrameDecoder[ToEngine](ToEngine)

    def _take(self, message: ToEngine) -> None:
        match message:
            case AddRequest():
                self.reader.inbox.put(self.reader._build(message))
            case AbortRequests() | ResetPrefixCache():
                self.reader.inbox.put(message)
            case Configure() | Shutdown():
                return  # the reader raises, the main loop ends: neither is a fault
        self._gathered += 1
        if self._gathered == STEPS_EVERY:
            self._gathered = 0
            self._compute(8)
            self.reader.inbox.put(AbortRequests(list(self.engine.open_ids)))
            self._compute(2)
            assert self.scheduler.pool.free_count == self.scheduler.pool.num_blocks
            check(self.scheduler)

    def _compute(self, steps: int) -> None:
        for _ in range(steps):
            self.engine._drain_inbox(wait=False)
            if not self.engine._launch():
                break
            self.engine._collect()
        self.engine._drain_inbox(wait=False)
        self.engine._put(StepResult(finished=self.scheduler.take_finished()), 0.0)


class FakeTransport:
    """Nothing is written anywhere; an abort ends the connection as asyncio does."""

    def __init__(self, channel: ClientChannel) -> None:
        self._channel = channel
        self.is_closed = False

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes) -> None:
        pass


class FrontEnd:
    """The front-end's end: the real channel and engine client, without a process."""

    def __init__(self) -> None:
        self.client = EngineClient(EngineConfig(model_dir="/none"))
        self.channel = ClientChannel(self.client._on_message, self.client._on_closed)
        self.transport = FakeTransport(self.channel)
        self.channel.connection_made(cast(asyncio.Transport, self.transport))
        self.client._channel = self.channel
        self.client._on_message(_READY)
        self.streams: dict[str, RequestStream] = {}
        self._number = 0

    def feed(self, frames: Frames, counts: Counter[str]) -> None:
        while len(self.client._streams) < 6 and self.client.state is EngineState.READY:
            self._number += 1
            name = f"r{self._number % 200}"
            if name not in self.client._streams:
                request = AddRequest(request_id=name, prompt=b"1234", params=SamplingParams(max_tokens=1))
                self.streams[name] = self.client.submit(request)
        before = dict(self.client._streams)
        counts["frames to the front-end"] += 1
        self.channel.data_received(frames.to_front_end(list(before)))
        for name in before.keys() - self.client._streams.keys():
            self._check_end(self.streams.pop(name))
        if self.transport.is_closed:
            counts["closed by the front-end"] += 1
            self.channel.connection_lost(None)
            assert self.client.state is EngineState.DOWN
            assert not self.client._streams
            for stream in self.streams.values():
                self._check_end(stream)
            self.__init__()  # type: ignore[misc]

    def _check_end(self, stream: RequestStream) -> None:
        assert stream.ended
        pending: Delta | None = stream._pending
        assert pending is not None
        assert (pending.finished or stream._end) is not None  # behind log-probabilities that wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts = fuzz(args.frames, args.seed)
    print(f"{args.frames:,} frames with seed {args.seed}: 0 crashes, 0 hangs")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count:,}")


def fuzz(count: int, seed: int) -> Counter[str]:
    """Half of the frames to either end. Whatever is raised comes out; a hang ends the process with its stack."""
    frames, engine, front_end = Frames(seed), EngineEnd(), FrontEnd()
    counts: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        started = time.perf_counter()
        if number % 2:
            engine.feed(frames.to_engine(), counts)
        else:
            front_end.feed(frames, counts)
        slowest = max(slowest, time.perf_counter() - started)
    faulthandler.cancel_dump_traceback_later()
    counts["slowest frame, ms"] = round(slowest * 1000)
    return counts


if __name__ == "__main__":
    main()
