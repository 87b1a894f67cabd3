"""Choosing on the device against its twin in torch and numpy: the same ids, whatever is asked of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import sampler as twin
from model.batch import NONE_LEFT, NOT_FINITE
from model.ops.cuda.ops import CudaOps
from model.ops.cuda.sampler import sample
from tests.model.ops.cuda.common import DEVICE, poisoned
from tests.model.ops.cuda.test_graphs import CaptureList
from tests.model.test_sampler import inputs_of, random_rows


def both(logits: NDArray[np.float32], rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    expected = twin.sample(torch.from_numpy(logits.copy()), inputs_of(rows, logits.shape[1])).tolist()
    inputs = inputs_of(rows, logits.shape[1])
    object.__setattr__(inputs, "history", inputs.history.to(DEVICE))
    with poisoned():
        found = sample(torch.from_numpy(logits.copy()).to(DEVICE), inputs).tolist()
    return found, expected


@pytest.mark.parametrize("vocab_size", [40, 4096 + 77])
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_mixed_rows_equal_the_twin(vocab_size: int, spread: float) -> None:
    """Flat logits make top_p keep hundreds; rounded ones have ties at every border."""
    rng = np.random.default_rng(vocab_size)
    number = 12
    for ties in (False, True):
        logits = (rng.standard_normal((number, vocab_size)) * spread).astype(np.float32)
        if ties:
            logits = np.round(logits * 4) / 4
        found, expected = both(logits, random_rows(number, vocab_size, rng))
        assert found == expected


def test_penalties_begin_with_the_first_token_and_end_with_the_last() -> None:
    """Of prompt [9, 8] and output [5, 9, 6] presence counts the output, repetition all of it; what lies behind in the
    row's memory nothing."""
    logits = np.ones((6, 40), np.float32)
    best = [5, 6, 8, 8, 9, 7]
    logits[range(6), best] = 3.0
    presence, repetition = ([9, 8, 5, 9, 6], 2, 1.0, 5.0, 0.0), ([9, 8, 5, 9, 6], 2, 100.0, 0.0, 0.0)
    penalties = [presence, presence, presence, repetition, repetition, repetition]
    rows: list[dict[str, Any]] = [{"temperature": 0.0, "penalties": each} for each in penalties]
    found, expected = both(logits, rows)
    assert found == expected
    assert [token == own for token, own in zip(found, best, strict=True)] == [False, False, True, False, False, True]


def test_rows_without_a_token_say_why() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 70)).astype(np.float32)
    rows: list[dict[str, Any]] = [{"temperature": float(i % 2), "top_p": 0.9, "seed": i} for i in range(8)]
    logits[0, 3], logits[1, 69], logits[2, 0], logits[3, 5] = np.nan, np.inf, -np.inf, np.nan
    rows[3]["limits"] = {"banned": [5]}  # not finite all the same
    rows[4]["limits"] = {"grammar": []}
    rows[5]["limits"] = {"allowed": [3], "banned": [3]}
    found, expected = both(logits, rows)
    assert found == expected
    assert found[:6] == [NOT_FINITE] * 4 + [NONE_LEFT] * 2
    assert min(found[6:]) >= 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([[1.0, 30.0, -80.0, 29.0]], np.float32).repeat(6, 0)
    rows: list[dict[str, Any]] = [
        {"temperature": temperature, "position": i, "top_p": (1.0, 0.7)[i % 2], "top_k": (0, 3, 2)[i % 3]}
        for i in range(6)
    ]
    found, expected = both(logits, rows)
    assert found == expected


def test_greedy_rows_need_nothing_else() -> None:
    logits = torch.randn(5, 70, device=DEVICE).round(decimals=1)
    logits[2, 7] = torch.nan
    found = CudaOps().sample(logits.clone(), None)
    assert found.tolist() == twin.sample(logits.cpu(), None).tolist()
    assert found[2] == -1


@pytest.mark.skipif(DEVICE == "cuda", reason="looked into on a CPU")
def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = random_rows(24, 100, rng)
    inputs = inputs_of(rows, 100)
    assert len(inputs.limits) > 3
    assert inputs.penalised.size > 3
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *_, **__: None)
    with CaptureList(uploads=True) as captured:
        sample(torch.randn(24, 100), inputs)
    assert captured.names.count("scatter_add_") == 2
