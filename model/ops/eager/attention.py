"""Multi-head latent attention over the paged latent cache in plain torch (DeepSeek-V2, arXiv 2405.04434, 2.1).

n rows with q tokens each, H heads, K keys of a chunk, W latent_dim = r + dr. Both forms walk the context in
chunks of keys with an online softmax, so that the workspace does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.interface import LatentWeights, unpacked

WORKSPACE = 1 << 20
"""Numbers the largest intermediate of a chunk of keys (scores, gathered latents, expanded keys) should have: 4 MB of
scores stay in a CPU's cache, and smaller chunks skip more of what causality hides."""

FEW_TOKENS = 16
"""A row of so few tokens is absorbed whatever that costs: drafts get what they would have got one by one."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive keys of every row of a group, for the queries from `first_query` on: those before see none."""

    blocks: Tensor
    """[n, blocks of the chunk] int64."""
    num_keys: int
    first_query: int
    hidden: Tensor | None
    """[n, q - first_query, num_keys] bool: keys past the query's own position; None where every query sees all."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows attended together: decode rows with contexts of like length, or one row with a chunk of q tokens."""

    tokens: slice | Tensor
    """The group's n * q tokens in the step, row after row."""
    num_rows: int
    expand: bool
    chunks: list[_Chunk]


class _ScoredChunk(NamedTuple):
    scores: Tensor
    """[B, Q', num_keys] float32, -inf where hidden; the last Q' of the group's Q query rows."""
    values: Tensor
    """[B, num_keys, width] run dtype."""


