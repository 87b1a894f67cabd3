"""Groups of `benchmarks.gpu_suite`: the card itself, each kernel alone, and a sweep over the experts' tiles."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
import triton

from benchmarks.gpu_rig import L2_BYTES, Suite, clocked, new_cache, step_inputs
from model.latent_cache import BLOCK_SIZE
from model.ops.cuda.attention import plan_attention
from model.ops.cuda.cudnn import Attend, chosen
from model.ops.cuda.moe import Tile, moe
from model.ops.cuda.norm import rms_norm
from model.ops.cuda.ops import CudaOps
from model.ops.cuda.router import router
from model.ops.interface import Mlp, Routing, SwigluWeights


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
    began = time.perf_counter()
    by_cudnn = chosen(config, suite.dtype, suite.device)
    suite.report("kernels", "choosing who attends", s=time.perf_counter() - began)
    expanded(suite, by_cudnn)
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


def expanded(suite: Suite, attend: Attend | None) -> None:
    """Attention of long prompts, with what cuDNN takes of it and by the own kernel alone, rebuilt keys and values
    included; by the clock, since cuDNN is called many times."""
    if attend is None:
        suite.report("kernels", "expanded by cuDNN", outcome="not chosen on this device")
    limits, config = suite.limits(), suite.config
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    packed = CudaOps().pack_latent(
        suite.randn(heads, config.qk_nope_head_dim, rank), suite.randn(heads, config.v_head_dim, rank)
    )
    shapes = [(1024, 1024), (2048, 2048), (4096, 4096), (4096, 8192), (1024, 32768), (4096, 32768), (4096, 131072)]
    faster: dict[str, list[str]] = {"own kernel": [], "cuDNN": []}
    for tokens, context in [(150, 200)] if suite.toy else shapes:
        blocks = -(-context // BLOCK_SIZE)
        cache = new_cache(suite, blocks, 1)
        q = suite.randn(tokens, heads, config.qk_head_dim)
        q_nope, q_rope = torch.split(q, [config.qk_nope_head_dim, rope], dim=2)
        pairs = tokens * (context - tokens) + tokens**2 / 2
        operations = 2 * pairs * heads * (config.qk_head_dim + config.v_head_dim)
        operations += 2 * context * rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        limit = limits.seconds(context * config.latent_dim * suite.dtype.itemsize, operations)
        found, seconds = {}, {}
        for name, computed_by in {"own kernel": None, "cuDNN": attend}.items():
            if name == "own kernel" or computed_by is not None:
                prepared = plan_attention(step_inputs(suite, tokens, [context], blocks), cache, config, computed_by)
                call = partial(prepared, 0, q_nope, q_rope, packed)
                found[name] = call()
                seconds[name] = clocked(call, 1 if suite.toy else 5)
                exact = found["own kernel"].float()
                suite.report(
                    "kernels",
                    f"expanded {tokens} of {context}, {name}",
                    us=seconds[name] * 1e6,
                    share=limit / seconds[name],
                    relative_error=float((found[name].float() - exact).norm() / exact.norm()),
                )
        faster[min(seconds, key=lambda name: seconds[name])].append(f"{tokens} of {context}")
    for name, cases in faster.items() if attend is not None else ():
        suite.report("kernels", f"expanded: faster by the {name}", cases=", ".join(cases) or "none")


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
