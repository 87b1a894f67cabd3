"""What a busy neighbour costs: `python -m benchmarks.cpu_neighbour MODEL [--batches 1,8,16] [--check]`.

Decoding steps of the worker, and a parallel region of nearly empty jobs, alone and beside one process that only
computes, in a session of its own and with this one's priority. Quiet and busy phases take turns; a figure is the mean
of all steps of its kind, since a median would not show those that stall. With `--check` the exit code is 1 where a step
costs more than 2.5 times its quiet time. Everything else on the machine must be idle.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from model.batch import ForwardBatch, NewRow, SamplingParams, ScheduledRow
from model.cores import usable_cores
from model.latent_cache import BLOCK_SIZE
from model.ops.cpu.library import Library, library
from model.runner import ModelRunner, load_runner

BOUND = 2.5
PROMPT = 128
COMPUTE = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this process, however that ends
while True: pass
"""
BLOCKS_A_ROW = 16


class Times(NamedTuple):
    """Seconds."""

    mean: float
    longest: float


class Neighbour:
    """Computes while it is asked to."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def work(self, working: bool) -> None:
        self._process.send_signal(signal.SIGCONT if working else signal.SIGSTOP)
        time.sleep(0.05)


@contextmanager
def neighbour() -> Iterator[Neighbour]:
    """A session has a scheduling group of its own, which gets as much of a core as all threads of this one."""
    process = subprocess.Popen([sys.executable, "-c", COMPUTE], start_new_session=True)
    try:
        own = Path("/proc/self/autogroup")  # "/autogroup-12 nice 0"
        if own.exists():
            Path(f"/proc/{process.pid}/autogroup").write_text(own.read_text().split()[-1])
        yield Neighbour(process)
    finally:
        process.kill()
        process.wait()


def compare(step: Callable[[], object], beside: Neighbour, rounds: int, seconds: float) -> tuple[Times, Times]:
    """Quiet and busy."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for busy, found in enumerate(times):
            beside.work(bool(busy))
            stop = time.perf_counter() + seconds
            while (before := time.perf_counter()) < stop:
                step()
                found.append(time.perf_counter() - before)
    quiet, busy_times = (Times(sum(found) / len(found), max(found)) for found in times)
    return quiet, busy_times


def decoding(runner: ModelRunner, batch: int, bound: int) -> Iterator[object]:
    """Decoding steps of `batch` rows; their contexts grow from 128 tokens and begin anew when their blocks are full.

    bound: so many rows the runner still holds.
    """
    numbers = count()
    draw = random.Random(0)
    params = SamplingParams(max_tokens=BLOCKS_A_ROW * BLOCK_SIZE, temperature=0, ignore_eos=True)
    while True:
        new, scheduled = [], []
        for row in range(batch):
            tokens = array("I", (draw.randrange(runner.vocab_size) for _ in range(PROMPT)))
            blocks = list(range(row * BLOCKS_A_ROW, (row + 1) * BLOCKS_A_ROW))
            new.append(NewRow(row=row, tokens=tokens, num_prompt_tokens=PROMPT, params=params))
            scheduled.append(ScheduledRow(row=row, start=0, num_tokens=PROMPT, new_blocks=blocks, sample=True))
        runner.execute(ForwardBatch(next(numbers), scheduled, new, list(range(bound))))
        bound = batch
        for start in range(PROMPT, BLOCKS_A_ROW * BLOCK_SIZE):
            rows = [ScheduledRow(row=row, start=start, num_tokens=1, sample=True) for row in range(batch)]
            yield runner.execute(ForwardBatch(next(numbers), rows))


def region(kernels: Library) -> Callable[[], object]:
    """A hundred regions of four jobs that do nearly nothing."""
    x, weight, y = torch.ones(64, 32).bfloat16(), torch.ones(32).bfloat16(), torch.empty(64, 32).bfloat16()

    def regions() -> None:
        for _ in range(100):
            kernels.rms_norm(x, weight, 1e-6, y)

    return regions


def report(name: str, quiet: Times, busy: Times) -> float:
    ratio = busy.mean / quiet.mean
    longest = f"{quiet.longest * 1e3:11.2f} / {busy.longest * 1e3:9.2f}"
    print(f"{name:<24} {quiet.mean * 1e3:9.2f} {busy.mean * 1e3:9.2f} {ratio:6.2f} {longest}", flush=True)
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a phase")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    runner = load_runner(
        options.model,
        num_threads=options.threads,
        num_blocks=max(batches) * BLOCKS_A_ROW,
        max_num_seqs=max(batches),
        progress=False,
    )
    kernels = library()
    instructions = "" if kernels is None or runner.ops != "cpu" else f" ({kernels.isa})"
    print(f"{runner.ops} operations{instructions}, {options.threads} threads")
    print(f"{'ms':<24} {'quiet':>9} {'busy':>9} {'ratio':>6} {'longest, quiet / busy':>23}")
    ratios, bound = [], 0
    with neighbour() as beside:
        for batch in batches:
            steps = decoding(runner, batch, bound)
            next(steps)
            quiet, busy = compare(partial(next, steps), beside, options.rounds, options.seconds)
            bound = batch
            ratios.append(report(f"step of {batch} rows", quiet, busy))
        if kernels is not None:
            report("100 regions", *compare(region(kernels), beside, options.rounds, options.seconds))
    return int(options.check and max(ratios) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
