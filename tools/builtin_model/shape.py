"""The shape of the built-in model: its `config.json` in one place, and how the server reads it.

A DeepSeek-V2 network (arXiv 2405.04434) of 7.9 million parameters. Rope is as wide as the rest of a head, since
the neighbour heads that the weights start with (`initial.py`) need several short wavelengths.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from model.config import DeepseekConfig, load_config

HUB_CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def hub_config(bos: int, eos: int, **changes: object) -> dict[str, object]:
    """The fields of config.json, for these token ids; `changes` are for smaller shapes in tests."""
    return HUB_CONFIG | {"bos_token_id": bos, "eos_token_id": eos} | changes


def read_config(fields: dict[str, object]) -> DeepseekConfig:
    """Through the server's own reader, so that training and serving cannot differ in what a field means."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return load_config(Path(folder))
