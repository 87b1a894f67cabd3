"""Attention over expanded keys and values with an online softmax, as a Triton kernel: FlashAttention (arXiv 2205.14135)
for keys of two parts, of which the rotated one is shared by all heads and never copied to them.

Contexts that do not fit into the workspace together are computed in several passes: what a pass leaves, a mean and
the logarithm of its sum, is where the next one goes on. In the same way it goes on from what others have computed of
its keys, the pieces of `cudnn`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.cuda.mla_decode import LOG2_E
from model.transfer import to_device

TILE = 128
"""Query tokens of a program."""
FIRST, LAST = 1, 2
"""Bits: whether a tile or a piece has seen no keys before, and will see none afterwards."""
PIECE, MOST_OF_A_PIECE, PIECE_KEYS = 512, 4096, 4096
"""Query tokens of a piece: a multiple of the first, up to the second. Its keys: that many cached ones, or its own. So
there are 16 shapes, all of them multiples of 128: before cuDNN 9.15.1 others could go wrong."""


class Segment(NamedTuple):
    """Consecutive keys of one row in the workspace of a pass."""

    row: int
    start: int
    """Position of the first of them in the row."""
    stop: int


class Piece(NamedTuple):
    """Consecutive tokens of a row with keys of the workspace, all of which they see, or each those before it."""

    token: int
    number: int
    first_key: int
    keys: int
    causal: bool
    flags: int


class Pass(NamedTuple):
    segments: list[Segment]
    """One behind the other in the workspace."""
    pieces: list[Piece]
    """In this order, and before the tiles."""
    tiles: Tensor
    """[N, 6] int32: first token, number of tokens, first key in the workspace, number of keys, the last key that the
    first token sees (counted from the first key; negative: none), FIRST and LAST."""
    whole: bool
    """No token has more than one piece or tile, in this pass or others."""


def plan_passes(
    tokens: list[int],
    queries: list[int],
    contexts: list[int],
    workspace: int,
    device: torch.device,
    in_pieces: bool = False,
) -> list[Pass]:
    """For rows whose `queries` tokens begin at `tokens` and attend to `contexts` keys; `workspace` keys a pass."""
    passes = []
    row = start = 0
    while row < len(contexts):
        segments, pieces, tiles = [], [], []
        room = workspace
        while row < len(contexts) and room > 0:
            stop = min(contexts[row], start + room)
            segments.append(Segment(row, start, stop))
            for query, number, cut in _parts(queries[row], in_pieces):
                part = _plan_part(
                    tokens[row] + query,
                    number,
                    contexts[row] - queries[row] + query,
                    segments[-1],
                    workspace - room,
                    cut,
                )
                pieces += part[0]
                tiles += part[1]
            room -= stop - start
            row, start = (row + 1, 0) if stop == contexts[row] else (row, stop)
        whole = all(flags == FIRST | LAST for *_, flags in (*pieces, *tiles))
        on_device = to_device(np.array(tiles, np.int32).reshape(-1, 6), device)
        passes.append(Pass(segments, pieces, on_device, whole))
    return passes


def _parts(queries: int, in_pieces: bool) -> Iterator[tuple[int, int, bool]]:
    """A row's tokens in parts: the first one, how many, and whether pieces may have them."""
    first = 0
    while in_pieces and (number := min((queries - first) // PIECE * PIECE, MOST_OF_A_PIECE)) > 0:
        yield first, number, True
        first += number
    if first < queries:
        yield first, queries - first, False


_Tile = tuple[int, int, int, int, int, int]


def _plan_part(
    token: int, number: int, position: int, segment: Segment, place: int, cut: bool
) -> tuple[list[Piece], list[_Tile]]:
    """Of tokens from `token` on, the first at `position` of its row, with a segment that lies at `place` of the
    workspace. Pieces have the whole stretches of keys before the tokens, and the tokens' own if the segment has all of
    them; tiles have what is left."""
    keys = segment.stop - segment.start
    before = max(0, min(keys, position - segment.start)) if cut else 0
    stretches = before // PIECE_KEYS * PIECE_KEYS
    own = cut and segment.start <= position and position + number <= segment.stop
    spans = [(key, PIECE_KEYS, False) for key in range(0, stretches, PIECE_KEYS)]
    spans += [(before, number, True)] if own else []
    pieces = [
        Piece(token, number, place + key, length, causal, FIRST * (segment.start == 0 and i == 0))
        for i, (key, length, causal) in enumerate(spans)
    ]
    if own and stretches == before:
        pieces[-1] = pieces[-1]._replace(flags=pieces[-1].flags | LAST)
    tiles = []
    end = before if own else keys
    for query in range(0, number, TILE):
        rows = min(TILE, number - query)
        sees = position + query - segment.start
        seen = min(end, sees + rows)
        if seen > stretches:
            flags = FIRST * (segment.start == 0 and not pieces) + LAST * (keys >= sees + rows)
            tiles.append((token + query, rows, place + stretches, seen - stretches, sees - stretches, flags))
    return pieces, tiles


class Accumulator(NamedTuple):
    """What rows of several passes have so far; not read before it is written."""

    mean: Tensor
    """[T, H, dv] float32"""
    lse: Tensor
    """[T, H] float32, base 2"""


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    values: Tensor,
    tiles: Tensor,
    softmax_scale: float,
    accumulator: Accumulator,
    output: Tensor,
) -> None:
    """One pass. q_nope [T, H, dn], q_rope [T, H, dr], k_nope [K, H, dn], k_rope [K, dr] and values [K, H, dv] of the
    workspace, last dimension contiguous; what is complete is written to its tokens of output [T, H, dv]."""
    heads, nope = q_nope.shape[1:]
    rope, value = q_rope.shape[2], values.shape[2]
    _prefill[(len(tiles), heads)](
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        values,
        tiles,
        accumulator.mean,
        accumulator.lse,
        output,
        softmax_scale * LOG2_E,
        q_nope.stride(0),
        q_nope.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        k_rope.stride(0),
        HEADS=heads,
        NOPE=nope,
        ROPE=rope,
        VALUE=value,
        FIRST=FIRST,
        LAST=LAST,
        TILE=TILE,
        KEYS=64,
        BLOCK_NOPE=max(16, triton.next_power_of_2(nope)),
        BLOCK_ROPE=max(16, triton.next_power_of_2(rope)),
        BLOCK_VALUE=max(16, triton.next_power_of_2(value)),
        num_warps=8,
        num_stages=2,
    )


@triton.jit
def _prefill(
    q_nope: tl.tensor,
    q_rope: tl.tensor,
    k_nope: tl.tensor,
    k_rope: tl.tensor,
    values: tl.tensor,
    tiles: tl.tensor,
    mean: tl.tensor,
    lse: tl.tensor,
    output: tl.tensor,
    scale: tl.tensor,
    nope_token_stride: tl.tensor,
    nope_head_stride: tl.tensor,
    rope_token_stride: tl.tensor,
    rope_head_stride: tl.tensor,
    k_rope_stride: tl.tensor,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
) -> None:
    """One program a tile and head."""
    head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * 6
    token, number, first_key = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    keys, sees, flags = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    query = tl.arange(0, TILE)
    wide, turned, column = tl.arange(0, BLOCK_NOPE), tl.arange(0, BLOCK_ROPE), tl.arange(0, BLOCK_VALUE)
    asked = (query < number)[:, None]
    tokens = (token + query).to(tl.int64)[:, None]
    at = q_nope + tokens * nope_token_stride + head * nope_head_stride + wide
    nope = tl.load(at, mask=asked & (wide < NOPE), other=0.0)
    at = q_rope + tokens * rope_token_stride + head * rope_head_stride + turned
    rope = tl.load(at, mask=asked & (turned < ROPE), other=0.0)

    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, BLOCK_VALUE), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        known = (key < keys)[:, None]
        line = (first_key + key).to(tl.int64)[:, None]
        k = tl.load(k_nope + (line * HEADS + head) * NOPE + wide, mask=known & (wide < NOPE), other=0.0)
        shared = tl.load(k_rope + line * k_rope_stride + turned, mask=known & (turned < ROPE), other=0.0)
        scores = tl.dot(nope, tl.trans(k), input_precision="ieee")
        scores = tl.dot(rope, tl.trans(shared), scores, input_precision="ieee")
        visible = (key <= sees + query[:, None]) & (key < keys)
        scores = tl.where(visible, scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a query that sees nothing of this pass
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(values + (line * HEADS + head) * VALUE + column, mask=known & (column < VALUE), other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        peak = new_peak

    # What passes before have left counts as one more key, of the weight 2^lse and with their mean as its value.
    later = (flags & FIRST) == 0
    of_head = tokens * HEADS + head
    before = tl.load(lse + of_head, mask=asked & later, other=float("-inf"))
    old_mean = tl.load(mean + of_head * VALUE + column, mask=asked & later & (column < VALUE), other=0.0)
    new_peak = tl.maximum(peak[:, None], before)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink, weight = tl.exp2(peak[:, None] - base), tl.exp2(before - base)
    total_now = total[:, None] * shrink + weight
    total_now = tl.where(total_now > 0, total_now, 1.0)
    result = (sums * shrink + old_mean * weight) / total_now
    done = (flags & LAST) != 0
    inside = asked & (column < VALUE)
    tl.store(output + of_head * VALUE + column, result, mask=inside & done)
    tl.store(mean + of_head * VALUE + column, result, mask=inside & (done == 0))
    tl.store(lse + of_head, new_peak + tl.log2(total_now), mask=asked & (done == 0))
