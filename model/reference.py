"""The same network in the plainest form, for tests: one sequence, no cache, no batching, nothing absorbed.

Written from the papers (DeepSeek-V2, arXiv 2405.04434, 2; DeepSeek-V3, arXiv 2412.19437, 2.1; YaRN,
arXiv 2309.00071) and sharing only the config with `model/deepseek.py`, so that no mistake is made twice.
Takes weights as the hub names them: one tensor a projection and expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import DeepseekConfig
from model.rope_config import RopeConfig


def reference_logits(
    config: DeepseekConfig, weights: Mapping[str, Tensor], token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """[T, vocab_size] of `dtype`, float32 or float64: the logits after every token of one sequence.

    Angles are those of float32 in either dtype, as in the published code: they are part of the function that
    checkpoints were trained with, and after 2,000 positions they matter more than all other rounding.
    """
    network = _Network(config, weights, dtype)
    h = network.weight("model.embed_tokens.weight")[list(token_ids)]
    turns = _turns(config.rope, config.qk_rope_head_dim, len(token_ids))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        h = h + network.attention(prefix + "self_attn.", network.block_norm(prefix + "input_layernorm", h), turns)
        x = network.block_norm(prefix + "post_attention_layernorm", h)
        feed_forward = network.mixture if config.is_moe_layer(layer) else network.swiglu
        h = h + feed_forward(prefix + "mlp.", x)
    h = network.block_norm("model.norm", h)
    return h @ network.weight("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight").T


@dataclass(frozen=True)
class _Network:
    config: DeepseekConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype

    def weight(self, name: str) -> Tensor:
        return self.weights[name].to(self.dtype)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weight(name + ".weight").T
        return y + self.weight(name + ".bias") if name + ".bias" in self.weights else y

    def block_norm(self, name: str, x: Tensor) -> Tensor:
        return _rms(x, self.weight(name + ".weight"), self.config.rms_norm_eps)

    def latent_norm(self, name: str, x: Tensor) -> Tensor:
        return _rms(x, self.weight(name + ".weight"), 1e-6)

    def attention(self, prefix: str, x: Tensor, turns: Tensor) -> Tensor:
        """Multi-head latent attention (V2 paper, 2.1), with the keys and values of every head written out."""
        config, num_tokens = self.config, len(x)
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        if config.q_lora_rank is None:
            queries = self.linear(prefix + "q_proj", x)
        else:
            low_rank = self.latent_norm(prefix + "q_a_layernorm", self.linear(prefix + "q_a_proj", x))
            queries = self.linear(prefix + "q_b_proj", low_rank)
        queries = queries.view(num_tokens, heads, -1)
        compressed = self.linear(prefix + "kv_a_proj_with_mqa", x)
        latent = self.latent_norm(prefix + "kv_a_layernorm", compressed[:, : config.kv_lora_rank])
        shared_key = _turn(compressed[:, config.kv_lora_rank :], turns)
        keys_values = self.linear(prefix + "kv_b_proj", latent).view(num_tokens, heads, -1)
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        scale = _softmax_scale(config)
        outputs = []
        for head in range(heads):
            query = torch.cat((queries[:, head, :nope], _turn(queries[:, head, nope:], turns)), dim=1)
            key = torch.cat((keys_values[:, head, :nope], shared_key), dim=1)
            attention = (scale * query @ key.T).masked_fill(future, -math.inf).softmax(-1)
            outputs.append(attention @ keys_values[:, head, nope:])
        return self.linear(prefix + "o_proj", torch.cat(outputs, dim=1))

    def swiglu(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self.linear(prefix + "gate_proj", x), self.linear(prefix + "up_proj", x)
        return self.linear(prefix + "down_proj", gate * gate.sigmoid() * up)

    def mixture(self, prefix: str, x: Tensor) -> Tensor:
        """V2 paper, 2.2, and V3 paper, 2.1.2: every expert looks at every token; what was not chosen counts 0."""
        shares = self.shares(prefix, x)
        result = torch.zeros_like(x)
        for expert in range(self.config.n_routed_experts):
            chosen = shares[:, expert] > 0
            result[chosen] += shares[chosen, expert, None] * self.swiglu(f"{prefix}experts.{expert}.", x[chosen])
        return result + self.swiglu(prefix + "shared_experts.", x) if self.config.n_shared_experts else result

    def shares(self, prefix: str, x: Tensor) -> Tensor:
        """[T, E]: what each expert's output is multiplied by."""
        config = self.config
        logits = self.linear(prefix + "gate", x)
        affinity = logits.softmax(-1) if config.scoring_func == "softmax" else 1 / (1 + (-logits).exp())
        ranked = affinity
        if config.topk_method == "noaux_tc":
            ranked = affinity + self.weight(prefix + "gate.e_score_correction_bias")
        if config.topk_method != "greedy":
            groups = ranked.view(len(x), config.n_group, -1).sort(-1, descending=True).values
            best = groups[..., :2].sum(-1) if config.topk_method == "noaux_tc" else groups[..., 0]
            worst_kept = best.sort(-1, descending=True).values[:, config.topk_group - 1, None]
            size = config.n_routed_experts // config.n_group
            ranked = ranked.masked_fill((best < worst_kept).repeat_interleave(size, dim=1), -math.inf)
        least_chosen = ranked.sort(-1, descending=True).values[:, config.num_experts_per_tok - 1, None]
        shares = affinity * (ranked >= least_chosen)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return shares * config.routed_scaling_factor


def _rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _softmax_scale(config: DeepseekConfig) -> float:
    """1 / sqrt(d_h + d_h^R); YaRN sharpens the softmax by its temperature, on queries and keys alike."""
    yarn = config.rope.yarn
    temperature = 1.0
    if yarn is not None and yarn.factor > 1:
        temperature = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return temperature * temperature / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)


def _turns(rope: RopeConfig, dim: int, num_tokens: int) -> Tensor:
    """[T, dim / 2] complex: e^(i angle) of every position and pair of dimensions."""
    angles = torch.arange(num_tokens)[:, None] * _frequencies(rope, dim)
    amplitude = 1.0
    if rope.yarn is not None and rope.yarn.factor > 1:
        stretch = 0.1 * math.log(rope.yarn.factor)
        amplitude = (stretch * rope.yarn.mscale + 1) / (stretch * rope.yarn.mscale_all_dim + 1)
    return torch.polar(torch.full_like(angles, amplitude).double(), angles.double())


def _frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """[dim / 2] radians a position. YaRN, 3.2: kept where a pair turns more than beta_fast times within the original
    context, divided by the factor where it turns less than beta_slow times, a mixture between (linear in the
    pair's number, the ends rounded outwards)."""
    period = torch.tensor(rope.theta) ** (torch.arange(0, dim, 2) / dim)
    yarn = rope.yarn
    if yarn is None:
        return 1 / period
    ends = [
        dim / 2 * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(rope.theta)
        for turns in (yarn.beta_fast, yarn.beta_slow)
    ]
    first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
    stretched = ((torch.arange(dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    return 1 / period * (1 - stretched) + 1 / (yarn.factor * period) * stretched


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """x [T, dim]: neighbours (x[2i], x[2i + 1]) are one complex number, multiplied by its turn."""
    numbers = torch.complex(x[:, 0::2].double(), x[:, 1::2].double()) * turns
    return torch.stack((numbers.real, numbers.imag), dim=2).flatten(1).to(x.dtype)
