"""The operations in plain torch: exact in float32, on every device; what other implementations are compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.eager.attention import EagerAttention
from model.ops.eager.experts import mlp, moe, router
from model.ops.eager.linear import lay_out, linear
from model.ops.interface import (
    LatentWeights,
    LinearWeight,
    Mlp,
    Network,
    Routing,
    SwigluWeights,
    by_head,
    stacked,
    unpacked,
)
from model.rotary import Rotation, rotate_pairs, rotation
from model.sampler import SamplingInputs, sample


class EagerOps:
    decode_sizes = ()
    quantization = "none"
    packing = None
    prefill_attention = None

    def __init__(self, onednn: bool = False) -> None:
        """`onednn`: linear weights and experts in oneDNN's layout (see `linear.py`)."""
        self.name = "onednn" if onednn else "eager"
        self._onednn = onednn

    def pack(self, weight: Tensor, precise: bool = False) -> Tensor:
        return lay_out(weight) if self._onednn else weight

    def pack_swiglu(self, mlp: Mlp) -> SwigluWeights:
        return SwigluWeights(self.pack(torch.cat((mlp.gate, mlp.up))), self.pack(mlp.down))

    def pack_experts(self, number: int, experts: Iterable[Mlp]) -> SwigluWeights:
        if not self._onednn:
            return stacked(number, experts)
        gate_up, down = zip(*map(self.pack_swiglu, experts), strict=True)
        return SwigluWeights(gate_up, down)

    def pack_latent(self, w_uk: Tensor, w_uv: Tensor) -> LatentWeights:
        return by_head(w_uk, w_uv)

    def recorded(self, network: Network, config: DeepseekConfig) -> Network:
        return network

    def linear(
        self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        y = linear(x, unpacked(weight), bias)
        return y if residual is None else residual + y

    def logits(self, x: Tensor, weight: LinearWeight) -> Tensor:
        return linear(x, unpacked(weight)).float()

    def sample(self, logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
        return sample(logits, inputs)

    def gather(self, table: Tensor, index: Tensor) -> Tensor:
        return table[index]

    def rotation(self, positions: Tensor, frequencies: Tensor, amplitude: float) -> Rotation:
        return rotation(positions, frequencies, amplitude)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def rope_and_cache(
        self,
        q_rope: Tensor,
        kv: Tensor,
        norm_weight: Tensor,
        eps: float,
        rotation: Rotation,
        slot_mapping: Tensor,
        cache: LatentCache,
        layer: int,
    ) -> Tensor:
        rank = norm_weight.shape[0]
        latent = self.rms_norm(kv[:, :rank], norm_weight, eps)
        turned = rotate_pairs(torch.cat((q_rope, kv[:, None, rank:]), dim=1), rotation)
        block = slot_mapping // BLOCK_SIZE
        lines = (block * cache.num_layers + layer) * BLOCK_SIZE + slot_mapping % BLOCK_SIZE
        cache.write(lines, latent, turned[:, -1])
        return turned[:, :-1]

    def attention(self, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> EagerAttention:
        return EagerAttention(step, cache, config)

    def mlp(self, x: Tensor, weights: SwigluWeights, residual: Tensor) -> Tensor:
        return residual + mlp(x, weights)

    def router(self, x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
        return router(x, weight, correction_bias, config)

    def moe(
        self, x: Tensor, routing: Routing, experts: SwigluWeights, shared: SwigluWeights | None, residual: Tensor
    ) -> Tensor:
        return residual + moe(x, routing, experts, shared)
