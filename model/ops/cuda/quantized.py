"""Weights in 8 and 4 bits: what they are rounded to, and their products as a Triton kernel.

A row's numbers lie in groups of 64 that share a bfloat16 scale; in int4, byte i of a group has numbers i and i + 32,
each plus 8. Kernels multiply the whole numbers, which bfloat16 holds exactly, and scale the float32 sum of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.interface import PackedWeight

GROUP = tl.constexpr(64)
HALF = tl.constexpr(32)
BITS = {"int8": 8, "int4": 4}
_ALIGNMENT = 128
_ROWS_AT_ONCE = 4096
"""Of a matrix that is packed: the head of 100,000 rows would take gigabytes in float32."""
MOST_FUSED = 256
"""Tokens up to which weights are multiplied as they are; for more they are made tensors, and cuBLAS computes."""


def packed_bytes(bits: int, out_features: int, in_features: int) -> tuple[int, int]:
    """Of one matrix: its numbers, and with its scales, rounded up so that the next one is aligned."""
    groups = triton.cdiv(in_features, GROUP.value)
    numbers = out_features * groups * (GROUP.value * bits // 8)
    return numbers, triton.cdiv(numbers + out_features * groups * 2, _ALIGNMENT) * _ALIGNMENT


def empty(number: int, bits: int, weight: Tensor, out_features: int | None = None) -> PackedWeight:
    """Room for so many weights of this shape, or of this width and so many rows."""
    rows = weight.shape[0] if out_features is None else out_features
    size = packed_bytes(bits, rows, weight.shape[1])[1]
    data = torch.zeros((number, size), dtype=torch.uint8, device=weight.device)
    return PackedWeight(data, bits, rows, weight.shape[1])


def pack_into(packed: PackedWeight, index: int, weight: Tensor, first_row: int = 0) -> None:
    """Round [n, in] to rows `first_row` and after of one of the matrices."""
    numbers, scales = planes(packed)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        part = weight[first : first + _ROWS_AT_ONCE].float()
        rows = slice(first_row + first, first_row + first + len(part))
        padded = torch.nn.functional.pad(part, (0, -part.shape[1] % GROUP.value))
        groups = padded.view(len(part), -1, GROUP.value)
        counted, scale = _rounded(groups, packed.format)
        scales[index, rows] = scale
        if packed.format == 4:
            shifted = (counted + 8).to(torch.uint8)
            stored = shifted[..., : HALF.value] | shifted[..., HALF.value :] << 4
        else:
            stored = counted.to(torch.int8).view(torch.uint8)
        numbers[index, rows] = stored.flatten(1)


def _rounded(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[n, G, 64] -> whole numbers and the scales [n, G] bfloat16. Of int4 scales, several sizes, the one with the least
    squared error is taken."""
    largest = groups.abs().amax(dim=2)
    if bits == 8:
        scale = (largest / 127).bfloat16()
        return _counted(groups, scale, 127), scale
    # The larger side of the range is the negative one: -8 to 7.
    signed = torch.where(groups.amax(dim=2) >= largest, -largest, largest)
    best, error = torch.zeros_like(largest).bfloat16(), torch.full_like(largest, torch.inf)
    for divisor in (8.0, 7.5, 7.0, 6.5, 6.0, 5.5, 5.0):
        scale = (signed / divisor).bfloat16()
        left = (groups - _counted(groups, scale, 7) * scale.float()[..., None]).square().sum(dim=2)
        best, error = torch.where(left < error, scale, best), torch.minimum(error, left)
    best = torch.where(largest.isfinite(), best, torch.nan)  # what is not finite stays so
    return _counted(groups, best, 7), best


def _counted(groups: Tensor, scale: Tensor, highest: int) -> Tensor:
    lowest = -highest if highest == 127 else -8
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    return (groups * inverse[..., None]).round().clamp(lowest, highest)