class EagerAttention:
    """`StepAttention`: groups, chunks and masks are made once a step and serve all layers."""

    def __init__(self, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> None:
        self._cache = cache
        self._config = config
        self._groups = [_make_group(step, rows, config) for rows in _like_rows(step)]
        # Rows of a group are read up to the longest one's length, and probability 0 only hides what is finite:
        # blocks are cleared as they are begun, so that a row reads nothing foreign or uninitialised.
        begun = step.slot_mapping[step.slot_mapping % BLOCK_SIZE == 0] // BLOCK_SIZE
        cache.data.index_fill_(0, begun, 0)

    def __call__(self, layer: int, q_nope: Tensor, q_rope: Tensor, weights: LatentWeights) -> Tensor:
        w_uk, w_uv = unpacked(weights.expand), unpacked(weights.value)
        output = q_nope.new_empty((*q_nope.shape[:2], self._config.v_head_dim))
        for group in self._groups:
            attend = self.mla_prefill if group.expand else self.mla_attention
            output[group.tokens] = attend(layer, group, q_nope[group.tokens], q_rope[group.tokens], w_uk, w_uv)
        return output

    def mla_attention(
        self, layer: int, group: _Group, q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, w_uv: Tensor
    ) -> Tensor:
        """Absorbed: W_UK goes into the queries and W_UV behind the sum, so that all heads share one key of width W.

        q_nope [n * q, H, dn], q_rope [n * q, H, dr] -> [n * q, H, dv].
        """
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        queries = torch.cat((q_latent, q_rope), dim=2).view(group.num_rows, -1, self._config.latent_dim)

        def score(chunk: _Chunk) -> _ScoredChunk:
            latents = self._gather(layer, chunk)
            hidden = None if chunk.hidden is None else chunk.hidden.repeat_interleave(q_nope.shape[1], dim=1)
            visible = queries[:, chunk.first_query * q_nope.shape[1] :]
            # Latents whole as values, keys included: cutting them first would copy them, cutting the sum is cheap.
            return self._scored(visible, latents, latents, hidden)

        attended = _softmax_sum(map(score, group.chunks), len(group.chunks))[..., : self._config.kv_lora_rank]
        attended = attended.to(q_nope.dtype).reshape(*q_nope.shape[:2], -1)
        return torch.bmm(attended.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def mla_prefill(
        self, layer: int, group: _Group, q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, w_uv: Tensor
    ) -> Tensor:
        """Expanded: each chunk's keys and values are rebuilt from its latents once, for all of one row's queries.

        q_nope [q, H, dn], q_rope [q, H, dr] -> [q, H, dv].
        """
        heads, rank = q_nope.shape[1], self._config.kv_lora_rank
        queries = torch.cat((q_nope, q_rope), dim=2).transpose(0, 1)

        def score(chunk: _Chunk) -> _ScoredChunk:
            latents = self._gather(layer, chunk)[0]
            k_nope = F.linear(latents[:, :rank], w_uk.flatten(0, 1)).view(len(latents), heads, -1)
            values = F.linear(latents[:, :rank], w_uv.flatten(0, 1)).view(len(latents), heads, -1)
            keys = torch.cat((k_nope, latents[:, None, rank:].expand(-1, heads, -1)), dim=2)
            visible = queries[:, chunk.first_query :]
            return self._scored(visible, keys.transpose(0, 1), values.transpose(0, 1), chunk.hidden)

        attended = _softmax_sum(map(score, group.chunks), len(group.chunks))
        return attended.to(q_nope.dtype).transpose(0, 1)

    def _gather(self, layer: int, chunk: _Chunk) -> Tensor:
        """[n, num_keys, W]: a copy of the chunk's latents of one layer."""
        latents = self._cache.read_pages(chunk.blocks.flatten() * self._cache.num_layers + layer)
        return latents.view(len(chunk.blocks), -1, latents.shape[2])[:, : chunk.num_keys]

    def _scored(self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> _ScoredChunk:
        scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(self._config.softmax_scale)
        return _ScoredChunk(scores if hidden is None else scores.masked_fill_(hidden, -torch.inf), values)


def _softmax_sum(chunks: Iterator[_ScoredChunk], num_chunks: int) -> Tensor:
    """softmax(scores over all chunks) @ values -> [B, Q, width]; float32 when there is more than one chunk.

    Every query sees a key of the first chunk, so the running maximum is finite from then on.
    """
    scores, values = next(chunks)
    if num_chunks == 1:
        return torch.bmm(scores.softmax(-1).to(values.dtype), values)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    result = torch.bmm(weights.to(values.dtype), values).float()
    for scores, values in chunks:
        seeing = slice(result.shape[1] - scores.shape[1], None)
        old_peak = peak[:, seeing]
        new_peak = torch.maximum(old_peak, scores.amax(-1, keepdim=True))
        shrink = (old_peak - new_peak).exp_()
        weights = scores.sub_(new_peak).exp_()
        total[:, seeing] = total[:, seeing] * shrink + weights.sum(-1, keepdim=True)
        result[:, seeing] = result[:, seeing] * shrink + torch.bmm(weights.to(values.dtype), values)
        peak[:, seeing] = new_peak
    return result / total


def _like_rows(step: StepInputs) -> list[list[int]]:
    """Rows to be attended together: decode rows whose contexts differ by less than a factor of two (short ones
    all together, where calls cost more than keys), every other row by itself."""
    decode_rows: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for row, context_len in enumerate(step.context_lens):
        if step.query_start[row + 1] - step.query_start[row] > 1:
            groups.append([row])
        else:
            decode_rows.setdefault((context_len // 256).bit_length(), []).append(row)
    return [*decode_rows.values(), *groups]


def _make_group(step: StepInputs, rows: list[int], config: DeepseekConfig) -> _Group:
    starts = [step.query_start[row] for row in rows]
    num_queries = step.query_start[rows[0] + 1] - starts[0]
    context_len = max(step.context_lens[row] for row in rows)
    expand = len(rows) == 1 and _expanding_is_cheaper(num_queries, context_len, config)
    device = step.positions.device
    tokens: slice | Tensor
    if starts[-1] - starts[0] == len(rows) - 1 or len(rows) == 1:
        tokens = slice(starts[0], starts[0] + len(rows) * num_queries)
    else:
        tokens = torch.tensor(starts, device=device)
    positions = step.positions[tokens].view(len(rows), num_queries)
    first_position = min(step.context_lens[row] for row in rows) - num_queries

    blocks = step.block_tables[rows[0] : rows[-1] + 1]
    blocks = blocks if len(blocks) == len(rows) else step.block_tables[torch.tensor(rows, device=device)]
    blocks = blocks[:, : -(-context_len // BLOCK_SIZE)].long()
    if len(rows) > 1:  # a shorter row's missing blocks are read (and hidden): let them be its own
        used = torch.tensor([-(-step.context_lens[row] // BLOCK_SIZE) for row in rows], device=device)
        missing = torch.arange(blocks.shape[1], device=device) >= used[:, None]
        blocks = torch.where(missing, blocks[:, :1], blocks)

        context_len = blocks.shape[1] * BLOCK_SIZE  # whole blocks: a batched product copies what is cut

    chunks = []
    keys_a_chunk = _keys_a_chunk(len(rows), num_queries, expand, config)
    for start in range(0, context_len, keys_a_chunk):
        stop = min(start + keys_a_chunk, context_len)
        first_query = max(0, start - first_position) if len(rows) == 1 else 0
        hidden = None
        if stop - 1 > first_position + first_query:
            hidden = torch.arange(start, stop, device=device) > positions[:, first_query:, None]
        chunks.append(
            _Chunk(blocks[:, start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)], stop - start, first_query, hidden)
        )
    return _Group(tokens, len(rows), expand, chunks)


def _expanding_is_cheaper(num_queries: int, context_len: int, config: DeepseekConfig) -> bool:
    """Multiplications a head: expanding needs fewer for each query-key pair, but rebuilds the cached keys too."""
    cached = context_len - num_queries
    pairs = num_queries * (cached + num_queries / 2)
    expanded_width = config.qk_head_dim + config.v_head_dim
    absorbed_width = config.latent_dim + config.kv_lora_rank
    rebuilding = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    return num_queries > FEW_TOKENS and pairs * (absorbed_width - expanded_width) > cached * rebuilding


def _keys_a_chunk(num_rows: int, num_queries: int, expand: bool, config: DeepseekConfig) -> int:
    """A multiple of BLOCK_SIZE; at least one block, however many queries there are."""
    heads = config.num_attention_heads
    if expand:
        numbers_a_key = heads * max(num_queries, config.qk_head_dim + config.v_head_dim)
    else:
        numbers_a_key = num_rows * max(heads * num_queries, config.latent_dim)
    return max(1, WORKSPACE // numbers_a_key // BLOCK_SIZE) * BLOCK_SIZE
