"""Mixture of experts: gate and up with SiLU, down, and the weighted sum of each token's experts, a Triton kernel each.

Shared experts run as experts E, E + 1, ... of every token in the same launches. Products are transposed, weights
times activations: the side of a Hopper tensor core that is 64 wide then is a weight's, whatever the batch is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.cuda.align import _expert, align
from model.ops.cuda.device import shared_memory
from model.ops.cuda.quantized import add_group, planes
from model.ops.interface import LinearWeight, PackedWeight, Routing, SwigluWeights, unpacked

DIRECT_PAIRS = 32
"""Up to so many pairs each is a block by itself: nothing is sorted."""


class Tile(NamedTuple):
    """What one program computes: `pairs` x `columns` of a product, `inner` numbers of the sum at a time."""

    pairs: int
    columns: int
    inner: int
    warps: int
    stages: int


_TILES = json.loads(Path(__file__).with_name("tiles.json").read_text())
"""By what weights are: the tile of steps of up to so many tokens. `benchmarks.gpu_suite` measures such a table. With
quantised weights a tile takes a group at a time, to whose product a scale applies."""


def tile_of(tokens: int, bits: int, memory: int) -> Tile:
    """Weights are what is read in small steps, tensor cores what is busy in large ones. Stages are as many as fit into
    `memory` bytes: what all but one of them load waits there, for gate and up at once."""
    table = _TILES["bfloat16" if bits == 16 else "quantized"]
    tile = Tile(*next(tile for most, *tile in table if tokens <= most))
    loaded = (tile.pairs + 2 * tile.columns) * tile.inner * 2
    return tile._replace(stages=min(tile.stages, 1 + memory // loaded))


class _Weight(NamedTuple):
    """What a kernel needs of experts, or of the shared ones' MLP."""

    data: Tensor
    """[E, out, in], [out, in], or the numbers of quantised ones."""
    scales: Tensor
    """Of those; else the data again, unread."""
    stride: int
    """From expert to expert, in the data's elements."""
    scale_stride: int
    bits: int
    shape: tuple[int, int]
    """[out, in]"""


def _weight(weight: LinearWeight) -> _Weight:
    if isinstance(weight, PackedWeight):
        numbers, scales = planes(weight)
        shape = weight.out_features, weight.in_features
        return _Weight(numbers, scales, numbers.stride(0), scales.stride(0), weight.format, shape)
    weight = unpacked(weight)
    out_features, in_features = weight.shape[-2:]
    return _Weight(weight, weight, out_features * in_features, 0, 16, (out_features, in_features))


