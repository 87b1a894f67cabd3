"""The engine process: `python -m scheduler.engine --fd N`, N being its end of the front-end's socketpair.

Three threads. The *reader* receives, decodes and hashes prompts; what it makes waits in the inbox. The *main* thread
loads the model and then loops: inbox, schedule, launch, collect, inbox again (aborts take effect before the step's
tokens do), update, outbox. It alone touches scheduler, block pool and model. The *writer* sends what the socket has no
room for, so that a slow one never stops the model, and says once a second how long the running step has taken.

Where the model runs on a device of its own, steps overlap: the next one is scheduled and launched before the tokens of
the one that runs are collected, so that the device does not wait for the host. With drafts they do not, because what
is drafted follows from known tokens.

The front-end's end of file ends the process at once, in every state: there is nobody left to work for. Signals do not:
the front-end decides, and it may still be draining.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NoReturn, Protocol

import numpy as np

from model.batch import ForwardBatch, SampledTokens, SamplingParams
from scheduler.block_pool import BlockPool
from scheduler.channel import ChannelClosed, ChannelError, EngineChannel, ProtocolError
from scheduler.config import BLOCK_SIZE, EngineConfig, lone_chunk, token_budget
from scheduler.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    Configure,
    EngineFailed,
    EngineReady,
    Finished,
    FinishReason,
    Grammar,
    Heartbeat,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
)
from scheduler.outbox import Outbox
from scheduler.request import Request
from scheduler.scheduler import Scheduler, StepResult

logger = logging.getLogger("engine")

EXIT_CONFIG = 2
EXIT_FAILURE = 70
HEARTBEAT_SECONDS = 1.0
FORGIVEN_SECONDS = 60.0
"""Running out of memory again so soon is the end: a new process begins with all of it."""

_ABORTED = Finished(reason=FinishReason.ABORT)
_DRAIN_ABORTED = Finished(
    reason=FinishReason.ABORT, code="shutting_down", message="The server shut down before the request was complete."
)
_OUT_OF_MEMORY = Finished(
    reason=FinishReason.ERROR, code="out_of_memory", message="memory ran out while the request was computed"
)
_GRAMMAR_ENDED = Finished(reason=FinishReason.STOP)
_DRAIN_REFUSED = Finished(reason=FinishReason.REJECTED, code="shutting_down", message="The server is shutting down.")


class Runner(Protocol):
    """What the engine needs of the model worker, `model.runner.ModelRunner`."""

    @property
    def model_type(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def cache_bytes_per_token(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def ops(self) -> str: ...
    @property
    def instruction_set(self) -> str | None: ...

    @property
    def overlaps(self) -> bool:
        """A step may be launched before the one before it is collected."""

    def launch(self, batch: ForwardBatch) -> Launched:
        """After a MemoryError, and `reset`, it can go on; after any other exception it is lost."""

    def reset(self) -> None:
        """Forget all rows and what was launched."""


class Launched(Protocol):
    """A step that the worker has begun, `model.launched.LaunchedStep`."""

    def collect(self) -> SampledTokens: ...


RunnerFactory = Callable[[EngineConfig], Runner]


class Grammars(Protocol):
    """What the engine needs of whatever enforces grammars: the state of each request that has one, by id."""

    def add(self, request_id: str, grammar: Grammar) -> None:
        """Compile, in the reader thread. `ValueError`, from here and below, says what is wrong with the grammar."""

    def bitmask(self, request_id: str) -> bytes:
        """Which ids may come next, packed as in `ForwardBatch.grammar_bitmasks`; eos where the text may end."""

    def accept(self, request_id: str, token_id: int) -> bool:
        """Advance by a sampled token; True where nothing more can follow."""

    def drop(self, request_id: str) -> None:
        """Forget a request. A no-op for one without a grammar."""


GrammarsFactory = Callable[[EngineConfig, Runner], Grammars]


def load_model(config: EngineConfig) -> Runner:
    """The real worker: loads the checkpoint. `ValueError` or `OSError` when the operator must change something."""
    # Imported here, so that this module and whatever wraps it with another runner load no torch.
    from model.runner import load_runner

    return load_runner(
        model_dir=Path(config.model_dir),
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or BLOCK_SIZE,
        num_blocks=config.num_blocks,
        kv_cache_memory=config.kv_cache_memory,
        num_threads=config.num_threads,
        weights_cache=None if config.weights_cache is None else Path(config.weights_cache),
    )


def load_grammars(config: EngineConfig, runner: Runner) -> Grammars:
    """The real grammars, over the checkpoint's tokenizer. Nothing is read before the first one."""
    # Imported here for the same reason as the model: only an engine with a checkpoint needs llguidance.
    from scheduler.grammar import CheckpointGrammars

    return CheckpointGrammars(Path(config.model_dir) / "tokenizer.json", runner.vocab_size, runner.eos_token_ids)


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that the reader found impossible to build."""

    request_id: str
    finished: Finished


Inbox = SimpleQueue[Request | Refused | AbortRequests | ResetPrefixCache | Shutdown]


class Reader:
    """The thread that receives. It starts before the model is loaded, to see the front-end's end even then."""

    def __init__(self, channel: EngineChannel) -> None:
        self.inbox: Inbox = SimpleQueue()
        self.exit_code = 0
        """With what to exit at the front-end's end of file."""
        self._channel = channel
        self._scheduler: Scheduler | None = None
        self._grammars: Grammars | None = None
        self._vocab_size = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def accept_requests(self, scheduler: Scheduler, grammars: Grammars, vocab_size: int) -> None:
        """Call before the front-end is told that the engine is ready; a request that comes earlier is an error."""
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._scheduler = scheduler

    def _run(self) -> None:
        try:
            while True:
                match self._channel.receive():
                    case AddRequest() as message:
                        self.inbox.put(self._build(message))
                    case AbortRequests() | ResetPrefixCache() | Shutdown() as message:
                        self.inbox.put(message)
                    case message:
                        raise ProtocolError(f"unexpected {type(message).__name__}")
        except ChannelClosed as error:
            logger.info("front-end is gone (%s): exiting", error)
            _exit(self.exit_code)
        except Exception:
            logger.exception("the reader failed: exiting")
            _exit(EXIT_FAILURE)

    def _build(self, message: AddRequest) -> Request | Refused:
        """The scheduler's request. What is wrong with one request must end that one only, never the engine."""
        if self._scheduler is None:
            raise ProtocolError("AddRequest before EngineReady")
        try:
            token_ids = np.frombuffer(message.prompt, dtype="<u4")
            if token_ids.size and (largest := int(token_ids.max())) >= self._vocab_size:
                raise ValueError(f"token id {largest} is outside the vocabulary of {self._vocab_size}")
            request = self._scheduler.make_request(message, time.monotonic())
        except ValueError as error:
            return _refused(message, "invalid_prompt", error)
        try:
            _check_ids(message.params, self._vocab_size)
        except ValueError as error:
            return _refused(message, "invalid_request", error)
        if message.grammar is not None:
            try:
                assert self._grammars is not None
                self._grammars.add(message.request_id, message.grammar)
            except ValueError as error:
                return _refused(message, "invalid_grammar", error)
        return request


