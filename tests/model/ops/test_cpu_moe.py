"""Norm, rotation into the cache, router, experts and MLP of the CPU kernels against their eager twins in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cpu.library import AttentionShape, Format, Library, RouterShape, in_turn
from model.ops.eager.ops import EagerOps
from model.ops.interface import Routing, SwigluWeights, unpacked
from model.rotary import Rotation
from tests.model.ops.test_cpu_linear import FORMATS
from tests.model.test_ops_eager import CONFIG

EAGER = EagerOps()


class Workspace:
    """As many bytes as asked for, NaN as whatever they are read, and some behind that must not be touched."""

    def __init__(self, size: int) -> None:
        self.data = torch.full((size + 64,), 0xFF, dtype=torch.uint8)

    def __enter__(self) -> Tensor:
        return self.data

    def __exit__(self, *_: object) -> None:
        assert (self.data[-64:] == 0xFF).all()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (randn(*shape, seed=seed) * scale).bfloat16()


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


# --- norm and cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (3, 32), (40, 96)])
def test_rms_norm(kernels: Library, rows: int, width: int) -> None:
    x, weight = bf16(rows, width + 64, scale=300)[:, :width], 1 + bf16(width, seed=1, scale=0.1)
    y = torch.full((rows, width + 3), torch.nan, dtype=torch.bfloat16)
    kernels.rms_norm(x, weight, 0.5, y[:, :width])
    exact = F.rms_norm(x.float(), (width,), weight.float(), 0.5)
    assert torch.allclose(y[:, :width].float(), exact, rtol=2**-8, atol=0)
    assert y[:, width:].isnan().all()


def test_rms_norm_in_place_and_alone_as_in_a_batch(kernels: Library) -> None:
    x, weight = bf16(32, 512), bf16(512, seed=1)
    y = torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, y)
    for i in range(len(x)):
        row = x[i : i + 1].clone()
        kernels.rms_norm(row, weight, 1e-6, row)
        assert torch.equal(row, y[i : i + 1])


@pytest.mark.parametrize(("heads", "rank", "rope"), [(3, 32, 8), (16, 256, 32), (2, 96, 64), (1, 64, 42)])
def test_rope_and_cache(kernels: Library, heads: int, rank: int, rope: int) -> None:
    tokens, layers, layer = 37, 3, 1
    kv, norm_weight = bf16(tokens, rank + rope + 5)[:, : rank + rope], 1 + bf16(rank, seed=1, scale=0.1)
    queries = bf16(tokens, heads, rope + 16, seed=2)
    angles = 1000 * randn(tokens, rope // 2, seed=3)
    rotation = Rotation(angles.cos(), angles.sin())
    slots = torch.randperm(4 * BLOCK_SIZE, generator=torch.Generator().manual_seed(4))[:tokens]
    exact = LatentCache(4, layers, rank + rope, torch.float32)
    exact.data.fill_(torch.nan)
    turned = EAGER.rope_and_cache(
        queries[..., 16:].float(), kv.float(), norm_weight.float(), 1e-6, rotation, slots, exact, layer
    )
    cache = LatentCache(4, layers, rank + rope, torch.bfloat16)
    cache.data.fill_(torch.nan)
    shape = AttentionShape(
        tokens=tokens,
        cache=cache.data.data_ptr(),
        layers=layers,
        block_size=BLOCK_SIZE,
        heads=heads,
        rank=rank,
        rope=rope,
    )
    kernels.rope_and_cache(shape, layer, kv, norm_weight, 1e-6, *rotation, slots, queries[..., 16:])
    assert torch.equal(queries[..., :16], bf16(tokens, heads, rope + 16, seed=2)[..., :16])
    assert torch.allclose(queries[..., 16:].float(), turned, rtol=2**-8, atol=1e-6)
    assert torch.allclose(cache.data.float(), exact.data, rtol=2**-8, atol=1e-6, equal_nan=True)


# --- router --------------------------------------------------------------------------------------------------------

SOFTMAX = replace(CONFIG, n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1)
GROUPED = replace(SOFTMAX, n_group=8, topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0)
NOAUX = replace(
    CONFIG,
    n_routed_experts=252,
    num_experts_per_tok=8,
    n_group=7,
    topk_group=3,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
ODD = replace(SOFTMAX, n_routed_experts=11, num_experts_per_tok=1, norm_topk_prob=True)


def route(kernels: Library, x: Tensor, weight: Tensor, bias: Tensor | None, config: DeepseekConfig) -> Routing:
    grouped = config.topk_method != "greedy"
    shape = RouterShape(
        experts=config.n_routed_experts,
        groups=config.n_group if grouped else 1,
        top_groups=config.topk_group if grouped else 1,
        per_token=config.num_experts_per_tok,
        sigmoid=config.scoring_func == "sigmoid",
        two_best_per_group=config.topk_method == "noaux_tc",
        normalise=config.norm_topk_prob,
        scaling=config.routed_scaling_factor,
    )
    experts = torch.full((len(x), config.num_experts_per_tok), -1, dtype=torch.int32)
    weights = torch.full(experts.shape, torch.nan)
    with Workspace(kernels.router_workspace(len(x), config.n_routed_experts)) as workspace:
        kernels.router(shape, x, weight, bias, experts, weights, workspace)
    return Routing(experts.long(), weights)


@pytest.mark.parametrize("tokens", [1, 7, 150])
@pytest.mark.parametrize("config", [SOFTMAX, GROUPED, NOAUX, ODD], ids=["softmax", "grouped", "noaux_tc", "odd"])
def test_router(kernels: Library, config: DeepseekConfig, tokens: int) -> None:
    x = bf16(tokens, 96 + 32)[:, :96]
    weight = randn(config.n_routed_experts, 96, seed=1) * 0.2
    bias = 0.3 * randn(config.n_routed_experts, seed=2) - 1.0 if config.topk_method == "noaux_tc" else None
    found, exact = route(kernels, x, weight, bias, config), EAGER.router(x.float(), weight, bias, config)
    scores = F.linear(x.float(), weight)
    scores = scores.softmax(-1) if config.scoring_func == "softmax" else scores.sigmoid()
    choice = (scores if bias is None else scores + bias).gather(1, found.experts)
    assert (choice.diff(dim=1) <= 1e-6).all()
    order, exact_order = found.experts.argsort(1), exact.experts.argsort(1)
    assert torch.equal(found.experts.gather(1, order), exact.experts.gather(1, exact_order))
    assert torch.allclose(found.weights.gather(1, order), exact.weights.gather(1, exact_order), rtol=1e-5)


def test_the_lower_of_equal_experts_comes_first(kernels: Library) -> None:
    weight = torch.zeros(64, 96)
    weight[[50, 7, 33]] = 0.1
    found = route(kernels, torch.ones(1, 96, dtype=torch.bfloat16), weight, None, SOFTMAX)
    assert found.experts.tolist() == [[7, 33, 50, 0, 1, 2]]


def test_tokens_without_numbers_still_go_to_different_experts(kernels: Library) -> None:
    x = torch.full((2, 96), torch.nan, dtype=torch.bfloat16)
    for config in (SOFTMAX, GROUPED, NOAUX):
        bias = torch.zeros(config.n_routed_experts)
        found = route(kernels, x, randn(config.n_routed_experts, 96), bias, config)
        for experts in found.experts.tolist():
            assert len(set(experts)) == config.num_experts_per_tok
            assert set(experts) <= set(range(config.n_routed_experts))


def test_a_token_is_routed_alone_as_in_a_batch(kernels: Library) -> None:
    x, weight, bias = bf16(32, 512), randn(252, 512, seed=1) * 0.1, randn(252, seed=2)
    together = route(kernels, x, weight, bias, NOAUX)
    for i in range(len(x)):
        alone = route(kernels, x[i : i + 1], weight, bias, NOAUX)
        assert torch.equal(alone.experts[0], together.experts[i])
        assert torch.equal(alone.weights[0], together.weights[i])


# --- experts -------------------------------------------------------------------------------------------------------


def swiglu(hidden: int, width: int, experts: int | None = None, seed: int = 0) -> SwigluWeights:
    leading = () if experts is None else (experts,)
    gate_up = bf16(*leading, 2 * width, hidden, seed=seed, scale=hidden**-0.5)
    return SwigluWeights(gate_up, bf16(*leading, hidden, width, seed=seed + 1, scale=width**-0.5))


def as_float(weights: SwigluWeights) -> SwigluWeights:
    return SwigluWeights(unpacked(weights.gate_up).float(), unpacked(weights.down).float())


class Packed(NamedTuple):
    format: Format
    experts: int
    width: int
    gate_up: Tensor
    down: Tensor


def packed(kernels: Library, weights: SwigluWeights, format: Format = Format.BF16) -> Packed:
    gate_up, down = unpacked(weights.gate_up), unpacked(weights.down)

    def pack(matrices: Tensor) -> Tensor:
        data = torch.empty(len(matrices), kernels.packed_bytes(format, *matrices.shape[1:]), dtype=torch.uint8)
        for matrix, to in zip(matrices, data, strict=True):
            kernels.pack(format, matrix, to)
        return data

    width = down.shape[-1]
    down = down.reshape(-1, *down.shape[-2:])
    gate_up = in_turn(*gate_up.reshape(len(down), 2, width, -1).unbind(1))
    return Packed(format, len(down), width, pack(gate_up), pack(down))


def moe(
    kernels: Library, x: Tensor, routing: Routing, experts: Packed, shared: Packed | None, residual: Tensor | None
) -> Tensor:
    y = torch.full(x.shape, torch.nan, dtype=torch.bfloat16)
    also = None if shared is None else (shared.width, shared.gate_up, shared.down)
    chosen = routing.experts.int()
    tokens, hidden = x.shape
    shared_width = 0 if shared is None else shared.width
    size = kernels.moe_workspace(tokens, hidden, experts.width, experts.experts, chosen.shape[1], shared_width)
    with Workspace(size) as workspace:
        kernels.moe(
            *(experts.format, x, experts.width, experts.experts, chosen, routing.weights.contiguous()),
            *(experts.gate_up, experts.down, also, residual, y, workspace),
        )
    return y


def routing_of(tokens: int, experts: int, per_token: int, seed: int = 5) -> Routing:
    chosen = randn(tokens, experts, seed=seed).argsort(1)[:, :per_token]
    return Routing(chosen, randn(tokens, per_token, seed=seed + 1).abs())


@pytest.mark.parametrize("tokens", [1, 2, 9, 65, 300])
@pytest.mark.parametrize(("hidden", "width", "shared_width"), [(160, 96, 224), (128, 64, 0), (64, 32, 32)])
def test_moe(kernels: Library, tokens: int, hidden: int, width: int, shared_width: int) -> None:
    x, residual = bf16(tokens, hidden + 32)[:, :hidden], bf16(tokens, hidden, seed=1)
    experts, routing = swiglu(hidden, width, 12), routing_of(tokens, 12, 3)
    shared = swiglu(hidden, shared_width, seed=2) if shared_width else None
    shared_float = None if shared is None else as_float(shared)
    shared_packed = None if shared is None else packed(kernels, shared)
    exact = EAGER.moe(x.float(), routing, as_float(experts), shared_float, residual.float())
    found = moe(kernels, x, routing, packed(kernels, experts), shared_packed, residual)
    assert relative_error(found, exact) < 0.004


def test_experts_without_tokens_are_not_read_and_one_may_have_all(kernels: Library) -> None:
    x, experts = bf16(400, 128), swiglu(128, 96, 8)
    routing = Routing(torch.tensor([[6, 2]]).repeat(400, 1), torch.full((400, 2), 0.5))
    routing.experts[17, 1] = 7
    for unused in (0, 1, 3, 4, 5):
        unpacked(experts.gate_up)[unused] = torch.nan
        unpacked(experts.down)[unused] = torch.nan
    exact = EAGER.moe(x.float(), routing, as_float(experts), None, torch.zeros(400, 128))
    assert relative_error(moe(kernels, x, routing, packed(kernels, experts), None, None), exact) < 0.004


def test_experts_are_summed_in_float32(kernels: Library) -> None:
    """Two experts that cancel each other: a bfloat16 sum would lose the third."""
    weights = swiglu(128, 64, 3)
    gate_up, down = unpacked(weights.gate_up), unpacked(weights.down)
    gate_up[1], down[1] = gate_up[0], -down[0]
    x, experts = bf16(1, 128), packed(kernels, weights)
    routing = Routing(torch.tensor([[0, 2, 1]]), torch.tensor([[1000.0, 1.0, 1000.0]]))
    found = moe(kernels, x, routing, experts, None, None)
    only = moe(kernels, x, Routing(torch.tensor([[2]]), torch.ones(1, 1)), experts, None, None)
    assert (found - only).abs().max() <= 0.01 * only.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_moe_is_its_linears(kernels: Library, format: Format) -> None:
    """`linear` is tested against the formula in each format; of the same sums, only the parts are put together here."""
    x, experts, shared, routing = bf16(40, 160), swiglu(160, 96, 6), swiglu(160, 224, seed=2), routing_of(40, 6, 3)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        data = torch.empty(kernels.packed_bytes(format, *weight.shape), dtype=torch.uint8)
        kernels.pack(format, weight, data)
        y = torch.full((len(x), len(weight)), torch.nan)
        kernels.linear(format, x, data, y)
        return y

    def one(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = linear(x, gate_up).chunk(2, dim=-1)
        return linear((F.silu(gate) * up).bfloat16(), down)

    exact = x.float() + one(x, unpacked(shared.gate_up), unpacked(shared.down))
    for expert in range(6):
        tokens, slots = (routing.experts == expert).nonzero(as_tuple=True)
        output = one(x[tokens], unpacked(experts.gate_up)[expert], unpacked(experts.down)[expert])
        exact[tokens] += routing.weights[tokens, slots, None] * output
    found = moe(kernels, x, routing, packed(kernels, experts, format), packed(kernels, shared, format), x)
    # All that differs is a number that is rounded the other way between the phases.
    assert relative_error(found, exact) < 0.003


@pytest.mark.parametrize(("format", "error"), [(Format.INT8, 0.02), (Format.INT4, 0.2)])
def test_quantised_experts_are_near(kernels: Library, format: Format, error: float) -> None:
    x, experts, shared, routing = bf16(20, 256), swiglu(256, 128, 6), swiglu(256, 256, seed=2), routing_of(20, 6, 3)
    exact = EAGER.moe(x.float(), routing, as_float(experts), as_float(shared), torch.zeros(20, 256))
    found = moe(kernels, x, routing, packed(kernels, experts, format), packed(kernels, shared, format), None)
    assert relative_error(found, exact) < error


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_gets_alone_what_it_gets_in_a_batch(kernels: Library, format: Format) -> None:
    x, routing = bf16(32, 512), routing_of(32, 8, 3)
    experts, shared = packed(kernels, swiglu(512, 96, 8), format), packed(kernels, swiglu(512, 192, seed=2), format)
    together = moe(kernels, x, routing, experts, shared, x)
    for i in range(len(x)):
        one = slice(i, i + 1)
        alone = Routing(routing.experts[one], routing.weights[one])
        assert torch.equal(moe(kernels, x[one], alone, experts, shared, x[one]), together[one])
    # Nor does it depend on the order in which the router names the experts.
    backwards = Routing(routing.experts.flip(1), routing.weights.flip(1))
    assert torch.equal(moe(kernels, x, backwards, experts, shared, x), together)


@pytest.mark.parametrize("format", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(kernels: Library, format: Format) -> None:
    """With so many tokens experts are split by rows, and with so many threads columns are, too."""
    x, experts, routing = bf16(450, 64), packed(kernels, swiglu(64, 96, 4), format), routing_of(450, 4, 2)
    results = []
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        results.append(moe(kernels, x, routing, experts, None, x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_mlp(kernels: Library, tokens: int) -> None:
    x, weights = bf16(tokens, 160), swiglu(160, 352)
    exact = EAGER.mlp(x.float(), as_float(weights), x.float())
    dense = packed(kernels, weights)
    y = x.clone()
    with Workspace(kernels.moe_workspace(tokens, 160, 0, 0, 0, 352)) as workspace:
        kernels.mlp(dense.format, x, 352, dense.gate_up, dense.down, y, y, workspace)
    assert relative_error(y, exact) < 0.004
