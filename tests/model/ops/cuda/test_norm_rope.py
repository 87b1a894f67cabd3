"""Norm, rotation and paged write against their eager twins in float32."""

from __future__ import annotations

import pytest
import torch

from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.norm import rms_norm
from model.ops.cuda.rope import rope_and_cache
from model.ops.eager.ops import EagerOps
from model.rotary import Rotation
from tests.model.ops.cuda.common import DEVICE, DTYPES, TOLERANCE, randn, relative_error

EAGER = EagerOps()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "stride"), [(1, 64, 64), (5, 48, 80), (3, 2048, 2048), (2, 7168, 7200)])
def test_rms_norm(rows: int, width: int, stride: int, dtype: torch.dtype) -> None:
    x = randn(rows, stride, seed=1, dtype=dtype)[:, :width] * 3
    x[0] *= 1e-3  # so that eps counts
    weight = randn(width, seed=2, dtype=dtype)
    exact = EAGER.rms_norm(x.float(), weight.float(), 1e-6)
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    assert relative_error(found, exact) < TOLERANCE[dtype]
    assert relative_error(found[0], exact[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (3, 40, 24), (1, 32, 16)])
def test_rope_and_cache(heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
    """Queries as the projection leaves them, between other numbers; every other token is padding."""
    tokens, nope, layers, layer = 6, 32, 2, 1
    q = randn(tokens, heads, nope + rope, seed=1, dtype=dtype)
    untouched = q.clone()
    kv = randn(tokens, rank + rope + 16, seed=2, dtype=dtype)[:, : rank + rope] * 2
    norm_weight = randn(rank, seed=3, dtype=dtype)
    angles = randn(tokens, rope // 2, seed=4)
    rotation = Rotation(angles.cos() * 1.1, angles.sin() * 1.1)
    slots = torch.tensor([2 * BLOCK_SIZE + 5, -1, 0, -1, 3 * BLOCK_SIZE + 63, -1], device=DEVICE)
    cache = LatentCache(5, layers, rank + rope, dtype, DEVICE)
    cache.data.fill_(torch.nan)
    exact = LatentCache(5, layers, rank + rope, torch.float32, DEVICE)
    exact.data.fill_(torch.nan)
    written = slots >= 0
    turned = EAGER.rope_and_cache(
        q[written][..., nope:].float(),
        kv[written].float(),
        norm_weight.float(),
        1e-6,
        Rotation(rotation.cos[written], rotation.sin[written]),
        slots[written],
        exact,
        layer,
    )
    found = rope_and_cache(q[..., nope:], kv, norm_weight, 1e-6, rotation, slots, cache, layer)
    assert torch.equal(q[..., :nope], untouched[..., :nope])
    assert relative_error(found[written], turned) < TOLERANCE[dtype]
    assert torch.equal(cache.data.isnan(), exact.data.isnan())
    assert relative_error(cache.data.nan_to_num(0.0), exact.data.nan_to_num(0.0)) < TOLERANCE[dtype]