def _refused(message: AddRequest, code: str, error: Exception) -> Refused:
    return Refused(message.request_id, Finished(reason=FinishReason.REJECTED, code=code, message=str(error)))


def _grammar_failed(error: Exception) -> Finished:
    return Finished(reason=FinishReason.ERROR, code="grammar_failed", message=str(error))


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    """The HTTP edge has checked them; one that slipped through must not reach a tensor's index. Raises ValueError."""
    ids = (params.stop_token_ids, params.logit_bias, params.allowed_token_ids, *params.bad_words)
    if any(not 0 <= token_id < vocab_size for group in ids for token_id in group):
        raise ValueError(f"a token id of the sampling parameters is outside the vocabulary of {vocab_size}")


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step between its launch and its update."""

    number: int
    launched: Launched
    constrained: set[str]
    """Requests that sample under a grammar in it."""


class Engine:
    """The main loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        grammars: Grammars,
        inbox: Inbox,
        outbox: Outbox,
        overlap: bool = False,
    ) -> None:
        """`overlap`: have a second step in flight while the tokens of the first are not known."""
        self.stats = scheduler.stats()
        """As of the last step or change; replaced, never written to, so that the writer can read it."""
        self.step = 0
        self.step_started: float | None = None
        """Monotonic time at which the running step began, as far as the host can tell; None between steps."""
        self.open_ids: set[str] = set()
        """Accepted requests without their terminal event."""
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = grammars
        self._inbox = inbox
        self._outbox = outbox
        self._in_flight: deque[InFlight] = deque()
        self._most_in_flight = 2 if overlap else 1
        self._refused: dict[str, Finished] = {}
        self._deadline: float | None = None
        """Monotonic time at which draining ends; None until `Shutdown`."""
        self._out_of_memory_at: float | None = None
        """Monotonic time of the last step that ran out of it."""

    def run(self) -> None:
        """Until a `Shutdown` is carried out. An exception of a step comes out as it is."""
        while True:
            self._drain_inbox(wait=not (self._scheduler.has_work or self._in_flight or self._draining))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                for request_id in self.open_ids:
                    self._scheduler.finish(request_id, _DRAIN_ABORTED)
            if self._launch():
                if len(self._in_flight) == self._most_in_flight:
                    self._collect()
            elif self._in_flight:
                self._collect()
            else:
                if self._scheduler.has_work:
                    raise RuntimeError("there are requests, but no step can be scheduled")
                self._put(StepResult(finished=self._scheduler.take_finished()), self.stats.step_seconds)
                if self._draining:
                    return

    def _launch(self) -> bool:
        """Begin the next step, if there is anything to compute."""
        now = time.monotonic()
        batch = self._scheduler.schedule(now)
        if batch is None:
            return False
        self.step = batch.step
        if self.step_started is None:
            self.step_started = now
        constrained = self._mask(batch)
        try:
            launched = self._runner.launch(batch)
        except MemoryError as error:
            self._recover(error)
        else:
            self._in_flight.append(InFlight(batch.step, launched, constrained))
        return True

    def _collect(self) -> None:
        """End the oldest step in flight."""
        self.step = self._in_flight[0].number
        sampled = self._in_flight[0].launched.collect()
        constrained = self._in_flight.popleft().constrained
        self._drain_inbox(wait=False)
        now = time.monotonic()
        result = self._scheduler.update(sampled, now)
        self._follow_grammars(constrained, result)
        assert self.step_started is not None
        now = time.monotonic()
        step_seconds = now - self.step_started
        self.step_started = now if self._in_flight else None
        self._put(result, step_seconds)

    @property
    def _draining(self) -> bool:
        return self._deadline is not None

    def _drain_inbox(self, wait: bool) -> None:
        """Apply what has arrived; `wait`: sleep until something does."""
        try:
            self._apply(self._inbox.get(block=wait))
            while True:
                self._apply(self._inbox.get_nowait())
        except Empty:
            pass

    def _apply(self, item: Request | Refused | AbortRequests | ResetPrefixCache | Shutdown) -> None:
        match item:
            case Request():
                refusal = _DRAIN_REFUSED if self._draining else self._scheduler.add(item)
                if refusal is None:
                    self.open_ids.add(item.request_id)
                else:
                    self._refused[item.request_id] = refusal
                    if item.has_grammar:  # if not, one under this id belongs to the request that has the id
                        self._grammars.drop(item.request_id)
            case Refused():
                self._refused[item.request_id] = item.finished
            case AbortRequests():
                for request_id in item.request_ids:
                    self._scheduler.finish(request_id, _ABORTED)
            case ResetPrefixCache():
                self._scheduler.reset_prefix_cache()
            case Shutdown():
                logger.info("draining %d requests for at most %.1f s", len(self.open_ids), item.drain_seconds)
                self._deadline = time.monotonic() + item.drain_seconds

    def _mask(self, batch: ForwardBatch) -> set[str]:
        """Give the rows that sample under a grammar their bitmasks; the ids of their requests."""
        constrained = set()
        for row, request_id in self._scheduler.grammar_rows:
            try:
                batch.grammar_bitmasks[row] = self._grammars.bitmask(request_id)
            except ValueError as error:
                self._scheduler.finish(request_id, _grammar_failed(error))  # what this step samples for it is dropped
            else:
                constrained.add(request_id)
        return constrained

    def _follow_grammars(self, constrained: set[str], result: StepResult) -> None:
        """Advance grammars by their new tokens; a request whose grammar is complete ends, also at its last token."""
        for request_id, token_ids in zip(result.request_ids, result.token_ids, strict=True):
            finished = result.finished.get(request_id)
            if request_id not in constrained or (finished is not None and finished.reason is not FinishReason.LENGTH):
                continue
            end = None
            try:
                if [token_id for token_id in token_ids if self._grammars.accept(request_id, token_id)]:
                    end = _GRAMMAR_ENDED
            except ValueError as error:
                end = _grammar_failed(error)
            if end is not None and finished is None:
                self._scheduler.finish(request_id, end)
                result.finished |= self._scheduler.take_finished()
            elif end is not None:
                result.finished[request_id] = end

    def _recover(self, error: MemoryError) -> None:
        """Give up the request that took too much memory and compute the others again. Raises the error the second time
        within a minute.
        """
        now = time.monotonic()
        if self._out_of_memory_at is not None and now - self._out_of_memory_at < FORGIVEN_SECONDS:
            raise error
        self._out_of_memory_at = now
        self._in_flight.clear()
        self._runner.reset()
        culprit = self._scheduler.abandon()
        logger.error("step %d ran out of memory, %s is given up: %s", self.step, culprit, _one_line(error))
        if culprit is not None:
            self._scheduler.finish(culprit, _OUT_OF_MEMORY)
        self.step_started = None
        self._put(StepResult(finished=self._scheduler.take_finished()), self.stats.step_seconds)

    def _put(self, result: StepResult, step_seconds: float) -> None:
        self.stats = self._scheduler.stats(step_seconds)
        self.open_ids.difference_update(result.finished)
        for request_id in result.finished:
            self._grammars.drop(request_id)
        if self._refused:
            result.finished |= self._refused
            self._refused = {}
        if result:
            self._outbox.put(
                StepOutput(
                    step=self.step,
                    request_ids=result.request_ids,
                    token_ids=result.token_ids,
                    finished=result.finished,
                    started=result.started,
                    logprobs=result.logprobs,
                    prompt_logprobs=result.prompt_logprobs,
                    progress=result.progress,
                    stats=self.stats,
                )
            )


