"""Attention of whole steps, absorbed and expanded rows among each other, against the eager twin in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda import attention, mla_prefill
from model.ops.cuda.cudnn import Attend
from model.ops.cuda.ops import CudaOps
from model.ops.eager.ops import EagerOps
from tests.model.ops.cuda.common import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    flash_attention,
    poisoned,
    randn,
    relative_error,
    small_pieces,
)
from tests.model.test_ops_eager import CONFIG, step_of

LAYER = 1
ROWS = {
    "decode": [(1, 65), (1, 1), (1, 130)],
    "one prompt": [(40, 40)],
    "chunks on prefixes": [(30, 200), (9, 65)],
    "mixed": [(1, 64), (20, 20), (1, 129), (5, 210), (33, 100), (2, 2)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("workspace", [1 << 20, 70])
@pytest.mark.parametrize("attend", [None, flash_attention], ids=["kernel", "pieces"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention(
    rows: list[tuple[int, int]],
    attend: Attend | None,
    workspace: int,
    fp8: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of more than 8 tokens are expanded, in tiles of 16; also with a workspace that cuts their contexts, and also
    in pieces of 8 or 16 tokens with each other or with 24 cached ones."""
    config = CONFIG
    numbers_a_key = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    monkeypatch.setattr(attention, "MOST_ABSORBED", 8)
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", workspace * numbers_a_key * dtype.itemsize)
    monkeypatch.setattr(mla_prefill, "TILE", 16)
    small_pieces(monkeypatch, 8, 16, 24)
    step, num_blocks = step_of(rows)
    rank, layers = config.kv_lora_rank, config.num_hidden_layers
    exact_cache, cache = (
        LatentCache(num_blocks, layers, config.latent_dim, kind, device, fp8_latents=rank if fp8 else 0)
        for kind, device in ((torch.float32, "cpu"), (dtype, DEVICE))
    )
    eager = EagerOps().attention(step, exact_cache, config)
    numbers = randn(num_blocks * layers * BLOCK_SIZE, config.latent_dim, seed=1, dtype=dtype)
    exact_cache.write(torch.arange(len(numbers)), *numbers.cpu().float().split([rank, config.qk_rope_head_dim], dim=1))
    cache.data.view(torch.uint8).fill_(255)  # NaN, which stays where no query may look
    kept = torch.ones((num_blocks, layers, BLOCK_SIZE), dtype=torch.bool)
    for row, context in enumerate(step.context_lens):
        if context % BLOCK_SIZE:
            kept[step.block_tables[row, context // BLOCK_SIZE], :, context % BLOCK_SIZE :] = False
    lines = kept.flatten().nonzero()[:, 0].to(DEVICE)
    cache.write(lines, *numbers[lines].split([rank, config.qk_rope_head_dim], dim=1))
    q = randn(step.num_tokens, config.num_attention_heads, config.qk_head_dim, seed=3, dtype=dtype) * 2
    q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=2)
    w_uk = randn(config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank, seed=4, dtype=dtype) * 0.2
    w_uv = randn(config.num_attention_heads, config.v_head_dim, config.kv_lora_rank, seed=5, dtype=dtype) * 0.2
    packed = EagerOps().pack_latent(w_uk.cpu().float(), w_uv.cpu().float())
    exact = eager(LAYER, q_nope.cpu().float(), q_rope.cpu().float(), packed)

    ops = CudaOps(attend=attend)
    on_device = replace(
        step,
        positions=step.positions.to(DEVICE),
        slot_mapping=step.slot_mapping.to(DEVICE),
        block_tables=step.block_tables.to(DEVICE),
    )
    with poisoned():
        prepared = ops.attention(on_device, cache, config)
        found = prepared(LAYER, q_nope, q_rope, ops.pack_latent(w_uk, w_uv))
    assert relative_error(found.cpu(), exact) < TOLERANCE[dtype]


def test_few_queries_are_absorbed_and_many_expanded() -> None:
    few, many = attention.MOST_ABSORBED, attention.MOST_ABSORBED + 1
    step, num_blocks = step_of([(1, 70), (many, 200), (few, 300)])
    cache = LatentCache(num_blocks, CONFIG.num_hidden_layers, CONFIG.latent_dim, torch.float32)
    planned = attention.plan_attention(step, cache, CONFIG)
    assert planned._absorbed is not None
    assert isinstance(planned._absorbed.tokens, torch.Tensor)
    assert planned._absorbed.tokens.tolist() == [0, *range(1 + many, 1 + many + few)]
    assert [len(expanded.keys) for expanded in planned._expanded] == [200]
