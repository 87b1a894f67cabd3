"""What the daemon tells about itself, and the answers of the endpoints that act on it."""

from __future__ import annotations

from typing import Any

import msgspec

from server.limits import Limit


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine turned out to be."""

    model_type: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    weight_bytes: int
    cache_bytes_per_token: int
    device: str
    dtype: str
    quantization: str
    """Of the weights: `none`, `int8` or `int4`."""
    ops: str
    """Implementation of the operations."""
    instruction_set: str | None
    """That the CPU kernels use; null where others compute."""
    prefill_attention: str | None
    """Who computes the attention of long prompts on a GPU, `cudnn` or `triton`; null elsewhere."""
    max_num_seqs: int
    max_num_batched_tokens: int
    load_seconds: float


class BlockPoolInfo(msgspec.Struct, frozen=True, kw_only=True):
    block_size: int
    """Tokens a block."""
    num_blocks: int
    free_blocks: int
    """Blocks no request refers to, cached ones included."""
    cached_blocks: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    models: list[str]
    state: str
    engine: EngineInfo | None
    """null until the model is loaded."""
    block_pool: BlockPoolInfo | None
    num_running: int
    num_waiting: int
    limits: list[Limit]
    """The bound of every number, length and depth of a request."""
    settings: dict[str, Any]
    """The options in effect, without keys and paths."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    server_load: int
    """Requests that are open."""


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    cancelled: bool


class PrefixCacheReset(msgspec.Struct, frozen=True, kw_only=True):
    reset: bool
