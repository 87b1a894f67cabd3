"""Rotary position embedding of the shared key and the queries' rope part, with YaRN (arXiv 2309.00071).

Checkpoints of this family store the rope dimensions as interleaved pairs: frequency i turns
(x[2i], x[2i + 1]). Rotating half against half, as Llama does, is another function of these weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.rope_config import RopeConfig


class Rotation(NamedTuple):
    """cos and sin of every token's angles, times YaRN's amplitude: made once a step, used by all layers."""

    cos: Tensor
    """[T, dim / 2] float32"""
    sin: Tensor
    """[T, dim / 2] float32"""


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """[dim / 2] float32: radians a position, fastest first.

    YaRN leaves fast dimensions alone, divides slow ones by `factor` and blends linearly between the
    dimensions that turn `beta_fast` and `beta_slow` times within the original context. The arithmetic is
    float32 as in the published implementations: checkpoints were trained with these very numbers, and
    more exact ones would drift from them by 1e-4 in the logits after a few thousand positions.
    """
    base = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.yarn is None:
        return 1.0 / base
    yarn = rope.yarn

    def turning(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times within the original context."""
        return (
            dim
            * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low = max(math.floor(turning(yarn.beta_fast)), 0)
    high = min(math.ceil(turning(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return (1.0 / (yarn.factor * base)) * ramp + (1.0 / base) * (1 - ramp)


def rotation(positions: Tensor, inv_freq: Tensor, amplitude: float) -> Rotation:
    """The angles of positions [T] (integers): a few hundred KB a step at most, so no table is kept."""
    angles = positions[:, None].float() * inv_freq
    return Rotation(angles.cos() * amplitude, angles.sin() * amplitude)


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """x [T, heads, dim] -> the same shape and dtype: every pair turned by its token's angle, in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned = pairs * torch.complex(rotation.cos, rotation.sin)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
