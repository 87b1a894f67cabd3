"""The kernels that choose tokens, beside their twin, on every instruction set that this machine runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import sampler as twin
from model.batch import NONE_LEFT, NOT_FINITE
from model.ops.cpu.library import Library
from model.ops.cpu.ops import CpuOps
from model.sampler import SamplingInputs
from tests.model.test_sampler import inputs_of, random_rows

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


def draw(kernels: Library, logits: Tensor, inputs: SamplingInputs) -> list[int]:
    chosen = torch.full((len(logits),), -7)
    columns = inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.seed.view(np.int64), inputs.position
    kernels.draw(logits, *map(torch.from_numpy, columns), chosen)
    return chosen.tolist()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 1e4])
def test_drawn_as_the_twin_draws(kernels: Library, length: int, spread: float) -> None:
    """Flat logits and peaked ones, hot and cold rows and greedy ones, and ids that cannot be drawn."""
    rows: list[dict[str, Any]] = [
        {"temperature": temperature, "seed": seed, "position": seed * 7}
        for seed, temperature in enumerate([0.0, 1e-40, 0.01, 0.3, 1.0, 1.0, 1.0, 2.0, 1e6] * 4)
    ]
    logits = torch.randn((len(rows), length), generator=torch.Generator().manual_seed(length)) * spread
    logits[:, 0] -= 3.0
    assert draw(kernels, logits, inputs_of(rows)) == twin.sample(logits.clone(), inputs_of(rows)).tolist()
    limits = {"limits": {"banned": list(range(0, length, 3))}}
    expected = twin.sample(logits.clone(), inputs_of([row | limits for row in rows], length)).tolist()
    logits[:, ::3] = -math.inf
    assert draw(kernels, logits, inputs_of(rows)) == [max(token_id, -1) for token_id in expected]


LIMITS: list[dict[str, Any]] = [
    *({"top_k": k} for k in (1, 2, 7, 100, 511, 5000)),
    *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.999999)),
    *({"min_p": p} for p in (1e-30, 0.01, 0.3, 1.0)),
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("length", [1, 3, 17, 513, 2000])
@pytest.mark.parametrize("values", ["flat", "peaked", "tied", "equal"])
def test_truncated_as_the_twin_truncates(kernels: Library, length: int, values: str) -> None:
    """Of equal logits the first ids stay, in the middle of a vector too."""
    rows: list[dict[str, Any]] = [
        limits | {"temperature": temperature, "seed": seed, "position": 3 * seed + length}
        for limits in LIMITS
        for seed, temperature in enumerate([0.7, 1.0, 3.0, 40.0])
    ]
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn((len(rows), length), generator=generator) * {"flat": 0.1, "peaked": 6.0}.get(values, 1.5)
    if values == "tied":
        logits = logits.round()
    if values == "equal":
        logits.fill_(-2.5)
    assert draw(kernels, logits, inputs_of(rows)) == twin.sample(logits.clone(), inputs_of(rows)).tolist()
    limits = {"limits": {"banned": list(range(1, length, 2))}}
    expected = twin.sample(logits.clone(), inputs_of([row | limits for row in rows], length)).tolist()
    logits[:, 1::2] = -math.inf
    assert draw(kernels, logits, inputs_of(rows)) == expected


def test_no_id_comes_that_is_not_kept(kernels: Library) -> None:
    """And over many draws every one comes that is."""
    logits = torch.randn(200, generator=torch.Generator().manual_seed(8)).round(decimals=1)
    for limits in ({"top_k": 20}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 60, "top_p": 0.7}):
        rows = [limits | {"position": i, "temperature": 2.0} for i in range(3000)]
        inputs = inputs_of(rows)
        weights = twin.boltzmann(logits[None], inputs.temperature[:1])
        twin.truncate(weights, inputs.top_k[:1], inputs.top_p[:1], inputs.min_p[:1])
        drawn = set(draw(kernels, logits.repeat(3000, 1), inputs))
        assert drawn == set(weights[0].nonzero().flatten().tolist())


def test_ids_come_as_often_as_they_should(kernels: Library) -> None:
    share = torch.tensor([0.5, 0.25, 0.125, 0.125])
    rows = [{"position": i} for i in range(4000)]
    counts = np.bincount(draw(kernels, share.log().repeat(4000, 1), inputs_of(rows)), minlength=4) / 4000
    assert np.abs(counts - share.numpy()).max() < 0.03


def test_the_operation_draws_as_the_twin_whatever_is_asked(kernels: Library) -> None:
    """Limits, penalties and rows that are not finite."""
    ops = CpuOps(kernels, threads=2)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = random_rows(24, 300, rng)
        logits = torch.from_numpy(rng.normal(0, 3, (24, 300)).astype(np.float32))
        logits[3, 5], logits[9, 0], logits[17, 299] = math.nan, -math.inf, math.inf
        rows[4]["limits"] = rows[17]["limits"] = {"allowed": [3], "banned": [3]}
        expected = twin.sample(logits.clone(), inputs_of(rows, 300)).tolist()
        assert [expected[i] for i in (3, 4, 9, 17)] == [NOT_FINITE, NONE_LEFT, NOT_FINITE, NOT_FINITE]
        assert ops.sample(logits, inputs_of(rows, 300)).tolist() == expected
