"""How many blocks the latent pool gets and how long a request may be: arithmetic only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import DeepseekConfig
from model.latent_cache import BLOCK_SIZE
from model.memory import in_gib

DEFAULT_SHARE = 0.4
"""Of the memory left beside the weights, unless one request of full length needs more."""
LARGEST_SHARE = 0.9
"""The rest is for activations, the allocator and whatever else the machine does."""


class ConfigError(ValueError):
    """An option cannot be met on this machine or with this checkpoint; the message is one line naming it."""


@dataclass(frozen=True, slots=True)
class PoolSize:
    num_blocks: int
    max_model_len: int
    """Longest prompt + output of one request; the pool holds it."""


def size_pool(
    config: DeepseekConfig,
    *,
    free_bytes: int,
    bytes_per_token: int,
    max_num_seqs: int,
    max_model_len: int | None = None,
    num_blocks: int | None = None,
    kv_cache_memory: int | None = None,
    share: float = DEFAULT_SHARE,
) -> PoolSize:
    """Size the pool within `free_bytes`, what is left beside the weights; `bytes_per_token` is the cache's.

    `num_blocks` wins over `kv_cache_memory` (bytes). With neither, the pool holds `max_num_seqs` requests of
    `max_model_len` tokens, or what fits into `share` of the free memory, or one such request if that is more.
    A `max_model_len` of None is the checkpoint's, cut to what the pool holds. Raises ConfigError.
    """
    limit = config.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise ConfigError(f"max_model_len {max_model_len} is beyond the checkpoint's max_position_embeddings, {limit}")
    longest = limit if max_model_len is None else max_model_len
    if longest < 2:
        raise ConfigError(f"max_model_len {longest} leaves no room for a prompt and an output")
    request_blocks = -(-longest // BLOCK_SIZE)
    block_bytes = bytes_per_token * BLOCK_SIZE
    most = int(free_bytes * LARGEST_SHARE) // block_bytes
    if num_blocks is not None:
        blocks, asked = num_blocks, f"num_blocks {num_blocks}"
    elif kv_cache_memory is not None:
        blocks, asked = kv_cache_memory // block_bytes, f"kv_cache_memory {in_gib(kv_cache_memory)}"
    else:
        wanted = int(free_bytes * share) // block_bytes
        blocks = min(max_num_seqs * request_blocks, max(wanted, request_blocks), most)
        asked = f"the free memory, {in_gib(free_bytes)},"
    if blocks < 1:
        raise ConfigError(f"{asked} holds no block of {BLOCK_SIZE} tokens ({block_bytes:,} bytes)")
    if blocks > most:
        raise ConfigError(
            f"{asked} needs {in_gib(blocks * block_bytes)} of latent cache, but {in_gib(free_bytes)} are free beside "
            f"the weights; at most {most} blocks fit"
        )
    if max_model_len is not None and blocks < request_blocks:
        raise ConfigError(
            f"max_model_len {max_model_len} needs {request_blocks} blocks of {BLOCK_SIZE} tokens "
            f"({in_gib(request_blocks * block_bytes)}), but {asked} gives {blocks}"
        )
    return PoolSize(num_blocks=blocks, max_model_len=min(longest, blocks * BLOCK_SIZE))
