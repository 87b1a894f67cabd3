"""Groups of `benchmarks.gpu_suite` above the network: sampling, the engine's loop, HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import warnings
from array import array
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks.gpu_rig import Suite, clocked, daemon_ops, new_cache, random_model
from benchmarks.make_checkpoint import SHAPES, make
from benchmarks.peers.load import HOST, MODEL_NAME, Prompts, measure
from benchmarks.peers.scenarios import Scenario
from benchmarks.real_size import wait_ready
from model.batch import SamplingParams
from model.latent_cache import BLOCK_SIZE
from model.ops.cuda.ops import CudaOps
from model.rows import Rows
from model.runner import ModelRunner
from model.sampler import SamplingInputs
from scheduler.block_pool import BlockPool
from scheduler.channel import EngineChannel
from scheduler.main_loop import Engine
from scheduler.messages import AddRequest, Shutdown
from scheduler.outbox import Outbox
from scheduler.reader import Inbox
from scheduler.scheduler import Scheduler
from scheduler.worker import Grammars
from server.settings import BUILTIN_MODEL


def sampling(suite: Suite) -> bool:
    """Logits to tokens, uploads of the parameters included; beside it what one reading of the logits takes."""
    vocab_size, limits = suite.config.vocab_size, suite.limits()
    kinds: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "temperature": {},
        "top_p": {"top_p": 0.95},
        "top_k, top_p, penalties": {"top_k": 50, "top_p": 0.95, "frequency": 0.5},
    }
    for rows in (2,) if suite.toy else (1, 32, 256):
        logits = torch.randn((rows, vocab_size), device=suite.device) * 3
        for kind, values in kinds.items():
            column = partial(np.full, rows)
            inputs = SamplingInputs(
                temperature=column(values.get("temperature", 0.8)),
                top_k=column(int(values.get("top_k", 0))),
                top_p=column(values.get("top_p", 1.0)),
                min_p=column(0.0),
                seed=np.arange(rows, dtype=np.uint64),
                position=column(9),
                repetition=column(1.0),
                presence=column(0.0),
                frequency=column(values.get("frequency", 0.0)),
                row=np.arange(rows),
                num_prompt_tokens=column(5),
                history=torch.ones((rows, 16), dtype=torch.int32, device=suite.device),
                limits=[],
            )
            ops = CudaOps()
            ops.sample(logits, inputs)
            seconds = clocked(partial(ops.sample, logits, inputs), 1 if suite.toy else 20)
            reading = limits.seconds(4 * rows * vocab_size, 0)
            suite.report("sampling", f"{kind}, {rows} rows", us=seconds * 1e6, **{"one reading, us": reading * 1e6})
    return True


def engine(suite: Suite) -> bool:
    """Requests through scheduler and worker, one step at a time and overlapped, with latents in 8 bits and with
    quantised weights.

    `waits`: how often the host waited for the GPU where nobody asked it to; there should be none.
    """
    number, prompt, output = (3, 9, 4) if suite.toy else (256, 512, 128)
    runs = (("none", False, (False, True)), ("none", True, (True,)), ("int8", False, (True,)), ("int4", False, (True,)))
    for quantization, fp8, overlaps in runs:
        runner = _random_runner(suite, quantization, fp8, number, prompt + output)
        _serve(suite, runner, 1, prompt, 2, overlap=False)  # compiles and captures
        texts = []
        for overlap in overlaps:
            seconds, steps, tokens, waits = _serve(suite, runner, number, prompt, output, overlap)
            texts.append(tokens)
            suite.report(
                "engine",
                f"weights {quantization}{', latents fp8' if fp8 else ''}, {'overlapped' if overlap else 'one by one'}",
                **{"tok/s": number * output / seconds, "ms a step": seconds / steps * 1e3},
                waits=waits,
            )
        if len(texts) == 2:
            same = sum(texts[0][key] == texts[1][key] for key in texts[0])
            suite.report("engine", "the same text", requests=number, same=same)
            if suite.toy and same < number:
                return False
        del runner
    return True


def _random_runner(suite: Suite, quantization: str, fp8: bool, rows: int, length: int) -> ModelRunner:
    network = random_model(suite, daemon_ops(suite, quantization), suite.dtype)
    cache = new_cache(suite, rows * -(-length // BLOCK_SIZE) + 1, suite.config.num_hidden_layers, fp8=fp8)
    checkpoint = cast("Any", SimpleNamespace(fingerprint="random weights"))
    return ModelRunner(network, cache, Rows(rows, length, device=suite.device), checkpoint, length, 0)


def _serve(
    suite: Suite, runner: ModelRunner, number: int, prompt: int, output: int, overlap: bool
) -> tuple[float, int, dict[str, list[int]], int]:
    """Seconds, steps, tokens by request and unasked waits."""
    scheduler = Scheduler(
        pool=BlockPool(runner.num_blocks),
        block_size=BLOCK_SIZE,
        max_num_seqs=number,
        max_num_batched_tokens=4096,
        max_model_len=runner.max_model_len,
        eos_token_ids=(),
        prefix_cache=False,
        fingerprint=runner.fingerprint,
    )
    inbox, rng = Inbox(), np.random.default_rng(1)
    with socket.socket() as nowhere:  # nothing is sent, since there is no writer
        outbox = Outbox(EngineChannel(nowhere))
    for i in range(number):
        params = SamplingParams(max_tokens=output, seed=i, temperature=(0.0, 0.8)[i % 2], top_p=0.95, ignore_eos=True)
        tokens = array("I", rng.integers(suite.config.vocab_size, size=prompt).tolist()).tobytes()
        inbox.put(scheduler.make_request(AddRequest(request_id=str(i), prompt=tokens, params=params)))
    inbox.put(Shutdown(3600.0))
    runner.reset()
    grammars = cast("Grammars", SimpleNamespace(drop=lambda _: None))
    with warnings.catch_warnings(record=True) as caught:
        if suite.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        began = time.perf_counter()
        Engine(scheduler, runner, grammars, inbox, outbox, overlap).run()
        seconds = time.perf_counter() - began
        if suite.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    said = outbox.take(0)
    assert said is not None
    waits = sum("synchronizing" in str(warning.message) for warning in caught)
    return seconds, scheduler.stats().num_steps, dict(zip(said.request_ids, said.token_ids, strict=True)), waits


def http(suite: Suite) -> bool:
    """The daemon on a checkpoint of V2-Lite's layers, fewer of them, so that writing it takes seconds."""
    checkpoint = BUILTIN_MODEL
    options = ["--device", "cpu", "--num-blocks", "64"]
    if not suite.toy:
        checkpoint, options = suite.out / "checkpoint", ["--device", "cuda", "--max-num-seqs", "256"]
        if make(checkpoint, SHAPES["small"]) != 0:
            suite.report("http", "not run", reason="the disk has no room for the checkpoint")
            return False
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", str(checkpoint), "--port", str(port)]
    with subprocess.Popen([*command, "--served-model-name", MODEL_NAME, *options]) as daemon:
        try:
            wait_ready(daemon, port)
            prompts = Prompts(checkpoint, seed=1)
            for clients in (2,) if suite.toy else (1, 32, 256):
                scenario = Scenario(clients, 8, 4) if suite.toy else Scenario(clients, 512, 128)
                run = measure(port, scenario, prompts, plain=False)
                suite.report(
                    "http",
                    f"{clients} streams",
                    **{"tok/s": run.output_tok_s, "first token, ms": run.ttft_s * 1e3, "then, ms": run.tpot_s * 1e3},
                )
        finally:
            daemon.terminate()
    return True
