"""What a model needs of a machine's memory, computed from its config alone: no weights read, no torch.

The cached latents of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, table 1) cost
`kv_lora_rank + qk_rope_head_dim` numbers a token and layer, whatever the number of heads.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

from model.config import CheckpointError, DeepseekConfig, expected_tensors

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
QUANTIZED_BITS = {"int8": 8, "int4": 4}
"""By what `--quantization` asks for."""
SCALE_BITS = 0.25
"""Of a weight: 64 share a scale of 16."""
LONG_CONTEXT = 131_072
"""Tokens of a 128K request."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """All in bytes, tokens or numbers of requests; `available` is what the weights and the cache may take together."""

    available: int
    parameters: int
    active_parameters: int
    weight_bytes: int
    cache_bytes_per_token: int
    cached_tokens: int
    """Tokens that fit beside the weights, in whole blocks."""
    longest_context: int
    """Longest prompt and output of one request: `cached_tokens`, cut to the checkpoint's own limit."""
    long_requests: int
    """Requests of 128K tokens that fit at once; 0 where the checkpoint's own limit is below that."""


def estimate_memory(
    config: DeepseekConfig,
    *,
    available: int,
    dtype: str,
    block_size: int,
    quantization: str = "none",
    fp8_cache: bool = False,
) -> MemoryEstimate:
    """What fits into `available` bytes with weights and cache in `dtype`, weights quantised to `quantization`, and a
    cache in blocks of `block_size` tokens, its latents in 8 bits if asked for.

    `dtype` is one of `ITEMSIZES`. Activations are not counted: a step of a few hundred tokens needs little beside the
    weights, and the engine measures rather than guesses them.
    """
    weight_bytes = weight_bytes_in(config, dtype, quantization)
    per_token = config.cache_bytes_per_token(ITEMSIZES[dtype], fp8_cache)
    blocks = max(0, available - weight_bytes) // (per_token * block_size)
    long_blocks = -(-LONG_CONTEXT // block_size)
    return MemoryEstimate(
        available=available,
        parameters=config.num_parameters(),
        active_parameters=config.num_active_parameters(),
        weight_bytes=weight_bytes,
        cache_bytes_per_token=per_token,
        cached_tokens=blocks * block_size,
        longest_context=min(blocks * block_size, config.max_position_embeddings),
        long_requests=blocks // long_blocks if config.max_position_embeddings >= LONG_CONTEXT else 0,
    )


def weight_bytes_in(config: DeepseekConfig, dtype: str, quantization: str = "none") -> int:
    """Bytes of the network's weights when it runs in `dtype`, those of linear layers and experts quantised."""
    tensors = expected_tensors(config)
    if quantization != "none" and config.tie_word_embeddings:  # the head is quantised, the embedding is not
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return sum(int(math.prod(shape) * _bits(name, shape, dtype, quantization)) // 8 for name, shape in tensors.items())


def _bits(name: str, shape: tuple[int, ...], dtype: str, quantization: str) -> float:
    """Of each number of a tensor."""
    if name.endswith((".mlp.gate.weight", ".e_score_correction_bias")):
        return 32
    kept = name.endswith("embed_tokens.weight") or len(shape) == 1
    if kept or quantization == "none":
        return 8 * ITEMSIZES[dtype]
    if name.endswith(("kv_a_proj_with_mqa.weight", "kv_b_proj.weight")):
        quantization = "int8"  # on a GPU the second stays as it is; its pool is what steps are seen to leave
    return QUANTIZED_BITS[quantization] + SCALE_BITS


def require_memory(
    config: DeepseekConfig,
    *,
    available: int,
    dtype: str,
    block_size: int,
    quantization: str = "none",
    fp8_cache: bool = False,
) -> None:
    """Raises CheckpointError, with the sum in it, unless the weights and one block of cache fit: asked before anything
    is allocated, because config.json decides how much that is."""
    estimate = estimate_memory(
        config,
        available=available,
        dtype=dtype,
        block_size=block_size,
        quantization=quantization,
        fp8_cache=fp8_cache,
    )
    if not estimate.cached_tokens:
        raise CheckpointError(
            f"the model does not fit: {in_gib(estimate.weight_bytes)} of weights in "
            f"{weights_in(dtype, quantization)} and {in_gib(estimate.cache_bytes_per_token * block_size)} for "
            f"{block_size} tokens of cache, but {in_gib(available)} are available"
        )


def weights_in(dtype: str, quantization: str) -> str:
    """How to call their format."""
    return dtype if quantization == "none" else f"{quantization} and {dtype}"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: free memory of the machine, or what is left of its control group.

    Page cache counts as free in both, because the kernel gives it back. `root` is the file system to look in.
    """
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    for group, limit_file, usage_file, reclaimable in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (root / group / limit_file).read_text().strip()
            usage = int((root / group / usage_file).read_text())
            statistics = dict(line.split(" ", 1) for line in (root / group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            available = min(available, int(limit) - usage + int(statistics.get(reclaimable, 0)))
    return max(0, available)


def trim() -> None:
    """Give the system back what was freed in pieces, as loading does; the C library would keep it. Costs a millisecond
    for each 100 MB."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's alone
        library.malloc_trim(0)


def in_gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
