"""Alignment of pairs and the experts' kernels against their eager twins in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.cuda import moe as kernels
from model.ops.cuda import quantized
from model.ops.cuda.align import align
from model.ops.eager.ops import EagerOps
from model.ops.interface import Routing, SwigluWeights
from tests.model.ops.cuda.common import DEVICE, DTYPES, TOLERANCE, poisoned, randn, relative_error

EXPERTS, HIDDEN, WIDTH = 12, 80, 48


def routing_of(tokens: int, per_token: int, hot: bool, experts: int = EXPERTS) -> Routing:
    """Different experts for each token; `hot`: one of them is everybody's."""
    scores = randn(tokens, experts, seed=5)
    if hot:
        scores[:, 7] = 100
    return Routing(scores.topk(per_token).indices.int(), randn(tokens, per_token, seed=6).abs())


@pytest.mark.parametrize(("tokens", "per_token", "shared"), [(1, 3, 0), (9, 3, 2), (300, 6, 1)])
@pytest.mark.parametrize("hot", [False, True])
def test_align(tokens: int, per_token: int, shared: int, hot: bool) -> None:
    """Every pair once, in order, in blocks of its expert; padding tokens nowhere."""
    experts = routing_of(tokens, per_token, hot).experts
    experts[4::3] = -1
    with poisoned():
        blocks = align(experts, EXPERTS, shared, 16)
    pairs = tokens * (per_token + shared)
    expected: list[list[int]] = [[] for _ in range(EXPERTS + shared)]
    for token, chosen in enumerate(experts.tolist()):
        if chosen[0] >= 0:
            for place, expert in enumerate([*chosen, *range(EXPERTS, EXPERTS + shared)]):
                expected[expert].append(token * (per_token + shared) + place)
    found: list[list[int]] = [[] for _ in range(EXPERTS + shared)]
    used = [expert for expert in blocks.experts.tolist() if expert >= 0]
    assert used == sorted(used)
    assert blocks.experts[len(used) :].eq(-1).all()
    for expert, block in zip(used, blocks.pairs.view(-1, 16).tolist(), strict=False):
        found[expert] += block
    for expert in range(EXPERTS + shared):
        whole = -(-len(expected[expert]) // 16) * 16
        assert found[expert] == expected[expert] + [pairs] * (whole - len(expected[expert]))


def swiglu(*shape: int, width: int, dtype: torch.dtype, seed: int) -> SwigluWeights:
    gate_up = randn(*shape, 2 * width, HIDDEN, seed=seed, dtype=dtype) / HIDDEN**0.5
    return SwigluWeights(gate_up, randn(*shape, HIDDEN, width, seed=seed + 1, dtype=dtype) / width**0.5)


def widened(weights: SwigluWeights) -> SwigluWeights:
    return SwigluWeights(*(weight.float() for weight in weights if isinstance(weight, Tensor)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_moe(tokens: int, num_shared: int, dtype: torch.dtype) -> None:
    """Up to 32 pairs are not sorted; of 40 tokens some experts get several blocks, and some none."""
    routing = routing_of(tokens, 3, hot=tokens > 6)
    experts = swiglu(EXPERTS, width=WIDTH, dtype=dtype, seed=1)
    shared = swiglu(width=num_shared * WIDTH, dtype=dtype, seed=3) if num_shared else None
    x, residual = randn(tokens, HIDDEN, seed=7, dtype=dtype), randn(tokens, HIDDEN, seed=8, dtype=dtype)
    exact = EagerOps().moe(
        x.float(),
        Routing(routing.experts.long(), routing.weights),
        widened(experts),
        None if shared is None else widened(shared),
        residual.float(),
    )
    with poisoned():
        found = kernels.moe(x, routing, experts, shared, residual)
    assert found.dtype == dtype
    assert relative_error(found, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [3, 20])
def test_padding_tokens_touch_nothing(tokens: int) -> None:
    experts = swiglu(EXPERTS, width=WIDTH, dtype=torch.float32, seed=1)
    shared = swiglu(width=WIDTH, dtype=torch.float32, seed=3)
    routing = routing_of(tokens, 3, hot=False)
    x, residual = randn(tokens, HIDDEN, seed=7), randn(tokens, HIDDEN, seed=8)
    alone = kernels.moe(x[:2], Routing(routing.experts[:2], routing.weights[:2]), experts, shared, residual[:2])
    routing.experts[2:] = -1
    routing.weights[2:] = torch.nan
    x[2:] = torch.nan
    with poisoned():
        found = kernels.moe(x, routing, experts, shared, residual)
    assert torch.equal(found[2:], residual[2:])
    assert torch.equal(found[:2], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = randn(3, 2 * 1100, dtype=dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    with poisoned():
        found = kernels.silu_mul(gate_up)
    assert relative_error(found, F.silu(gate) * up) < TOLERANCE[dtype]


def test_every_size_of_step_has_a_tile() -> None:
    """All tiles give the same, whatever step they were made for."""
    tiles = {kernels.tile_of(tokens, 16, memory) for tokens in (1, 64, 256, 4096) for memory in (99 << 10, 227 << 10)}
    assert len(tiles) == 6
    assert {kernels.tile_of(tokens, 4, 99 << 10).inner for tokens in (1, 64, 256, 4096)} == {quantized.GROUP.value}
    experts = swiglu(EXPERTS, width=WIDTH, dtype=torch.float32, seed=1)
    routing = routing_of(14, 3, hot=True)
    x, residual = randn(14, HIDDEN, seed=7), torch.zeros(14, HIDDEN, device=DEVICE)
    exact = EagerOps().moe(x, Routing(routing.experts.long(), routing.weights), experts, None, residual)
    for tile in tiles:
        with poisoned():
            found = kernels.moe(x, routing, experts, None, residual, tile)
        assert relative_error(found, exact) < TOLERANCE[torch.float32]
