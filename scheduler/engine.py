"""The engine process: `python -m scheduler.engine --fd N`, N being its end of the front-end's socketpair.

Three threads. The *reader* (`scheduler/reader.py`) receives, decodes and hashes prompts; what it makes waits in the
inbox. The *main* thread loads the model and then loops (`scheduler/main_loop.py`). The *writer* sends what the main
loop could not send at once, so that a slow socket never stops the model, and says once a second how long the running
step has taken.

The front-end's end of file ends the process at once, in every state: there is nobody left to work for. Signals do not:
the front-end decides, and it may still be draining.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from scheduler.block_pool import BlockPool
from scheduler.channel import ChannelClosed, ChannelError, EngineChannel, ProtocolError
from scheduler.config import BLOCK_SIZE, EngineConfig, lone_chunk, token_budget
from scheduler.main_loop import Engine
from scheduler.messages import PROTOCOL_VERSION, Configure, EngineFailed, EngineReady, Heartbeat
from scheduler.outbox import Outbox
from scheduler.process_end import EXIT_CONFIG, EXIT_FAILURE, end_process, one_line
from scheduler.reader import Reader
from scheduler.scheduler import Scheduler
from scheduler.worker import Grammars, Runner

logger = logging.getLogger("engine")

HEARTBEAT_SECONDS = 1.0

RunnerFactory = Callable[[EngineConfig], Runner]
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
        kv_cache_dtype=config.kv_cache_dtype,
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
        end_process(EXIT_FAILURE)


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
        return fail(EXIT_CONFIG, EngineFailed(kind="config", message=one_line(error)))
    except Exception as error:
        logger.exception("loading failed")
        return fail(EXIT_FAILURE, EngineFailed(kind="load", message=f"{type(error).__name__}: {one_line(error)}"))

    outbox = Outbox(channel)
    engine = Engine(scheduler, runner, grammars, reader.inbox, outbox, runner.overlaps)
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
        message = f"step {engine.step} failed: {type(error).__name__}: {one_line(error)}"
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
    end_process(exit_code)


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
        prefill_attention=runner.prefill_attention,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=token_budget(config, runner.device),
        load_seconds=load_seconds,
    )


if __name__ == "__main__":
    main()
