"""What the operator reads when the daemon is ready: what runs, where, with how much room, and how to try it."""

from __future__ import annotations

import json
import shlex
import socket
from importlib.metadata import version

from model.config import DeepseekConfig
from scheduler.messages import EngineReady
from server.address import base_url, is_loopback
from server.settings import Settings
from server.sizes import format_count, format_size

SUGGESTIONS = (
    "What is the capital of France?",
    "My name is Anna. What is my name?",
    "What is the opposite of hot?",
)
"""Questions that the built-in model answers rightly."""


def ready_text(
    settings: Settings, config: DeepseekConfig, ready: EngineReady, listener: socket.socket, seconds: float
) -> str:
    name = settings.served_model_name[0]
    tokens = ready.num_blocks * ready.block_size
    weights = ready.dtype if ready.quantization == "none" else f"{ready.quantization} and {ready.dtype}"
    in_fp8 = " in fp8" if settings.kv_cache_dtype == "fp8" else ""
    url = base_url(settings.host, listener.getsockname()[1])
    instructions = "" if ready.instruction_set is None else f" ({ready.instruction_set})"
    lines = [
        f"latentd {version('latentd')} serves {name} at {url}/v1 (ready after {seconds:.1f} s)",
        f"  model   {ready.model_type}, {format_count(config.num_parameters())} parameters, "
        f"{format_count(config.num_active_parameters())} active a token; "
        f"{format_size(ready.weight_bytes)} in {weights}",
        f"  runs    on {ready.device} with the {ready.ops} operations{instructions}; "
        f"{ready.max_num_seqs} requests at a time, {ready.max_num_batched_tokens} tokens a step",
        f"  cache   {ready.num_blocks:,} blocks of {ready.block_size} = {tokens:,} tokens{in_fp8}, "
        f"{format_size(tokens * ready.cache_bytes_per_token)}; longest request {ready.max_model_len:,} tokens",
        f"  try     {_curl(url, name, bool(settings.api_key), SUGGESTIONS[0] if settings.is_builtin else 'Hello')}",
    ]
    if settings.is_builtin:
        lines.append(f"  ask     the built-in model knows little, but this: {' / '.join(SUGGESTIONS)}")
        lines.append("  note    to serve another model, give its checkpoint folder as MODEL")
    if not settings.api_key and not is_loopback(settings.host):
        lines.append(
            f"  WARNING listening on {settings.host} without an API key: "
            "whoever reaches this port can use the model. Set LATENTD_API_KEY or --api-key-file."
        )
    return "\n".join(lines)


def _curl(url: str, name: str, with_key: bool, question: str) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 32}
    key = '-H "Authorization: Bearer $LATENTD_API_KEY" ' if with_key else ""
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' {key}"
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
