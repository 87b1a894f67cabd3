"""The CUDA worker on one GPU, in one command of 16 minutes at most: `python -m benchmarks.gpu_suite --out FOLDER`.

Groups run in this order, each in a process of its own and for so many seconds at most; a crash takes only its group
along, and what a group has found is written at once (FOLDER/results.jsonl).

- facts: the card, its copy bandwidth, its products in bfloat16 and what a node of a CUDA graph costs;
- tests: the kernels' tests on this card (needs pytest);
- model: four layers against plain torch in float32, replayed against launched, and a row alone against the same row
  among others;
- kernels: each kernel alone, on memory that no cache holds, beside the card's limits;
- step: the whole network, decoding steps and prompts, beside the roofline of the measured limits;
- sampling: logits to tokens;
- engine: requests through scheduler and worker, one step at a time and overlapped, and with quantised weights;
- http: the daemon on a small checkpoint;
- transformers: its `generate` on the same shape, where it is installed;
- tiles: a sweep over the experts' tiles; OUT/tiles.json can take the place of `model/ops/cuda/tiles.json`.

Weights are random and made on the card, so routing is nearly uniform: real models touch fewer experts. `--toy` runs
the same code on a CPU under Triton's interpreter, at sizes of no interest: what it times means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks import gpu_serving
from benchmarks.gpu_serving import clocked
from benchmarks.make_checkpoint import SHAPES, Noise
from model.config import DeepseekConfig, expected_tensors, load_config
from model.deepseek import DeepseekForCausalLM
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.attention import plan_attention
from model.ops.cuda.moe import moe
from model.ops.cuda.norm import rms_norm
from model.ops.cuda.ops import CudaOps
from model.ops.cuda.router import router
from model.ops.eager.ops import EagerOps
from model.ops.interface import LinearWeight, Network, Ops, SwigluWeights

SECONDS = {"facts": 60, "tests": 150, "model": 60, "kernels": 120, "step": 180}
SECONDS |= {"sampling": 40, "engine": 150, "http": 120, "transformers": 120, "tiles": 120}
L2_BYTES = 256 << 20
"""Every kernel is timed on more memory than this, in turn."""
TOY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


class Limits(NamedTuple):
    bytes: float
    """A second, as a copy reads and writes them."""
    operations: float
    """A second, of a large product in the run dtype."""

    def seconds(self, size: float, operations: float) -> float:
        return max(size / self.bytes, operations / self.operations)


@dataclass(frozen=True)
class Suite:
    config: DeepseekConfig
    device: torch.device
    dtype: torch.dtype
    out: Path
    toy: bool

    def report(self, group: str, case: str, **figures: Any) -> None:
        line = {"group": group, "case": case} | figures
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = [
            f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        print(f"{group:8} {case:34} {', '.join(shown)}", flush=True)

    def limits(self) -> Limits:
        """What `facts` measured."""
        lines = [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]
        found = {line["case"]: line for line in lines if line["group"] == "facts"}
        return Limits(found["copy"]["GB/s"] * 1e9, found["product"]["TFLOP/s"] * 1e12)

    def seconds(self, calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
        """Of one call, median: as a CUDA graph of all of them replays on a GPU, called one by one elsewhere."""
        for call in calls[:2]:
            call()
        if self.device.type != "cuda":
            return clocked(calls[0], 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return statistics.median(clocked(graph.replay, 1) for _ in range(rounds)) / len(calls)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, scale)


class RandomWeights:
    """`model.deepseek.Weights` made where they are used; equal for equal seeds, whatever the dtype."""

    def __init__(self, suite: Suite, dtype: torch.dtype, seed: int = 0) -> None:
        self._suite, self._dtype = suite, dtype
        self._shapes, self._noise = expected_tensors(suite.config), Noise(suite.config)
        self._generator = torch.Generator(suite.device).manual_seed(seed)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=self._suite.dtype, device=self._suite.device)
        tensor.normal_(0, 1, generator=self._generator)
        tensor = 1 + 0.1 * tensor if len(shape) == 1 else tensor.mul_(self._noise.deviation(name, shape))
        return tensor.to(dtype or self._dtype)

    def packed(self, name: str, pack: Callable[[], Sequence[LinearWeight]]) -> Sequence[LinearWeight]:
        return pack()


def network(suite: Suite, ops: Ops, dtype: torch.dtype) -> Network:
    return DeepseekForCausalLM(suite.config, ops, RandomWeights(suite, dtype)).compute


def step_inputs(suite: Suite, queries: int, contexts: Sequence[int], num_blocks: int) -> StepInputs:
    """Rows of so many new tokens each, at the ends of their contexts, in blocks of no order."""
    counts = [-(-context // BLOCK_SIZE) for context in contexts]
    assert sum(counts) <= num_blocks
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))[: sum(counts)]
    tables = torch.zeros((len(contexts), max(counts)), dtype=torch.int32)
    for table, of_row in zip(tables, torch.split(blocks, counts), strict=True):
        table[: len(of_row)] = of_row
    positions = torch.cat([torch.arange(context - queries, context) for context in contexts])
    row = torch.arange(len(contexts)).repeat_interleave(queries)
    slots = tables[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    token_ids = torch.randint(suite.config.vocab_size, (len(row),), generator=torch.Generator().manual_seed(2))
    return StepInputs(
        token_ids=token_ids.to(suite.device),
        positions=positions.to(suite.device),
        slot_mapping=slots.to(suite.device),
        query_start=list(range(0, len(row) + 1, queries)),
        context_lens=list(contexts),
        block_tables=tables.to(suite.device),
        sample_index=(torch.arange(1, len(contexts) + 1) * queries - 1).to(suite.device),
    )


def new_cache(
    suite: Suite, num_blocks: int, layers: int, dtype: torch.dtype | None = None, fp8: bool = False
) -> LatentCache:
    rank = suite.config.kv_lora_rank
    shape = (num_blocks, layers, suite.config.latent_dim)
    cache = LatentCache(*shape, dtype or suite.dtype, suite.device, fp8_latents=rank if fp8 else 0)
    generator = torch.Generator(suite.device).manual_seed(3)
    if not fp8:
        cache.data.normal_(generator=generator)
        return cache
    for layer in range(layers):
        latents, scales, keys = cache.planes(layer, rank)
        assert scales is not None
        latents.random_(0, 0x78, generator=generator)  # up to 256
        scales.fill_(2.0**-7)
        keys.normal_(generator=generator)
    return cache


# --- groups --------------------------------------------------------------------------------------------------------


def facts(suite: Suite) -> bool:
    card = torch.cuda.get_device_name() if suite.device.type == "cuda" else "the interpreter, on a CPU"
    suite.report("facts", "versions", torch=torch.__version__, triton=triton.__version__, card=card)
    size = 1 << (20 if suite.toy else 32)
    source = torch.empty(size, dtype=torch.uint8, device=suite.device).fill_(1)
    target = torch.empty_like(source)
    suite.report("facts", "copy", **{"GB/s": 2 * size / suite.seconds([partial(target.copy_, source)]) / 1e9})
    del source, target
    width = 64 if suite.toy else 8192
    a, b = suite.randn(width, width), suite.randn(width, width)
    suite.report("facts", "product", **{"TFLOP/s": 2 * width**3 / suite.seconds([lambda: a @ b] * 4) / 1e12})
    one = torch.zeros(1, device=suite.device)
    suite.report("facts", "node of a graph", us=suite.seconds([lambda: one.add_(1)] * (4 if suite.toy else 1000)) * 1e6)
    return True


def tests(suite: Suite) -> bool:
    if suite.toy:  # they are where the toy runs
        return True
    if find_spec("pytest") is None:
        suite.report("tests", "not run", reason="pytest is not installed")
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/ops/cuda"]
    result = subprocess.run(command, capture_output=True, text=True)
    (suite.out / "tests.log").write_text(result.stdout + result.stderr)
    suite.report("tests", "tests/model/ops/cuda", outcome=result.stdout.strip().rpartition("\n")[2])
    return result.returncode == 0


def model(suite: Suite) -> bool:
    """bfloat16 costs about 1 % of the logits, and more where it makes a router choose another expert."""
    rows = 2 if suite.toy else 8
    blocks = rows * 8 + 8
    cache, ops = new_cache(suite, blocks, suite.config.num_hidden_layers), CudaOps()
    exact_cache = new_cache(suite, blocks, suite.config.num_hidden_layers, torch.float32)
    exact_cache.data.copy_(cache.data)
    compute = network(suite, ops, suite.dtype)
    exact = network(suite, EagerOps(), torch.float32)
    good = True
    bound = 0.05 if suite.dtype is torch.bfloat16 else 1e-4
    cases = {"decode": 1, "absorbed chunk": 3} if suite.toy else {"decode": 1, "absorbed chunk": 64, "expanded": 200}
    for name, queries in cases.items():
        inputs = step_inputs(suite, queries, [queries + 5 + 30 * row for row in range(rows)], blocks)
        found, wanted = compute(inputs, cache)[1], exact(inputs, exact_cache)[1]
        error = float((found - wanted).norm() / wanted.norm())
        same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
        suite.report("model", f"{name} against float32", relative_error=error, same_first=same)
        good &= error < bound
    inputs = step_inputs(suite, 1, [70 + 30 * row for row in range(rows)], blocks)
    launched = compute(inputs, cache)[1]
    replayed = ops.recorded(compute, suite.config)
    replayed(inputs, cache)
    again = replayed(inputs, cache)[1]
    error = float((again - launched).norm() / launched.norm())
    alone = _row(inputs, 1)
    equal = bool((compute(alone, cache)[1][0] == launched[1]).all())
    suite.report("model", "replayed against launched", relative_error=error)
    suite.report("model", "a row alone and among others", bit_equal=equal)
    return good and error < bound


def _row(inputs: StepInputs, row: int) -> StepInputs:
    one = slice(row, row + 1)
    context = inputs.context_lens[one]
    return StepInputs(
        inputs.token_ids[one], inputs.positions[one], inputs.slot_mapping[one], [0, 1], context,
        inputs.block_tables[one], inputs.sample_index[:1] * 0,
    )  # fmt: skip


def kernels(suite: Suite) -> bool:
    limits, config = suite.limits(), suite.config
    heads, rank, width = config.num_attention_heads, config.kv_lora_rank, config.latent_dim
    shapes = [(1, 1024), (1, 131072), (16, 1024), (32, 8192), (128, 1024), (128, 4096), (256, 4096)]
    for (rows, context), fp8 in product([(1, 64), (2, 70)] if suite.toy else shapes, (False, True)):
        size = rows * context * config.cache_bytes_per_token(suite.dtype.itemsize, fp8) // config.num_hidden_layers
        layers = 1 if suite.toy else max(2, L2_BYTES // size)
        blocks = rows * -(-context // BLOCK_SIZE)
        cache = new_cache(suite, blocks, layers, fp8=fp8)
        attend = plan_attention(step_inputs(suite, 1, [context] * rows, blocks), cache, config)
        q = suite.randn(rows, heads, config.qk_head_dim)
        q_nope, q_rope = torch.split(q, [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=2)
        packed = CudaOps().pack_latent(
            suite.randn(heads, config.qk_nope_head_dim, rank), suite.randn(heads, config.v_head_dim, rank)
        )
        calls = [partial(attend, layer, q_nope, q_rope, packed) for layer in range(min(layers, 20))]
        seconds = suite.seconds(calls)
        limit = limits.seconds(size, 2 * rows * context * heads * (width + rank))
        name = f"attention {rows} x {context}{' in fp8' if fp8 else ''}"
        suite.report("kernels", name, us=seconds * 1e6, share=limit / seconds)
        del cache, attend
    experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    number = config.n_shared_experts
    weight = partial(suite.randn, scale=0.02)
    routed = SwigluWeights(weight(experts, 2 * inner, hidden), weight(experts, hidden, inner))
    shared = SwigluWeights(weight(2 * number * inner, hidden), weight(hidden, number * inner))
    gate = torch.randn(experts, hidden, device=suite.device)
    for tokens in (1, 3) if suite.toy else (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192):
        x = suite.randn(tokens, hidden)
        routing = router(x, gate, None, config)
        touched = len(set(routing.experts.flatten().tolist())) + number
        operations = 2 * tokens * (config.num_experts_per_tok + number) * 3 * inner * hidden
        limit = limits.seconds(touched * 3 * inner * hidden * suite.dtype.itemsize, operations)
        seconds = suite.seconds([partial(moe, x, routing, routed, shared, x)] * 5)
        suite.report("kernels", f"experts, {tokens} tokens", us=seconds * 1e6, touched=touched, share=limit / seconds)
        for name, call in (
            ("norm", partial(rms_norm, x, x[0], 1e-6)),
            ("router", partial(router, x, gate, None, config)),
        ):
            suite.report("kernels", f"{name}, {tokens} tokens", us=suite.seconds([call] * 20) * 1e6)
    return True


def roofline(config: DeepseekConfig, limits: Limits, rows: int, context: int, itemsize: int) -> float:
    """Seconds of a decoding step: of each part, what takes longer, reading its bytes once or its operations."""
    shapes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    touched = experts * (1 - (1 - chosen / experts) ** rows)
    dense = sum(n for name, n in shapes.items() if ".experts." not in name and "embed_tokens" not in name)
    keys = config.num_hidden_layers * rows * context
    parts = (
        (dense * itemsize, 2 * dense * rows),
        (moe_layers * touched * expert * itemsize, 2 * rows * moe_layers * chosen * expert),
        (
            keys * config.latent_dim * itemsize,
            2 * keys * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank),
        ),
    )
    return sum(limits.seconds(*part) for part in parts)


def step(suite: Suite) -> bool:
    config, limits = suite.config, suite.limits()
    ops = CudaOps()
    compute = network(suite, ops, suite.dtype)
    shapes = [(rows, 1024) for rows in (1, 8, 32, 64, 128, 256, 512)]
    shapes += [(1, 32768), (8, 8192), (32, 8192), (64, 8192), (128, 4096)]
    shapes = [(1, 64), (3, 66)] if suite.toy else shapes
    blocks = max(rows * -(-context // BLOCK_SIZE) for rows, context in shapes)
    cache = new_cache(suite, blocks, config.num_hidden_layers)
    replayed = ops.recorded(compute, config)
    for rows, context in shapes:
        inputs = step_inputs(suite, 1, [context] * rows, blocks)
        replayed(inputs, cache)
        seconds = clocked(partial(replayed, inputs, cache), 1 if suite.toy else 20)
        limit = roofline(config, limits, rows, context, suite.dtype.itemsize)
        suite.report(
            "step", f"decode {rows} x {context}", ms=seconds * 1e3, **{"tok/s": rows / seconds}, share=limit / seconds
        )
    for tokens in (5,) if suite.toy else (512, 2048, 8192, 32768):
        inputs = step_inputs(suite, tokens, [tokens], blocks)
        compute(inputs, cache)
        seconds = clocked(partial(compute, inputs, cache), 1 if suite.toy else 3)
        suite.report("step", f"prompt of {tokens}", ms=seconds * 1e3, **{"tok/s": tokens / seconds})
    return True


GROUPS: dict[str, Callable[[Suite], bool]] = {
    "facts": facts,
    "tests": tests,
    "model": model,
    "kernels": kernels,
    "step": step,
    "sampling": gpu_serving.sampling,
    "engine": gpu_serving.engine,
    "http": gpu_serving.http,
    "transformers": gpu_serving.transformers,
    "tiles": gpu_serving.tiles,
}


def read_config(values: dict[str, Any]) -> DeepseekConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values | {"bos_token_id": 0, "eos_token_id": 1}))
        return load_config(Path(folder))


def run_group(name: str, out: Path, shape: str, toy: bool) -> int:
    values = SHAPES[shape] | (TOY if toy else {})
    if name == "model" and not toy:
        values = values | {"num_hidden_layers": 4}
    device, dtype = (torch.device("cpu"), torch.float32) if toy else (torch.device("cuda"), torch.bfloat16)
    (out / "config.json").write_text(json.dumps(values))
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
