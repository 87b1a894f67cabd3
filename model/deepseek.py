"""The DeepSeek-V2 network, written once (DeepSeek-V2, arXiv 2405.04434, 2; DeepSeek-V3, arXiv 2412.19437, 2.1).

Multi-head latent attention and mixture of experts; V3, Moonlight and Kimi-K2 differ only in the router and
the numbers. Modules hold parameters under the names of the published checkpoints and nothing else: cache,
rows and angles are arguments. T tokens of a step lie ragged in one batch; D hidden_size, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import LatentCache
from model.ops.interface import LatentWeights, LinearWeight, Ops, StepAttention, SwigluWeights
from model.rotary import Rotation, inverse_frequencies, rotation

LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says: the published code never passes it to them."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward pass share."""

    cache: LatentCache
    slot_mapping: Tensor
    rotation: Rotation
    attention: StepAttention


def _empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Uninitialised: the loader writes every parameter, and untouched memory costs nothing until then."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _drop(module: nn.Module, name: str) -> None:
    """Gives the memory of a parameter back whose values are kept in another form."""
    setattr(module, name, None)


class Weight(nn.Module):
    """What a checkpoint calls a linear layer, a norm or an embedding: `weight`, and `bias` where there is one."""

    def __init__(self, *shape: int, bias: bool = False, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = _empty(*shape, dtype=dtype, device=device)
        self.bias = _empty(shape[0], dtype=dtype, device=device) if bias else None


class Linear(Weight):
    """A linear layer; what computes with it is `packed`, made by `pack`."""

    packed: LinearWeight

    def pack(self, ops: Ops, precise: bool = False) -> None:
        self.packed = ops.pack(self.weight, precise)
        if self.packed is not self.weight:
            _drop(self, "weight")


class DeepseekAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads come from one latent of width kv_lora_rank."""

    latent_weights: LatentWeights
    """kv_b_proj by head, made by `prepare`."""

    def __init__(
        self, config: DeepseekConfig, ops: Ops, layer: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.config, self.ops, self.layer = config, ops, layer
        weight = partial(Weight, dtype=dtype, device=device)
        linear = partial(Linear, dtype=dtype, device=device)
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = linear(heads * config.qk_head_dim, hidden)
        else:
            self.q_a_proj = linear(config.q_lora_rank, hidden, bias=bias)
            self.q_a_layernorm = weight(config.q_lora_rank)
            self.q_b_proj = linear(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = linear(config.latent_dim, hidden, bias=bias)
        self.kv_a_layernorm = weight(config.kv_lora_rank)
        self.kv_b_proj = weight(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o_proj = linear(hidden, heads * config.v_head_dim, bias=bias)

    def prepare(self) -> None:
        config = self.config
        for layer in self.children():
            if isinstance(layer, Linear):
                # An error of the latents goes into the keys and values of all heads, and stays in the cache: of what
                # int4 costs the network's answers this small matrix has by far the most.
                layer.pack(self.ops, precise=layer is self.kv_a_proj_with_mqa)
        # kv_b_proj has the rows that rebuild keys and those that rebuild values interleaved by head.
        kv_b = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        w_uk, w_uv = torch.split(kv_b, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self.latent_weights = self.ops.pack_latent(w_uk, w_uv)
        _drop(self.kv_b_proj, "weight")

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


class DeepseekMLP(nn.Module):
    packed: SwigluWeights

    def __init__(
        self, hidden: int, intermediate: int, ops: Ops, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.ops = ops
        weight = partial(Weight, dtype=dtype, device=device)
        self.gate_proj = weight(intermediate, hidden)
        self.up_proj = weight(intermediate, hidden)
        self.down_proj = weight(hidden, intermediate)

    def prepare(self) -> None:
        gate_up = torch.cat((self.gate_proj.weight, self.up_proj.weight))
        self.packed = self.ops.pack_swiglu(gate_up, self.down_proj.weight)
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            _drop(layer, "weight")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.ops.mlp(x, self.packed, residual)


class Router(nn.Module):
    """Float32 whatever the run dtype is: a rounded score would send a token to other experts."""

    def __init__(self, config: DeepseekConfig, device: torch.device | str) -> None:
        super().__init__()
        self.weight = _empty(config.n_routed_experts, config.hidden_size, dtype=torch.float32, device=device)
        self.e_score_correction_bias = None
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = _empty(config.n_routed_experts, dtype=torch.float32, device=device)


class RoutedExperts(nn.Module):
    """All experts of a layer, stacked: gate_up_proj [E, 2I, D] (gate rows first), down_proj [E, D, I]."""

    packed: SwigluWeights

    def __init__(self, config: DeepseekConfig, ops: Ops, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.ops = ops
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = _empty(experts, 2 * width, hidden, dtype=dtype, device=device)
        self.down_proj = _empty(experts, hidden, width, dtype=dtype, device=device)

    def prepare(self) -> None:
        self.packed = self.ops.pack_swiglu(self.gate_up_proj, self.down_proj)
        _drop(self, "gate_up_proj")
        _drop(self, "down_proj")


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekConfig, ops: Ops, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.gate = Router(config, device)
        self.experts = RoutedExperts(config, ops, dtype, device)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = DeepseekMLP(config.hidden_size, width, ops, dtype, device)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        routing = self.ops.router(x, self.gate.weight, self.gate.e_score_correction_bias, self.config)
        shared = None if self.shared_experts is None else self.shared_experts.packed
        return self.ops.moe(x, routing, self.experts.packed, shared, residual)


class DecoderLayer(nn.Module):
    def __init__(
        self, config: DeepseekConfig, ops: Ops, layer: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.rms_norm_eps
        self.input_layernorm = Weight(config.hidden_size, dtype=dtype, device=device)
        self.self_attn = DeepseekAttention(config, ops, layer, dtype, device)
        self.post_attention_layernorm = Weight(config.hidden_size, dtype=dtype, device=device)
        self.mlp: DeepseekMoE | DeepseekMLP
        if config.is_moe_layer(layer):
            self.mlp = DeepseekMoE(config, ops, dtype, device)
        else:
            self.mlp = DeepseekMLP(config.hidden_size, config.intermediate_size, ops, dtype, device)

    def forward(self, h: Tensor, step: Step) -> Tensor:
        h = self.self_attn.forward(self.ops.rms_norm(h, self.input_layernorm.weight, self.eps), step, h)
        return self.mlp.forward(self.ops.rms_norm(h, self.post_attention_layernorm.weight, self.eps), h)


class DeepseekModel(nn.Module):
    def __init__(self, config: DeepseekConfig, ops: Ops, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, layer, dtype, device) for layer in layers)
        self.norm = Weight(config.hidden_size, dtype=dtype, device=device)


class DeepseekForCausalLM(nn.Module):
    """The whole network. Parameters are uninitialised until a loader wrote them and called `prepare`."""

    def __init__(
        self, config: DeepseekConfig, ops: Ops, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.model = DeepseekModel(config, ops, dtype, device)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.inv_freq = inverse_frequencies(config.rope, config.qk_rope_head_dim).to(device)
        self._waiting = {
            unit: {f"{unit}.{name}" for name, _ in module.named_parameters()}
            for unit, module in self.named_modules()
            if isinstance(module, DeepseekAttention | DeepseekMLP | RoutedExperts) or unit == "lm_head"
        }
        """By what is packed together, the parameters that are not loaded yet."""
        self._head: LinearWeight | None = None
        """The embedding as the head's weight, where they are tied."""

    def prepare(self) -> None:
        """Packs all parameters that are computed with in another form; they must be loaded, and are gone then."""
        for name, _ in list(self.named_parameters()):
            self.loaded(name)

    def loaded(self, name: str) -> None:
        """A parameter has its values. What has all of its own is packed at once, so that unpacked and packed weights
        never exist side by side for more than a layer's experts."""
        if self.lm_head is None and name == "model.embed_tokens.weight":
            self._head = self.ops.pack(self.model.embed_tokens.weight)
        unit = name
        while unit and unit not in self._waiting:
            unit = unit.rpartition(".")[0]
        if not unit:
            return  # used as it is
        waiting = self._waiting[unit]
        waiting.discard(name)
        if waiting:
            return
        del self._waiting[unit]
        module = self.get_submodule(unit)
        if isinstance(module, Linear):
            module.pack(self.ops)
        else:
            assert isinstance(module, DeepseekAttention | DeepseekMLP | RoutedExperts)
            module.prepare()

    def forward(self, inputs: StepInputs, cache: LatentCache) -> Tensor:
        """Writes the latents of the step's tokens to the cache; returns their final hidden states [T, D], normed."""
        yarn = self.config.rope.yarn
        step = Step(
            cache,
            inputs.slot_mapping,
            rotation(inputs.positions, self.inv_freq, 1.0 if yarn is None else yarn.amplitude),
            self.ops.attention(inputs, cache, self.config),
        )
        h = self.model.embed_tokens.weight[inputs.token_ids]
        for layer in self.model.layers:
            h = layer(h, step)
        return self.ops.rms_norm(h, self.model.norm.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, D] -> [S, vocab_size] float32."""
        head = self._head if self.lm_head is None else self.lm_head.packed
        assert head is not None
        return self.ops.logits(hidden, head)
