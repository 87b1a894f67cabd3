"""Every server that is compared, by its command line.

`{home}` is a folder with the peers as docs/benchmarks.md builds them: `checkpoints/`, `gguf/`, `llama.cpp/`,
`ik_llama.cpp/`, `vllm/` and `transformers/`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from benchmarks.peers.load import HOST, MODEL_NAME

SMALL = ("c1", "c4", "c8", "c16", "c4p1k", "p2k")
TINY = ("t1", "t16", "t64")


@dataclass(frozen=True)
class Server:
    command: str
    """With {home} and {port}."""
    checkpoint: str
    precision: str
    scenarios: tuple[str, ...]
    ready: str = "/health"
    environment: dict[str, str] = field(default_factory=dict)
    plain: bool = False
    """It refuses request fields beyond OpenAI's first ones, such as `ignore_eos`, and a name for its model."""


def _latentd(checkpoint: str, precision: str, scenarios: tuple[str, ...], options: str = "") -> Server:
    command = f"{sys.executable} -m server serve {{home}}/checkpoints/{checkpoint} --host {HOST} --port {{port}}"
    command += f" --served-model-name {MODEL_NAME} --kv-cache-memory 1GiB --log-level warning {options}"
    return Server(command, checkpoint, precision, scenarios, ready="/ready")


def _llama(gguf: str, precision: str, scenarios: tuple[str, ...], options: str, build: str = "llama.cpp") -> Server:
    command = f"{{home}}/{build}/bin/llama-server -m {{home}}/gguf/{gguf}.gguf --alias {MODEL_NAME} -t 2"
    return Server(f"{command} --host {HOST} --port {{port}} {options}", gguf.split("-")[0], precision, scenarios)


def _vllm(checkpoint: str, scenarios: tuple[str, ...], max_model_len: int) -> Server:
    command = f"{{home}}/vllm/bin/vllm serve {{home}}/checkpoints/{checkpoint} --served-model-name {MODEL_NAME}"
    command += f" --host {HOST} --port {{port}} --dtype bfloat16 --max-model-len {max_model_len} --enforce-eager"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_MLA_DISABLE": "1"}  # its kernel of MLA knows latents of 512 + 64 only
    return Server(command, checkpoint, "bf16", scenarios, environment=environment)


# A server of llama.cpp divides its context among its slots: 16 of 2,560 tokens, 64 of 256, one of 9,216.
_SLOTS16, _SLOTS64, _SLOTS1 = "-np 16 -c 40960", "-np 64 -c 16384", "-np 1 -c 9216"
_IK = "-mla 3 -fa on"  # expanded for prompts, absorbed for single tokens

SERVERS = {
    "latentd-bf16": _latentd("small", "bf16", (*SMALL, "p8k")),
    "latentd-int8": _latentd("small", "8-bit", SMALL, "--quantization int8"),
    "latentd-int4": _latentd("small", "4-bit", SMALL, "--quantization int4"),
    "latentd-tiny": _latentd("tiny", "bf16", TINY),
    "latentd-narrow-bf16": _latentd("narrow", "bf16", SMALL),
    "latentd-narrow-int8": _latentd("narrow", "8-bit", SMALL, "--quantization int8"),
    "latentd-narrow-int4": _latentd("narrow", "4-bit", SMALL, "--quantization int4"),
    "llama-bf16": _llama("small-bf16", "bf16", SMALL, _SLOTS16),
    "llama-bf16-8k": _llama("small-bf16", "bf16", ("p8k",), _SLOTS1),
    "llama-q8_0": _llama("small-Q8_0", "8-bit", SMALL, _SLOTS16),
    "llama-q4_0": _llama("small-Q4_0", "4-bit", SMALL, _SLOTS16),
    "llama-q4_k_m": _llama("small-Q4_K_M", "4-bit", SMALL, _SLOTS16),
    "llama-tiny": _llama("tiny-bf16", "bf16", TINY, _SLOTS64),
    "vllm-bf16": _vllm("small", (*SMALL, "p8k"), 9216),
    "vllm-tiny": _vllm("tiny", TINY, 256),
    "transformers-bf16": Server(
        f"{{home}}/transformers/bin/transformers serve {{home}}/checkpoints/small --device cpu --dtype bfloat16"
        f" --host {HOST} --port {{port}}",
        "small",
        "bf16",
        ("c1",),
        environment={"HF_HUB_OFFLINE": "1"},
        plain=True,
    ),
    "llama-narrow-bf16": _llama("narrow-bf16", "bf16", SMALL, _SLOTS16),
    "llama-narrow-q8_0": _llama("narrow-Q8_0", "8-bit", SMALL, _SLOTS16),
    "llama-narrow-q4_0": _llama("narrow-Q4_0", "4-bit", SMALL, _SLOTS16),
    "ik-narrow-bf16": _llama("narrow-bf16", "bf16", SMALL, f"{_SLOTS16} {_IK}", "ik_llama.cpp"),
    "ik-narrow-q8_0": _llama("narrow-Q8_0", "8-bit", SMALL, f"{_SLOTS16} {_IK}", "ik_llama.cpp"),
    "ik-narrow-q4_0": _llama("narrow-Q4_0", "4-bit", SMALL, f"{_SLOTS16} {_IK}", "ik_llama.cpp"),
}
