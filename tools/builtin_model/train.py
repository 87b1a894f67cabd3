"""Trains: one process of one thread on each of two cores, over one set of weights in shared memory.

A step: each process computes the gradient of its own windows into its own buffer; when both have, each updates its own
share of the weights from both gradients; when both have, the next step begins. Threads within one process would leave
half of a core idle. A run goes on from `state.pt`, which is written at every evaluation, with fresh optimisers; or a
new run starts from the weights of a checkpoint of the same tokenizer, to learn what was added to the data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from tools.builtin_model.initial import write_initial
from tools.builtin_model.network import Network, attention_bias
from tools.builtin_model.optimiser import Optimiser
from tools.builtin_model.plot import write_plot
from tools.builtin_model.schedule import BATCH_TOKENS, Phase, Schedule
from tools.builtin_model.score import Scorer, table
from tools.builtin_model.state import Data, State, load_state, open_data, read_checkpoint, save_state
from tools.builtin_model.windows import Batch, Windows

PROCESSES = 2
SEED = 7
LOG_STEPS = 20
SPARE_SECONDS = 60
"""Kept free before the deadline, for the last evaluation."""
MAX_ROWS = 64
BARRIER_SECONDS = 900


@dataclass(frozen=True)
class Shared:
    """In shared memory, all float: what the processes tell each other."""

    weights: Tensor
    """[size]"""
    average: Tensor
    """[size]"""
    gradients: Tensor
    """[processes, size]"""
    scores: Tensor
    """[processes, MAX_ROWS, 2] float64"""
    progress: Tensor
    """[2] int64: tokens done when the processes started, tokens of the whole run"""
    barrier: Barrier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder that `data` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for state.pt, log.jsonl and loss.svg")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of the whole run")
    parser.add_argument("--until", metavar="HH:MM", help="train fewer tokens where that is needed to end by then")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="start from its weights, not from new ones")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--evaluate-every", type=int, default=2_000_000, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="without torch.compile: no C++ compiler needed, slower")


def run(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.resume and (out / "state.pt").exists():
        raise SystemExit(f"{out / 'state.pt'} exists: --resume goes on from it")
    data = open_data(arguments.data)
    size = data.layout.size
    context = multiprocessing.get_context("spawn")
    shared = Shared(
        weights=_shared(size),
        average=_shared(size),
        gradients=_shared(PROCESSES, size),
        scores=_shared(PROCESSES, MAX_ROWS, 2, dtype=torch.float64),
        progress=_shared(2, dtype=torch.int64),
        barrier=context.Barrier(PROCESSES, timeout=BARRIER_SECONDS),
    )
    shared.progress[1] = arguments.tokens
    if arguments.resume:
        state = load_state(out)
        shared.weights.copy_(state.weights)
        shared.average.copy_(state.average)
        shared.progress[0] = state.tokens
    else:
        (out / "log.jsonl").unlink(missing_ok=True)
        if arguments.start is None:
            write_initial(data.config, data.layout, shared.weights, data.texts, SEED)
        else:
            read_checkpoint(arguments.start, data.layout, shared.weights)
        shared.average.copy_(shared.weights)
    spawn(_work, (shared, arguments), nprocs=PROCESSES)  # type: ignore[no-untyped-call]


def _shared(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor: Tensor = torch.zeros(shape, dtype=dtype).share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _work(rank: int, shared: Shared, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    Worker(rank, shared, arguments).run()


class Worker:
    """One of the processes. The first one also plans, logs and saves."""

    def __init__(self, rank: int, shared: Shared, arguments: argparse.Namespace) -> None:
        self.rank, self.shared, self.arguments = rank, shared, arguments
        self.data: Data = open_data(arguments.data)
        self.network = Network(self.data.config, torch.bfloat16)
        self.weights = {
            name: view.requires_grad_() for name, view in self.data.layout.views(shared.weights.detach()).items()
        }
        self.gradients = list(self.data.layout.views(shared.gradients[rank]).values())
        self.optimiser = Optimiser(self.data.layout, shared.weights, shared.average, shared.gradients, rank)
        self.scorer = Scorer(self.data.config, self.data.tokenizer, self.data.mixes["val"], rank, PROCESSES)
        self.loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = self.network.loss
        if not arguments.eager:
            self.loss = torch.compile(self.network.loss, dynamic=False)
        self.done = int(shared.progress[0])
        self.log = Log(arguments.out, self.done) if rank == 0 else None

    @property
    def schedule(self) -> Schedule:
        return Schedule(int(self.shared.progress[1]), from_checkpoint=self.arguments.start is not None)

    def run(self) -> None:
        steps, evaluated = 0, self.done
        phase = self.schedule.phase(self.done)
        windows = self._windows(phase)
        while self.done < self.schedule.tokens:
            if phase != self.schedule.phase(self.done):
                phase = self.schedule.phase(self.done)
                windows = self._windows(phase)
            loss, balance = self._gradient(windows.next_batch())
            self.shared.barrier.wait()
            rates = self.schedule.rates(self.done, steps)
            with torch.no_grad():
                self.optimiser.step(rates)
            self.shared.barrier.wait()
            steps += 1
            self.done += BATCH_TOKENS
            if self.log is not None:
                self.log.step(self.done, phase, loss, balance, rates.matrices)
            if self.done - evaluated >= self.arguments.evaluate_every or self.done >= self.schedule.tokens:
                evaluated = self.done
                self._evaluate()

    def _windows(self, phase: Phase) -> Windows:
        shape = BATCH_TOKENS // PROCESSES // phase.window, phase.window
        seed = SEED + self.done
        return Windows(self.data.mixes, phase.shares, shape, rank=self.rank, processes=PROCESSES, seed=seed)

    def _gradient(self, batch: Batch) -> tuple[float, float]:
        """Writes the gradient of the process's own batch; the mean loss and balance loss."""
        total, likelihood, balance = self.loss(self.weights, batch, attention_bias(batch.documents, self.network.dtype))
        for own, gradient in zip(self.gradients, torch.autograd.grad(total, list(self.weights.values())), strict=True):
            own.copy_(gradient)
        return likelihood.item(), balance.item()

    def _evaluate(self) -> None:
        sums = self.scorer.measure(self.data.layout.views(self.shared.average))
        self.shared.scores[self.rank, : len(sums)] = sums
        self.shared.barrier.wait()
        if self.log is not None:
            report = self.scorer.report(self.shared.scores[:, : len(sums)].sum(0))
            self._replan()
            save_state(self.arguments.out, State(self.shared.weights, self.shared.average, self.done))
            self.log.evaluation(self.done, self.schedule.tokens, report)
        self.shared.barrier.wait()

    def _replan(self) -> None:
        """Fewer tokens where the deadline asks for it, by the rate since the last evaluation, this one included."""
        assert self.log is not None
        rate = self.log.rate_since_evaluation(self.done)
        if self.arguments.until is not None:
            left = (_next_time(self.arguments.until) - datetime.now()).total_seconds() - SPARE_SECONDS
            reachable = self.done + int(rate * max(left, 0.0)) // BATCH_TOKENS * BATCH_TOKENS
            self.shared.progress[1] = min(self.arguments.tokens, reachable)


