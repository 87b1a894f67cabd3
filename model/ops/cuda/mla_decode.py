"""Absorbed latent attention over the paged cache, as two Triton kernels: parts of contexts, and their merge.

A row's n query tokens and H heads are n * H query lines, token by token; a tile is BLOCK consecutive lines, whatever
number of tokens or heads that is, so any number of heads and of query tokens is computed alike. Contexts are cut into
splits of a fixed length, never into a fixed number: where a row is cut does not depend on its neighbours. Tile times
split is one item of work; a fixed number of programs walks through all items, which the device counts itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.device import processors, shared_memory
from model.ops.cuda.fp8 import widened

LOG2_E = 1.4426950408889634
HOPPER_MEMORY = 227 << 10
"""Bytes, of a program: 64 lines and two pages of 576 numbers fit."""


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """What a step's layers share; R rows, n tokens, I at least the number of items. All tensors int32."""

    query_start: Tensor
    """[R + 1]: row r has the tokens query_start[r] to query_start[r + 1] of n; there may be more, which are padding."""
    context_lens: Tensor
    """[R]: up to the row's last token and with it; 0 for rows without tokens."""
    block_tables: Tensor
    """[R, max_blocks]"""
    first_item: Tensor
    """[R + 1]: where a row's items begin."""
    item_row: Tensor
    """[I]: the row of each item."""
    token_row: Tensor
    """[n]: the row of each token, R for padding."""
    block: int
    """Query lines of a tile."""
    split_pages: int
    programs: int


def lines_of_a_tile(heads: int, most_queries: int, device: torch.device) -> int:
    """16 lines suit one token of 16 heads; 64 are what a Hopper tensor core takes at once, if there is room."""
    return 64 if heads * most_queries > 16 and shared_memory(device) >= HOPPER_MEMORY else 16


def pages_of_a_split(rows: int) -> int:
    """Few rows must be cut finely to occupy every processor."""
    return 2 if rows <= 8 else 4 if rows <= 32 else 8 if rows <= 128 else 16


