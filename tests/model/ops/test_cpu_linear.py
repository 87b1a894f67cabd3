"""Packed weights and the linear kernel, on every instruction set that this machine runs."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from model.ops.cpu import library as binding
from model.ops.cpu.library import ISAS, Format, Library

GROUP, PANEL = 64, 64
FORMATS = (Format.BF16, Format.INT8, Format.INT4)
"""Of linear layers."""
SHAPES = [
    (1, 64, 32),
    (1, 1, 64),
    (2, 63, 96),
    (3, 100, 160),
    (5, 65, 1056),
    (8, 70, 544),
    (13, 192, 288),
    (131, 130, 192),
    (3, 1217, 96),
]
"""M, N, K: every number of rows that a tile can have left, incomplete panels, groups and blocks of k, several panels to
a job."""


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def pack(kernels: Library, format: Format, weight: Tensor) -> Tensor:
    """[N, K]"""
    packed = torch.full((kernels.packed_bytes(format, *weight.shape),), 0xFF, dtype=torch.uint8)
    kernels.pack(format, weight.T.contiguous() if format is Format.INT8_INPUTS else weight, packed)
    return packed


def linear(kernels: Library, format: Format, x: Tensor, packed: Tensor, n: int) -> Tensor:
    y = torch.full((len(x), n), torch.nan)
    kernels.linear(format, x, packed, y)
    return y


def unpack(format: Format, packed: Tensor, n: int, k: int) -> Tensor:
    """[N, K] float32: what a packed weight stands for, by the layout that packed.h describes."""
    panels = -(-n // PANEL)
    if format is Format.BF16:
        pairs = packed.view(torch.bfloat16).view(panels, k // 2, PANEL, 2)
        return pairs.permute(0, 2, 1, 3).reshape(panels * PANEL, k)[:n].float()
    rows, at, values = packed.view(panels, -1), 0, []
    for first in range(0, k, GROUP):
        count = min(GROUP, k - first)
        stop = at + PANEL * count // (2 if format is Format.INT4 else 1)
        numbers, scales = rows[:, at:stop], rows[:, stop : stop + 2 * PANEL].contiguous().view(torch.bfloat16).float()
        at = stop + 2 * PANEL
        if format is Format.INT4:
            numbers = numbers.reshape(panels, count // 8, 1, PANEL, 4)
            numbers = torch.cat((numbers & 15, numbers >> 4), dim=2)
        counted = numbers.reshape(panels, count // 4, PANEL, 4).float() - (8 if format is Format.INT4 else 128)
        if format is Format.INT8_INPUTS:
            meant = counted * scales[:, :count].view(panels, count // 4, 1, 4)
        else:
            meant = counted * scales[:, None, :, None]
        values.append(meant.permute(0, 2, 1, 3).reshape(panels * PANEL, count))
    return torch.cat(values, dim=1)[:n]


def whole_numbers(m: int, k: int, seed: int) -> Tensor:
    """Activations that are the same as int8: whole numbers, up to 127 in every group, times a power of two."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // GROUP)
    numbers = torch.randint(-127, 128, (m, groups, GROUP), generator=generator)
    numbers[..., 7] = 127
    scales = 2.0 ** torch.randint(-9, 2, (m, groups, 1), generator=generator)
    return (numbers * scales).view(m, -1)[:, :k].bfloat16().contiguous()


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_product_is_that_of_what_was_packed(kernels: Library, format: Format, m: int, n: int, k: int) -> None:
    x, weight = whole_numbers(m, k, seed=1), randn(n, k, seed=2) * 0.05
    packed = pack(kernels, format, weight)
    meant = unpack(format, packed, n, k)
    if format is Format.BF16:
        assert torch.equal(meant, weight.float())
    expected = x.double() @ meant.double().T
    assert relative_error(linear(kernels, format, x, packed, n), expected) < 2e-6


@pytest.mark.parametrize(("format", "bound"), [(Format.INT8, 0.009), (Format.INT4, 0.093)])
def test_quantised_product_is_near(kernels: Library, format: Format, bound: float) -> None:
    x, weight = randn(64, 512, seed=3), randn(128, 512, seed=4) * 0.02
    expected = x.float() @ weight.float().T
    assert relative_error(linear(kernels, format, x, pack(kernels, format, weight), 128), expected) < bound


def test_int4_scales_are_better_than_the_largest_number_s(kernels: Library) -> None:
    weight = randn(192, 1024, seed=5) * 0.02
    weight[:, ::97] *= 4
    groups = weight.float().view(192, -1, GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scales).round() * scales).view_as(weight)
    searched = unpack(Format.INT4, pack(kernels, Format.INT4, weight), *weight.shape)
    assert relative_error(searched, weight.float()) < 0.9 * relative_error(plain, weight.float())


