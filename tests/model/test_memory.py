"""Memory arithmetic against the published figures, and what is left of a machine or its control group."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, DeepseekConfig, load_config
from model.memory import available_memory, estimate_memory, require_memory, trim, weight_bytes_in
from tests.checkpoints import KINDS, make_checkpoint, make_config
from tests.model.test_config import V2_LITE

GIB = 1 << 30
MEMINFO = "MemTotal:  32000000 kB\nMemFree:  1000000 kB\nMemAvailable:  8000000 kB\nHugetlb:  0 kB\n"


@pytest.fixture
def v2_lite(tmp_path: Path) -> DeepseekConfig:
    (tmp_path / "config.json").write_text(json.dumps(make_config("v2", **V2_LITE)))
    return load_config(tmp_path)


def test_v2_lite_in_64_gib(v2_lite: DeepseekConfig) -> None:
    estimate = estimate_memory(v2_lite, available=64 * GIB, dtype="bfloat16", block_size=64)
    router_bytes = 26 * 64 * 2048 * 2  # the float32 routers take two bytes a weight more than the file's
    assert estimate.weight_bytes == 15_706_484_224 * 2 + router_bytes
    assert estimate.cache_bytes_per_token == 31_104
    blocks = (64 * GIB - estimate.weight_bytes) // (64 * 31_104)
    assert estimate.cached_tokens == 64 * blocks
    assert estimate.longest_context == 163_840
    assert estimate.long_requests == blocks // 2048 == 9


def test_a_context_longer_than_memory_is_cut_to_whole_blocks(v2_lite: DeepseekConfig) -> None:
    available = weight_bytes_in(v2_lite, "bfloat16") + 31_104 * 1000
    estimate = estimate_memory(v2_lite, available=available, dtype="bfloat16", block_size=64)
    assert (estimate.cached_tokens, estimate.longest_context, estimate.long_requests) == (960, 960, 0)
    short = estimate_memory(
        replace(v2_lite, max_position_embeddings=4096), available=64 * GIB, dtype="float32", block_size=64
    )
    assert (short.longest_context, short.long_requests, short.cache_bytes_per_token) == (4096, 0, 62_208)


def test_a_model_that_does_not_fit_is_refused_with_the_sum(v2_lite: DeepseekConfig) -> None:
    one_block = 31_104 * 64
    enough = weight_bytes_in(v2_lite, "bfloat16") + one_block
    require_memory(v2_lite, available=enough, dtype="bfloat16", block_size=64)
    with pytest.raises(CheckpointError, match=r"29\.26 GiB of weights in bfloat16 .* but 29\.26 GiB are available"):
        require_memory(v2_lite, available=enough - 1, dtype="bfloat16", block_size=64)
    assert estimate_memory(v2_lite, available=0, dtype="bfloat16", block_size=64).longest_context == 0


def test_quantised_v2_lite(v2_lite: DeepseekConfig) -> None:
    """A byte a weight, or half of one, and two bytes of scale for 64 weights; what is not quantised as it was."""
    kept = 102400 * 2048 + 27 * (2 * 2048 + 512) + 2048
    routers, latents = 26 * 64 * 2048, 27 * (576 * 2048 + 4096 * 512)
    rest = 15_706_484_224 - kept - routers - latents
    assert weight_bytes_in(v2_lite, "bfloat16", "int8") == 2 * kept + 4 * routers + (rest + latents) * 66 // 64
    assert weight_bytes_in(v2_lite, "bfloat16", "int4") == 2 * kept + 4 * routers + rest * 34 // 64 + latents * 66 // 64
    tied = replace(v2_lite, tie_word_embeddings=True)
    for quantization in ("int8", "int4"):  # the embedding is kept, what the head reads is a quantised copy
        assert weight_bytes_in(tied, "bfloat16", quantization) == weight_bytes_in(v2_lite, "bfloat16", quantization)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_bytes_are_those_of_the_file_in_its_own_type(tmp_path: Path, kind: str) -> None:
    config = load_config(make_checkpoint(tmp_path, kind))
    assert weight_bytes_in(config, "float32") == open_checkpoint(tmp_path, config).weight_bytes


def fake_root(path: Path, group: str = "", **files: str) -> Path:
    (path / "proc").mkdir()
    (path / "proc/meminfo").write_text(MEMINFO)
    (path / "sys/fs/cgroup" / group).mkdir(parents=True)
    for name, content in files.items():
        (path / "sys/fs/cgroup" / group / name.replace("__", ".")).write_text(content + "\n")
    return path


def test_memory_of_the_machine(tmp_path: Path) -> None:
    assert available_memory(fake_root(tmp_path)) == 8_000_000 * 1024
    assert available_memory() > 0


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    files = {"memory__current": "3000000000", "memory__stat": "anon 1\ninactive_file 500000000"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    assert available_memory(fake_root(tmp_path / "a", memory__max="4000000000", **files)) == 1_500_000_000
    assert available_memory(fake_root(tmp_path / "b", memory__max="max", **files)) == 8_000_000 * 1024
    version1 = {"memory__usage_in_bytes": "3000000000", "memory__stat": "total_inactive_file 1"}
    assert available_memory(fake_root(tmp_path / "c", "memory", memory__limit_in_bytes="2000000000", **version1)) == 0


def test_what_was_freed_in_pieces_goes_back_to_the_system() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not this C library")
    pieces = [bytearray(1 << 16) for _ in range(1024)]
    last = pieces.pop()  # what lies before it cannot go back by itself
    del pieces
    before = resident_bytes()
    trim()
    assert resident_bytes() < before - (32 << 20)
    assert len(last) == 1 << 16


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
