"""Published shapes, as far as kernels see them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from model.config import DeepseekConfig
from tests.model.test_ops_eager import CONFIG


class Shape(NamedTuple):
    name: str
    config: DeepseekConfig


_HEADS = replace(
    CONFIG, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_group=1, topk_group=1
)
V2_LITE = Shape(
    "V2-Lite",
    replace(
        _HEADS,
        hidden_size=2048,
        num_attention_heads=16,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
    ),
)
V2 = Shape(
    "V2",
    replace(
        _HEADS,
        hidden_size=5120,
        num_attention_heads=128,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_shared_experts=2,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    ),
)
V3 = Shape(
    "V3",
    replace(
        V2.config,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        topk_group=4,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
)
