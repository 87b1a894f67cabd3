"""Groups of `benchmarks.gpu_suite`: what others have for the same shapes, as far as it is installed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_rig import L2_BYTES, Suite, new_cache
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.mla_decode import decode_work, lines_of_a_tile, mla_decode, num_items, pages_of_a_split
from model.ops.cuda.moe import moe
from model.ops.interface import Routing, SwigluWeights


class Decode(NamedTuple):
    """Absorbed attention of one token a row, over contexts of one length in pages of no order."""

    q_latent: Tensor
    """[B, H, r]"""
    q_rope: Tensor
    """[B, H, dr]"""
    cache: LatentCache
    tables: Tensor
    """[B, pages] int32"""
    lengths: Tensor
    """[B] int32"""
    scale: float


class Experts(NamedTuple):
    x: Tensor
    """[T, D]"""
    routing: Routing
    weights: SwigluWeights


DecodeCall = Callable[[int], Tensor]
"""Layer -> [B, H, r]."""


def own_attention(case: Decode) -> DecodeCall:
    rows, heads = case.q_latent.shape[:2]
    device, context = case.lengths.device, int(case.lengths[0])
    block, pages = lines_of_a_tile(heads, 1, device), pages_of_a_split(rows)
    work = decode_work(
        torch.arange(rows + 1, dtype=torch.int32, device=device),
        case.lengths,
        case.tables,
        tokens=rows,
        items=num_items([1] * rows, [context] * rows, heads, block, pages),
        heads=heads,
        block=block,
        split_pages=pages,
    )
    return lambda layer: mla_decode(case.q_latent, case.q_rope, case.cache, layer, work, case.scale).transpose(0, 1)


def flash_mla(case: Decode) -> DecodeCall:
    """DeepSeek's FlashMLA, also as sgl-flash-mla, which keeps dense decoding on Hopper behind `use_legacy`."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    q = torch.cat((case.q_latent, case.q_rope), dim=2)[:, None]
    heads, rank = q.shape[2], case.q_latent.shape[2]
    schedule, splits = get_mla_metadata(case.lengths, heads, 1)
    more = {"use_legacy": True} if "use_legacy" in signature(flash_mla_with_kvcache).parameters else {}

    def call(layer: int) -> Tensor:
        pages = case.cache.data[:, layer, :, None]
        arguments = q, pages, case.tables, case.lengths, rank, schedule, splits
        found: Tensor = flash_mla_with_kvcache(*arguments, softmax_scale=case.scale, is_fp8_kvcache=False, **more)[0]
        return found[:, 0]

    return call


