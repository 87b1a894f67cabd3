"""Latents in 8 bits: floats with four bits of exponent and three of mantissa (e4m3), and a scale for a token's.

The scale is a power of two, so that nothing is lost but by rounding to e4m3: the outcome is exact in bfloat16, and
scores may be scaled instead of latents. A number changes by a sixteenth of itself at most, unless it is less than 2^-14
of the token's largest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_fp8(latents: Tensor) -> tuple[Tensor, Tensor]:
    """[n, r] -> uint8 [n, r] and the scales [n] float32: the smallest power of two that keeps all within 448, e4m3's
    largest; NaN where a latent is not finite."""
    latents = latents.float()
    peak = latents.abs().amax(1)
    # 448 is 1.75 * 2^8: a mantissa above that of 1.75 carries into the exponent.
    exponent = (peak.clamp(min=2.0**-100).view(torch.int32) + 0x1FFFFF) & 0x7F800000
    scale = (exponent - (8 << 23)).view(torch.float32)
    numbers = (latents / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return numbers, torch.where(peak.isfinite(), scale, torch.nan)


def from_fp8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_fp8` rounded to; any shape whose last dimension shares a scale."""
    return numbers.view(torch.float8_e4m3fn).to(dtype) * scales[..., None].to(dtype)