def num_items(queries: list[int], context_lens: list[int], heads: int, block: int, split_pages: int) -> int:
    """Items of a step with these rows."""
    lengths = zip(queries, context_lens, strict=True)
    return sum(-(-n * heads // block) * -(-context // (split_pages * BLOCK_SIZE)) for n, context in lengths)


def decode_work(
    query_start: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    tokens: int,
    items: int,
    heads: int,
    block: int,
    split_pages: int,
) -> DecodeWork:
    """Counts on the device, without waiting for it; `items` may be more than there are."""
    device = query_start.device
    tiles = (query_start.diff() * heads + (block - 1)) // block
    splits = (context_lens + (split_pages * BLOCK_SIZE - 1)) // (split_pages * BLOCK_SIZE)
    ends = (tiles * splits).cumsum(0, dtype=torch.int32)
    first_item = torch.nn.functional.pad(ends, (1, 0))
    item_row = torch.searchsorted(ends, torch.arange(items, device=device), right=True, out_int32=True)
    token_row = torch.searchsorted(query_start[1:], torch.arange(tokens, device=device), right=True, out_int32=True)
    programs = min(items, 2 * processors(device))
    return DecodeWork(
        query_start, context_lens, block_tables, first_item, item_row, token_row, block, split_pages, programs
    )


def mla_decode(
    q_latent: Tensor, q_rope: Tensor, cache: LatentCache, layer: int, work: DecodeWork, softmax_scale: float
) -> Tensor:
    """q_latent [n, H, r], q_rope [n, H, dr], last dimension contiguous -> attended latents [H, n, r]; 0 for padding."""
    tokens, heads, rank = q_latent.shape
    rope = q_rope.shape[2]
    items = len(work.item_row)
    partial = torch.empty((items, work.block, rank), dtype=torch.float32, device=q_latent.device)
    lse = torch.empty((items, work.block), dtype=torch.float32, device=q_latent.device)
    latents, scales, keys = cache.planes(layer, rank)
    if scales is not None:
        latents = latents.view(torch.int32)
    wide, hopper = work.block > 16, shared_memory(q_latent.device) >= HOPPER_MEMORY
    # Two pages in flight where they fit; that is one stage more where no tensor core reads them asynchronously. In 8
    # bits half a page is enough where there is little memory: it is there in both forms, widened by twice the warps.
    stages = 3 if not wide and (hopper or scales is not None) else 2
    keys_of_a_tile = BLOCK_SIZE if hopper or scales is None else BLOCK_SIZE // 2
    _split[(work.programs,)](
        q_latent,
        q_rope,
        latents,
        scales,
        keys,
        work.block_tables,
        work.query_start,
        work.context_lens,
        work.first_item,
        work.item_row,
        partial,
        lse,
        softmax_scale * LOG2_E,
        q_latent.stride(0),
        q_latent.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        latents.stride(0),
        0 if scales is None else scales.stride(0),
        keys.stride(0),
        work.block_tables.stride(0),
        len(work.context_lens),
        HEADS=heads,
        RANK=rank,
        ROPE=rope,
        LATENT_STRIDE=latents.stride(1),
        KEY_STRIDE=keys.stride(1),
        PAGE=BLOCK_SIZE,
        KEYS=keys_of_a_tile,
        SPLIT_PAGES=work.split_pages,
        BLOCK=work.block,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=max(16, triton.next_power_of_2(rope)),
        num_warps=4 if scales is None and not wide else 8,
        num_stages=stages,
    )
    attended = torch.empty((heads, tokens, rank), dtype=q_latent.dtype, device=q_latent.device)
    _merge[(tokens, heads)](
        partial,
        lse,
        work.query_start,
        work.context_lens,
        work.first_item,
        work.token_row,
        attended,
        tokens,
        len(work.context_lens),
        HEADS=heads,
        RANK=rank,
        SPLIT=work.split_pages * BLOCK_SIZE,
        BLOCK=work.block,
        BLOCK_RANK=triton.next_power_of_2(rank),
        num_warps=4,
    )
    return attended


@triton.jit(do_not_specialize=["num_rows"])
def _split(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    latents: tl.tensor,
    scales: tl.tensor | None,
    keys: tl.tensor,
    block_tables: tl.tensor,
    query_start: tl.tensor,
    context_lens: tl.tensor,
    first_item: tl.tensor,
    item_row: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    latent_token_stride: tl.tensor,
    latent_head_stride: tl.tensor,
    rope_token_stride: tl.tensor,
    rope_head_stride: tl.tensor,
    latent_page_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    key_page_stride: tl.tensor,
    table_stride: tl.tensor,
    num_rows: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
) -> None:
    """Each item: softmax over one split for one tile, normalised, and the logarithm (base 2) of its sum."""
    line = tl.arange(0, BLOCK)
    number, turned = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    key, word = tl.arange(0, KEYS), tl.arange(0, BLOCK_RANK // 4)
    for item in range(tl.program_id(0), tl.load(first_item + num_rows), tl.num_programs(0)):
        row = tl.load(item_row + item)
        first_token = tl.load(query_start + row)
        queries = tl.load(query_start + row + 1) - first_token
        context = tl.load(context_lens + row)
        # Tiles of one split lie beside each other: the second finds the latents in the cache of the chip.
        tiles = tl.cdiv(queries * HEADS, BLOCK)
        of_row = item - tl.load(first_item + row)
        tile, split = of_row % tiles, of_row // tiles

        query = (tile * BLOCK + line) // HEADS
        head = (tile * BLOCK + line) % HEADS
        asked = query < queries
        token = (first_token + query).to(tl.int64)
        at = q_latent + token * latent_token_stride + head * latent_head_stride
        latent_query = tl.load(at[:, None] + number, mask=asked[:, None] & (number < RANK), other=0.0)
        at = q_rope + token * rope_token_stride + head * rope_head_stride
        rope_query = tl.load(at[:, None] + turned, mask=asked[:, None] & (turned < ROPE), other=0.0)
        position = context - queries + query

        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        sums = tl.zeros((BLOCK, BLOCK_RANK), tl.float32)
        last_query = tl.minimum(queries - 1, (tile * BLOCK + BLOCK - 1) // HEADS)
        start = split * (SPLIT_PAGES * PAGE)
        end = tl.minimum(start + SPLIT_PAGES * PAGE, context - queries + last_query + 1)
        table = block_tables + row.to(tl.int64) * table_stride
        block = tl.load(table + start // PAGE, mask=start < end, other=0)
        for first in range(start, end, KEYS):
            # One turn ahead: a load whose address was loaded in the same turn would not be pipelined.
            next_block = tl.load(table + (first + KEYS) // PAGE, mask=first + KEYS < end, other=0)
            page = block.to(tl.int64)
            known = first + key < context  # what lies behind is whatever was there before
            within = first % PAGE + key
            latent_lines = latents + page * latent_page_stride + within * LATENT_STRIDE
            if scales is None:
                values = tl.load(latent_lines[:, None] + number, mask=known[:, None] & (number < RANK), other=0.0)
            else:
                words = tl.load(latent_lines[:, None] + word, mask=known[:, None] & (word < RANK // 4), other=0)
                values = widened(words, latent_query.dtype)
            key_lines = keys + page * key_page_stride + within * KEY_STRIDE
            rope_keys = tl.load(key_lines[:, None] + turned, mask=known[:, None] & (turned < ROPE), other=0.0)
            scores = tl.dot(latent_query, tl.trans(values), input_precision="ieee")
            if scales is not None:
                scale_of_key = tl.load(scales + page * scale_page_stride + within, mask=known, other=0.0)
                scores *= scale_of_key
            scores = tl.dot(rope_query, tl.trans(rope_keys), scores, input_precision="ieee")
            visible = first + key <= position[:, None]
            scores = tl.where(visible, scores * scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a query that sees nothing of this split yet
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(peak - base)
            total = total * shrink + tl.sum(weights, axis=1)
            if scales is not None:
                weights *= scale_of_key
            sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
            peak = new_peak
            block = next_block
        target = (item + tl.zeros((BLOCK,), tl.int64)) * BLOCK + line
        seen = total > 0
        mean = sums / tl.where(seen, total, 1.0)[:, None]
        tl.store(partial + target[:, None] * RANK + number, mean, mask=asked[:, None] & (number < RANK))
        tl.store(lse + target, tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf")), mask=asked)


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def _merge(
    partial: tl.tensor,
    lse: tl.tensor,
    query_start: tl.tensor,
    context_lens: tl.tensor,
    first_item: tl.tensor,
    token_row: tl.tensor,
    attended: tl.tensor,
    tokens: tl.tensor,
    num_rows: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """One program a token and head: its splits in order, up to the one it lies in."""
    token, head = tl.program_id(0), tl.program_id(1)
    number = tl.arange(0, BLOCK_RANK)
    sums = tl.zeros((BLOCK_RANK,), tl.float32)
    row = tl.load(token_row + token)
    if row < num_rows:
        first_token = tl.load(query_start + row)
        queries = tl.load(query_start + row + 1) - first_token
        position = tl.load(context_lens + row) - queries + token - first_token
        line = (token - first_token) * HEADS + head
        tiles = tl.cdiv(queries * HEADS, BLOCK)
        item = tl.load(first_item + row) + line // BLOCK
        peak = float("-inf")
        total = 0.0
        for split in range(0, position // SPLIT + 1):
            source = (item + split * tiles).to(tl.int64) * BLOCK + line % BLOCK
            part = tl.load(lse + source)
            new_peak = tl.maximum(peak, part)
            shrink, weight = tl.exp2(peak - new_peak), tl.exp2(part - new_peak)
            value = tl.load(partial + source * RANK + number, mask=number < RANK, other=0.0)
            sums = sums * shrink + value * weight
            total = total * shrink + weight
            peak = new_peak
        sums = sums / total
    target = attended + (head * tokens + token).to(tl.int64) * RANK
    tl.store(target + number, sums, mask=number < RANK)
