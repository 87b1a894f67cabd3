"""What `latentd inspect` plans for the cards that the published models are served on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.make_checkpoint import SHAPES
from server.inspect import Inspection, inspect_checkpoint
from server.sizes import parse_size

V2 = SHAPES["lite"] | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 160,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
"""DeepSeek-V2, 236 billion parameters."""


def inspect(path: Path, shape: dict[str, object], memory: str) -> Inspection:
    (path / "config.json").write_text(json.dumps(shape | {"bos_token_id": 0, "eos_token_id": 1}))
    return inspect_checkpoint(path, parse_size(memory))


@pytest.mark.parametrize(("memory", "long_requests"), [("40GB", 2), ("80GB", 11), ("141GB", 26)])
def test_v2_lite_in_bfloat16(tmp_path: Path, memory: str, long_requests: int) -> None:
    """31.4 GB of weights and 4.08 GB a request of 128K tokens (arXiv 2405.04434, table 1: 576 numbers a layer)."""
    found = inspect(tmp_path, SHAPES["lite"], memory)
    assert round(found.weight_bytes / 1e9, 1) == 31.4
    assert found.requests_of_128k == int((parse_size(memory) - found.weight_bytes) // (131072 * 27 * 576 * 2))
    assert found.requests_of_128k == long_requests
    assert found.fp8_cache_bytes_per_token == 27 * (512 + 4 + 2 * 64) == 17388
    assert found.fp8_cached_tokens == (parse_size(memory) - found.weight_bytes) // (64 * 17388) * 64


def test_v2_fits_a_card_of_141_gb_in_int4_alone(tmp_path: Path) -> None:
    found = inspect(tmp_path, V2, "141GB")
    assert round(found.parameters / 1e9, 1) == 235.7
    assert found.cache_bytes_per_token == 69120
    assert found.cached_tokens == 0
    assert "none: the weights do not fit" in found.text()
    assert found.quantization["int8"].cached_tokens == 0
    int4 = found.quantization["int4"]
    assert 126e9 < int4.weight_bytes < 138e9
    assert int4.cached_tokens == (141 * 10**9 - int4.weight_bytes) // (64 * 69120) * 64 > 50_000
    assert int4.fp8_cached_tokens == (141 * 10**9 - int4.weight_bytes) // (64 * 60 * 644) * 64
