"""Expanded attention by cuDNN, in pieces of few shapes: cuDNN makes a plan for each shape, a fraction of a second.

A piece is some tokens of a row with a whole stretch of its cached keys, or with each other: cuDNN's causal mask begins
at the first query and the first key, so the two are never one call. What pieces find is merged with what the row has so
far, as the own kernel does in `mla_prefill`, which computes what no piece covers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from model.config import DeepseekConfig
from model.ops.cuda import mla_prefill as prefill
from model.ops.cuda.mla_decode import LOG2_E
from model.ops.cuda.mla_prefill import FIRST, LAST, Accumulator, Piece, mla_prefill
from model.transfer import to_device

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""q [n, H, d], k [m, H, d], v [m, H, dv], scale, and whether query i sees only keys up to i -> [n, H, dv] in the dtype
of q, and the logarithm (base e) of each softmax's sum [H, n] float32."""

TOLERANCE = 1e-2
"""Relative difference of the means, in the Frobenius norm, and difference of the logarithms: what 16 bits explain."""


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """`Attend`. Keys of 192 numbers and values of 128 are for Hopper and data centres' Blackwell, from cuDNN 9.11 on;
    elsewhere RuntimeError."""
    found, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.unsqueeze(0).transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )[:2]
    return found[0].transpose(0, 1), lse.view(q.shape[1], q.shape[0])


def attend_pieces(
    attend: Attend,
    pieces: Sequence[Piece],
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    values: Tensor,
    softmax_scale: float,
    accumulator: Accumulator,
    output: Tensor,
) -> None:
    """All pieces of a pass, one after the other; the tensors are those of `mla_prefill`."""
    heads = q_nope.shape[1]
    for (token, number), of_tokens in groupby(pieces, lambda piece: (piece.token, piece.number)):
        tokens = slice(token, token + number)
        q = torch.cat((q_nope[tokens], q_rope[tokens]), dim=2)
        for piece in of_tokens:
            keys = slice(piece.first_key, piece.first_key + piece.keys)
            k = torch.cat((k_nope[keys], k_rope[keys, None].expand(-1, heads, -1)), dim=2)
            found, lse = attend(q, k, values[keys], softmax_scale, piece.causal)
            fold(found, lse, token, piece.flags, accumulator, output)


def fold(found: Tensor, lse: Tensor, token: int, flags: int, accumulator: Accumulator, output: Tensor) -> None:
    """Merges what `Attend` gave for the tokens from `token` on into what they have so far, by weight."""
    number, heads, value = found.shape
    block = min(16, triton.next_power_of_2(heads))
    _fold[(number, triton.cdiv(heads, block))](
        found,
        lse,
        accumulator.mean,
        accumulator.lse,
        output,
        token,
        found.stride(0),
        found.stride(1),
        lse.stride(0),
        lse.stride(1),
        LOG2_E=LOG2_E,
        HEADS=heads,
        VALUE=value,
        FIRST=bool(flags & FIRST),
        LAST=bool(flags & LAST),
        BLOCK=block,
        BLOCK_VALUE=triton.next_power_of_2(value),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first_token"])
def _fold(
    found: tl.tensor,
    found_lse: tl.tensor,
    mean: tl.tensor,
    lse: tl.tensor,
    output: tl.tensor,
    first_token: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    LOG2_E: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
) -> None:
    """One program a token and BLOCK of its heads."""
    query = tl.program_id(0)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_VALUE)
    known = head < HEADS
    inside = known[:, None] & (column < VALUE)
    at = found + query * token_stride + head[:, None] * head_stride + column
    result = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    result_lse = tl.load(found_lse + head * lse_head_stride + query * lse_token_stride, mask=known, other=0.0) * LOG2_E
    of_head = (first_token + query).to(tl.int64) * HEADS + head
    at_value = of_head[:, None] * VALUE + column
    if not FIRST:
        before = tl.load(lse + of_head, mask=known, other=float("-inf"))
        old_mean = tl.load(mean + at_value, mask=inside, other=0.0)
        peak = tl.maximum(before, result_lse)
        old_weight, weight = tl.exp2(before - peak), tl.exp2(result_lse - peak)
        total = old_weight + weight
        result = (old_mean * old_weight[:, None] + result * weight[:, None]) / total[:, None]
        result_lse = peak + tl.log2(total)
    if LAST:
        tl.store(output + at_value, result, mask=inside)
    else:
        tl.store(mean + at_value, result, mask=inside)
        tl.store(lse + of_head, result_lse, mask=known)


def chosen(
    config: DeepseekConfig, dtype: torch.dtype, device: torch.device, attend: Attend = cudnn_attention
) -> Attend | None:
    """`attend` if it gives, here and at every shape that pieces have, what the own kernel gives; else None.

    Whatever it raises counts as no. The plans that it makes are those that prompts will need.
    """
    try:
        problem = _disagreement(config, dtype, device, attend)
    except Exception as error:  # of cuDNN, of a torch without it, of a device that runs out of memory
        problem = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if problem is not None:
        logger.info("attention of prompts: by the own kernel, not cuDNN (%s)", problem)
        return None
    logger.info("attention of prompts: by cuDNN (they agree)")
    return attend


def _disagreement(config: DeepseekConfig, dtype: torch.dtype, device: torch.device, attend: Attend) -> str | None:
    """The first shape whose results differ by more than `TOLERANCE`."""
    for number in range(prefill.PIECE, prefill.MOST_OF_A_PIECE + 1, prefill.PIECE):
        for keys, causal in ((number, True), (prefill.PIECE_KEYS, False)):
            difference = _difference(attend, number, keys, causal, config, dtype, device)
            if not difference < TOLERANCE:  # NaN is not
                return f"results of {number} queries and {keys} keys differ by {difference:.2g}"
    return None


def _difference(
    attend: Attend,
    number: int,
    keys: int,
    causal: bool,
    config: DeepseekConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Between `attend` and the own kernel, the larger one of `TOLERANCE`'s two."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    generator = torch.Generator(device).manual_seed(number)

    def randn(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    q, k_nope = randn(number, heads, config.qk_head_dim), randn(keys, heads, nope)
    k_rope, values = randn(keys, config.qk_rope_head_dim), randn(keys, heads, config.v_head_dim)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, heads, -1)), dim=2)
    found, lse = attend(q, k, values, config.softmax_scale, causal)
    tiles = []
    for query in range(0, number, prefill.TILE):
        rows = min(prefill.TILE, number - query)
        sees = query if causal else keys
        tiles.append((query, rows, 0, min(keys, sees + rows), sees, FIRST))
    accumulator = Accumulator(
        torch.empty(found.shape, dtype=torch.float32, device=device),
        torch.empty(found.shape[:2], dtype=torch.float32, device=device),
    )
    output = found.new_empty(0)
    q_nope, q_rope = torch.split(q, [nope, config.qk_rope_head_dim], dim=2)
    uploaded = to_device(np.array(tiles, np.int32), device)
    mla_prefill(q_nope, q_rope, k_nope, k_rope, values, uploaded, config.softmax_scale, accumulator, output)
    of_means = (found.float() - accumulator.mean).norm() / accumulator.mean.norm()
    of_logarithms = (lse.t() - accumulator.lse / LOG2_E).abs().max()
    return float(torch.maximum(of_means, of_logarithms))
