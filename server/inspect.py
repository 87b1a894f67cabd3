"""`latentd inspect`: what a checkpoint is and what it needs, from config.json and the weight files' headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model.checkpoint import open_checkpoint
from model.config import load_config
from model.memory import LONG_CONTEXT, QUANTIZED_BITS, available_memory, estimate_memory
from scheduler.config import BLOCK_SIZE
from server.sizes import format_count, format_size


@dataclass(frozen=True)
class Quantized:
    """What changes with `--quantization`, which runs in bfloat16."""

    weight_bytes: int
    cached_tokens: int
    fp8_cached_tokens: int
    """With `--kv-cache-dtype fp8` as well."""


@dataclass(frozen=True)
class Inspection:
    """The keys of `--json`. Sizes are in bytes, contexts in tokens."""

    model_dir: str
    model_type: str
    parameters: int
    active_parameters: int
    """Used for one token."""
    dtype: str
    """What `--dtype auto` runs it in; the figures below are for that."""
    weight_bytes: int
    weight_files_bytes: int | None
    """None where the folder has no weight files."""
    weight_files_dtype: str | None
    cache_bytes_per_token: int
    fp8_cache_bytes_per_token: int
    """With `--kv-cache-dtype fp8`."""
    max_position_embeddings: int
    available_bytes: int
    cached_tokens: int
    """What fits beside the weights."""
    fp8_cached_tokens: int
    """The same with `--kv-cache-dtype fp8`."""
    longest_context: int
    """Of one request: what fits, cut to what the model allows."""
    requests_of_128k: int
    """How many fit at the same time; 0 where the model allows less."""
    quantization: dict[str, Quantized]
    """By what `--quantization` is set to."""

    def text(self) -> str:
        """For people."""
        files = "no weight files in the folder"
        if self.weight_files_bytes is not None:
            files = f"{format_size(self.weight_files_bytes)} of {self.weight_files_dtype} in files"
        allowed = f"the model allows {self.max_position_embeddings:,} tokens"
        context, long_requests = f"{self.longest_context:,} tokens ({allowed})", f"{self.requests_of_128k:,} at a time"
        if self.cached_tokens == 0:
            context = long_requests = "none: the weights do not fit"
        elif self.max_position_embeddings < LONG_CONTEXT:
            long_requests = f"none: {allowed}"
        rows = {
            "model": f"{self.model_type} in {self.model_dir}",
            "parameters": f"{format_count(self.parameters)}, {format_count(self.active_parameters)} active a token",
            "weights": f"{format_size(self.weight_bytes)} in {self.dtype} ({files})",
            "cache": f"{self.cache_bytes_per_token:,} bytes a token",
            "memory": f"{format_size(self.available_bytes)} for weights and cache",
            "cached tokens": f"{self.cached_tokens:,} beside the weights",
            "longest context": context,
            "128K requests": long_requests,
            "with an fp8 cache": f"{self.fp8_cache_bytes_per_token:,} bytes a token, {self.fp8_cached_tokens:,} cached",
        }
        for quantization, sizes in self.quantization.items():
            rows[f"with {quantization}"] = (
                f"{format_size(sizes.weight_bytes)} of weights, {sizes.cached_tokens:,} cached tokens beside them, "
                f"{sizes.fp8_cached_tokens:,} in fp8"
            )
        return "\n".join(f"{name:17} {row}" for name, row in rows.items())


def inspect_checkpoint(model_dir: Path, device_memory: int | None = None) -> Inspection:
    """Reads no weights. `device_memory` is what weights and cache may take; None asks this machine.

    A folder that has only config.json is planned from that, so that nobody has to download weights to learn that they
    do not fit. Raises CheckpointError.
    """
    config = load_config(model_dir)
    has_weights = any(model_dir.glob("*.safetensors*"))
    checkpoint = open_checkpoint(model_dir, config) if has_weights else None
    file_dtype = config.dtype if checkpoint is None else checkpoint.file_dtype
    dtype = "float32" if file_dtype == "float32" else "bfloat16"
    available = available_memory() if device_memory is None else device_memory
    estimated = partial(estimate_memory, config, available=available, block_size=BLOCK_SIZE)
    estimate = estimated(dtype=dtype)
    in_fp8 = estimated(dtype=dtype, fp8_cache=True)
    quantized = {}
    for quantization in QUANTIZED_BITS:
        plain = estimated(dtype="bfloat16", quantization=quantization)
        dense = estimated(dtype="bfloat16", quantization=quantization, fp8_cache=True)
        quantized[quantization] = Quantized(plain.weight_bytes, plain.cached_tokens, dense.cached_tokens)
    return Inspection(
        model_dir=str(model_dir),
        model_type=config.model_type,
        parameters=estimate.parameters,
        active_parameters=estimate.active_parameters,
        dtype=dtype,
        weight_bytes=estimate.weight_bytes,
        weight_files_bytes=None if checkpoint is None else checkpoint.weight_bytes,
        weight_files_dtype=file_dtype,
        cache_bytes_per_token=estimate.cache_bytes_per_token,
        max_position_embeddings=config.max_position_embeddings,
        available_bytes=estimate.available,
        fp8_cache_bytes_per_token=in_fp8.cache_bytes_per_token,
        cached_tokens=estimate.cached_tokens,
        fp8_cached_tokens=in_fp8.cached_tokens,
        longest_context=estimate.longest_context,
        requests_of_128k=estimate.long_requests,
        quantization=quantized,
    )
