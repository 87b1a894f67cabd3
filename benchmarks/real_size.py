"""A model of real size on this machine: `python -m benchmarks.real_size CHECKPOINT [options of latentd serve ...]`.

Starts the daemon on a checkpoint (`benchmarks.make_checkpoint` writes one of DeepSeek-V2-Lite's shape) and prints how
long that took, what is resident, and tokens a second at 1, 4 and 16 streams beside the machine's limits. With
`--context TOKENS` a prompt of that length follows, in two requests: the second one continues the first, whose tokens
are in the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.cpu_kernels import measure_limits
from benchmarks.peers.limits import limit
from benchmarks.peers.load import HOST, MODEL_NAME, Prompts, measure
from benchmarks.peers.scenarios import Scenario
from model.config import load_config

PRECISIONS = {"none": "bf16", "int8": "8-bit", "int4": "4-bit"}
ANSWER_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantization", choices=PRECISIONS, default="int4")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer, behind 128 of prompt")
    parser.add_argument("--context", type=int, metavar="TOKENS")
    args, options = parser.parse_known_args()
    config, precision = load_config(args.checkpoint), PRECISIONS[args.quantization]
    machine = measure_limits(2)
    print(f"memory {machine.read / 1e9:.1f} GB/s, bf16 {machine.bf16 / 1e9:.0f}, int8 {machine.int8 / 1e9:.0f} GFLOP/s")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", str(args.checkpoint), "--port", str(port)]
    command += ["--served-model-name", MODEL_NAME, "--quantization", args.quantization, *options]
    started = time.monotonic()
    with subprocess.Popen(command) as daemon:
        try:
            wait_ready(daemon, port)
            print(f"ready after {time.monotonic() - started:.1f} s; {resident(daemon.pid)}", flush=True)
            prompts = Prompts(args.checkpoint, seed=1)
            for streams in args.streams:
                scenario = Scenario(streams, 128, args.output)
                run = measure(port, scenario, prompts, plain=False)
                step = limit(machine, config, precision, scenario, "tpot_s")
                print(
                    f"{streams:2} streams: {run.output_tok_s:.1f} tokens/s, first token {run.ttft_s:.2f} s, then one "
                    f"every {1e3 * run.tpot_s:.1f} ms (the machine's limit is {1e3 * step:.1f} ms: "
                    f"{step / run.tpot_s:.0%})",
                    flush=True,
                )
            if args.context:
                long_context(port, prompts.draw(args.context - ANSWER_TOKENS), args.context)
            print(resident(daemon.pid))
        finally:
            daemon.terminate()


def long_context(port: int, prompt: str, context: int) -> None:
    text = prompt[: len(prompt) // 2]
    for part in (text[: text.rindex(" ")], prompt):
        began = time.monotonic()
        answer = ask(port, "/v1/completions", prompt=part, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
        usage, timings = answer["usage"], answer["timings"]
        print(
            f"{usage['prompt_tokens']:,} tokens of prompt, {usage['prompt_tokens_details']['cached_tokens']:,} of them "
            f"cached: {time.monotonic() - began:.1f} s, {timings}",
            flush=True,
        )


def ask(port: int, path: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def wait_ready(daemon: subprocess.Popen[bytes], port: int) -> None:
    while daemon.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/ready", timeout=10):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the daemon ended")


def resident(pid: int) -> str:
    """Of the front-end and of its engine."""
    [engine, *_] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    figures = []
    for name, process in (("front-end", str(pid)), ("engine", engine)):
        status = Path(f"/proc/{process}/status").read_text()
        now, peak = (int(re.findall(rf"{key}:\s+(\d+)", status)[0]) / 1024 for key in ("VmRSS", "VmHWM"))
        figures.append(f"{name} {now:,.0f} MiB resident, {peak:,.0f} at the peak")
    return ", ".join(figures)


if __name__ == "__main__":
    main()