def planes(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Views: numbers [n, out, bytes] uint8 and scales [n, out, groups] bfloat16."""
    size, _ = packed_bytes(packed.format, packed.out_features, packed.in_features)
    groups = triton.cdiv(packed.in_features, GROUP.value)
    rows = packed.out_features
    number = len(packed.data)
    scales = packed.data[:, size : size + rows * groups * 2].view(torch.bfloat16)
    return packed.data[:, :size].view(number, rows, -1), scales.view(number, rows, groups)


def dequantized(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """[n, out, in] as the kernels take them."""
    numbers, scales = planes(packed)
    number, rows, groups = scales.shape
    if packed.format == 8:
        counted = numbers.view(torch.int8).view(number, rows, groups, GROUP.value)
    else:
        halves = numbers.view(number, rows, groups, HALF.value)
        counted = torch.cat((halves & 15, halves >> 4), dim=3).to(torch.int8) - 8
    values: Tensor = counted * scales[..., None].to(dtype)
    return values.flatten(2)[..., : packed.in_features].contiguous()


@triton.jit
def add_group(
    total: tl.tensor,
    numbers: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """total [C, P] and the product of one group: numbers [C, 32] and scale [C], pointers, with x [32, P] twice; `rows`
    [C] are there."""
    if BITS == 4:
        both = tl.load(numbers, mask=rows[:, None], other=0)
        low = ((both & 15).to(tl.int8) - 8).to(first.dtype)
        high = ((both >> 4).to(tl.int8) - 8).to(first.dtype)
    else:
        low = tl.load(numbers, mask=rows[:, None], other=0).to(tl.int8, bitcast=True).to(first.dtype)
        high = tl.load(numbers + 32, mask=rows[:, None], other=0).to(tl.int8, bitcast=True).to(first.dtype)
    part = tl.dot(low, first, input_precision="ieee")
    part = tl.dot(high, second, part, input_precision="ieee")
    return total + part * tl.load(scale, mask=rows, other=0.0).to(tl.float32)[:, None]


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, in] -> [T, out], on top of residual [T, out]."""
    if len(x) > MOST_FUSED:
        weight = dequantized(packed, x.dtype)[0]
        if residual is None:
            return torch.nn.functional.linear(x, weight, bias)
        return torch.addmm(residual if bias is None else residual + bias, x, weight.t())
    numbers, scales = planes(packed)
    y = torch.empty((len(x), packed.out_features), dtype=x.dtype, device=x.device)
    tokens = 16 if len(x) <= 16 else 32 if len(x) <= 32 else 64
    columns = 32 if len(x) <= 16 else 64
    _linear[(triton.cdiv(packed.out_features, columns), triton.cdiv(len(x), tokens))](
        x,
        numbers,
        scales,
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        len(x),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        OUT=packed.out_features,
        IN=packed.in_features,
        BITS=packed.format,
        BIASED=bias is not None,
        ADDED=residual is not None,
        BLOCK_COLUMNS=columns,
        BLOCK_TOKENS=tokens,
        num_warps=4,
        num_stages=6,
    )
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def _linear(
    x: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BITS: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    GROUPS: tl.constexpr = (IN + 63) // 64
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    half = tl.arange(0, 32)
    there, asked = column < OUT, token < num_tokens
    numbers_at = numbers + column.to(tl.int64)[:, None] * (GROUPS * 8 * BITS) + half[None, :]
    scale_at = scales + column.to(tl.int64) * GROUPS
    x_at = x + token.to(tl.int64)[None, :] * x_stride + half[:, None]
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_TOKENS), tl.float32)
    for group in range(GROUPS):
        left = IN - group * 64
        first = tl.load(x_at + group * 64, mask=(half < left)[:, None] & asked[None, :], other=0.0)
        second = tl.load(x_at + group * 64 + 32, mask=(half + 32 < left)[:, None] & asked[None, :], other=0.0)
        total = add_group(total, numbers_at + group * (8 * BITS), scale_at + group, there, first, second, BITS)
    if BIASED:
        total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[:, None]
    inside = there[:, None] & asked[None, :]
    if ADDED:
        source = residual + token.to(tl.int64)[None, :] * residual_stride + column[:, None]
        total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64)[None, :] * OUT + column[:, None], total, mask=inside)
