"""Compiles what the operations launch, for a GPU that is not here: `python -m tests.model.ops.cuda.ahead CAPABILITY`
calls them with tensors of the published shapes, launches nothing, and prints a line of JSON for each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from model.latent_cache import LatentCache
from model.ops.cuda import mla_decode as mla_decode_module
from model.ops.cuda import moe as moe_module
from model.ops.cuda import quantized
from model.ops.cuda.cudnn import fold
from model.ops.cuda.mla_decode import decode_work, lines_of_a_tile, mla_decode
from model.ops.cuda.mla_prefill import FIRST, LAST, Accumulator, mla_prefill
from model.ops.cuda.moe import moe, silu_mul
from model.ops.cuda.norm import rms_norm
from model.ops.cuda.rope import rope_and_cache
from model.ops.cuda.router import router
from model.ops.cuda.sampler import sample
from model.ops.interface import PackedWeight, Routing, SwigluWeights
from model.rotary import Rotation
from model.sampler import Limits, SamplingInputs
from tests.model.ops.cuda.shapes import V2, V2_LITE, V3, Shape

SHARED_MEMORY = {90: 227 << 10, 89: 99 << 10, 80: 163 << 10}
"""Bytes a program can have, by compute capability."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Target:
    """A driver without a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def bf16(*shape: int) -> Tensor:
    """Memory that nobody touches: 64 experts are addresses only."""
    return torch.empty(shape, dtype=torch.bfloat16)


def packed_weight(bits: int, number: int, out_features: int, in_features: int) -> PackedWeight:
    size = quantized.packed_bytes(bits, out_features, in_features)[1]
    return PackedWeight(torch.empty((number, size), dtype=torch.uint8), bits, out_features, in_features)


def launches(shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a layer of the shape launches, by name: decode, chunk of 2,048 tokens."""
    config = shape.config
    heads, hidden, rank, rope = config.num_attention_heads, config.hidden_size, 512, 64
    caches = {
        "": LatentCache(4, 2, rank + rope, torch.bfloat16),
        " in fp8": LatentCache(4, 2, rank + rope, torch.bfloat16, fp8_latents=rank),
    }
    yield "norm", lambda: rms_norm(bf16(32, hidden), bf16(hidden), 1e-6)
    rotation = Rotation(torch.empty(32, rope // 2), torch.empty(32, rope // 2))
    slots, q = torch.zeros(32, dtype=torch.int64), bf16(32, heads, 192)
    for kept, cache in caches.items():
        yield (
            f"rope{kept}",
            lambda cache=cache: rope_and_cache(
                q[..., 128:], bf16(32, rank + rope), bf16(rank), 1e-6, rotation, slots, cache, 1
            ),
        )
    for queries, split_pages, (kept, cache) in product((1, 128), (2, 16), caches.items()):
        block = lines_of_a_tile(heads, queries, cache.data.device)
        work = decode_work(
            torch.arange(0, 33 * queries, queries, dtype=torch.int32),
            torch.full((32,), 1024, dtype=torch.int32),
            torch.zeros((32, 16), dtype=torch.int32),
            tokens=32 * queries,
            items=512,
            heads=heads,
            block=block,
            split_pages=split_pages,
        )
        yield (
            f"decode, {queries} queries{kept}",
            lambda work=work, n=queries, cache=cache: mla_decode(
                bf16(heads, 32 * n, rank).transpose(0, 1), bf16(32 * n, heads, 192)[..., 128:], cache, 1, work, 0.1
            ),
        )
    tiles = torch.zeros((8, 6), dtype=torch.int32)
    for passes in (1, 2):
        shape_of = (2048, heads) if passes > 1 else (0, heads)
        accumulator = Accumulator(torch.empty((*shape_of, 128)), torch.empty(shape_of))
        yield (
            "prefill",
            lambda accumulator=accumulator: mla_prefill(
                *(bf16(2048, heads, 192).split([128, 64], dim=2)),
                *(bf16(2048, heads, 128), bf16(2048, 576)[:, 512:], bf16(2048, heads, 128)),
                *(tiles, 0.1, accumulator, bf16(2048, heads, 128)),
            ),
        )
    found = bf16(1, 4096, heads, 128)[0]  # as cuDNN gives it
    accumulator = Accumulator(torch.empty(4096, heads, 128), torch.empty(4096, heads))
    for flags in (FIRST, 0, LAST, FIRST | LAST):
        yield (
            "fold",
            lambda flags=flags, found=found, accumulator=accumulator: fold(
                found, torch.empty(heads, 4096), 9, flags, accumulator, bf16(4096, heads, 128)
            ),
        )
    bias = torch.zeros(config.n_routed_experts) if config.topk_method == "noaux_tc" else None
    gate = torch.zeros(config.n_routed_experts, hidden)
    yield "router", lambda: router(bf16(32, hidden), gate, bias, config)
    experts, width, shared = config.n_routed_experts, config.moe_intermediate_size, config.n_shared_experts
    weights = SwigluWeights(bf16(experts, 2 * width, hidden), bf16(experts, hidden, width))
    extra = SwigluWeights(bf16(2 * shared * width, hidden), bf16(hidden, shared * width))
    for tokens in (1, 32, 64, 256, 2048):
        routing = Routing(
            torch.zeros(tokens, config.num_experts_per_tok, dtype=torch.int32),
            torch.zeros(tokens, config.num_experts_per_tok),
        )
        yield (
            f"experts, {tokens} tokens",
            lambda routing=routing, n=tokens: moe(bf16(n, hidden), routing, weights, extra, bf16(n, hidden)),
        )
    for bits in (8, 4):
        packed = SwigluWeights(
            packed_weight(bits, experts, 2 * width, hidden), packed_weight(bits, experts, hidden, width)
        )
        packed_shared = SwigluWeights(
            packed_weight(bits, 1, 2 * shared * width, hidden), packed_weight(bits, 1, hidden, shared * width)
        )
        for tokens in (1, 32, 64, 256):
            routing = Routing(
                torch.zeros(tokens, config.num_experts_per_tok, dtype=torch.int32),
                torch.zeros(tokens, config.num_experts_per_tok),
            )
            yield (
                f"experts in int{bits}, {tokens} tokens",
                lambda routing=routing, n=tokens, packed=packed, packed_shared=packed_shared: moe(
                    bf16(n, hidden), routing, packed, packed_shared, bf16(n, hidden)
                ),
            )
            weight = packed_weight(bits, 1, 2 * config.intermediate_size, hidden)
            yield (
                f"linear in int{bits}, {tokens} tokens",
                lambda n=tokens, weight=weight: quantized.linear(bf16(n, hidden), weight),
            )
    columns = {name: np.zeros(32) for name in ("temperature", "top_p", "min_p", "presence", "frequency")}
    integers = {name: np.zeros(32, np.int64) for name in ("top_k", "position", "row", "num_prompt_tokens")}
    grammar = Limits(0, bytes(12800), *(np.empty(0, np.int64),) * 3, np.empty(0, np.float32))
    sampling = SamplingInputs(
        **columns,
        **integers,
        repetition=np.ones(32),
        seed=np.zeros(32, np.uint64),
        history=torch.zeros((32, 8), dtype=torch.int32),
        limits=[grammar],
    )
    yield "sampler", lambda: sample(torch.zeros(32, 102400), sampling)
    yield "silu", lambda: silu_mul(bf16(32, 2 * config.intermediate_size))


def examined(kernel: Any) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory of a program, and how often its machine code multiplies tiles."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    count = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA", "LDL", "STL", "LDGSTS")}
    return found | count | {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}


def main(capability: int) -> None:
    driver.set_active(Target(capability))
    mla_decode_module.shared_memory = moe_module.shared_memory = lambda _: SHARED_MEMORY[capability]
    run = JITFunction.run
    name = ""
    seen: dict[int, None] = {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen[id(kernel)] = None
            print(json.dumps({"launch": name, "kernel": self.__name__} | examined(kernel)), flush=True)
        return kernel

    JITFunction.run = compile_only
    for shape in (V2_LITE, V2, V3):
        for launch, call in launches(shape):
            # Of V2's experts those in 4 bits: others are as V2-Lite's, and no card holds them.
            alike = launch.startswith("experts") and "int4" not in launch
            if shape is V2_LITE or (shape is V2 and not alike) or launch == "router":
                name = f"{shape.name}: {launch}"
                call()


if __name__ == "__main__":
    main(int(sys.argv[1]))
