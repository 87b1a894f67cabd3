"""Groups of `benchmarks.gpu_suite` above the kernels: sampling, the engine's loop, HTTP, transformers, and a sweep."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import warnings
from array import array
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from benchmarks.make_checkpoint import SHAPES, make
from benchmarks.peers.load import HOST, MODEL_NAME, Prompts, measure
from benchmarks.peers.scenarios import Scenario
from benchmarks.real_size import wait_ready
from model.batch import SamplingParams
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.moe import Tile, moe
from model.ops.cuda.ops import CudaOps
from model.ops.interface import Mlp, Routing
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

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite


def clocked(call: Callable[[], object], times: int) -> float:
    """Seconds of one of so many calls, the GPU's work included."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


CANDIDATES = {
    "bfloat16": [
        Tile(pairs, columns, inner, warps, stages)
        for pairs in (16, 32, 64, 128)
        for columns, inner, warps, stages in (
            (32, 256, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 3),
        )
    ],
    "quantized": [
        Tile(pairs, columns, 64, warps, stages)
        for pairs in (16, 32, 64)
        for columns in (32, 64, 128)
        for warps, stages in ((4, 4), (4, 8), (8, 4))
    ],
}  # fmt: skip


def tiles(suite: Suite) -> bool:
    """The fastest tile of each size of step, in the form of `model/ops/cuda/tiles.json`.

    A candidate that a card has too little shared memory for is passed over.
    """
    config = suite.config
    hidden, width = config.hidden_size, config.moe_intermediate_size or 0
    table: dict[str, list[list[int]]] = {}
    for kind, quantization in (("bfloat16", "none"), ("quantized", "int4")):
        ops = CudaOps(quantization)
        one = Mlp(*(suite.randn(*shape, scale=0.02) for shape in ((width, hidden), (width, hidden), (hidden, width))))
        routed = ops.pack_experts(config.n_routed_experts or 0, (one for _ in range(config.n_routed_experts or 0)))
        table[kind] = []
        for tokens in (3,) if suite.toy else (32, 96, 512, 4096):
            x = suite.randn(tokens, hidden)
            chosen = torch.rand(tokens, config.n_routed_experts or 0, device=suite.device)
            routing = Routing(
                chosen.topk(config.num_experts_per_tok or 0).indices.int(),
                torch.ones(tokens, config.num_experts_per_tok or 0, device=suite.device),
            )
            best: tuple[float, Tile] | None = None
            for tile in CANDIDATES[kind][:2] if suite.toy else CANDIDATES[kind]:
                try:
                    seconds = suite.seconds([partial(moe, x, routing, routed, None, x, tile)] * 3, rounds=3)
                except Exception as error:  # triton's OutOfResources, which has no public home
                    if type(error).__name__ != "OutOfResources":
                        raise
                    continue
                if best is None or seconds < best[0]:
                    best = seconds, tile
            assert best is not None
            table[kind].append([tokens, *best[1]])
            suite.report("tiles", f"{kind}, {tokens} tokens", us=best[0] * 1e6, tile=list(best[1]))
        table[kind][-1][0] = 10**9
    (suite.out / "tiles.json").write_text(json.dumps(table, indent=2))
    return True


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
    """Requests through scheduler and worker, one step at a time and overlapped, and with quantised weights.

    `waits`: how often the host waited for the GPU where nobody asked it to; there should be none.
    """
    number, prompt, output = (3, 9, 4) if suite.toy else (256, 512, 128)
    for quantization, overlaps in (("none", (False, True)), ("int8", (True,)), ("int4", (True,))):
        runner = _random_runner(suite, quantization, number, prompt + output)
        _serve(suite, runner, 1, prompt, 2, overlap=False)  # compiles and captures
        texts = []
        for overlap in overlaps:
            seconds, steps, tokens, waits = _serve(suite, runner, number, prompt, output, overlap)
            texts.append(tokens)
            suite.report(
                "engine",
                f"weights {quantization}, {'overlapped' if overlap else 'one by one'}",
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


def _random_runner(suite: Suite, quantization: str, rows: int, length: int) -> ModelRunner:
    from benchmarks.gpu_suite import RandomWeights
    from model.deepseek import DeepseekForCausalLM

    config = suite.config
    network = DeepseekForCausalLM(config, CudaOps(quantization), RandomWeights(suite, suite.dtype))
    blocks = rows * -(-length // BLOCK_SIZE) + 1
    cache = LatentCache(blocks, config.num_hidden_layers, config.latent_dim, suite.dtype, suite.device)
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


def transformers(suite: Suite) -> bool:
    """`generate` of transformers on a network of the same shape, beside the figures of `step` and `engine`."""
    if find_spec("transformers") is None:
        suite.report("transformers", "not run", reason="transformers is not installed")
        return True
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads((Path(suite.out) / "config.json").read_text())
    config = AutoConfig.for_model(**values)
    with torch.device(suite.device):
        peer = AutoModelForCausalLM.from_config(config, dtype=suite.dtype).eval()  # type: ignore[no-untyped-call]
    prompt, output = (5, 3) if suite.toy else (512, 32)
    for rows in (2,) if suite.toy else (1, 32, 256):
        tokens = torch.randint(suite.config.vocab_size, (rows, prompt), device=suite.device)
        peer.generate(tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False)  # loads what it needs
        times = []
        for length in (1, 1 + output):
            began = time.perf_counter()
            peer.generate(tokens, max_new_tokens=length, min_new_tokens=length, do_sample=False)
            times.append(time.perf_counter() - began)
        seconds = (times[1] - times[0]) / output
        suite.report("transformers", f"{rows} x {prompt}", **{"ms a step": seconds * 1e3, "tok/s": rows / seconds})
    return True