def flashinfer(case: Decode) -> DecodeCall:
    """FlashInfer's MLA, which compiles itself when it is first called: minutes, where nothing is kept of it."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    rows, heads, rank = case.q_latent.shape
    device, dtype = case.q_latent.device, case.q_latent.dtype
    row = torch.arange(rows + 1, dtype=torch.int32, device=device)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=device))
    wrapper.plan(
        *(row, row * case.tables.shape[1], case.tables.flatten(), case.lengths),
        *(heads, rank, case.q_rope.shape[2], BLOCK_SIZE, False, case.scale, dtype, dtype),
    )

    def call(layer: int) -> Tensor:
        latents, _, keys = case.cache.planes(layer, rank)
        found: Tensor = wrapper.run(case.q_latent, case.q_rope, latents, keys)
        return found

    return call


def own_experts(case: Experts) -> Callable[[], Tensor]:
    return partial(moe, case.x, case.routing, case.weights, None, torch.zeros_like(case.x))


def grouped_mm(case: Experts) -> Callable[[], Tensor]:
    """torch's products of groups of rows: sorted by expert, gathered, and added up again."""
    multiply = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    gate_up, down = case.weights
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)

    def call() -> Tensor:
        experts, order = case.routing.experts.flatten().long().sort()
        ends = torch.searchsorted(experts, torch.arange(1, len(gate_up) + 1, device=experts.device), out_int32=True)
        token = order // case.routing.experts.shape[1]
        gate, up = multiply(case.x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
        found = multiply(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        weighted = found.float() * case.routing.weights.flatten()[order, None]
        return torch.zeros_like(case.x, dtype=torch.float32).index_add_(0, token, weighted).to(case.x.dtype)

    return call


def vllm(case: Experts) -> Callable[[], Tensor]:
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda: fused_experts(case.x, *case.weights, case.routing.weights, case.routing.experts.int())


ATTENTION: Mapping[str, Callable[[Decode], DecodeCall]] = {"flash_mla": flash_mla, "flashinfer": flashinfer}
EXPERTS: Mapping[str, Callable[[Experts], Callable[[], Tensor]]] = {"torch": grouped_mm, "vllm": vllm}
"""By the package that must be there."""


def peers(suite: Suite) -> bool:
    """Kernels of others beside ours, each on its own; none of them is needed, and what one does not take is a line.

    `relative_error` is the difference from ours, in the Frobenius norm.
    """
    for name in dict.fromkeys((*ATTENTION, *EXPERTS)):
        if find_spec(name) is None:
            suite.report("peers", name, outcome="not installed")
    _attention(suite)
    _experts(suite)
    return True


def _attention(suite: Suite) -> None:
    config, limits = suite.config, suite.limits()
    heads, rank, width = config.num_attention_heads, config.kv_lora_rank, config.latent_dim
    for rows, context in [(2, 70)] if suite.toy else [(1, 1024), (1, 131072), (32, 8192), (128, 1024), (128, 4096)]:
        size = rows * context * width * suite.dtype.itemsize
        layers = 1 if suite.toy else min(20, max(2, L2_BYTES // size))
        pages = -(-context // BLOCK_SIZE)
        case = Decode(
            suite.randn(rows, heads, rank),
            suite.randn(rows, heads, width - rank),
            new_cache(suite, rows * pages, layers),
            torch.randperm(rows * pages, device=suite.device).int().view(rows, pages),
            torch.full((rows,), context, dtype=torch.int32, device=suite.device),
            config.softmax_scale,
        )
        limit = limits.seconds(size, 2 * rows * context * heads * (width + rank))
        own = own_attention(case)
        exact = own(0).float()
        for name, peer in ({"latentd": own_attention} | dict(ATTENTION)).items():
            if name == "latentd" or find_spec(name) is not None:
                shown = f"attention {rows} x {context}, {name}"
                _measured(suite, shown, partial(_layer_by_layer, peer, case, layers), exact, limit)


def _layer_by_layer(peer: Callable[[Decode], DecodeCall], case: Decode, layers: int) -> list[Callable[[], Tensor]]:
    call = peer(case)
    return [partial(call, layer) for layer in range(layers)]


def _experts(suite: Suite) -> None:
    config, limits = suite.config, suite.limits()
    number, inner, hidden = config.n_routed_experts or 0, config.moe_intermediate_size or 0, config.hidden_size
    chosen = config.num_experts_per_tok or 0
    weight = partial(suite.randn, scale=0.02)
    weights = SwigluWeights(weight(number, 2 * inner, hidden), weight(number, hidden, inner))
    for tokens in (3,) if suite.toy else (1, 8, 32, 128, 512, 4096):
        experts = torch.rand(tokens, number, device=suite.device).topk(chosen).indices.int()
        routing = Routing(experts, torch.rand(tokens, chosen, device=suite.device))
        case = Experts(suite.randn(tokens, hidden), routing, weights)
        touched = len(set(experts.flatten().tolist()))
        operations = 2 * tokens * chosen * 3 * inner * hidden
        limit = limits.seconds(touched * 3 * inner * hidden * suite.dtype.itemsize, operations)
        exact = own_experts(case)().float()
        for name, peer in ({"latentd": own_experts} | dict(EXPERTS)).items():
            if name == "latentd" or find_spec(name) is not None:
                _measured(suite, f"experts, {tokens} tokens, {name}", partial(_five_times, peer, case), exact, limit)


def _five_times(peer: Callable[[Experts], Callable[[], Tensor]], case: Experts) -> list[Callable[[], Tensor]]:
    return [peer(case)] * 5


def _measured(
    suite: Suite, name: str, prepare: Callable[[], list[Callable[[], Tensor]]], exact: Tensor, limit: float
) -> None:
    try:
        calls = prepare()
        error = float((calls[0]().float() - exact).norm() / exact.norm())
        seconds = suite.seconds(calls)
    except Exception as problem:  # whatever a version of theirs does not know or take
        outcome = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        suite.report("peers", name, outcome=f"failed: {outcome[:200]}")
        return
    suite.report("peers", name, us=seconds * 1e6, share=limit / seconds, relative_error=error)


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