@pytest.mark.parametrize("format", FORMATS)
def test_strides_bias_and_residual(kernels: Library, format: Format) -> None:
    """x and y lie in wider tensors full of NaN; what is beside y stays as it was, and y may be the residual."""
    m, n, k = 7, 100, 96
    weight, bias = randn(n, k, seed=6), randn(n, seed=7)
    packed = pack(kernels, format, weight)
    x, y = torch.full((2, m, 200), torch.nan, dtype=torch.bfloat16)
    x[:, 40 : 40 + k] = randn(m, k, seed=8)
    residual = randn(m, n, seed=9)
    y[:, 50 : 50 + n] = residual
    plain = linear(kernels, format, x[:, 40 : 40 + k].contiguous(), packed, n)
    kernels.linear(format, x[:, 40 : 40 + k], packed, y[:, 50 : 50 + n], bias, y[:, 50 : 50 + n])
    assert torch.equal(y[:, 50 : 50 + n], ((plain + bias.float()) + residual.float()).bfloat16())
    assert y[:, :50].isnan().all()
    assert y[:, 50 + n :].isnan().all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(kernels: Library, format: Format) -> None:
    n, k = 200, 416
    packed = pack(kernels, format, randn(n, k, seed=10))
    x = randn(130, k, seed=11)
    kernels.set_threads(1)
    alone = torch.cat([linear(kernels, format, row[None], packed, n) for row in x[:32]])
    for threads in (1, 3):
        kernels.set_threads(threads)
        for rows in (2, 5, 8, 32, 130):
            both = min(rows, 32)
            assert torch.equal(linear(kernels, format, x[:rows], packed, n)[:both], alone[:both])


@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_infinity_stay_in_their_row(kernels: Library, format: Format) -> None:
    x, weight = randn(4, 64, seed=12), randn(70, 64, seed=13)
    packed = pack(kernels, format, weight)
    clean = linear(kernels, format, x, packed, 70)
    x[1, 5], x[2, 40] = torch.nan, torch.inf
    y = linear(kernels, format, x, packed, 70)
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("format", [Format.INT8, Format.INT4])
def test_groups_of_zeros_of_tiny_numbers_and_with_nan(kernels: Library, format: Format) -> None:
    weight = randn(64, 4 * GROUP, seed=14)
    weight[:, :GROUP] = 0
    weight[:, GROUP : 2 * GROUP] *= 1e-12
    meant = unpack(format, pack(kernels, format, weight), *weight.shape)
    assert torch.equal(meant[:, :GROUP], torch.zeros(64, GROUP))
    tiny = slice(GROUP, 2 * GROUP)
    assert relative_error(meant[:, tiny], weight[:, tiny].float()) < 0.1
    weight[3, 70] = torch.nan
    meant = unpack(format, pack(kernels, format, weight), *weight.shape)
    assert meant[3, GROUP : 2 * GROUP].isnan().all()
    assert int(meant.isnan().sum()) == GROUP


@pytest.mark.parametrize(("n", "k"), [(128, 128), (96, 160), (512, 96), (32, 32)])
def test_a_matrix_and_its_transpose_are_the_same_numbers(kernels: Library, n: int, k: int) -> None:
    weight = randn(n, k, seed=14) * torch.logspace(-3, 0, n)[:, None].bfloat16()
    transposed = unpack(Format.INT8_INPUTS, pack(kernels, Format.INT8_INPUTS, weight.T), k, n)
    assert torch.equal(transposed.T, unpack(Format.INT8, pack(kernels, Format.INT8, weight), n, k))


@pytest.mark.parametrize("format", Format)
def test_packing_is_the_same_on_every_instruction_set(format: Format) -> None:
    library = binding.library()
    if library is None:
        pytest.skip("the kernels are not built")
    best, weight = library.isa, randn(100, 256, seed=15)
    expected = unpack(format, pack(library, format, weight), *weight.shape)
    for isa in ISAS:
        if library.use_isa(isa):
            other = unpack(format, pack(library, format, weight), *weight.shape)
            # The order of a sum may tip the choice between two scales that fit equally well, nothing more.
            assert float((other != expected).float().mean()) < 0.02, isa
    assert library.use_isa(best)


def test_nothing_to_do() -> None:
    library = binding.library()
    if library is None:
        pytest.skip("the kernels are not built")
    packed = pack(library, Format.BF16, randn(64, 32, seed=16))
    for format in FORMATS:
        assert linear(library, format, randn(0, 32, seed=17), packed, 64).shape == (0, 64)


def test_unknown_instruction_sets_are_refused() -> None:
    library = binding.library()
    if library is None:
        pytest.skip("the kernels are not built")
    before = library.isa
    assert not library.use_isa("mmx")
    assert library.isa == before
    assert ctypes.sizeof(binding.AttentionShape) == 15 * 8
    assert ctypes.sizeof(binding.RouterShape) == 6 * 8
