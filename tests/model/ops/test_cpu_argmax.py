"""The kernel that chooses greedily, on every instruction set that this machine runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.ops.cpu.library import Library

LENGTHS = (1, 3, 15, 16, 17, 511, 512, 513, 1030, 8192)
"""Rests that fill no register, and one, two and more of the pieces that are looked at together."""


def argmax(kernels: Library, logits: Tensor) -> list[int]:
    chosen = torch.full((len(logits),), -7)
    kernels.argmax(logits, chosen)
    return chosen.tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_first_of_the_largest(kernels: Library, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    logits = torch.randint(-9, 9, (37, length), generator=generator).float()  # many are equal
    assert argmax(kernels, logits) == [row.index(max(row)) for row in logits.tolist()]
    assert argmax(kernels, logits - 1e30) == [0] * 37
    places = torch.randint(length, (37, 1), generator=generator)
    assert argmax(kernels, logits.scatter(1, places, 10.0)) == places.flatten().tolist()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_everywhere(kernels: Library, length: int, value: float) -> None:
    for place in {0, length // 2, length - 1}:
        logits = torch.arange(3 * length).view(3, length).float()
        logits[1, place] = value
        assert argmax(kernels, logits) == [length - 1, -1, length - 1]
    assert argmax(kernels, torch.full((1, length), value)) == [-1]
