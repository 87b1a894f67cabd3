"""Attention of one step: which rows are computed in which form, and what the kernels need to know of them.

Rows with few query tokens (decoding, the ends of prompts, drafts) are absorbed, all in one launch; those with many are
expanded, from about where that takes fewer multiplications, in passes of a bounded workspace.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.cudnn import Attend, attend_pieces
from model.ops.cuda.mla_decode import (
    DecodeWork,
    decode_work,
    lines_of_a_tile,
    mla_decode,
    num_items,
    pages_of_a_split,
)
from model.ops.cuda.mla_prefill import Accumulator, Pass, mla_prefill, plan_passes
from model.ops.interface import LatentWeights, unpacked
from model.transfer import to_device

MOST_ABSORBED = 128
"""Query tokens of a row. Per head and pair of query and key, absorbing takes (2 r + dr) / (dn + dr + dv) = 3.4 times
the multiplications of expanding, which for its part rebuilds all cached keys: they are equal at 171 tokens."""
WORKSPACE_BYTES = 256 << 20
"""Of expanded keys and values, at most."""


class Absorbed(NamedTuple):
    tokens: slice | Tensor
    """The n tokens of the rows, row after row."""
    work: DecodeWork


class Expanded(NamedTuple):
    keys: Tensor
    """[K] int64: the lines of the workspace's keys in layer 0 of the cache, see `LatentCache.read`."""
    plan: Pass


class CudaAttention:
    """`StepAttention`."""

    def __init__(
        self,
        cache: LatentCache,
        config: DeepseekConfig,
        absorbed: Absorbed | None,
        expanded: list[Expanded],
        attend: Attend | None,
    ) -> None:
        self._cache, self._config = cache, config
        self._absorbed, self._expanded, self._attend = absorbed, expanded, attend

    def __call__(self, layer: int, q_nope: Tensor, q_rope: Tensor, weights: LatentWeights) -> Tensor:
        shape = (*q_nope.shape[:2], self._config.v_head_dim)
        output = torch.empty(shape, dtype=q_nope.dtype, device=q_nope.device)
        if self._absorbed is not None:
            tokens = self._absorbed.tokens
            whole = isinstance(tokens, slice)
            target = output[tokens] if whole else torch.empty_like(output[tokens])
            self._absorb(layer, q_nope[tokens], q_rope[tokens], weights, self._absorbed.work, target)
            if not whole:
                output[tokens] = target
        if self._expanded:
            self._expand(layer, q_nope, q_rope, weights, output)
        return output

    def _absorb(
        self, layer: int, q_nope: Tensor, q_rope: Tensor, weights: LatentWeights, work: DecodeWork, output: Tensor
    ) -> None:
        q_latent = torch.bmm(q_nope.transpose(0, 1), unpacked(weights.expand)).transpose(0, 1)
        attended = mla_decode(q_latent, q_rope, self._cache, layer, work, self._config.softmax_scale)
        torch.bmm(attended, unpacked(weights.value).transpose(1, 2), out=output.transpose(0, 1))

    def _expand(self, layer: int, q_nope: Tensor, q_rope: Tensor, weights: LatentWeights, output: Tensor) -> None:
        config, rank = self._config, self._config.kv_lora_rank
        heads = config.num_attention_heads
        whole = all(expanded.plan.whole for expanded in self._expanded)
        shape = (0, heads, 0) if whole else output.shape
        accumulator = Accumulator(
            torch.empty(shape, dtype=torch.float32, device=output.device),
            torch.empty(shape[:2], dtype=torch.float32, device=output.device),
        )
        for keys, plan in self._expanded:
            latents = self._cache.read(keys + layer * BLOCK_SIZE)
            k_nope = F.linear(latents[:, :rank], unpacked(weights.expand).flatten(0, 1)).view(len(keys), heads, -1)
            values = F.linear(latents[:, :rank], unpacked(weights.value).flatten(0, 1)).view(len(keys), heads, -1)
            inputs = q_nope, q_rope, k_nope, latents[:, rank:], values
            if plan.pieces:
                assert self._attend is not None
                attend_pieces(self._attend, plan.pieces, *inputs, config.softmax_scale, accumulator, output)
            if len(plan.tiles):
                mla_prefill(*inputs, plan.tiles, config.softmax_scale, accumulator, output)


