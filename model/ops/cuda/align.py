"""Pairs of token and expert in blocks of one expert each, as one Triton kernel without atomics or host.

A pair is a token and one of its experts: k routed ones, then the shared ones, which are experts E, E + 1, ... of
every token. Pair p is place p % (k + S) of token p // (k + S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Pairs looked at at once."""


class Blocks(NamedTuple):
    """Blocks of `block_pairs` pairs of one expert, as many as the worst routing needs; only the first ones are used."""

    pairs: Tensor
    """[capacity * block_pairs] int32; the number of pairs where a block has a gap. What lies past the used blocks is
    not written."""
    experts: Tensor
    """[capacity] int32: each block's expert, -1 past the used ones."""
    block_pairs: int


def align(experts: Tensor, num_experts: int, num_shared: int, block_pairs: int) -> Blocks:
    """experts [T, k] int32, -1 for a pair that is not to be computed (with all of the token's shared experts).

    A pair's place depends on the pairs before it alone, so equal routing gives equal blocks.
    """
    tokens, per_token = experts.shape
    pairs = tokens * (per_token + num_shared)
    used_experts = min(num_experts, tokens * per_token) + num_shared
    capacity = min(pairs, triton.cdiv(pairs + used_experts * (block_pairs - 1), block_pairs))
    block = torch.empty(capacity * block_pairs, dtype=torch.int32, device=experts.device)
    expert_of = torch.empty(capacity, dtype=torch.int32, device=experts.device)
    _align[(num_experts + num_shared,)](
        experts,
        block,
        expert_of,
        pairs,
        capacity,
        EXPERTS=num_experts,
        SHARED=num_shared,
        PER_TOKEN=per_token,
        BLOCK_PAIRS=block_pairs,
        BLOCK_EXPERTS=triton.next_power_of_2(num_experts + num_shared + 1),
        CHUNK=CHUNK,
        num_warps=4,
    )
    return Blocks(block, expert_of, block_pairs)


@triton.jit
def _expert(
    experts: tl.tensor,
    pair: tl.tensor,
    num_pairs: tl.tensor,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
) -> tl.tensor:
    """Each pair's expert; EXPERTS + SHARED where there is none."""
    token, place = pair // (PER_TOKEN + SHARED), pair % (PER_TOKEN + SHARED)
    shared = place >= PER_TOKEN
    routed = tl.load(experts + token * PER_TOKEN + tl.where(shared, 0, place), mask=pair < num_pairs, other=-1)
    expert = tl.where(shared, EXPERTS + place - PER_TOKEN, routed)
    return tl.where(routed < 0, EXPERTS + SHARED, expert)


@triton.jit(do_not_specialize=["num_pairs", "capacity"])
def _align(
    experts: tl.tensor,
    block: tl.tensor,
    expert_of: tl.tensor,
    num_pairs: tl.tensor,
    capacity: tl.tensor,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program an expert: counts all pairs, so that it knows where its own begin, and puts those in place."""
    mine = tl.program_id(0)
    number = tl.arange(0, BLOCK_EXPERTS)
    counts = tl.zeros((BLOCK_EXPERTS,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        counts += tl.histogram(_expert(experts, pair, num_pairs, EXPERTS, SHARED, PER_TOKEN), BLOCK_EXPERTS)
    blocks = tl.where(number < EXPERTS + SHARED, tl.cdiv(counts, BLOCK_PAIRS), 0)
    first_block = tl.sum(tl.where(number < mine, blocks, 0))
    count = tl.sum(tl.where(number == mine, counts, 0))
    my_blocks = tl.cdiv(count, BLOCK_PAIRS)

    done = 0
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        hit = _expert(experts, pair, num_pairs, EXPERTS, SHARED, PER_TOKEN) == mine
        rank = done + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        tl.store(block + first_block * BLOCK_PAIRS + rank, pair, mask=hit)
        done += tl.sum(hit.to(tl.int32))
    gap = count + tl.arange(0, BLOCK_PAIRS)
    tl.store(block + first_block * BLOCK_PAIRS + gap, num_pairs, mask=gap < my_blocks * BLOCK_PAIRS)
    for start in range(0, my_blocks, CHUNK):
        place = start + tl.arange(0, CHUNK)
        tl.store(expert_of + first_block + place, mine, mask=place < my_blocks)
    if mine == EXPERTS + SHARED - 1:
        for start in range(first_block + my_blocks, capacity, CHUNK):
            place = start + tl.arange(0, CHUNK)
            tl.store(expert_of + place, -1, mask=place < capacity)
