"""Rotary embedding: published frequencies, interleaved pairs, amplitude."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from model.rope_config import RopeConfig, YarnConfig
from model.rotary import inverse_frequencies, rotate_pairs, rotation

V2_LITE = RopeConfig(10000.0, YarnConfig(40, 4096, 32, 1, 0.707, 0.707))
KIMI_K2 = RopeConfig(50000.0, YarnConfig(32, 4096, 1, 1, 1.0, 1.0))
KIMI_64 = RopeConfig(50000.0, YarnConfig(64, 4096, 32, 1, 1.0, 1.0))


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (V2_LITE, {10: 0.0562341, 16: 0.0055, 23: 3.3338e-05, 31: 3.3338e-06}),
        (KIMI_K2, {10: 0.0340073, 16: 0.00447214, 23: 1.31059e-05, 31: 8.76441e-07}),
        (KIMI_64, {10: 0.028428, 16: 0.0015373, 23: 6.55293e-06, 31: 4.38221e-07}),
        (RopeConfig(10000.0), {0: 1.0, 10: 10000 ** (-20 / 64), 31: 10000 ** (-62 / 64)}),
    ],
    ids=["v2-lite", "k2", "k2-64", "plain"],
)
def test_frequencies_of_the_published_configs(rope: RopeConfig, expected: dict[int, float]) -> None:
    frequencies = inverse_frequencies(rope, 64)
    assert frequencies.shape == (32,)
    assert frequencies.dtype == torch.float32
    for i, value in expected.items():
        assert frequencies[i].item() == pytest.approx(value, rel=1e-5)


def test_pairs_are_neighbours_and_turn_by_position_times_frequency() -> None:
    inv_freq = torch.tensor([0.5, 0.01])
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 700])
    turned = rotate_pairs(x, rotation(positions, inv_freq, 1.25))
    for token, position in enumerate(positions.tolist()):
        for head in range(2):
            for i, frequency in enumerate((0.5, 0.01)):
                number = complex(*x[token, head, 2 * i : 2 * i + 2].tolist())
                expected = number * cmath.rect(1.25, position * frequency)
                found = complex(*turned[token, head, 2 * i : 2 * i + 2].tolist())
                assert abs(found - expected) < 1e-4


def test_the_product_of_two_rotated_vectors_depends_on_their_distance_only() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 16, generator=generator)
    inv_freq = inverse_frequencies(RopeConfig(10000.0), 16)

    def product(at: int, of: int) -> float:
        at_query = rotate_pairs(query, rotation(torch.tensor([at]), inv_freq, 1.0))
        at_key = rotate_pairs(key, rotation(torch.tensor([of]), inv_freq, 1.0))
        return float((at_query * at_key).sum())

    assert product(5, 2) == pytest.approx(product(1003, 1000), abs=1e-3)
    assert abs(product(5, 2) - product(2, 5)) > 1e-2


def test_low_precision_rounds_the_result_only() -> None:
    """Positions beyond 256 are not bfloat16 numbers, and neither are their angles."""
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    turn = rotation(torch.tensor([131_071]), inverse_frequencies(V2_LITE, 64), 1.0)
    turned = rotate_pairs(x, turn)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate_pairs(x.float(), turn).bfloat16())
    exact = 131_071 * inverse_frequencies(V2_LITE, 64).double()
    assert (turn.cos[0] - exact.cos()).abs().max() < 0.01
    assert math.isclose(turn.sin[0, 31].item(), math.sin(exact[31].item()), abs_tol=1e-6)
