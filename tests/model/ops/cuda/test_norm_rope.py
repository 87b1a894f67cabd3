"""Norm, rotation and paged write against their eager twins in float32."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda import fp8
from model.ops.cuda.norm import rms_norm
from model.ops.cuda.rope import rope_and_cache
from model.ops.eager.ops import EagerOps
from model.rotary import Rotation
from tests.model.ops.cuda.common import DEVICE, DTYPES, TOLERANCE, poisoned, randn, relative_error

EAGER = EagerOps()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "stride"), [(1, 64, 64), (5, 48, 80), (3, 2048, 2048), (2, 7168, 7200)])
def test_rms_norm(rows: int, width: int, stride: int, dtype: torch.dtype) -> None:
    x = randn(rows, stride, seed=1, dtype=dtype)[:, :width] * 3
    x[0] *= 1e-3  # so that eps counts
    weight = randn(width, seed=2, dtype=dtype)
    exact = EAGER.rms_norm(x.float(), weight.float(), 1e-6)
    with poisoned():
        found = rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    assert relative_error(found, exact) < TOLERANCE[dtype]
    assert relative_error(found[0], exact[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (3, 40, 24), (1, 32, 16)])
def test_rope_and_cache(heads: int, rank: int, rope: int, fp8: bool, dtype: torch.dtype) -> None:
    """Queries as the projection leaves them, between other numbers; every other token is padding."""
    tokens, nope, layers, layer = 6, 32, 2, 1
    q = randn(tokens, heads, nope + rope, seed=1, dtype=dtype)
    untouched = q.clone()
    kv = randn(tokens, rank + rope + 16, seed=2, dtype=dtype)[:, : rank + rope] * 2
    kv[0] *= 1e-3  # so that eps counts
    norm_weight = randn(rank, seed=3, dtype=dtype)
    angles = randn(tokens, rope // 2, seed=4)
    rotation = Rotation(angles.cos() * 1.1, angles.sin() * 1.1)
    slots = torch.tensor([2 * BLOCK_SIZE + 5, -1, 0, -1, 3 * BLOCK_SIZE + 63, -1], device=DEVICE)
    cache, exact = (
        LatentCache(5, layers, rank + rope, kind, DEVICE, fp8_latents=rank if fp8 else 0)
        for kind in (dtype, torch.float32)
    )
    for one in (cache, exact):
        one.data.view(torch.uint8).fill_(255)  # NaN
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
    with poisoned():
        found = rope_and_cache(q[..., nope:], kv, norm_weight, 1e-6, rotation, slots, cache, layer)
    assert torch.equal(q[..., :nope], untouched[..., :nope])
    assert relative_error(found[written], turned) < TOLERANCE[dtype]
    for one in range(layers):
        latents, scales, keys = cache.planes(one, rank)
        exact_latents, exact_scales, exact_keys = exact.planes(one, rank)
        written_planes = [(keys, exact_keys)]
        if scales is None:
            written_planes.append((latents, exact_latents))
        else:
            assert torch.equal(scales.nan_to_num(), exact_scales.nan_to_num())
            differing = latents != exact_latents  # at a border between two
            assert differing.float().mean() < 1e-3
            assert (latents[differing].int() - exact_latents[differing].int()).abs().le(1).all()
        for found_plane, exact_plane in written_planes:
            assert torch.equal(found_plane.isnan(), exact_plane.isnan())
            if one == layer:
                assert relative_error(found_plane.nan_to_num(), exact_plane.nan_to_num()) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_latents_that_are_not_finite_are_kept_so() -> None:
    cache = LatentCache(1, 1, 48, torch.float32, DEVICE, fp8_latents=32)
    kv = randn(3, 48)
    kv[1, 7], kv[2, 5] = torch.nan, torch.inf
    rotation = Rotation(*torch.ones(2, 3, 8, device=DEVICE))
    slots, gains = torch.arange(3, device=DEVICE), torch.ones(32, device=DEVICE)
    rope_and_cache(randn(3, 2, 16), kv, gains, 1e-6, rotation, slots, cache, 0)
    assert cache.read(slots)[:, :32].isnan().all(dim=1).tolist() == [False, True, True]


def test_every_number_of_8_bits() -> None:
    """Widened as torch does, and rounded back to itself; what lies between two goes to the nearer, or the even one."""
    numbers = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)
    meant = numbers.view(torch.float8_e4m3fn).float()
    padded = torch.cat((numbers, numbers[:2])).to(DEVICE)
    found = torch.empty(256, device=DEVICE)
    _widen[(1,)](padded.view(torch.int32), found, WORDS=64)
    assert torch.equal(found[:254].cpu(), meant)
    half = meant[1:127]
    middle = (half[1:] + half[:-1]) / 2
    values = torch.cat((meant, middle, -middle, middle * (1 + 2**-20), middle * (1 - 2**-20), torch.zeros(2)))
    values = torch.nn.functional.pad(values, (0, 1024 - len(values))).to(DEVICE)
    rounded_numbers = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    _round[(1,)](values, rounded_numbers, NUMBER=1024)
    assert torch.equal(rounded_numbers, values.to(torch.float8_e4m3fn).view(torch.uint8))


@triton.jit
def _widen(words: tl.tensor, target: tl.tensor, WORDS: tl.constexpr) -> None:
    column = tl.arange(0, WORDS)[None, :]
    values = fp8.widened(tl.load(words + column), tl.float32)
    tl.store(target + tl.arange(0, 4 * WORDS)[None, :], values)


@triton.jit
def _round(values: tl.tensor, target: tl.tensor, NUMBER: tl.constexpr) -> None:
    column = tl.arange(0, NUMBER)
    tl.store(target + column, fp8.rounded(tl.load(values + column)))
