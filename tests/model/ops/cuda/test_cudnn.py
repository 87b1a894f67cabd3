"""Long prompts in pieces: that the plan covers everything once, and that only who computes rightly is chosen."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from model.ops.cuda import mla_prefill
from model.ops.cuda.cudnn import Attend, chosen, cudnn_attention
from model.ops.cuda.mla_prefill import FIRST, LAST, plan_passes
from tests.model.ops.cuda.common import DEVICE, flash_attention, relative_error, small_pieces
from tests.model.ops.cuda.shapes import V2_LITE
from tests.model.test_ops_eager import CONFIG

ROWS = [(40, 40), (9, 9), (33, 133), (16, 64), (17, 65), (5, 90), (24, 48)]
"""Query tokens and context."""


@pytest.mark.parametrize("workspace", [1 << 20, 100, 64, 37])
def test_every_pair_of_query_and_key_is_planned_once(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first thing that is computed of a token knows that it is the first, and the last that it is the last."""
    small_pieces(monkeypatch, 8, 16, 24)
    monkeypatch.setattr(mla_prefill, "TILE", 4)
    queries, contexts = [q for q, _ in ROWS], [c for _, c in ROWS]
    starts = [sum(queries[:row]) for row in range(len(ROWS))]
    seen: list[list[int]] = [[] for _ in range(sum(queries))]
    flags: list[list[int]] = [[] for _ in range(sum(queries))]
    num_pieces = 0
    for plan in plan_passes(starts, queries, contexts, workspace, torch.device("cpu"), in_pieces=True):
        positions = [position for _, start, stop in plan.segments for position in range(start, stop)]
        assert len(positions) <= workspace
        num_pieces += len(plan.pieces)
        spans = [(*piece[:4], 0 if piece.causal else piece.keys, piece.flags) for piece in plan.pieces]
        for token, number, first_key, keys, sees, flag in spans + plan.tiles.tolist():
            for i in range(number):
                seen[token + i] += positions[first_key : first_key + max(0, min(keys, sees + i + 1))]
                flags[token + i].append(flag)
        for piece in plan.pieces:
            assert piece.number in (8, 16)
            assert piece.keys == (piece.number if piece.causal else 24)
        assert plan.whole == all(flag == FIRST | LAST for *_, flag in spans + plan.tiles.tolist())
    assert num_pieces > 5
    for (count, context), start in zip(ROWS, starts, strict=True):
        for i in range(count):
            assert sorted(seen[start + i]) == list(range(context - count + i + 1))
            assert [flag & FIRST for flag in flags[start + i]] == [FIRST, *[0] * (len(flags[start + i]) - 1)]
            assert [flag & LAST for flag in flags[start + i]] == [*[0] * (len(flags[start + i]) - 1), LAST]


def test_without_pieces_there_are_only_tiles() -> None:
    (plan,) = plan_passes([0], [9000], [9000], 1 << 20, torch.device("cpu"))
    assert not plan.pieces
    assert plan.whole


def test_a_long_prompt_is_almost_all_pieces() -> None:
    (plan,) = plan_passes([7], [4196], [4196 + 8192 + 64], 1 << 20, torch.device("cpu"), in_pieces=True)
    shapes = [(piece.number, piece.keys, piece.causal) for piece in plan.pieces]
    assert shapes == [(4096, 4096, False), (4096, 4096, False), (4096, 4096, True)]
    left = [tile[3] for tile in plan.tiles.tolist()]
    assert left == [64] * 32 + [8192 + 64 + 4196]


def in_base_two(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    found, lse = flash_attention(q, k, v, scale, causal)
    return found, lse / torch.tensor(2.0).log()


def never_causal(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return flash_attention(q, k, v, scale, False)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    found, lse = flash_attention(q, k, v, scale, causal)
    return found * torch.nan, lse


def one_shape_wrong(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    found, lse = flash_attention(q, k, v, scale, causal)
    return (found + 1, lse) if (len(q), causal) == (16, False) else (found, lse)


def raises(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no engine\nfor this")


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (flash_attention, "by cuDNN (they agree)"),
        (in_base_two, "not cuDNN (results of 8 queries and 8 keys differ by"),
        (never_causal, "not cuDNN (results of 8 queries and 8 keys differ by"),
        (not_a_number, "not cuDNN (results of 8 queries and 8 keys differ by nan"),
        (one_shape_wrong, "not cuDNN (results of 16 queries and 24 keys differ by"),
        (raises, "not cuDNN (RuntimeError: no engine)"),
    ],
)
def test_who_differs_from_the_own_kernel_is_not_chosen(
    attend: Attend, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_pieces(monkeypatch, 8, 16, 24)
    with caplog.at_level(logging.INFO):
        found = chosen(CONFIG, torch.float16, torch.device(DEVICE), attend)
    assert found is (attend if attend is flash_attention else None)
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


@pytest.mark.skipif(DEVICE == "cuda", reason="there cuDNN is tried")
def test_without_cudnn_the_own_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 8, 8, 8)
    assert chosen(CONFIG, torch.float16, torch.device("cpu")) is None
    assert chosen(CONFIG, torch.float16, torch.device("cuda")) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no cuDNN")
@pytest.mark.parametrize(("number", "keys", "causal"), [(512, 512, True), (1536, 4096, False)])
def test_cudnn_where_it_is_chosen(number: int, keys: int, causal: bool) -> None:
    """Of 16 heads of 192 and 128 numbers, in the layouts that pieces have."""
    config = V2_LITE.config
    if chosen(config, torch.bfloat16, torch.device(DEVICE)) is None:
        pytest.skip("it is not chosen here")
    q, k = (torch.randn(n, 16, 192, device=DEVICE).bfloat16() for n in (number, keys))
    v = torch.randn(keys, 16, 128, device=DEVICE).bfloat16()
    found, lse = cudnn_attention(q, k, v, 0.1, causal)
    exact, exact_lse = flash_attention(q.float(), k.float(), v.float(), 0.1, causal)
    assert relative_error(found, exact) < 1e-2
    assert relative_error(lse, exact_lse) < 1e-3
