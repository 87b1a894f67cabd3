"""The CUDA worker on one GPU, in one command of 26 minutes at most: `python -m benchmarks.gpu_suite --out FOLDER`.

Groups run in this order, each in a process of its own and for so many seconds at most; a crash takes only its group
along, and what a group has found is written at once (FOLDER/results.jsonl).

- facts: the card, its copy bandwidth, its products in bfloat16 and what a node of a CUDA graph costs;
- tests: the kernels' tests on this card (needs pytest);
- model: four layers against plain torch in float32, with latents in 8 bits too, replayed against launched, and a row
  alone against the same row among others;
- kernels: each kernel alone, on memory that no cache holds, beside the card's limits, decoding attention with latents
  in 8 bits too; attention of long prompts with and without cuDNN, and who is faster where;
- step: the whole network, decoding steps and prompts, beside the roofline of the measured limits, with latents in 8
  bits too;
- sampling: logits to tokens;
- engine: requests through scheduler and worker, one step at a time and overlapped, with latents in 8 bits and with
  quantised weights;
- http: the daemon on a small checkpoint;
- peers: decoding attention and experts of FlashMLA, FlashInfer, torch and vLLM beside ours, those that are installed;
- transformers: its `generate` on the same shape, where it is installed;
- tiles: a sweep over the experts' tiles; OUT/tiles.json can take the place of `model/ops/cuda/tiles.json`.

Weights are random and made on the card, so routing is nearly uniform: real models touch fewer experts. `--toy` runs
the same code on a CPU under Triton's interpreter, at sizes of no interest: what it times means nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_kernels, gpu_network, gpu_peers, gpu_serving
from benchmarks.gpu_rig import TOY, Suite, read_config
from benchmarks.make_checkpoint import SHAPES

SECONDS = {"facts": 60, "tests": 150, "model": 80, "kernels": 150, "step": 220, "sampling": 40, "engine": 180}
SECONDS |= {"http": 120, "peers": 300, "transformers": 120, "tiles": 120}
GROUPS: dict[str, Callable[[Suite], bool]] = {
    "facts": gpu_kernels.facts,
    "tests": gpu_kernels.tests,
    "model": gpu_network.model,
    "kernels": gpu_kernels.kernels,
    "step": gpu_network.step,
    "sampling": gpu_serving.sampling,
    "engine": gpu_serving.engine,
    "http": gpu_serving.http,
    "peers": gpu_peers.peers,
    "transformers": gpu_peers.transformers,
    "tiles": gpu_kernels.tiles,
}


def run_group(name: str, out: Path, shape: str, toy: bool) -> int:
    values = SHAPES[shape] | (TOY if toy else {})
    if name == "model" and not toy:
        values = values | {"num_hidden_layers": 4}
    device, dtype = (torch.device("cpu"), torch.float32) if toy else (torch.device("cuda"), torch.bfloat16)
    (out / "config.json").write_text(json.dumps(values))
    logging.basicConfig(format="%(message)s", level=logging.INFO)  # who computes the attention of prompts, and why
    with torch.inference_mode():
        return 0 if GROUPS[name](Suite(read_config(values), device, dtype, out, toy)) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="lite")
    parser.add_argument("--toy", action="store_true", help="on a CPU, tiny, under the interpreter")
    parser.add_argument("--groups", default=",".join(GROUPS), help="in this order; all but facts need its results")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.group:
        return run_group(args.group, args.out, args.shape, args.toy)
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if args.toy else {})
    failed = []
    for name in args.groups.split(","):
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(args.out), "--shape", args.shape]
        command += ["--group", name, *(["--toy"] if args.toy else [])]
        try:
            code = subprocess.run(command, env=environment, timeout=SECONDS[name]).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {SECONDS[name]} s", flush=True)
            continue
        if code != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