def write_messages(channel: EngineChannel, outbox: Outbox, engine: Engine) -> None:
    """The writer thread: send what waits in the outbox and heartbeats, until the outbox is closed and empty."""
    next_heartbeat = time.monotonic()
    try:
        while not outbox.drained:
            output = outbox.take(timeout=max(0.0, next_heartbeat - time.monotonic()))
            channel.flush()
            if output is not None:
                channel.send(output)
            now = time.monotonic()
            if now >= next_heartbeat:
                started = engine.step_started
                step_age = 0.0 if started is None else now - started
                channel.send(Heartbeat(step=engine.step, step_age=step_age, stats=engine.stats))
                next_heartbeat = now + HEARTBEAT_SECONDS
    except ChannelClosed:
        pass  # the reader sees the same and exits
    except Exception:
        logger.exception("the writer failed: exiting")
        _exit(EXIT_FAILURE)


def run_engine(
    channel: EngineChannel, runner_factory: RunnerFactory, grammars_factory: GrammarsFactory = load_grammars
) -> int:
    """Be an engine until the front-end ends it; returns the exit code. The whole process is meant to belong to it.

    0: shut down. 2: `runner_factory` raised ValueError or OSError, which say in one line what the operator must change.
    70: a failure of our own, whose traceback is in the log.
    """
    configure = channel.receive()
    if not isinstance(configure, Configure):
        raise ProtocolError(f"the first frame is {type(configure).__name__}, not Configure")
    config = configure.config
    reader = Reader(channel)
    reader.start()

    def fail(exit_code: int, failure: EngineFailed) -> int:
        reader.exit_code = exit_code  # the front-end may hang up before we have exited
        channel.send(failure)
        return exit_code

    started = time.monotonic()
    try:
        logging.basicConfig(
            level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        if configure.protocol != PROTOCOL_VERSION:
            raise ValueError(f"the front-end speaks protocol {configure.protocol}, the engine {PROTOCOL_VERSION}")
        runner = runner_factory(config)
        scheduler = _make_scheduler(config, runner)
        grammars = grammars_factory(config, runner)
    except (ValueError, OSError) as error:
        logger.debug("loading failed", exc_info=True)
        return fail(EXIT_CONFIG, EngineFailed(kind="config", message=_one_line(error)))
    except Exception as error:
        logger.exception("loading failed")
        return fail(EXIT_FAILURE, EngineFailed(kind="load", message=f"{type(error).__name__}: {_one_line(error)}"))

    outbox = Outbox(channel)
    overlap = runner.overlaps and config.speculative == "off"
    engine = Engine(scheduler, runner, grammars, reader.inbox, outbox, overlap)
    reader.accept_requests(scheduler, grammars, runner.vocab_size)
    channel.send(_describe(config, runner, time.monotonic() - started))
    writer = threading.Thread(target=write_messages, args=(channel, outbox, engine), name="writer", daemon=True)
    writer.start()
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection between steps need look at it
    failure = None
    try:
        engine.run()
    except Exception as error:
        request_ids = scheduler.ids_in_flight
        logger.exception("step %d failed with %s", engine.step, " ".join(request_ids) or "no requests")
        message = f"step {engine.step} failed: {type(error).__name__}: {_one_line(error)}"
        failure = EngineFailed(kind="step", message=message, request_ids=request_ids)
    outbox.close()
    writer.join()
    return 0 if failure is None else fail(EXIT_FAILURE, failure)


def main(
    argv: Sequence[str] | None = None,
    *,
    runner_factory: RunnerFactory = load_model,
    grammars_factory: GrammarsFactory = load_grammars,
) -> NoReturn:
    # Supervisors signal every process of a service, terminals every process of a group. See the head of this file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # how the front-end asks what a step is doing for so long
    parser = argparse.ArgumentParser(prog="python -m scheduler.engine", description="The engine process of latentd.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket to the front-end")
    args = parser.parse_args(argv)
    sock = socket.socket(fileno=args.fd)
    sock.set_inheritable(False)  # a child of ours must not keep the channel open after we have died
    try:
        exit_code = run_engine(EngineChannel(sock), runner_factory, grammars_factory)
    except ChannelError as error:
        logger.error("no front-end: %s", error)
        exit_code = EXIT_FAILURE
    _exit(exit_code)


def _exit(exit_code: int) -> NoReturn:
    """End the process now, from any thread, without closing the channel first: its end of file means death."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _make_scheduler(config: EngineConfig, runner: Runner) -> Scheduler:
    return Scheduler(
        pool=BlockPool(runner.num_blocks),
        block_size=BLOCK_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=token_budget(config, runner.device),
        max_lone_chunk=lone_chunk(config, runner.device),
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.eos_token_ids,
        prefix_cache=config.prefix_cache,
        fingerprint=runner.fingerprint,
        speculative=config.speculative == "ngram",
    )


def _describe(config: EngineConfig, runner: Runner, load_seconds: float) -> EngineReady:
    return EngineReady(
        model_type=runner.model_type,
        fingerprint=runner.fingerprint,
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        eos_token_ids=list(runner.eos_token_ids),
        num_blocks=runner.num_blocks,
        block_size=BLOCK_SIZE,
        cache_bytes_per_token=runner.cache_bytes_per_token,
        weight_bytes=runner.weight_bytes,
        device=runner.device,
        dtype=runner.dtype,
        quantization=runner.quantization,
        ops=runner.ops,
        instruction_set=runner.instruction_set,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=token_budget(config, runner.device),
        load_seconds=load_seconds,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
