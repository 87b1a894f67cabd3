"""Latents in 8 bits as `model/fp8_latents.py` has them, by arithmetic alone: GPUs before sm_89 do not convert them, and
Triton's interpreter does it otherwise than a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(numbers: tl.tensor) -> tl.tensor:
    """float32, all within 448 -> uint8: the nearest e4m3, of two the even one."""
    sign = (numbers.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.abs(numbers)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9, as those of float32 are from 2^14 on.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return (sign | tl.where(magnitude < 0.015625, small, normal)).to(tl.uint8)


@triton.jit
def widened(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """int32 [M, N / 4], four numbers each -> [M, N]: what they mean, exactly; no NaN is expected."""
    even = tl.join(_byte(words << 24, dtype), _byte(words << 8, dtype))
    odd = tl.join(_byte(words << 16, dtype), _byte(words, dtype))
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 4))


@triton.jit
def _byte(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The highest one: sign, exponent and mantissa go where a float32 has them, whose exponent counts from 120 less."""
    bits = (words >> 4) & -0x78100000
    return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)


@triton.jit
def scale_of(latents: tl.tensor) -> tl.tensor:
    """float32 of one token -> the power of two that `to_fp8` divides them by; NaN where one is not finite."""
    magnitude = tl.abs(latents)
    finite = tl.where(magnitude < float("inf"), magnitude, 0.0)
    peak = tl.maximum(tl.max(finite), 7.888609052210118e-31)
    exponent = (peak.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
    scale = (exponent - (8 << 23)).to(tl.float32, bitcast=True)
    return tl.where(tl.sum(magnitude) < float("inf"), scale, float("nan"))