def plan_attention(
    step: StepInputs, cache: LatentCache, config: DeepseekConfig, attend: Attend | None = None
) -> CudaAttention:
    """From what the host knows of the step's rows. `attend` computes pieces of expanded ones, if there is one."""
    queries = [stop - start for start, stop in zip(step.query_start, step.query_start[1:], strict=False)]
    few = [row for row, number in enumerate(queries) if number <= MOST_ABSORBED]
    many = [row for row, number in enumerate(queries) if number > MOST_ABSORBED]
    absorbed = _absorbed(step, few, [queries[row] for row in few], config) if few else None
    of_many = [queries[row] for row in many]
    expanded = _expanded(step, many, of_many, cache, config, attend is not None) if many else []
    return CudaAttention(cache, config, absorbed, expanded, attend)


class DeviceRows(NamedTuple):
    """Rows of a captured step, of one token each, whose lengths only the device knows; those without are padding."""

    query_start: Tensor
    """[R + 1] int32"""
    context_lens: Tensor
    """[R] int32; 0 where a row is padding"""
    block_tables: Tensor
    """[R, max_blocks] int32"""
    items: int
    """At most, of the absorbed form; see `num_items`."""


def captured_attention(rows: DeviceRows, cache: LatentCache, config: DeepseekConfig) -> CudaAttention:
    """Of a step whose kernels are launched again with other rows of these numbers."""
    number, heads = len(rows.context_lens), config.num_attention_heads
    work = decode_work(
        rows.query_start,
        rows.context_lens,
        rows.block_tables,
        tokens=number,
        items=rows.items,
        heads=heads,
        block=lines_of_a_tile(heads, 1, cache.data.device),
        split_pages=pages_of_a_split(number),
    )
    return CudaAttention(cache, config, Absorbed(slice(0, number), work), [], None)


def _absorbed(step: StepInputs, rows: list[int], queries: list[int], config: DeepseekConfig) -> Absorbed:
    device = step.positions.device
    starts = [step.query_start[row] for row in rows]
    contexts = [step.context_lens[row] for row in rows]
    number = sum(queries)
    tokens: slice | Tensor = slice(starts[0], starts[0] + number)
    tables = step.block_tables[rows[0] : rows[-1] + 1]
    if len(tables) > len(rows):  # rows with many tokens lie between them
        tables = step.block_tables.index_select(0, to_device(np.array(rows), device))
        spans = [np.arange(start, start + n) for start, n in zip(starts, queries, strict=True)]
        tokens = to_device(np.concatenate(spans), device)
    heads, split_pages = config.num_attention_heads, pages_of_a_split(len(rows))
    block = lines_of_a_tile(heads, max(queries), device)
    work = decode_work(
        to_device(np.cumsum([0, *queries], dtype=np.int32), device),
        to_device(np.array(contexts, np.int32), device),
        tables,
        tokens=number,
        items=num_items(queries, contexts, heads, block, split_pages),
        heads=heads,
        block=block,
        split_pages=split_pages,
    )
    return Absorbed(tokens, work)


def _expanded(
    step: StepInputs,
    rows: list[int],
    queries: list[int],
    cache: LatentCache,
    config: DeepseekConfig,
    in_pieces: bool,
) -> list[Expanded]:
    device = step.positions.device
    numbers_a_key = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    workspace = max(1, WORKSPACE_BYTES // (numbers_a_key * cache.dtype.itemsize))
    contexts = [step.context_lens[row] for row in rows]
    starts = [step.query_start[row] for row in rows]
    passes = plan_passes(starts, queries, contexts, workspace, device, in_pieces)
    expanded = []
    for plan in passes:
        lines = []
        for row, start, stop in plan.segments:
            position = torch.arange(start, stop, device=device)
            block = step.block_tables[rows[row], position // BLOCK_SIZE].long()
            lines.append(block * cache.num_layers * BLOCK_SIZE + position % BLOCK_SIZE)
        expanded.append(Expanded(torch.cat(lines), plan))
    return expanded