class Log:
    """RUN/log.jsonl, the progress bar and the plot."""

    def __init__(self, out: Path, done: int) -> None:
        self.out, self.started, self.loss, self.steps = out, time.monotonic(), 0.0, 0
        self.logged, self.evaluated = (self.started, done), (self.started, done)
        self.bar = tqdm(desc="train", unit="tok", unit_scale=True, initial=done, disable=None, mininterval=1)

    def step(self, done: int, phase: Phase, loss: float, balance: float, rate: float) -> None:
        self.bar.update(done - self.bar.n)
        self.loss, self.steps = self.loss + loss, self.steps + 1
        if self.steps == LOG_STEPS:
            speed = (done - self.logged[1]) / (time.monotonic() - self.logged[0])
            mean = self.loss / self.steps
            self.bar.set_postfix(loss=f"{mean:.3f}", phase=phase.name)
            line = {"tokens": done, "phase": phase.name, "loss": round(mean, 4), "balance": round(balance, 3)}
            self._write(line | {"rate": round(rate, 6), "tokens_per_second": round(speed)})
            self.loss, self.steps, self.logged = 0.0, 0, (time.monotonic(), done)

    def rate_since_evaluation(self, done: int) -> float:
        """Tokens a second."""
        rate = (done - self.evaluated[1]) / (time.monotonic() - self.evaluated[0])
        self.evaluated = (time.monotonic(), done)
        return rate

    def evaluation(self, done: int, planned: int, report: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self.started)
        self._write({"tokens": done, "planned": planned, "seconds": seconds} | report)
        tqdm.write(f"{done / 1e6:.2f}M of {planned / 1e6:.2f}M tokens, {seconds} s: {table(report)}")
        write_plot(self.out)
        self.logged = (time.monotonic(), done)

    def _write(self, line: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _next_time(text: str) -> datetime:
    """HH:MM today, or tomorrow where that was more than half a day ago."""
    now = datetime.now()
    hour, minute = map(int, text.split(":"))
    at = now.replace(hour=hour, minute=minute, second=0)
    return at + timedelta(days=1) if now - at > timedelta(hours=12) else at
