"""What no server can pass on a machine: memory read and arithmetic done at the speeds of benchmarks.cpu_kernels.

A decode step reads every weight that it uses once (distinct experts as for independent uniform routing) and the latent
cache in bfloat16; a prompt is bound by arithmetic, its attention in the expanded form. Embedding rows are free.
"""

from __future__ import annotations

from benchmarks.cpu_kernels import Limits
from benchmarks.peers.scenarios import Figure, Scenario
from model.config import DeepseekConfig

BYTES_PER_WEIGHT = {"bf16": 2.0, "8-bit": 1.0, "4-bit": 0.516}


def limit(machine: Limits, config: DeepseekConfig, precision: str, scenario: Scenario, figure: Figure) -> float:
    """The best that a figure can be: tokens a second, or seconds."""
    prompt = scenario.clients * _prompt_seconds(machine, config, precision, scenario.prompt)
    step = _step_seconds(machine, config, precision, scenario.clients, scenario.prompt + scenario.output // 2)
    if figure == "output_tok_s":
        return scenario.clients * scenario.output / (prompt + scenario.output * step)
    return prompt if figure == "ttft_s" else step


def _prompt_seconds(machine: Limits, config: DeepseekConfig, precision: str, tokens: int) -> float:
    head = config.vocab_size * config.hidden_size
    used = _weights(config, config.num_experts_per_tok) - head
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = tokens**2 * config.num_hidden_layers * config.num_attention_heads * width
    return 2 * (tokens * used + head) / _rate(machine, precision) + attention / machine.bf16


def _step_seconds(machine: Limits, config: DeepseekConfig, precision: str, rows: int, context: int) -> float:
    experts = config.n_routed_experts
    distinct = experts * (1 - (1 - config.num_experts_per_tok / experts) ** rows) if experts else 0.0
    cached = rows * context * config.num_hidden_layers
    read = _weights(config, distinct) * BYTES_PER_WEIGHT[precision]
    read += cached * 2 * (config.kv_lora_rank + config.qk_rope_head_dim)
    operations = 2 * rows * _weights(config, config.num_experts_per_tok)
    operations += cached * 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return max(read / machine.read, operations / _rate(machine, precision))


def _weights(config: DeepseekConfig, experts: float) -> float:
    """Numbers in all that a token is multiplied with, if so many experts of each layer are used."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    rank = config.q_lora_rank
    attention = hidden * query if rank is None else rank * (hidden + query)
    attention += hidden * (latent + config.qk_rope_head_dim)
    attention += heads * (latent * (config.qk_nope_head_dim + config.v_head_dim) + config.v_head_dim * hidden)
    moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    dense = (config.num_hidden_layers - moe) * 3 * hidden * config.intermediate_size
    shared_and_routed = moe * 3 * hidden * config.moe_intermediate_size * (config.n_shared_experts + experts)
    router = moe * config.n_routed_experts * hidden
    return config.num_hidden_layers * attention + dense + shared_and_routed + router + config.vocab_size * hidden


def _rate(machine: Limits, precision: str) -> float:
    return machine.bf16 if precision == "bf16" else machine.int8
