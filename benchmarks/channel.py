"""What it costs to bring a step's tokens to their streams: `python -m benchmarks.channel [--rows 64] [--steps 5000]`.

A scripted engine process sends `--steps` step outputs of `--rows` rows, one every `--interval-ms`; this process is the
front-end, with `server.engine_client` and one reader task a stream. Per step, in microseconds: CPU of either side
(median over the rounds), and the time from before the encoding until all streams have their tokens (median and p99).
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import socket
import statistics
import sys
import time

import uvloop

from model.batch import SamplingParams
from scheduler.channel import EngineChannel
from scheduler.config import EngineConfig
from scheduler.messages import AddRequest, EngineReady, EngineStats, Finished, FinishReason, StepOutput
from server.engine_client import EngineClient
from server.streams import RequestStream

ROUNDS = 5


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_engine(channel: EngineChannel, rows: int, steps: int, interval: float) -> None:
    channel.receive()
    fixed = dict.fromkeys(("model_type", "fingerprint", "device", "dtype", "quantization", "ops"), "none")
    sizes = dict.fromkeys(("max_model_len", "vocab_size", "num_blocks", "block_size", "cache_bytes_per_token"), 1)
    limits = {"weight_bytes": 0, "max_num_seqs": rows, "max_num_batched_tokens": rows}
    none = dict.fromkeys(("instruction_set", "prefill_attention"))
    channel.send(EngineReady(**fixed, **sizes, **limits, **none, eos_token_ids=[], load_seconds=0.0))  # type: ignore[arg-type]
    ended = Finished(reason=FinishReason.LENGTH)
    for _ in range(ROUNDS):
        request_ids: list[str] = []
        while len(request_ids) < rows:
            message = channel.receive()
            assert isinstance(message, AddRequest)
            request_ids.append(message.request_id)
        busy = cpu_seconds()
        for step in range(steps):
            time.sleep(interval)
            last = step == steps - 1
            cpu = (cpu_seconds() - busy) / steps if last else 0.0
            output = StepOutput(
                step=step,
                request_ids=request_ids,
                token_ids=[[100_000 + step]] * rows,
                finished=dict.fromkeys(request_ids, ended) if last else {},
                started={},
                stats=EngineStats(step_seconds=cpu if last else time.monotonic()),
            )
            channel.send(output)
    channel.receive()


async def read(stream: RequestStream) -> int:
    return sum([len(delta.token_ids) async for delta in stream])


async def measure(rows: int, steps: int, interval: float) -> None:
    command = [sys.executable, "-m", "benchmarks.channel", "--rows", str(rows), "--steps", str(steps)]
    command += ["--interval-ms", str(interval * 1000)]
    engine = EngineClient(EngineConfig(model_dir="/none"), command=command)
    delays: list[float] = []
    engine_cpu: list[float] = []
    front_end_cpu: list[float] = []
    engine.on_stats = lambda stats: delays.append(time.monotonic() - stats.step_seconds)
    await engine.start()
    await engine.wait_ready()
    for round_number in range(ROUNDS):
        params = SamplingParams(max_tokens=steps)
        requests = [
            AddRequest(request_id=f"chatcmpl-{round_number:016x}{i:016x}", prompt=b"1234", params=params)
            for i in range(rows)
        ]
        busy = cpu_seconds()
        counts = await asyncio.gather(*(read(engine.submit(request)) for request in requests))
        front_end_cpu.append((cpu_seconds() - busy) / steps)
        engine_cpu.append(engine.stats.step_seconds)
        delays.pop()
        assert counts == [steps] * rows
    await engine.shutdown(0)
    delays.sort()
    print(f"{rows} rows, {steps} steps of {interval * 1e3:.0f} ms, {ROUNDS} rounds; us a step:")
    print(f"  engine, encode and send:                {statistics.median(engine_cpu) * 1e6:7.1f} CPU")
    print(f"  front-end, decode, dispatch, readers:   {statistics.median(front_end_cpu) * 1e6:7.1f} CPU")
    print(
        f"  from before encode to all streams:      {statistics.median(delays) * 1e6:7.1f} median, "
        f"{delays[len(delays) * 99 // 100] * 1e6:.1f} p99"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--interval-ms", type=float, default=2.0)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    interval = args.interval_ms / 1000
    if args.fd is not None:
        run_engine(EngineChannel(socket.socket(fileno=args.fd)), args.rows, args.steps, interval)
    else:
        uvloop.run(measure(args.rows, args.steps, interval))


if __name__ == "__main__":
    main()
