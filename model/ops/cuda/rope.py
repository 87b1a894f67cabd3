"""Rotation of queries and shared key, norm of the latent and the paged write, as one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.fp8 import rounded, scale_of
from model.rotary import Rotation


def rope_and_cache(
    q_rope: Tensor,
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    rotation: Rotation,
    slot_mapping: Tensor,
    cache: LatentCache,
    layer: int,
) -> Tensor:
    """As `Ops.rope_and_cache`; q_rope is turned in place. A slot of -1 writes nothing to the cache."""
    tokens, heads, rope = q_rope.shape
    rank = norm_weight.shape[0]
    latents, scales, keys = cache.planes(layer, rank)
    _rope_and_cache[(tokens,)](
        q_rope,
        kv,
        norm_weight,
        rotation.cos,
        rotation.sin,
        slot_mapping,
        latents,
        scales,
        keys,
        q_rope.stride(0),
        q_rope.stride(1),
        kv.stride(0),
        latents.stride(0),
        latents.stride(1),
        0 if scales is None else scales.stride(0),
        keys.stride(0),
        keys.stride(1),
        eps,
        HEADS=heads,
        RANK=rank,
        ROPE=rope,
        PAGE=BLOCK_SIZE,
        BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(rope),
        num_warps=8 if heads > 32 else 4,
    )
    return q_rope


@triton.jit
def _turn(pairs: tl.tensor, cos: tl.tensor, sin: tl.tensor, ROWS: tl.constexpr, ROPE: tl.constexpr) -> tl.tensor:
    """[ROWS, ROPE] in interleaved pairs, cos and sin [ROPE / 2] -> the same, turned, in float32."""
    even, odd = tl.split(tl.reshape(pairs.to(tl.float32), (ROWS, ROPE // 2, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, ROPE))


@triton.jit
def _rope_and_cache(
    q_rope: tl.tensor,
    kv: tl.tensor,
    norm_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slot_mapping: tl.tensor,
    latents: tl.tensor,
    scales: tl.tensor | None,
    keys: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    kv_stride: tl.tensor,
    latent_page_stride: tl.tensor,
    latent_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
) -> None:
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_ROPE // 2)
    angle = token * (ROPE // 2) + pair
    cos_of = tl.load(cos + angle, mask=pair < ROPE // 2, other=0.0)
    sin_of = tl.load(sin + angle, mask=pair < ROPE // 2, other=0.0)

    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_ROPE)
    inside = (head < HEADS) & (column < ROPE)[None, :]
    q = q_rope + token * q_token_stride + head * q_head_stride + column[None, :]
    turned = _turn(tl.load(q, mask=inside, other=0.0), cos_of, sin_of, BLOCK_HEADS, BLOCK_ROPE)
    tl.store(q, turned, mask=inside)

    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // PAGE, slot % PAGE
        source = kv + token * kv_stride
        number = tl.arange(0, BLOCK_RANK)
        latent = tl.load(source + number, mask=number < RANK, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(latent * latent) / RANK + eps)
        gain = tl.load(norm_weight + number, mask=number < RANK, other=0.0).to(tl.float32)
        normed = latent * scale * gain
        target = latents + page * latent_page_stride + offset * latent_stride + number
        if scales is None:
            tl.store(target, normed, mask=number < RANK)
        else:
            common = scale_of(normed)
            tl.store(scales + page * scale_page_stride + offset, common)
            tl.store(target, rounded(normed / common), mask=number < RANK)
        key = tl.load(source + RANK + column[None, :], mask=(column < ROPE)[None, :], other=0.0)
        turned_key = _turn(key, cos_of, sin_of, 1, BLOCK_ROPE)
        target = keys + page * key_page_stride + offset * key_stride + column[None, :]
        tl.store(target, turned_key, mask=(column < ROPE)[None, :])
