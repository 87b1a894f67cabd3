"""The DeepSeek-V2 network, written once (DeepSeek-V2, arXiv 2405.04434, 2; DeepSeek-V3, arXiv 2412.19437, 2.1).

Multi-head latent attention and mixture of experts; V3, Moonlight and Kimi-K2 differ only in the router and
the numbers. Modules hold weights under the names of the published checkpoints and nothing else: cache,
rows and angles are arguments. T tokens of a step lie ragged in one batch; D hidden_size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import LatentCache
from model.ops.interface import LatentWeights, LinearWeight, Mlp, Ops, StepAttention, SwigluWeights
from model.rotary import Rotation, inverse_frequencies

LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says: the published code never passes it to them."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward pass share."""

    cache: LatentCache
    slot_mapping: Tensor
    rotation: Rotation
    attention: StepAttention


class Weights(Protocol):
    """Where a network gets its weights from; `model.weights` has the one that reads checkpoints."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the checkpoint by the hub's name, the caller's own, in `dtype` or else the run dtype."""
        ...

    def packed(self, name: str, pack: Callable[[], Sequence[LinearWeight]]) -> Sequence[LinearWeight]:
        """What `pack` makes of the tensors it reads, or has made of the same tensors at an earlier start."""
        ...


class Weight:
    """What a checkpoint calls a norm or an embedding: a `weight` that is used as it is."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.weight = weights.read(f"{name}.weight")


class Linear:
    """A linear layer: `weight`, and `bias` where there is one."""

    def __init__(self, name: str, weights: Weights, ops: Ops, bias: bool = False, precise: bool = False) -> None:
        [self.packed] = weights.packed(name, lambda: [ops.pack(weights.read(f"{name}.weight"), precise)])
        self.bias = weights.read(f"{name}.bias") if bias else None


class DeepseekAttention:
    """Multi-head latent attention: keys and values of all heads come from one latent of width kv_lora_rank."""

    def __init__(self, name: str, weights: Weights, config: DeepseekConfig, ops: Ops, layer: int) -> None:
        self.config, self.ops, self.layer = config, ops, layer
        bias = config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(f"{name}.q_proj", weights, ops)
        else:
            self.q_a_proj = Linear(f"{name}.q_a_proj", weights, ops, bias)
            self.q_a_layernorm = Weight(f"{name}.q_a_layernorm", weights)
            self.q_b_proj = Linear(f"{name}.q_b_proj", weights, ops)
        # An error of the latents goes into the keys and values of all heads, and stays in the cache: of what int4 costs
        # the network's answers this small matrix has by far the most.
        self.kv_a_proj_with_mqa = Linear(f"{name}.kv_a_proj_with_mqa", weights, ops, bias, precise=True)
        self.kv_a_layernorm = Weight(f"{name}.kv_a_layernorm", weights)
        kv_b = f"{name}.kv_b_proj"
        self.latent_weights = LatentWeights(
            *weights.packed(kv_b, lambda: self._pack_latent(weights.read(f"{kv_b}.weight")))
        )
        self.o_proj = Linear(f"{name}.o_proj", weights, ops, bias)

    def _pack_latent(self, kv_b: Tensor) -> LatentWeights:
        """kv_b_proj has the rows that rebuild keys and those that rebuild values interleaved by head."""
        config = self.config
        kv_b = kv_b.view(config.num_attention_heads, -1, config.kv_lora_rank)
        return self.ops.pack_latent(*torch.split(kv_b, [config.qk_nope_head_dim, config.v_head_dim], dim=1))

    def forward(self, x: Tensor, step: Step, residual: Tensor) -> Tensor:
        """[T, D] -> [T, D], on top of the residual."""
        config, linear = self.config, self.ops.linear
        if config.q_lora_rank is None:
            q = linear(x, self.q_proj.packed)
        else:
            q_a = linear(x, self.q_a_proj.packed, self.q_a_proj.bias)
            q_a = self.ops.rms_norm(q_a, self.q_a_layernorm.weight, LATENT_NORM_EPS)
            q = linear(q_a, self.q_b_proj.packed)
        q = q.view(len(x), config.num_attention_heads, -1)
        q_nope, q_rope = torch.split(q, [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=2)
        kv = linear(x, self.kv_a_proj_with_mqa.packed, self.kv_a_proj_with_mqa.bias)
        q_rope = self.ops.rope_and_cache(
            q_rope,
            kv,
            self.kv_a_layernorm.weight,
            LATENT_NORM_EPS,
            step.rotation,
            step.slot_mapping,
            step.cache,
            self.layer,
        )
        attended = step.attention(self.layer, q_nope, q_rope, self.latent_weights)
        return linear(attended.flatten(1), self.o_proj.packed, self.o_proj.bias, residual)


class DeepseekMLP:
    def __init__(self, name: str, weights: Weights, ops: Ops) -> None:
        self.ops = ops
        self.packed = SwigluWeights(*weights.packed(name, lambda: ops.pack_swiglu(_read_mlp(name, weights))))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.ops.mlp(x, self.packed, residual)


class Router:
    """Float32 whatever the run dtype is: a rounded score would send a token to other experts."""

    def __init__(self, name: str, weights: Weights, config: DeepseekConfig) -> None:
        self.weight = weights.read(f"{name}.weight", torch.float32)
        self.e_score_correction_bias = None
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = weights.read(f"{name}.e_score_correction_bias", torch.float32)


class RoutedExperts:
    """All experts of a layer, packed one after the other: only one of them exists in both forms at a time."""

    def __init__(self, name: str, weights: Weights, config: DeepseekConfig, ops: Ops) -> None:
        experts = (_read_mlp(f"{name}.{i}", weights) for i in range(config.n_routed_experts))
        self.packed = SwigluWeights(*weights.packed(name, lambda: ops.pack_experts(config.n_routed_experts, experts)))


def _read_mlp(name: str, weights: Weights) -> Mlp:
    return Mlp(*(weights.read(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down")))


class DeepseekMoE:
    def __init__(self, name: str, weights: Weights, config: DeepseekConfig, ops: Ops) -> None:
        self.config, self.ops = config, ops
        self.gate = Router(f"{name}.gate", weights, config)
        self.experts = RoutedExperts(f"{name}.experts", weights, config, ops)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(f"{name}.shared_experts", weights, ops)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        routing = self.ops.router(x, self.gate.weight, self.gate.e_score_correction_bias, self.config)
        shared = None if self.shared_experts is None else self.shared_experts.packed
        return self.ops.moe(x, routing, self.experts.packed, shared, residual)


class DecoderLayer:
    def __init__(self, name: str, weights: Weights, config: DeepseekConfig, ops: Ops, layer: int) -> None:
        self.ops, self.eps = ops, config.rms_norm_eps
        self.input_layernorm = Weight(f"{name}.input_layernorm", weights)
        self.self_attn = DeepseekAttention(f"{name}.self_attn", weights, config, ops, layer)
        self.post_attention_layernorm = Weight(f"{name}.post_attention_layernorm", weights)
        self.mlp: DeepseekMoE | DeepseekMLP
        if config.is_moe_layer(layer):
            self.mlp = DeepseekMoE(f"{name}.mlp", weights, config, ops)
        else:
            self.mlp = DeepseekMLP(f"{name}.mlp", weights, ops)

    def forward(self, h: Tensor, step: Step) -> Tensor:
        h = self.self_attn.forward(self.ops.rms_norm(h, self.input_layernorm.weight, self.eps), step, h)
        return self.mlp.forward(self.ops.rms_norm(h, self.post_attention_layernorm.weight, self.eps), h)


class DeepseekModel:
    def __init__(self, weights: Weights, config: DeepseekConfig, ops: Ops) -> None:
        self.embed_tokens = Weight("model.embed_tokens", weights)
        layers = range(config.num_hidden_layers)
        self.layers = [DecoderLayer(f"model.layers.{layer}", weights, config, ops, layer) for layer in layers]
        self.norm = Weight("model.norm", weights)


class DeepseekForCausalLM:
    """The whole network, made of its weights: every tensor is read once, in the order of the published files, and what
    is computed with in another form is packed at once."""

    def __init__(self, config: DeepseekConfig, ops: Ops, weights: Weights) -> None:
        self.config, self.ops = config, ops
        self.model = DeepseekModel(weights, config, ops)
        embedding = self.model.embed_tokens.weight
        [self.head] = weights.packed(
            "lm_head",
            lambda: [ops.pack(embedding if config.tie_word_embeddings else weights.read("lm_head.weight"))],
        )
        self.inv_freq = inverse_frequencies(config.rope, config.qk_rope_head_dim).to(embedding.device)

    def __call__(self, inputs: StepInputs, cache: LatentCache) -> Tensor:
        """Writes the latents of the step's tokens to the cache; returns their final hidden states [T, D], normed."""
        yarn = self.config.rope.yarn
        step = Step(
            cache,
            inputs.slot_mapping,
            self.ops.rotation(inputs.positions, self.inv_freq, 1.0 if yarn is None else yarn.amplitude),
            self.ops.attention(inputs, cache, self.config),
        )
        h = self.ops.gather(self.model.embed_tokens.weight, inputs.token_ids)
        for layer in self.model.layers:
            h = layer.forward(h, step)
        return self.ops.rms_norm(h, self.model.norm.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, D] -> [S, vocab_size] float32."""
        return self.ops.logits(hidden, self.head)

    def compute(self, inputs: StepInputs, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """What calling the network returns, and the logits of the tokens that choose a next one."""
        hidden = self(inputs, cache)
        return hidden, self.logits(self.ops.gather(hidden, inputs.sample_index))