def moe(
    x: Tensor,
    routing: Routing,
    experts: SwigluWeights,
    shared: SwigluWeights | None,
    residual: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """As `Ops.moe`, by the `tile` of steps of this size or by another. A token whose experts are -1 touches no weights
    and gives its residual."""
    gate_up, down = _weight(experts.gate_up), _weight(experts.down)
    hidden, width = down.shape
    num_experts = len(down.data)
    shared_gate_up = gate_up if shared is None else _weight(shared.gate_up)
    shared_down = down if shared is None else _weight(shared.down)
    num_shared = 0 if shared is None else shared_down.shape[1] // width
    tokens, per_token = routing.experts.shape
    pairs = tokens * (per_token + num_shared)
    tile = tile or tile_of(tokens, down.bits, shared_memory(x.device))
    direct = pairs <= DIRECT_PAIRS
    if direct:
        blocks, block_pairs, block_experts = pairs, routing.experts, routing.experts
    else:
        aligned = align(routing.experts, num_experts, num_shared, tile.pairs)
        blocks, block_pairs, block_experts = len(aligned.experts), aligned.pairs, aligned.experts
    activated = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    outputs = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    for kernel, source, routed_weight, shared_weight, target in (
        (_up, x, gate_up, shared_gate_up, activated),
        (_down, activated, down, shared_down, outputs),
    ):
        kernel[(blocks * triton.cdiv(target.shape[1], tile.columns),)](
            source,
            routed_weight.data,
            shared_weight.data,
            routed_weight.scales,
            shared_weight.scales,
            target,
            routing.experts,
            block_pairs,
            block_experts,
            pairs,
            routed_weight.stride,
            routed_weight.scale_stride,
            BITS=routed_weight.bits,
            HIDDEN=hidden,
            WIDTH=width,
            EXPERTS=num_experts,
            SHARED=num_shared,
            PER_TOKEN=per_token,
            DIRECT=direct,
            BLOCK_PAIRS=tile.pairs,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_INNER=tile.inner,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    result = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(hidden))
    _sum[(tokens, triton.cdiv(hidden, block))](
        outputs,
        routing.experts,
        routing.weights,
        residual,
        result,
        residual.stride(0),
        HIDDEN=hidden,
        SHARED=num_shared,
        PER_TOKEN=per_token,
        BLOCK=block,
        num_warps=4,
    )
    return result


@triton.jit
def _block(
    experts: tl.tensor,
    block_pairs: tl.tensor,
    block_experts: tl.tensor,
    block: tl.tensor,
    num_pairs: tl.tensor,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
) -> tl.tensor:
    """The block's expert, -1 or EXPERTS + SHARED where there is nothing to do, and its pairs, num_pairs in gaps."""
    lane = tl.arange(0, BLOCK_PAIRS)
    if DIRECT:
        expert = _expert(experts, block, num_pairs, EXPERTS, SHARED, PER_TOKEN)
        pair = tl.where(lane == 0, block, num_pairs)
    else:
        expert = tl.load(block_experts + block)
        pair = tl.load(block_pairs + block * BLOCK_PAIRS + lane, mask=expert >= 0, other=0)
    return expert, pair


@triton.jit(do_not_specialize=["num_pairs"])
def _up(
    x: tl.tensor,
    routed: tl.tensor,
    shared: tl.tensor,
    routed_scales: tl.tensor,
    shared_scales: tl.tensor,
    activated: tl.tensor,
    experts: tl.tensor,
    block_pairs: tl.tensor,
    block_experts: tl.tensor,
    num_pairs: tl.tensor,
    expert_stride: tl.tensor,
    scale_stride: tl.tensor,
    BITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> None:
    """x [T, HIDDEN], routed [EXPERTS, 2 WIDTH, HIDDEN], shared [2 SHARED WIDTH, HIDDEN] -> activated [pairs, WIDTH]:
    silu(gate x) * up x."""
    COLUMN_BLOCKS: tl.constexpr = tl.cdiv(WIDTH, BLOCK_COLUMNS)
    block = tl.program_id(0) // COLUMN_BLOCKS
    expert, pair = _block(
        experts, block_pairs, block_experts, block, num_pairs, EXPERTS, SHARED, PER_TOKEN, DIRECT, BLOCK_PAIRS
    )
    if (expert < 0) | (expert >= EXPERTS + SHARED):
        return
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there, some_pair = column < WIDTH, (pair < num_pairs)[:, None]
    token = (pair // (PER_TOKEN + SHARED)).to(tl.int64)
    weight = routed + expert.to(tl.int64) * expert_stride
    gate_row, to_up = column.to(tl.int64), WIDTH
    if expert >= EXPERTS:
        weight = shared
        gate_row += (expert - EXPERTS).to(tl.int64) * WIDTH
        to_up = SHARED * WIDTH
    gate = tl.zeros((BLOCK_COLUMNS, BLOCK_PAIRS), tl.float32)
    up = tl.zeros((BLOCK_COLUMNS, BLOCK_PAIRS), tl.float32)
    if BITS == 16:
        inner = tl.arange(0, BLOCK_INNER)
        gate_at = weight + gate_row[:, None] * HIDDEN + inner[None, :]
        x_at = x + token[:, None] * HIDDEN + inner[None, :]
        for start in range(0, HIDDEN, BLOCK_INNER):
            left = (inner < HIDDEN - start)[None, :]
            x_tile = tl.trans(tl.load(x_at + start, mask=some_pair & left, other=0.0))
            gate_tile = tl.load(gate_at + start, mask=there[:, None] & left, other=0.0)
            up_tile = tl.load(gate_at + to_up * HIDDEN + start, mask=there[:, None] & left, other=0.0)
            gate = tl.dot(gate_tile, x_tile, gate, input_precision="ieee")
            up = tl.dot(up_tile, x_tile, up, input_precision="ieee")
    else:
        GROUPS: tl.constexpr = (HIDDEN + 63) // 64
        half = tl.arange(0, 32)
        scale_at = routed_scales + expert.to(tl.int64) * scale_stride
        if expert >= EXPERTS:
            scale_at = shared_scales
        scale_rows = scale_at + gate_row * GROUPS
        rows = weight + gate_row[:, None] * (GROUPS * 8 * BITS) + half[None, :]
        x_at = x + token[:, None] * HIDDEN + half[None, :]
        for group in range(GROUPS):
            left = HIDDEN - group * 64
            first = tl.load(x_at + group * 64, mask=some_pair & (half < left)[None, :], other=0.0)
            second = tl.load(x_at + group * 64 + 32, mask=some_pair & (half + 32 < left)[None, :], other=0.0)
            first, second = tl.trans(first), tl.trans(second)
            gate_at = rows + group * (8 * BITS)
            up_at = gate_at + to_up * (GROUPS * 8 * BITS)
            gate = add_group(gate, gate_at, scale_rows + group, there, first, second, BITS)
            up = add_group(up, up_at, scale_rows + to_up * GROUPS + group, there, first, second, BITS)
    value = tl.trans(gate * tl.sigmoid(gate) * up)
    target = activated + pair.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(target, value, mask=some_pair & there[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def _down(
    activated: tl.tensor,
    routed: tl.tensor,
    shared: tl.tensor,
    routed_scales: tl.tensor,
    shared_scales: tl.tensor,
    outputs: tl.tensor,
    experts: tl.tensor,
    block_pairs: tl.tensor,
    block_experts: tl.tensor,
    num_pairs: tl.tensor,
    expert_stride: tl.tensor,
    scale_stride: tl.tensor,
    BITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> None:
    """activated [pairs, WIDTH], routed [EXPERTS, HIDDEN, WIDTH], shared [HIDDEN, SHARED WIDTH] -> outputs [pairs,
    HIDDEN]."""
    COLUMN_BLOCKS: tl.constexpr = tl.cdiv(HIDDEN, BLOCK_COLUMNS)
    block = tl.program_id(0) // COLUMN_BLOCKS
    expert, pair = _block(
        experts, block_pairs, block_experts, block, num_pairs, EXPERTS, SHARED, PER_TOKEN, DIRECT, BLOCK_PAIRS
    )
    if (expert < 0) | (expert >= EXPERTS + SHARED):
        return
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    there, some_pair = column < HIDDEN, (pair < num_pairs)[:, None]
    row = column.to(tl.int64)
    weight = routed + expert.to(tl.int64) * expert_stride
    shared_expert = tl.maximum(expert - EXPERTS, 0)
    value = tl.zeros((BLOCK_COLUMNS, BLOCK_PAIRS), tl.float32)
    if BITS == 16:
        inner = tl.arange(0, BLOCK_INNER)
        stride = WIDTH
        if expert >= EXPERTS:
            weight = shared + shared_expert * WIDTH
            stride = SHARED * WIDTH
        weight_at = weight + row[:, None] * stride + inner[None, :]
        activated_at = activated + pair.to(tl.int64)[:, None] * WIDTH + inner[None, :]
        for start in range(0, WIDTH, BLOCK_INNER):
            left = (inner < WIDTH - start)[None, :]
            activated_tile = tl.trans(tl.load(activated_at + start, mask=some_pair & left, other=0.0))
            weight_tile = tl.load(weight_at + start, mask=there[:, None] & left, other=0.0)
            value = tl.dot(weight_tile, activated_tile, value, input_precision="ieee")
    else:
        GROUPS: tl.constexpr = (WIDTH + 63) // 64
        half = tl.arange(0, 32)
        scale_at = routed_scales + expert.to(tl.int64) * scale_stride
        groups = GROUPS
        if expert >= EXPERTS:  # a shared expert's columns are whole groups: see `CudaOps`
            weight = shared + shared_expert * (GROUPS * 8 * BITS)
            scale_at = shared_scales + shared_expert * GROUPS
            groups = SHARED * GROUPS
        rows = weight + row[:, None] * groups * (8 * BITS) + half[None, :]
        scale_rows = scale_at + row * groups
        activated_at = activated + pair.to(tl.int64)[:, None] * WIDTH + half[None, :]
        for group in range(GROUPS):
            left = WIDTH - group * 64
            first = tl.load(activated_at + group * 64, mask=some_pair & (half < left)[None, :], other=0.0)
            second = tl.load(activated_at + group * 64 + 32, mask=some_pair & (half + 32 < left)[None, :], other=0.0)
            number_at = rows + group * (8 * BITS)
            value = add_group(value, number_at, scale_rows + group, there, tl.trans(first), tl.trans(second), BITS)
    target = outputs + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(target, tl.trans(value), mask=some_pair & there[None, :])


@triton.jit
def _sum(
    outputs: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    residual: tl.tensor,
    result: tl.tensor,
    residual_stride: tl.tensor,
    HIDDEN: tl.constexpr,
    SHARED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a token and block of columns; in the order of the router's choice, whoever the neighbours are."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    routed = tl.load(experts + token * PER_TOKEN) >= 0
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(PER_TOKEN + SHARED):
        source = outputs + (token * (PER_TOKEN + SHARED) + place) * HIDDEN + column
        value = tl.load(source, mask=inside & routed, other=0.0).to(tl.float32)
        if place < PER_TOKEN:
            value *= tl.load(weights + token * PER_TOKEN + place)
        total += value
    total = tl.where(routed, total, 0.0) + tl.load(residual + token * residual_stride + column, mask=inside, other=0.0)
    tl.store(result + token * HIDDEN + column, total, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], gates first -> silu(gate) * up [T, I]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(tokens, triton.cdiv(width, block))](gate_up, y, WIDTH=width, BLOCK=block, num_warps=4)
    return y


@triton.jit
def _silu_mul(gate_up: tl.tensor, y: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = gate_up + row * 2 * WIDTH + column
    gate = tl.load(source, mask=column < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, gate * tl.sigmoid(gate) * up, mask=column < WIDTH)
