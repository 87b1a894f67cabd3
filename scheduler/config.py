"""How an engine is built: frozen, validated at the edge by `server.settings`, sent as the first frame."""

from __future__ import annotations

import msgspec

BLOCK_SIZE = 64
"""Tokens a block of the latent pool (design: 64 everywhere; kernels and hashes rely on it)."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    model_dir: str
    """Folder of the checkpoint, absolute."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str = "auto"
    """`auto` (bfloat16, float32 where the checkpoint is float32), `bfloat16`, `float16`, `float32`."""
    quantization: str = "none"
    """Of the weights of linear layers and experts: `none`, `int8`, `int4`."""
    kv_cache_dtype: str = "auto"
    """`auto` (that of the network), or `fp8`: latents in 8 bits."""
    max_model_len: int | None = None
    """Longest prompt + output; None takes the checkpoint's, cut to what the pool can hold."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """Token budget of a step; None takes what suits the device."""
    num_blocks: int | None = None
    """Size of the latent pool in blocks; overrides `kv_cache_memory`."""
    kv_cache_memory: int | None = None
    """Size of the latent pool in bytes; None takes it from the free memory."""
    prefix_cache: bool = True
    speculative: str = "off"
    """`off`, or `ngram`: draft tokens by prompt lookup."""
    log_level: str = "info"
    num_threads: int | None = None
    """Threads of the CPU worker; None takes the cores this process may use."""
    weights_cache: str | None = None
    """Folder where packed weights are kept for the next start, absolute."""


def token_budget(config: EngineConfig, device: str) -> int:
    """Most tokens a step computes. While a long prompt is computed, every running answer waits a whole step for its
    next token: on a CPU that is a good quarter of a second; a GPU needs the larger step to be busy."""
    return config.max_num_batched_tokens or (256 if device == "cpu" else 4096)


def lone_chunk(config: EngineConfig, device: str) -> int:
    """Longest chunk of a deep prompt that a step computes while nobody waits for his next token. Every chunk expands
    all that is cached before it: on a CPU a prompt of 8,192 tokens takes 28 s in chunks of 256, 19 s in longer ones."""
    budget = token_budget(config, device)
    return 4 * budget if device == "cpu" and config.max_num_batched_tokens is None else budget
